"""Ranks that share a GPU give the tokens of a plain engine, and their kernels do what is written down in torch.

Engines run in processes of their own, so that each has the GPU for itself; this file is also their program:
test_local_ranks.py MODEL RANKS EAGER FILE.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tokenmesh.model_store import resolve_model

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 32
STEP_TOKENS = 512
"""Less than the longest prompts, so that these come in chunks, between others' decode steps."""
TEXT = """The lighthouse stood at the end of the peninsula, where the river met the sea. Every evening the keeper went
up the stairs, lit the lamp and wrote the weather into a book: wind from the west, rain before midnight, a ship far out.
"""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


# Kernels.


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_split_kernel(ranks: int) -> None:
    from tokenmesh.engine import gpu_kernels
    from tokenmesh.engine.gpu_rows import SplitRows, split_reference
    from tokenmesh.parallel.ids import STRIDE

    block, width, most = 16, 300, 100
    device = torch.device("cuda")
    ours, theirs = (SplitRows(ranks, most, width, block, device) for _ in range(2))
    generator = torch.Generator().manual_seed(ranks)
    # (1) Steps of all sizes follow each other in the same buffers; some rows are empty, as padding is.
    for count in (1, 2, 3, 16, 64, 99, 100, 5):
        owners = torch.randint(0, ranks, (count, 1), generator=generator)
        table = (torch.randint(0, 1000, (count, width), generator=generator) + owners * STRIDE).int()
        lens = torch.randint(0, width * block + 1, (count,), generator=generator).int()
        slots = torch.randint(-1, 1000, (count + 7,), generator=generator)
        arguments = [tensor.to(device) for tensor in (table, lens, slots)]
        gpu_kernels.split(*arguments, ours)
        split_reference(*arguments, theirs)
        # (2) Both buffers hold the same after each, what earlier steps left behind included.
        for name in ("rows", "starts", "seq_lens", "slots", "tables"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (count, name)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (32, 8, 64), (32, 8, 128), (4, 1, 128)])
def test_pack_and_unpack_kernels(heads: int, kv_heads: int, size: int) -> None:
    from tokenmesh.engine import gpu_kernels
    from tokenmesh.engine.gpu_rows import PackedRows, pack_reference, unpack_reference

    device, most, count = torch.device("cuda"), 40, 33
    # (1) 33 rows of three owners; q, k and v are views of one tensor that has padding behind them.
    owners = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(1))
    rows = torch.full((2, most), -1, dtype=torch.int32)
    for rank in (1, 2):
        mine = torch.nonzero(owners == rank).flatten()
        rows[rank - 1, : len(mine)] = mine.int()
    rows = rows.to(device)[:, :count]
    qkv = torch.randn(most, (heads + 2 * kv_heads) * size, device=device, dtype=torch.bfloat16)
    parts = qkv.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    query, key, value = (part.view(most, -1, size) for part in parts)
    ours, theirs = (PackedRows(2, most, heads, kv_heads, size, torch.bfloat16, device) for _ in range(2))
    gpu_kernels.pack(query, key, value, rows, ours)
    pack_reference(query, key, value, rows, theirs)
    assert torch.equal(ours.packed, theirs.packed)
    # (2) Attention comes back into its rows, and no others.
    ours.output.copy_(torch.randn_like(ours.output))
    theirs.output.copy_(ours.output)
    first, second = (torch.zeros(most, heads, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    gpu_kernels.unpack(rows, ours, first)
    unpack_reference(rows, theirs, second)
    assert torch.equal(first, second)
    assert not first[count:].any()


# Tokens.


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


async def generate(model: str, ranks: int, eager: bool, file: Path) -> None:
    """Greedy tokens of all prompts, twice, and the most sequences that lived on a rank other than the root."""
    from benchmarks.engine_group import engine_group
    from tokenmesh.config import MeshConfig

    config = MeshConfig(
        model=model,
        dtype="bfloat16",
        max_model_len=4096,
        prefill_service={"replicas": 0},
        decode_service={
            "token_parallel_size": ranks,
            "group": {"exchange": "local"},
            "kv_transfer": {"transport": "none"},
            "enforce_eager": eager,
            "max_num_batched_tokens": STEP_TOKENS,
            "block_size": 16,
            "kv_cache_memory_bytes": 2 << 30,
            "engine_args": {"attention_config": {"backend": "FLASH_ATTN"}},
        },
    )
    most = 0
    with tempfile.TemporaryDirectory(prefix="tokenmesh-test-") as folder:
        async with engine_group(config, Path(folder)) as running:

            async def look() -> None:
                nonlocal most
                while True:
                    most = max([most, *(entry.sequences for entry in running.engine.counts.ranks if entry.rank)])
                    await asyncio.sleep(0.005)

            watch = asyncio.create_task(look())
            # The second time every prompt finds its prefix.
            waves = [await running.generate(prompts(model), NEW_TOKENS) for _ in range(2)]
            watch.cancel()
    tokens = [stream.tokens for wave in waves for stream in wave]
    file.write_text(json.dumps({"tokens": tokens, "most": most}))


def in_process(model: str, ranks: int, eager: bool, folder: Path) -> tuple[list[list[int]], int]:
    """`generate` in a process that has the GPU for itself."""
    file = folder / f"{ranks}.json"
    command = [sys.executable, __file__, model, str(ranks), str(int(eager)), str(file)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(command, check=True, timeout=300, env=env, cwd=ROOT)
    result = json.loads(file.read_text())
    return result["tokens"], result["most"]


def agreement(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(tokens that are equal, tokens compared), from identical contexts: up to the first that differs."""
    equal = compared = 0
    for a, b in zip(first, second, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        equal += same
        compared += min(same + 1, len(a))
    return equal, compared


@pytest.mark.timeout(700)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_two_ranks_give_the_tokens_of_a_plain_engine(eager: bool, tmp_path: Path) -> None:
    model = os.environ.get("TOKENMESH_TEST_MODEL") or resolve_model("smollm2-135m-instruct")
    # (1) A plain engine, then a root and a rank on the same GPU.
    plain, _ = in_process(model, 1, eager, tmp_path)
    spread, most = in_process(model, 2, eager, tmp_path)
    # (2) The rank had its part of the sequences.
    assert most >= 8
    # (3) bfloat16 rounds coarsely: a sum in another order may pick another token. Hence agreement, not equality.
    half = len(plain) // 2
    against_itself = agreement(plain[:half], plain[half:])
    equal, compared = agreement(plain, spread)
    print(f"plain against itself with prefix hits: {against_itself[0]} of {against_itself[1]} tokens")
    print(f"two ranks against plain: {equal} of {compared} tokens ({equal / compared:.2%}); {most} on rank 1 at once")
    assert equal / compared >= 0.99


if __name__ == "__main__":
    asyncio.run(generate(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1", Path(sys.argv[4])))
