"""Greedy tokens of a whole mesh on GPUs, its KV moved by UCX: mesh_tokens.py MODEL CASE FILE."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.conftest import RunningMesh, free_port, run_mesh
from tests.gpu.engine_tokens import NEW_TOKENS, STEP_TOKENS, prompts
from tests.mesh.exact import through_mesh
from tokenmesh.config import MeshConfig
from tokenmesh.v1 import sampling_pb2

BLOCK = 16
MIN_REMOTE = 32

CASES: dict[str, dict[str, Any]] = {
    "root": {"token_parallel_size": 1},
    "local": {"token_parallel_size": 2, "group": {"exchange": "local"}},
    "nccl": {"token_parallel_size": 2, "group": {"exchange": "nccl"}},
    "fp8": {"token_parallel_size": 1, "kv_transfer": {"codec": "fp8"}},
}
"""What stands in decode_service."""


def config(model: str, case: str) -> MeshConfig:
    """Prefill and root share the first GPU; a worker has the next, if there is one."""
    engine = {
        "gpus": "0",
        "kv_cache_memory_bytes": 1 << 30,
        "gpu_memory_utilization": 0.1,
        "block_size": BLOCK,
        "max_num_batched_tokens": STEP_TOKENS,
        "engine_args": {"attention_config": {"backend": "FLASH_ATTN"}},
    }
    return MeshConfig(
        model=model,
        dtype="bfloat16",
        max_model_len=4096,
        gateway={"port": free_port(), "grpc_port": free_port()},
        prefill_service={"port": free_port(), **engine},
        decode_service={"port": free_port(), "remote_prefill_min_tokens": MIN_REMOTE, **engine, **CASES[case]},
        decode_worker={
            "port": free_port(),
            "gpus": "1" if torch.cuda.device_count() > 1 else "0",
            "kv_cache_memory_bytes": 1 << 30,
        },
    )


def mesh_tokens(model: str, case: str, logs: Path) -> dict[str, Any]:
    """Tokens of all prompts, twice: cold, and with their prefixes cached; and how their KV came."""
    asked = prompts(model)
    with run_mesh(config(model, case), logs) as mesh:
        waves, most = asyncio.run(_two_waves(mesh, asked))
        status = mesh.status(mesh.root_address)
        workers = mesh.config.worker_addresses(0) if case == "nccl" else []
        held = mesh.wait_idle()
        to_workers = sum(mesh.status(address).kv_bytes for address in workers)
    names = sampling_pb2.PrefillDecision.Name
    return {
        "tokens": [tokens for wave in waves for tokens, _ in wave],
        "decisions": [[names(decision) for _, decision in wave] for wave in waves],
        "most": most,
        "kv_transfers": status.kv_transfers,
        "kv_bytes": status.kv_bytes,
        "kv_bytes_to_workers": to_workers,
        "kv_transport": status.kv_transport,
        "held": held,
    }


async def _two_waves(
    mesh: RunningMesh, asked: Sequence[Sequence[int]]
) -> tuple[list[list[tuple[list[int], int]]], int]:
    """Tokens and decisions of both, and the most sequences that lived on a rank other than the root."""
    most = 0

    async def look() -> None:
        nonlocal most
        while True:
            status = await asyncio.to_thread(mesh.status, mesh.root_address)
            most = max([most, *(rank.sequences for rank in status.ranks if rank.rank)])
            await asyncio.sleep(0.01)

    watch = asyncio.create_task(look())
    waves = [await through_mesh(mesh, asked, concurrent=32, new_tokens=NEW_TOKENS) for _ in range(2)]
    watch.cancel()
    return waves, most


if __name__ == "__main__":
    name, which, file = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="tokenmesh-test-") as folder:
        try:
            result = mesh_tokens(name, which, Path(folder))
        finally:
            for log in sorted(Path(folder).glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-8000:]}", file=sys.stderr)
    Path(file).write_text(json.dumps(result))
