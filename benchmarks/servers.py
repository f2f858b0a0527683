"""The servers that are compared: a mesh for two cores, and a plain vLLM server with the same engine settings."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import aiohttp
import yaml

from tokenmesh.cli.child import Child
from tokenmesh.cli.mesh import MeshStartError
from tokenmesh.cli.serve import ServiceRole
from tokenmesh.cli.status import Endpoint
from tokenmesh.config import MeshConfig
from tokenmesh.engine.host import computes_bfloat16

START_TIMEOUT_S = 600.0
"""For one engine or mesh; compiling for the first time on a machine takes minutes."""
KV_BYTES = 512 << 20
"""KV cache of each engine."""


def mesh_config(eager: bool) -> MeshConfig:
    """A mesh for two cores: decode on the first, prefill on the second, on free ports."""
    rest, rpc, prefill, decode = free_ports(4)
    engine = {"kv_cache_memory_bytes": KV_BYTES, "enforce_eager": eager}
    sections: dict[str, Any] = {
        "gateway": {"port": rest, "grpc_port": rpc},
        "prefill_service": {"port": prefill, "cpu_omp_threads_bind": "1", **engine},
        # One rank: what a mesh adds to an engine is measured here, not what ranks add.
        "decode_service": {
            "port": decode,
            "cpu_omp_threads_bind": "0",
            "token_parallel_size": 1,
            **engine,
        },
    }
    return MeshConfig(dtype=dtype(), max_model_len=4096, **sections)


def dtype() -> Literal["bfloat16", "float32"]:
    """Of engines on CPUs. Without instructions for bfloat16 their prompts would take six times as long."""
    return "bfloat16" if computes_bfloat16() else "float32"


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    with ExitStack() as held:
        listeners = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


@asynccontextmanager
async def plain_server(config: MeshConfig, cores: str, logs: Path) -> AsyncIterator[str]:
    """A plain vLLM server with the settings of the mesh's decode root; gives its URL. Raises MeshStartError."""
    [port] = free_ports(1)
    file, log = logs / "plain.yaml", logs / f"plain-{cores}.log"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    command = [sys.executable, "-m", "benchmarks.plain_server", "--config", str(file)]
    command += ["--port", str(port), "--cores", cores]
    # A Child ends with all that it has started. The role says nothing here.
    child = Child(Endpoint(ServiceRole.DECODE_ROOT, 0, f"127.0.0.1:{port}"), command, log)
    try:
        await _wait_healthy(child, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        await _stop(child)


async def _wait_healthy(child: Child, url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while True:
            if child.poll() is not None:
                raise MeshStartError(f"the plain server exited (log: {child.log_path})", child.last_lines())
            with suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            if time.monotonic() > deadline:
                raise MeshStartError(f"the plain server is not ready after {START_TIMEOUT_S:g} s ({child.log_path})")
            await asyncio.sleep(0.5)


async def _stop(child: Child) -> None:
    """Ends it even if cancelled meanwhile, which only makes it hurry."""
    hurry = asyncio.Event()
    stopping = asyncio.create_task(child.stop(hurry))
    while not stopping.done():
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            hurry.set()
    for left in stopping.result():
        print(f"still running: {left}", file=sys.stderr)
    if hurry.is_set():
        raise asyncio.CancelledError
