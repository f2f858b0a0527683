"""Decode steps of a root with ranks on its own GPU, against plain vLLM, and KV from GPU to GPU: `make bench-gpu`.

Per model shape three engines run one after the other, each in a process of its own and alone on the GPU, with the same
settings and CUDA graphs: plain vLLM; a root whose sequences all live on one other rank, so that every row is packed,
attended beside an idle root, and unpacked; and a root and one other rank with half the sequences each. Weights are
random and KV is not computed but counts as fetched, which costs a step what real ones cost. How KV moves is measured
in `gpu_push`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.engine_group import EngineGroup, engine_group, random_prompts, step_seconds
from benchmarks.gpu_push import LARGEST
from benchmarks.harness import FIGURES, Report, commit, median
from benchmarks.turns import Side, in_turn, wait_for_turn
from tokenmesh.config import MeshConfig

BLOCK = 16
MAX_SEQS = 64
CAPTURED = [1, 2, 4, 8, 16, 32, 64]
"""Batch sizes of CUDA graphs, the same on all sides."""
ENGINE_ARGS = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "attention_config": {"backend": "FLASH_ATTN"},
    "compilation_config": {"cudagraph_capture_sizes": CAPTURED},
}
"""vLLM's, the same on all sides."""
REPEATS = 3
TOKENS = 64
"""Decoded per sequence and repetition."""

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128},
}
"""Llama-3.2-1B and Llama-3.1-8B."""
LOADS = ((16, 4096), (64, 4096), (64, 16384))
"""Sequences, and tokens of context of each."""
PUSH, PUSH_SHAPE = "push", "8b"
"""Beside the sides: how KV moves, that of prompts of this shape."""
SIDES: dict[str, dict[str, Any]] = {
    "plain": {"token_parallel_size": 1},
    # The root's share comes to one block, in which no sequence fits.
    "one": {"token_parallel_size": 2, "group": {"exchange": "local", "root_share": 1e-9}},
    "two": {"token_parallel_size": 2, "group": {"exchange": "local"}},
}


@dataclass(frozen=True)
class Run:
    """One load on one side."""

    shape: str
    side: str
    batch: int
    context: int
    step_s: list[float]
    """Per repetition, the median time between tokens while all sequences decode; empty: the KV does not fit."""


def write_model(shape: Mapping[str, Any], folder: Path) -> Path:
    """The configuration of a model of that shape, a Llama unless it says otherwise; its weights are made up by vLLM."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config(model: Path, side: str) -> MeshConfig:
    """One engine on the whole GPU; nothing moves in or out."""
    return MeshConfig.model_validate(
        {
            "model": str(model),
            "dtype": "bfloat16",
            "max_model_len": max(context for _, context in LOADS) + 2 * TOKENS,
            "prefill_service": {"replicas": 0},
            "decode_service": {
                "kv_transfer": {"transport": "none"},
                "max_num_seqs": MAX_SEQS,
                "max_num_batched_tokens": 8192,
                "block_size": BLOCK,
                "gpu_memory_utilization": 0.88,
                "enable_prefix_caching": False,
                "remote_prefill_min_tokens": 1,
                "engine_args": ENGINE_ARGS,
                **SIDES[side],
            },
        }
    )


def blocks_by_rank(running: EngineGroup) -> list[int]:
    """KV blocks of every rank, the root first."""
    if running.engine.device_blocks:
        return running.engine.device_blocks
    own = running.engine.llm.vllm_config.cache_config.num_gpu_blocks
    return [int(own or 0), *(rank.blocks for rank in running.group.ranks)]


def sequences_of(blocks: int, context: int) -> int:
    """How many sequences of a load a rank can hold."""
    return (blocks - 1) // -(-(context + TOKENS + 2) // BLOCK)


def fits(blocks: Sequence[int], batch: int, context: int) -> bool:
    """Whether the sequences of a load can all decode at once, spread over those ranks that can hold one."""
    return sum(sequences_of(rank, context) for rank in blocks) >= batch


async def load_steps(running: EngineGroup, batch: int, context: int) -> list[float]:
    """Per repetition, the median step of a load; none if it does not fit."""
    steps: list[float] = []
    if fits(blocks_by_rank(running), batch, context):
        for repeat in range(-1, REPEATS):
            prompts = random_prompts([context] * batch, repeat)
            streams = await running.generate(prompts, TOKENS, pretend=True)
            if repeat >= 0:
                steps.append(step_seconds(streams))
    return steps


async def measure(shape: str, side: str) -> list[Run]:
    """All loads on one engine."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="tokenmesh-bench-") as name:
        folder = Path(name)
        async with engine_group(config(write_model(SHAPES[shape], folder), side), folder / "group") as running:
            for batch, context in LOADS:
                steps = await load_steps(running, batch, context)
                runs.append(Run(shape, side, batch, context, steps))
                print(f"{shape} {side} {batch}x{context}: {[round(s * 1e3, 3) for s in steps]} ms", flush=True)
    return runs


def seen(runs: Sequence[Mapping[str, Any]]) -> list[Run]:
    """What a side wrote down; prints it."""
    result = [Run(**run) for run in runs]
    for run in result:
        steps = f"{median(run.step_s) * 1e3:.3f} ms" if run.step_s else "does not fit"
        print(f"{run.shape} {run.side:5} {run.batch}x{run.context}: {steps}", flush=True)
    return result


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per shape and load: steps, ratios to plain vLLM, and what a layer costs on top."""
    by_key = {(run.shape, run.batch, run.context, run.side): run.step_s for run in runs}
    rows: list[dict[str, Any]] = []
    for shape, batch, context, side in by_key:
        sides = {name: by_key.get((shape, batch, context, name), []) for name in SIDES}
        if side != "plain" or not all(sides.values()):
            continue
        steps = {name: median(values) for name, values in sides.items()}
        layers = SHAPES[shape]["num_hidden_layers"]
        row: dict[str, Any] = {"shape": shape, "batch": batch, "context": context}
        row |= {f"{name}_step_s": step for name, step in steps.items()}
        for number, name in ((1, "one"), (2, "two")):
            row[f"step_ratio_{number}"] = steps[name] / steps["plain"]
            row[f"layer_overhead_{number}_us"] = (steps[name] - steps["plain"]) / layers * 1e6
        rows.append(row)
    return rows


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The worst ratio over all shapes and loads, and the median overhead of a layer whose rows all go out."""
    return {
        "step_ratio_1": max(row["step_ratio_1"] for row in rows),
        "step_ratio_2": max(row["step_ratio_2"] for row in rows),
        "exchange_us_p50": median([row["layer_overhead_1_us"] for row in rows]),
    }


def push_figures(pushed: Mapping[str, Any]) -> dict[str, float]:
    """Of the largest layout in messages as configured by default, against ucx_perftest; and of the longest prompt.

    Without the first if ucx_perftest did not run.
    """
    best = next(row for row in pushed["goodput"] if row["layout"] == LARGEST)
    longest = max(pushed["exposed"], key=lambda row: int(row["tokens"]))
    found = {"exposed_ratio_8k": longest["exposed_s"] / longest["prefill_s"]}
    if best["perftest_gb_s"]:
        found["push_goodput_ratio"] = best["streamed_gb_s"] / best["perftest_gb_s"]
    return found


def driver() -> str:
    """The GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def bench(shapes: Sequence[str], out: Path) -> int:
    """Runs everything and writes JSON. Returns the exit status."""
    begun, started_at = time.monotonic(), commit()
    turns = [*product(shapes, SIDES), (PUSH_SHAPE, PUSH)]
    sides = [Side(f"gpu {shape} {side}", ["benchmarks.gpu", "--child", shape, side]) for shape, side in turns]
    *steps, [pushed] = [given for _, given in in_turn(sides, out)]
    runs = [run for [given] in steps for run in seen(given)]
    rows = compare(runs)
    left_out = sorted({f"{run.shape} {run.batch}x{run.context}" for run in runs if not run.step_s})
    notes = [
        "step_ratio_1: all sequences on one rank beside an idle root; step_ratio_2: half on each; worst of all loads",
        "exchange_us_p50: median over loads of what a layer takes longer with all rows on the other rank",
        f"sides ran one after the other, each in a process of its own; medians of {REPEATS} repetitions",
        "weights are random, KV is not computed but counts as fetched",
        f"{time.monotonic() - begun:.0f} s in all",
        f"push: see benchmarks/gpu_push.py; prompts of the {PUSH_SHAPE} shape, one at a time",
        f"left out, since the KV of all sequences does not fit beside the weights: {', '.join(left_out) or 'nothing'}",
    ]
    found = {**figures(rows), **push_figures(pushed)}
    report = Report(
        "gpu",
        found,
        [*rows, *pushed["goodput"], *pushed["exposed"], *({"measured": asdict(run)} for run in runs)],
        notes,
        sorted(set(FIGURES["gpu"]) - set(found)),
        commit=started_at,
    )
    report.machine["driver"] = driver()
    print(f"{report.write(out)}: {report.figures}")
    return 0


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["1b"], choices=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of gpu.json")
    parser.add_argument("--child", nargs=2, metavar=("SHAPE", "SIDE"), help="one engine only; --out is its file")
    options = parser.parse_args()
    if options.child:
        shape, side = options.child
        wait_for_turn()
        if side == PUSH:
            from benchmarks import gpu_push

            result: Any = gpu_push.measure(SHAPES[shape], ENGINE_ARGS)
        else:
            result = [asdict(run) for run in asyncio.run(measure(shape, side))]
        options.out.write_text(json.dumps(result))
        return 0
    return bench(options.shapes, options.out.absolute())


if __name__ == "__main__":
    sys.exit(main())
