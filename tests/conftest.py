"""One mesh for the whole test session: starting engines takes most of a minute."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.otlp import Receiver, receiving
from tokenmesh.cli.mesh import Mesh
from tokenmesh.config import MeshConfig
from tokenmesh.mesh_file import load_config
from tokenmesh.v1 import admin_pb2, admin_pb2_grpc

KV_BYTES = 512 << 20


_GIVEN: set[int] = set()


def free_port() -> int:
    """A port that was free a moment ago, and that nobody here has been given before."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _GIVEN:
            _GIVEN.add(port)
            return port


def mesh_config(dtype: str = "float32", **sections: object) -> MeshConfig:
    """A mesh for two cores: the root on the first, prefill and one worker on the second, eager, small caches."""
    engine = {"kv_cache_memory_bytes": KV_BYTES, "enforce_eager": True, "max_num_batched_tokens": 256}
    return MeshConfig(
        dtype=dtype,
        max_model_len=4096,
        gateway={"port": free_port(), "grpc_port": free_port()},
        prefill_service={"port": free_port(), "cpus": "1", "cpu_omp_threads_bind": "1", **engine},
        decode_service={
            "port": free_port(),
            "cpus": "0",
            "cpu_omp_threads_bind": "0",
            # Three engines and a test client on two cores: a rank may have to wait long for its turn.
            "group": {"timeout_s": 30},
            **engine,
        },
        decode_worker={
            "port": free_port(),
            "cpus": "1",
            "cpu_omp_threads_bind": "1",
            "poll_s": 0,
            "kv_cache_memory_bytes": KV_BYTES,
        },
        **sections,
    )


@dataclass(frozen=True)
class RunningMesh:
    """Addresses of a mesh that serves."""

    config: MeshConfig

    @property
    def rest_url(self) -> str:
        """Base URL of the OpenAI API, without /v1."""
        return f"http://{self.config.gateway.host}:{self.config.gateway.port}"

    @property
    def grpc_address(self) -> str:
        """InferenceService, health and AdminService of the gateway."""
        return f"{self.config.gateway.host}:{self.config.gateway.grpc_port}"

    @property
    def root_address(self) -> str:
        """The decode root."""
        return self.config.decode_addresses()[0]

    @property
    def prefill_address(self) -> str:
        """The prefill service."""
        return self.config.prefill_addresses()[0]

    def status(self, address: str) -> admin_pb2.GetStatusResponse:
        """AdminService.GetStatus of a service."""
        with grpc.insecure_channel(address) as channel:
            return admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=5)

    def reset_caches(self) -> None:
        """Empties both engines' prefix caches."""
        for address in (self.root_address, self.prefill_address):
            with grpc.insecure_channel(address) as channel:
                admin_pb2_grpc.AdminServiceStub(channel).ResetPrefixCache(
                    admin_pb2.ResetPrefixCacheRequest(), timeout=5
                )

    def held(self) -> dict[str, int]:
        """What is in use now: requests, blocks and transfers per engine; all zero when idle."""
        counts = {}
        for name, address in (("root", self.root_address), ("prefill", self.prefill_address)):
            status = self.status(address)
            counts[f"{name} requests"] = status.running + status.waiting
            counts[f"{name} blocks"] = status.blocks_total - status.blocks_free
            counts[f"{name} transfers"] = status.kv_open
        return counts

    async def until(self, condition: Callable[[dict[str, int]], bool]) -> dict[str, int]:
        """Polls what is held until it is as wanted, and returns it. Raises AssertionError."""
        for _ in range(500):
            held = await asyncio.to_thread(self.held)
            if condition(held):
                return held
            await asyncio.sleep(0.01)
        raise AssertionError(held)

    def wait_idle(self, timeout: float = 10.0) -> dict[str, int]:
        """Polls until nothing is held, and returns what is held at the end."""

        async def poll() -> dict[str, int]:
            deadline = asyncio.get_running_loop().time() + timeout
            while any((held := await asyncio.to_thread(self.held)).values()):
                if asyncio.get_running_loop().time() > deadline:
                    break
                await asyncio.sleep(0.05)
            return held

        return asyncio.run(poll())


@contextmanager
def run_mesh(config: MeshConfig, logs: Path) -> Iterator[RunningMesh]:
    """A mesh for the length of the block, supervised by an event loop in a thread of its own."""
    started, stop = threading.Event(), threading.Event()
    failure: list[BaseException] = []

    async def run() -> None:
        try:
            async with Mesh(config, logs):
                started.set()
                await asyncio.to_thread(stop.wait)
        except BaseException as error:
            failure.append(error)
            raise
        finally:
            started.set()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="mesh", daemon=True)
    thread.start()
    started.wait()
    if failure:
        pytest.fail(f"the mesh did not start: {failure[0]}; logs in {logs}")
    try:
        yield RunningMesh(config)
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def spans() -> Iterator[Receiver]:
    """What the services of the session's mesh record. Their spans arrive within a second."""
    with receiving() as receiver, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://{receiver.address}")
        yield receiver


@pytest.fixture(scope="session")
def mesh_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the services of the session's mesh log."""
    return tmp_path_factory.mktemp("mesh-logs")


@pytest.fixture(scope="session")
def mesh(mesh_logs: Path, spans: Receiver) -> Iterator[RunningMesh]:
    """The session's mesh, in float32. With TOKENMESH_TEST_MESH=FILE an already running one is used instead."""
    if running := os.environ.get("TOKENMESH_TEST_MESH"):
        yield RunningMesh(load_config(Path(running)))
        return
    with run_mesh(mesh_config(), mesh_logs) as running_mesh:
        yield running_mesh
