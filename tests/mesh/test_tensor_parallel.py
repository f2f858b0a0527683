"""Prefill and decode engines of different tensor parallelism: heads are cut at the sender, and tokens are the same."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.conftest import free_port, run_mesh
from tests.mesh.test_exactness import prompts, through_mesh
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


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("prefill", "decode", "codec"), [(3, 1, "lossless"), (1, 3, "auto")])
def test_tokens_are_those_of_the_root_alone(prefill: int, decode: int, codec: str, tmp_path: Path) -> None:
    # SmolLM2 has 3 KV heads. `auto` takes no codec or a lossless one, as this machine's links are.
    some = [ids for ids in prompts()[:48] if len(ids) > 256][:4]
    with run_mesh(mesh_of(prefill, decode, codec), tmp_path) as mesh:
        # (1) Every prompt is prefilled remotely, and all of its KV has come.
        remote = asyncio.run(through_mesh(mesh, some, concurrent=3))
        assert {decision for _, decision in remote} == {sampling_pb2.PREFILL_DECISION_DISAGGREGATED}
        status = mesh.status(mesh.root_address)
        assert status.kv_transfers == len(some)
        # 30 layers of 3 heads of 64, keys and values in float32; compressed to between half and all of it.
        whole = sum(-(-len(ids) // 128) * 128 for ids in some) * 30 * 3 * 64 * 2 * 4
        assert whole // 2 < status.kv_bytes <= whole
        assert (status.kv_bytes < whole) or codec == "auto"
        # (2) The root computes the same prompts itself: the same tokens.
        mesh.reset_caches()
        alone = asyncio.run(through_mesh(mesh, some, concurrent=3, local=True))
        assert [tokens for tokens, _ in remote] == [tokens for tokens, _ in alone]
        # (3) Nothing is left.
        assert not any(mesh.wait_idle().values()), mesh.held()
