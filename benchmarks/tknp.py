"""Token-parallel decode on two ranks against one, each rank with a core of its own: `make bench-tknp`.

Long contexts, so that attention is most of a step. One rank is stock vLLM. What perfect sharing of attention would give
is worked out from the same run: a step with short contexts is R, the rest of a step; what long contexts add on one rank
is A, the attention; on N ranks a step takes R + A/N at best.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine_group import EngineGroup, engine_group, random_prompts, step_seconds
from benchmarks.exchange import Cost, measure
from benchmarks.harness import Pair, Panel, Report, commit, median, paired, plot, quantile
from benchmarks.servers import free_ports
from tokenmesh.config import MeshConfig

MIN_PAIRS = 5
SETTLE_S = 2.0
SHORT = 16
"""Tokens of context of a step that is hardly any attention."""
KV_BYTES = 2 << 30
ROWS = (1, 16, 64)
SKEW = [2000] * 8 + [100] * 24
"""Context tokens of one wave of prompts."""


@dataclass(frozen=True)
class Load:
    """Sequences that decode together."""

    batch: int
    context: int
    tokens: int


FULL = Load(batch=16, context=4000, tokens=24)
TRIAL = Load(batch=4, context=500, tokens=8)


@dataclass(frozen=True)
class Measured:
    """One side of a pair: seconds per step."""

    short: float
    long: float
    exchange_us: list[float]
    """Per layer of the long steps; empty for one rank."""


def config(ranks: int, model: str, dtype: str) -> MeshConfig:
    """A root on core 0 and a worker on core 1, eager, prefix caches off."""
    port, worker, *_ = free_ports(4)
    return MeshConfig.model_validate(
        {
            "model": model,
            "dtype": dtype,
            "max_model_len": 4096,
            "decode_service": {
                "port": port,
                "token_parallel_size": ranks,
                "cpu_omp_threads_bind": "0",
                "kv_cache_memory_bytes": KV_BYTES,
                "enforce_eager": True,
                "enable_prefix_caching": False,
                "remote_prefill_min_tokens": 1,
            },
            "decode_worker": {"port": worker, "cpu_omp_threads_bind": "1", "kv_cache_memory_bytes": KV_BYTES},
        }
    )


async def side(running: EngineGroup, load: Load, index: int) -> Measured:
    """Short contexts, then long ones."""
    short = await running.generate(random_prompts([SHORT] * load.batch, index), load.tokens)
    await flush(running)
    running.times.clear()
    long = await running.generate(random_prompts([load.context] * load.batch, index), load.tokens, pretend=True)
    await flush(running)
    exchange = [us for times in running.times for us in times.exchange_us]
    return Measured(step_seconds(short), step_seconds(long), exchange)


async def flush(running: EngineGroup) -> None:
    """Has the last steps reported: that happens within a step, and twice a second at most."""
    await asyncio.sleep(0.6)
    await running.generate([[5, 6]], 1)


async def imbalance(running: EngineGroup) -> float:
    """Longest rank's context over the mean, sampled while a skewed wave decodes; the worst sample counts."""
    wave = asyncio.create_task(running.generate(random_prompts(SKEW, 99), 8, pretend=True))
    worst = 0.0
    while not wave.done():
        contexts = [entry.context_tokens for entry in running.engine.counts.ranks]
        sequences = sum(entry.sequences for entry in running.engine.counts.ranks)
        if sequences == len(SKEW):
            worst = max(worst, max(contexts) / (sum(contexts) / len(contexts)))
        await asyncio.sleep(0.02)
    await wave
    if not worst:
        raise RuntimeError(f"no sample was taken while all {len(SKEW)} sequences decoded")
    return worst


def figures(pairs: Sequence[Pair[Measured]], costs: Sequence[Cost], skew: float) -> dict[str, float]:
    """Medians over pairs."""
    speedups, ideals = zip(*(gains(pair) for pair in pairs), strict=True)
    at_16 = next(cost for cost in costs if cost.transport == "ucx" and cost.rows == 16)
    return {
        "speedup_2": median(speedups),
        "ideal_2": median(ideals),
        "efficiency_2": median([speedup / ideal for speedup, ideal in zip(speedups, ideals, strict=True)]),
        "exchange_us_p50_16": at_16.p50,
        "exchange_us_p99_16": at_16.p99,
        "imbalance_max_over_mean": skew,
    }


def gains(pair: Pair[Measured]) -> tuple[float, float]:
    """(speed-up on two ranks, what perfect sharing would give)."""
    one, two = pair.a, pair.b
    rest, attention = one.short, one.long - one.short
    return one.long / two.long, (rest + attention) / (rest + attention / 2)


async def bench(pairs: int, load: Load, model: str, dtype: str, out: Path, notes: list[str]) -> int:
    """Runs everything and writes JSON and plot. Returns the exit status."""
    started_at, steps = commit(), 400 if load is FULL else 20
    costs = [measure(transport, rows, steps) for transport in ("ucx", "gloo") for rows in ROWS]
    for cost in costs:
        print(f"exchange {cost.transport} {cost.rows} rows: p50 {cost.p50:.1f} us, p99 {cost.p99:.1f} us", flush=True)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenmesh-bench-")))
        one = await stack.enter_async_context(engine_group(config(1, model, dtype), folder / "one"))
        two = await stack.enter_async_context(engine_group(config(2, model, dtype), folder / "two"))

        def tell(pair: Pair[Measured]) -> None:
            speedup, ideal = gains(pair)
            print(
                f"pair {pair.index}: R {pair.a.short * 1e3:.1f} ms, one rank {pair.a.long * 1e3:.1f} ms, two ranks"
                f" {pair.b.long * 1e3:.1f} ms: speed-up {speedup:.3f} of {ideal:.3f}",
                flush=True,
            )

        measured = await paired(
            lambda i: side(one, load, i), lambda i: side(two, load, i), pairs, settle_s=SETTLE_S, note=tell
        )
        skew = await imbalance(two)
    report = Report("tknp", figures(measured, costs, skew), runs(measured, costs), notes, commit=started_at)
    print(f"{report.write(out)}: {report.figures}")
    plot(out / "tknp.png", f"Token-parallel decode, {load.batch} x {load.context} tokens", panels(measured))
    return 0


def runs(pairs: Sequence[Pair[Measured]], costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """For the report."""
    rows: list[dict[str, Any]] = [
        {
            "pair": pair.index,
            "one_rank_short_s": pair.a.short,
            "one_rank_long_s": pair.a.long,
            "two_ranks_short_s": pair.b.short,
            "two_ranks_long_s": pair.b.long,
            "in_step_exchange_us_p50": quantile(pair.b.exchange_us, 0.5),
            "in_step_exchange_us_p99": quantile(pair.b.exchange_us, 0.99),
        }
        for pair in pairs
    ]
    return [*rows, *({"exchange": asdict(cost)} for cost in costs)]


def panels(pairs: Sequence[Pair[Measured]]) -> list[Panel]:
    """Step times, and speed-up beside its ideal."""
    speedups, ideals = zip(*(gains(pair) for pair in pairs), strict=True)
    return [
        Panel(
            "step, long contexts",
            "ms",
            {"one rank": [p.a.long * 1e3 for p in pairs], "two ranks": [p.b.long * 1e3 for p in pairs]},
        ),
        Panel("speed-up on two ranks", "times", {"measured": list(speedups), "ideal": list(ideals)}),
        Panel(
            "exchange in the step",
            "us per layer",
            {"p50": [quantile(p.b.exchange_us, 0.5) for p in pairs]},
        ),
    ]


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tknp", description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help=f"at least {MIN_PAIRS}")
    parser.add_argument("--small", action="store_true", help="2 small pairs, as a trial")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of tknp.json and tknp.png")
    options = parser.parse_args()
    if not options.small and options.pairs < MIN_PAIRS:
        parser.error(f"--pairs must be at least {MIN_PAIRS}")
    if not {0, 1} <= os.sched_getaffinity(0):
        parser.error("cores 0 and 1 are needed")
    load = TRIAL if options.small else FULL
    notes = [
        f"{load.batch} sequences of {load.context} tokens, {load.tokens} decoded; {options.model} in {options.dtype}",
        "KV is not computed but counts as fetched: a step costs the same whatever the blocks hold",
        "root on core 0, worker on core 1, one thread each; the engine core's process and the benchmark share them",
        "exchange_us_*_16: packing, sending, receiving and unpacking 16 rows with a rank that computes nothing",
        f"load average of the machine before the start: {os.getloadavg()[0]:.2f}",
    ]
    if options.small:
        notes.append("SMALL: proves that it runs; its figures mean nothing")
    pairs = 2 if options.small else options.pairs
    return asyncio.run(bench(pairs, load, options.model, options.dtype, options.out, notes))


if __name__ == "__main__":
    sys.exit(main())
