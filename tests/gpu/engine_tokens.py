"""Greedy tokens of one engine that has its GPUs for itself: engine_tokens.py MODEL RANKS EXCHANGE EAGER KILL FILE."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tokenmesh.config import MeshConfig

if TYPE_CHECKING:
    from benchmarks.engine_group import Stream

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 32
STEP_TOKENS = 512
"""Less than the longest prompts, so that these come in chunks, between others' decode steps."""
TEXT = """The lighthouse stood at the end of the peninsula, where the river met the sea. Every evening the keeper went
up the stairs, lit the lamp and wrote the weather into a book: wind from the west, rain before midnight, a ship far out.
"""


def prompts(model: str) -> list[list[int]]:
    """32 prompts of 1 to 2,000 tokens of text: all lengths around block edges, shared prefixes, repeats."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = TEXT.split()

    def text(length: int, seed: int) -> list[int]:
        source = random.Random(seed)
        ids: list[int] = tokenizer.encode(" ".join(source.choice(words) for _ in range(length + 8)))
        return ids[:length]

    lengths = [
        1,
        2,
        15,
        16,
        17,
        31,
        32,
        33,
        64,
        127,
        128,
        129,
        255,
        256,
        257,
        400,
        511,
        512,
        513,
        700,
        1000,
        1500,
        2000,
    ]
    result = [text(length, seed) for seed, length in enumerate(lengths)]
    shared = text(256, 1000)
    result += [shared + text(20 * i + 1, 2000 + i) for i in range(6)]
    return [*result, result[12], result[20], result[22]]


def config(model: str, ranks: int, exchange: str, eager: bool) -> MeshConfig:
    """A root on the first GPU, and with NCCL every rank on the next; if there is but one, they share it."""
    gpus = torch.cuda.device_count()
    return MeshConfig(
        model=model,
        dtype="bfloat16",
        max_model_len=4096,
        prefill_service={"replicas": 0},
        decode_service={
            "token_parallel_size": ranks,
            "group": {"exchange": exchange},
            "kv_transfer": {"transport": "none"},
            "enforce_eager": eager,
            "max_num_batched_tokens": STEP_TOKENS,
            "block_size": 16,
            "kv_cache_memory_bytes": 2 << 30,
            "gpu_memory_utilization": 0.1,
            "engine_args": {"attention_config": {"backend": "FLASH_ATTN"}},
        },
        decode_worker={
            "gpus": "1" if gpus > 1 else "0",
            "kv_cache_memory_bytes": 2 << 30,
            "kv_transfer": {"transport": "none"},
        },
    )


async def generate(mesh: MeshConfig, kill: bool, file: Path) -> None:
    """Greedy tokens of all prompts, twice, and the most sequences that lived on a rank other than the root.

    `kill`: in the second wave rank 1 is killed, as soon as sequences decode there.
    """
    from benchmarks.engine_group import engine_group

    most, killed = 0, False
    # NCCL takes no two ranks of one host on one GPU; these two then say that they are on different ones.
    one_gpu = torch.cuda.device_count() == 1
    if one_gpu:
        os.environ.update(NCCL_HOSTID="root", NCCL_SOCKET_IFNAME="lo")
    with tempfile.TemporaryDirectory(prefix="tokenmesh-test-") as folder:
        try:
            async with engine_group(mesh, Path(folder), {"NCCL_HOSTID": "rank"} if one_gpu else None) as running:

                async def look() -> None:
                    nonlocal most, killed
                    while True:
                        now = max([0, *(entry.sequences for entry in running.engine.counts.ranks if entry.rank)])
                        most = max(most, now)
                        if kill and waves and now >= 8 and not killed:
                            killed = True
                            os.killpg(running.workers[0].pid, signal.SIGKILL)
                        await asyncio.sleep(0.005)

                waves: list[list[Stream]] = []
                watch = asyncio.create_task(look())
                # The second time every prompt finds its prefix, on the ranks that are left.
                for _ in range(2):
                    waves.append(await running.generate(prompts(mesh.model), NEW_TOKENS))
                watch.cancel()
        finally:
            for log in Path(folder).glob("*.log"):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}", file=sys.stderr)
    tokens = [stream.tokens for wave in waves for stream in wave]
    file.write_text(json.dumps({"tokens": tokens, "most": most, "killed": killed}))


def in_process(
    model: str, ranks: int, exchange: str, eager: bool, folder: Path, kill: bool = False
) -> tuple[list[list[int]], int]:
    """What `generate` gives, of a process that has the GPUs for itself."""
    file = folder / f"{ranks}-{exchange}.json"
    command = [sys.executable, "-m", "tests.gpu.engine_tokens", model, str(ranks), exchange, str(int(eager))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([*command, str(int(kill)), str(file)], check=True, timeout=300, env=env, cwd=ROOT)
    result = json.loads(file.read_text())
    assert result["killed"] == kill
    return result["tokens"], result["most"]


def agreement(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(tokens that are equal, tokens compared), from identical contexts: up to the first that differs."""
    equal = compared = 0
    for a, b in zip(first, second, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        equal += same
        compared += min(same + 1, len(a))
    return equal, compared


if __name__ == "__main__":
    name, size, how, without_graphs, with_kill, target = sys.argv[1:]
    asyncio.run(generate(config(name, int(size), how, without_graphs == "1"), with_kill == "1", Path(target)))
