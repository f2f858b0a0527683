"""Greedy tokens of one engine that has the GPU for itself: engine_tokens.py MODEL RANKS EAGER FILE."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

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


def agreement(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(tokens that are equal, tokens compared), from identical contexts: up to the first that differs."""
    equal = compared = 0
    for a, b in zip(first, second, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        equal += same
        compared += min(same + 1, len(a))
    return equal, compared


if __name__ == "__main__":
    asyncio.run(generate(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1", Path(sys.argv[4])))
