"""Groups of one, whose prefill and decode engines differ in tensor parallelism: heads are cut at the sender."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import free_port, run_mesh
from tests.mesh.exact import Truth, prompts, through_mesh
from tokenmesh.config import MeshConfig
from tokenmesh.v1 import sampling_pb2


def mesh_of(prefill: int, decode: int, codec: str) -> MeshConfig:
    """A prefill service and a decode root alone, on two cores."""

    def engine(shards: int, core: int) -> dict[str, object]:
        return {
            "port": free_port(),
            "tensor_parallel_size": shards,
            "cpu_omp_threads_bind": "|".join([str(core)] * shards),
            "kv_cache_memory_bytes": 128 << 20,
            "enforce_eager": True,
            "max_num_batched_tokens": 256,
        }

    return MeshConfig(
        dtype="float32",
        max_model_len=2048,
        gateway={"port": free_port(), "grpc_port": free_port()},
        prefill_service=engine(prefill, 1),
        decode_service={**engine(decode, 0), "token_parallel_size": 1, "kv_transfer": {"codec": codec}},
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("prefill", "decode", "codec"), [(3, 1, "lossless"), (1, 3, "auto")])
def test_tokens_are_those_of_a_plain_engine(
    prefill: int, decode: int, codec: str, tmp_path: Path, truth: Truth
) -> None:
    # SmolLM2 has 3 KV heads. `auto` takes no codec or a lossless one, as this machine's links are.
    every = prompts()[:48]
    if decode == 1:
        some = [ids for ids in every if 128 <= len(ids) < 512][:8]
        here = [ids for ids in prompts() if len(ids) <= 600][6::4]
    else:
        # Three shards that share a core are slow.
        some = [ids for ids in every if len(ids) > 256][:4]
        here = some[:1]
    with run_mesh(mesh_of(prefill, decode, codec), tmp_path) as mesh:
        # (1) Every prompt is prefilled remotely, and all of its KV has come.
        remote = asyncio.run(through_mesh(mesh, some, concurrent=3))
        assert [tokens for tokens, _ in remote] == truth.of(some)
        assert {decision for _, decision in remote} == {sampling_pb2.PREFILL_DECISION_DISAGGREGATED}
        status = mesh.status(mesh.root_address)
        assert status.kv_transfers == len(some)
        # 30 layers of 3 heads of 64, keys and values in float32; compressed to between half and all of it.
        whole = sum(-(-len(ids) // 128) * 128 for ids in some) * 30 * 3 * 64 * 2 * 4
        assert whole // 2 < status.kv_bytes <= whole
        assert (status.kv_bytes < whole) or codec == "auto"
        # (2) A root alone is stock vLLM behind the mesh.
        mesh.reset_caches()
        local = asyncio.run(through_mesh(mesh, here, concurrent=8, local=True))
        assert [tokens for tokens, _ in local] == truth.of(here)
        # (3) Nothing is left.
        assert not any(mesh.wait_idle().values()), mesh.held()
        if decode == 1:
            # (4) A mover dies, its service ends, and the root goes on alone.
            lose_a_mover(tmp_path / "mesh.yaml")
            unseen = [ids for ids in prompts() if len(ids) == 640]
            ((tokens, decision),) = asyncio.run(through_mesh(mesh, unseen, concurrent=1))
            assert [tokens] == truth.of(unseen)
            assert decision in (
                sampling_pb2.PREFILL_DECISION_NO_PREFILL,
                sampling_pb2.PREFILL_DECISION_PREFILL_FAILED,
            )


def lose_a_mover(file: Path) -> None:
    """Kills one of a prefill service's movers; the service must end, for whoever runs it to start it anew."""
    (service,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"prefill", str(file)} <= set(process.info["cmdline"] or [])
    ]
    (mover, *_) = [p for p in service.children(recursive=True) if "tokenmesh.kv.mover" in p.cmdline()]
    mover.kill()
    # Not reaped: that is for the mesh, which started it.
    deadline = time.monotonic() + 60
    while service.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.2)
