"""Token parallelism over the GPUs of one host, against tensor parallelism and replicas: `make bench-multigpu`.

On N GPUs: a root and N - 1 weightless workers over NCCL; the same model with tensor parallel N; and N engines of one
GPU each, side by side, each with 1/N of the sequences. CUDA graphs everywhere, random weights, KV that is not computed
but counts as fetched. The engines of one GPU also take the whole batch, as far as it fits: from what attention and the
rest take there follows what token parallelism should take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_group import engine_group
from benchmarks.gpu import (
    BLOCK,
    ENGINE_ARGS,
    MAX_SEQS,
    REPEATS,
    TOKENS,
    blocks_by_rank,
    driver,
    load_steps,
    sequences_of,
    write_model,
)
from benchmarks.gpu import SHAPES as LLAMA
from benchmarks.harness import FIGURES, Report, commit, median
from benchmarks.turns import Side, in_turn, wait_for_turn
from tokenmesh.config import MeshConfig

MEMORY = 0.88
"""Part of each GPU's memory that an engine takes."""
WORKER_SPARE = 3 << 30
"""Bytes of that part which a worker's partition leaves to buffers and NCCL."""
SHORT = 128
"""Tokens of context of the load that shows what a step takes but for attention."""

SHAPES: dict[str, dict[str, Any]] = {
    "8b": LLAMA["8b"],
    "32b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
"""Llama-3.1-8B and Qwen3-32B."""
LOADS: dict[str, tuple[tuple[int, int], ...]] = {
    "8b": ((16, SHORT), (64, SHORT), (16, 4096), (64, 4096), (64, 12288)),
    "32b": ((16, SHORT), (32, SHORT), (16, 4096), (32, 4096), (32, 8192)),
}
"""Sequences, and tokens of context of each."""
SIDES = ("token_parallel", "one", "tensor_parallel")
"""Engines of one GPU each, which run at the same time; and the two that take all GPUs."""


@dataclass(frozen=True)
class Measured:
    """One engine's loads."""

    shape: str
    side: str
    blocks: list[int]
    """KV blocks of every rank, the root first."""
    steps: dict[str, list[float]]
    """By ``batch x context``: per repetition, the median step in seconds; empty: the KV does not fit."""

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV it holds."""
        return sum(self.blocks) * BLOCK

    def step(self, batch: int, context: int) -> float | None:
        """Median over repetitions; None if the load did not fit."""
        found = self.steps.get(f"{batch}x{context}")
        return median(found) if found else None

    def attention(self, batch: int, context: int) -> float | None:
        """What attention to more than `SHORT` tokens takes in a step, from the nearest load that fits.

        It takes time in proportion to its tokens. None if only short loads fit.
        """
        loads = [(int(batch), int(context)) for batch, context in (key.split("x") for key in self.steps)]
        nearest = sorted(loads, key=lambda load: (abs(load[0] * load[1] - batch * context), abs(load[1] - context)))
        for sequences, tokens in nearest:
            whole, short = self.step(sequences, tokens), self.step(sequences, SHORT)
            if tokens != SHORT and whole and short:
                return (whole - short) * batch * (context - SHORT) / (sequences * (tokens - SHORT))
        return None

    def fullest(self, batch: int, context: int) -> int:
        """Sequences of the rank that has the most of them: spread evenly, as far as every rank holds its part."""
        rooms = sorted(sequences_of(blocks, context) for blocks in self.blocks)
        left, parts = batch, []
        for place, room in enumerate(rooms):
            parts.append(min(room, -(-left // (len(rooms) - place))))
            left -= parts[-1]
        return max(parts)


def config(shape: str, side: str, model: Path, gpus: int) -> MeshConfig:
    """A decode root, and its workers if the side has any."""
    tensor = gpus if side == "tensor_parallel" else 1
    ranks = gpus if side == "token_parallel" else 1
    memory = torch.cuda.get_device_properties(0).total_memory
    return MeshConfig.model_validate(
        {
            "model": str(model),
            "dtype": "bfloat16",
            "max_model_len": max(context for _, context in LOADS[shape]) + 2 * TOKENS,
            "prefill_service": {"replicas": 0},
            "decode_service": {
                "tensor_parallel_size": tensor,
                "token_parallel_size": ranks,
                "group": {"exchange": "nccl"},
                "kv_transfer": {"transport": "none"},
                "max_num_seqs": MAX_SEQS,
                "max_num_batched_tokens": 8192,
                "block_size": BLOCK,
                "gpu_memory_utilization": MEMORY,
                "enable_prefix_caching": False,
                "remote_prefill_min_tokens": 1,
                "engine_args": ENGINE_ARGS,
            },
            "decode_worker": {
                "gpus": f"1-{gpus - 1}" if gpus > 1 else None,
                "kv_cache_memory_bytes": int(MEMORY * memory) - WORKER_SPARE,
                "kv_transfer": {"transport": "none"},
            },
        }
    )


async def measure(shape: str, side: str, gpus: int) -> Measured:
    """All loads on one engine."""
    loads = list(LOADS[shape])
    if side == "one":
        loads += [(batch // gpus, context) for batch, context in loads]
    steps = {}
    with tempfile.TemporaryDirectory(prefix="tokenmesh-bench-") as name:
        folder = Path(name)
        settings = config(shape, side, write_model(SHAPES[shape], folder), gpus)
        try:
            async with engine_group(settings, folder / "group") as running:
                blocks = blocks_by_rank(running)
                for batch, context in dict.fromkeys(loads):
                    key = f"{batch}x{context}"
                    steps[key] = await load_steps(running, batch, context)
                    print(f"{shape} {side} {key}: {[round(s * 1e3, 3) for s in steps[key]]} ms", flush=True)
        finally:
            for log in (folder / "group").glob("*.log"):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}", flush=True)
    return Measured(shape, side, blocks, steps)


def side_of(shape: str, side: str, gpus: int) -> Side:
    """`measure` in a process of its own, or in one per GPU."""
    envs = [{"CUDA_VISIBLE_DEVICES": str(index)} for index in range(gpus)] if side == "one" else [{}]
    return Side(f"multigpu {shape} {side}", ["benchmarks.multigpu", "--gpus", str(gpus), "--child", shape, side], envs)


def seen(given: Sequence[dict[str, Any]]) -> list[Measured]:
    """What processes wrote down; prints it."""
    measured = [Measured(**one) for one in given]
    for one in measured:
        steps = {load: f"{median(found) * 1e3:.3f} ms" if found else "-" for load, found in one.steps.items()}
        print(f"{one.shape} {one.side}: {one.kv_tokens} tokens of KV; {steps}", flush=True)
    return measured


def compare(shape: str, gpus: int, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Per load: steps, tok/s, and what token parallelism should take."""
    ones = [one for one in measured if one.side == "one"]
    by_side = {one.side: one for one in measured}
    tensor, token = by_side["tensor_parallel"], by_side["token_parallel"]
    layers = SHAPES[shape]["num_hidden_layers"]
    rows = []
    for batch, context in LOADS[shape]:
        if context == SHORT:
            continue
        parts = [one.step(batch // gpus, context) for one in ones]
        row: dict[str, Any] = {"shape": shape, "batch": batch, "context": context, "gpus": gpus}
        row["step_s"] = {
            "token_parallel": token.step(batch, context),
            "tensor_parallel": tensor.step(batch, context),
            "replicas": max(part for part in parts if part) if all(parts) else None,
            "one": ones[0].step(batch, context),
        }
        row["tok_s"] = {side: batch / step for side, step in row["step_s"].items() if step}
        row["fullest"] = token.fullest(batch, context)
        attention = ones[0].attention(row["fullest"], context)
        short, token_short = ones[0].step(batch, SHORT), token.step(batch, SHORT)
        if attention and short and token_short:
            row["predicted_step_s"] = token_short + attention
            row["exchange_us_per_layer"] = (token_short - short) / layers * 1e6
        rows.append(row)
    return rows


def figures(rows: Sequence[dict[str, Any]], measured: Sequence[Measured]) -> dict[str, float]:
    """Of the longest load that each pair of sides holds."""

    def ratio(other: str) -> float:
        both = [row for row in rows if row["step_s"]["token_parallel"] and row["step_s"][other]]
        return both[-1]["tok_s"]["token_parallel"] / both[-1]["tok_s"][other] if both else 0.0

    tokens = {side: sum(one.kv_tokens for one in measured if one.side == side) for side in SIDES}
    predicted = [row for row in rows if "predicted_step_s" in row and row["step_s"]["token_parallel"]]
    result = {
        "tok_s_ratio_tensor_parallel": ratio("tensor_parallel"),
        "tok_s_ratio_replicas": ratio("replicas"),
        "kv_tokens_ratio_tensor_parallel": tokens["token_parallel"] / tokens["tensor_parallel"],
        "kv_tokens_ratio_replicas": tokens["token_parallel"] / tokens["one"],
    }
    if predicted:
        result["step_over_predicted_max"] = max(
            r["step_s"]["token_parallel"] / r["predicted_step_s"] for r in predicted
        )
        # One per batch: it does not depend on the context.
        result["exchange_us_p50"] = median(list({r["batch"]: r["exchange_us_per_layer"] for r in predicted}.values()))
    return {name: value for name, value in result.items() if value}


def bench(shapes: Sequence[str], gpus: int, out: Path) -> int:
    """Runs everything and writes JSON per shape. Returns the exit status."""
    for shape in shapes:
        begun, started_at = time.monotonic(), commit()
        sides = [side_of(shape, side, gpus) for side in SIDES]
        measured = [one for _, given in in_turn(sides, out) for one in seen(given)]
        rows = compare(shape, gpus, measured)
        notes = [
            f"{gpus} GPUs; NVLink multicast off: NCCL_NVLS_ENABLE={os.environ.get('NCCL_NVLS_ENABLE', 'unset')}",
            "replicas: one engine per GPU, all at once, each with its part of the sequences; the slowest counts",
            "predicted: the group's step at short contexts, and one GPU's attention to the fullest rank's sequences",
            "exchange_us_per_layer: what a step of short contexts takes longer than on one GPU, per layer",
            "ratios: tok/s of token parallelism over the other's, for the longest load that both hold",
            f"medians of {REPEATS} repetitions; sides ran one after the other; weights are random, KV is not computed",
            f"{time.monotonic() - begun:.0f} s in all",
        ]
        found = figures(rows, measured)
        unmeasured = sorted(set(FIGURES["multigpu"]) - set(found))
        report = Report(
            "multigpu",
            found,
            [*rows, *({**asdict(one), "kv_tokens": one.kv_tokens} for one in measured)],
            notes,
            unmeasured,
            commit=started_at,
        )
        report.machine["driver"] = driver()
        print(f"{report.write(out / shape)}: {report.figures}")
    return 0


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multigpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["8b"], choices=list(SHAPES))
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="how many to use")
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), help="the JSON lands in a folder of it per shape"
    )
    parser.add_argument("--child", nargs=2, metavar=("SHAPE", "SIDE"), help="one engine only; --out is its file")
    options = parser.parse_args()
    if options.child:
        wait_for_turn()
        shape, side = options.child
        options.out.write_text(json.dumps(asdict(asyncio.run(measure(shape, side, options.gpus)))))
        return 0
    if options.gpus < 2:
        parser.error("two GPUs are needed")
    return bench(options.shapes, options.gpus, options.out.absolute())


if __name__ == "__main__":
    sys.exit(main())
