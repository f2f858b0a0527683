"""The mesh against a plain vLLM server, on the same two cores: `make bench-mesh`.

Three loads, each the same on both sides:

decode   Short prompts, which the decode root computes itself. The plain server's engine has the root's core. What the
         mesh adds is its gateway, the root's gRPC and the connector.
prefill  Prompts that the mesh computes on its prefill service, on core 1, while the root decodes on core 0. The plain
         server's engine has both cores.
alone    Such prompts, one at a time. The plain engine puts both cores to one prompt, the mesh one core. That bounds
         nothing above: where prompts queue, two that are computed side by side make up for some of it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Pair, Panel, Report, commit, median, paired, plot
from benchmarks.load import LoadError, LoadResult, run_load
from benchmarks.servers import KV_BYTES, START_TIMEOUT_S, dtype, mesh_config, plain_server
from tokenmesh.cli.mesh import Mesh, MeshStartError, run_until_signal
from tokenmesh.cli.serve import ServiceRole

MIN_PAIRS = 5
SMALL_PAIRS = 2
SETTLE_S = 2.0
"""Before each side is measured: vLLM's processes go on spinning for one second after their last step."""
TOKEN_IDS = range(1000, 40_000)
"""Ordinary words of the embedded model."""


@dataclass(frozen=True)
class Load:
    """What both sides are asked to do in each pair."""

    name: str
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    requests: int
    """In all; a new one starts as soon as one has ended."""
    plain_cores: str
    """Of the plain server's engine: as many threads as cores."""
    decisions: frozenset[str]
    """What the decode root may have decided on a prompt."""

    def prompts(self, pair: int) -> list[list[int]]:
        """Token ids that no other prompt shares, the same whenever asked for this pair."""
        source = random.Random(f"{self.name} {pair}")
        return [source.choices(TOKEN_IDS, k=self.prompt_tokens) for _ in range(self.requests)]


DECODE = Load("decode", 32, 64, 4, 16, "0", frozenset({"PREFILL_DECISION_TOO_SHORT"}))
PREFILL_DECISIONS = frozenset({"PREFILL_DECISION_DISAGGREGATED", "PREFILL_DECISION_PREFILL_BUSY"})
PREFILL = Load("prefill", 400, 32, 6, 18, "0-1", PREFILL_DECISIONS)
ALONE = Load("alone", 400, 2, 1, 6, "0-1", frozenset({"PREFILL_DECISION_DISAGGREGATED"}))
LOADS = (DECODE, PREFILL, ALONE)


def small(load: Load) -> Load:
    """Only proves that it runs."""
    return replace(load, output_tokens=8, requests=load.concurrency)


Decisions = Callable[[], Awaitable[Mapping[str, int]]]
"""How many prompts the decode root has decided on since its start, by decision."""


@dataclass(frozen=True)
class Measured:
    """One side of a pair."""

    result: LoadResult
    decisions: Mapping[str, int]
    """Of this load only; empty for a plain server."""


async def compare(
    load: Load, model: str, plain_url: str, mesh_url: str, decisions: Decisions, pairs: int, settle_s: float = SETTLE_S
) -> list[Pair[Measured]]:
    """Runs a load on both servers in turn; side a is the plain one."""

    async def plain(index: int) -> Measured:
        return Measured(await _run(load, model, plain_url, index), {})

    async def mesh(index: int) -> Measured:
        before = await decisions()
        result = await _run(load, model, mesh_url, index)
        after = await decisions()
        return Measured(result, {name: n for name in after if (n := after[name] - before.get(name, 0))})

    def tell(pair: Pair[Measured]) -> None:
        sides = "; ".join(
            f"{name} {side.result.tok_s:6.1f} tok/s, TTFT {side.result.ttft_ms():7.1f} ms, ITL"
            f" {side.result.itl_ms():6.2f} ms"
            for name, side in (("plain", pair.a), ("mesh", pair.b))
        )
        _say(f"{load.name} {'warm-up' if pair.index < 0 else f'pair {pair.index}'}: {sides}")

    return await paired(plain, mesh, pairs, warmup=1, settle_s=settle_s, note=tell)


async def _run(load: Load, model: str, url: str, index: int) -> LoadResult:
    return await run_load(url, model, load.prompts(index), load.concurrency, load.output_tokens)


def figures(
    decode: Sequence[Pair[Measured]], prefill: Sequence[Pair[Measured]], alone: Sequence[Pair[Measured]]
) -> dict[str, float]:
    """Medians over pairs; ratios are mesh / plain, and `added_ms_per_token_p50` is in milliseconds."""

    def over(pairs: Sequence[Pair[Measured]], combine: Callable[[LoadResult, LoadResult], float]) -> float:
        return median([combine(pair.b.result, pair.a.result) for pair in pairs])

    return {
        "tok_s_ratio": over(decode, lambda mesh, plain: mesh.tok_s / plain.tok_s),
        "added_ms_per_token_p50": over(decode, lambda mesh, plain: mesh.itl_ms() - plain.itl_ms()),
        "ttft_ratio": over(prefill, lambda mesh, plain: mesh.ttft_ms() / plain.ttft_ms()),
        "itl_ratio": over(prefill, lambda mesh, plain: mesh.itl_ms() / plain.itl_ms()),
        "ttft_alone_ratio": over(alone, lambda mesh, plain: mesh.ttft_ms() / plain.ttft_ms()),
    }


def problems(load: Load, pairs: Sequence[Pair[Measured]]) -> list[str]:
    """Why the pairs did not measure what they should; empty if they did."""
    found = []
    for pair in pairs:
        for side in (pair.a, pair.b):
            if side.result.cached_tokens:
                found.append(f"{load.name} pair {pair.index}: {side.result.cached_tokens} prompt tokens were cached")
        if not pair.b.decisions.keys() <= load.decisions or sum(pair.b.decisions.values()) != load.requests:
            found.append(f"{load.name} pair {pair.index}: the root decided {dict(pair.b.decisions)}")
    return found


def runs(load: Load, pairs: Sequence[Pair[Measured]]) -> list[dict[str, Any]]:
    """For the report."""
    return [
        {
            "load": load.name,
            "pair": pair.index,
            "first": "plain" if pair.a_first else "mesh",
            "plain": pair.a.result.summary(),
            "mesh": {**pair.b.result.summary(), "decisions": dict(pair.b.decisions)},
        }
        for pair in pairs
    ]


def panels(decode: Sequence[Pair[Measured]], prefill: Sequence[Pair[Measured]]) -> list[Panel]:
    """For the plot."""

    def panel(title: str, unit: str, pairs: Sequence[Pair[Measured]], of: Callable[[LoadResult], float]) -> Panel:
        return Panel(title, unit, {"plain": [of(p.a.result) for p in pairs], "mesh": [of(p.b.result) for p in pairs]})

    return [
        panel("decode: output", "tokens/s", decode, lambda result: result.tok_s),
        panel("decode: between tokens", "ms, median", decode, lambda result: result.itl_ms()),
        panel("prefill: to first token", "ms, median", prefill, lambda result: result.ttft_ms()),
        panel("prefill: between tokens", "ms, median", prefill, lambda result: result.itl_ms()),
    ]


async def bench(pairs: int, loads: Sequence[Load], eager: bool, out: Path, notes: list[str]) -> int:
    """Measures and writes the report. Returns the exit status: 1 if it measured something else than it should."""
    config, started_at, began = mesh_config(eager), commit(), time.monotonic()
    logs = (out / "mesh-logs").absolute()
    measured: list[list[Pair[Measured]]] = []
    try:
        _say(f"starting a mesh (logs in {logs})")
        async with Mesh(config, logs, START_TIMEOUT_S) as mesh:

            async def decisions() -> Mapping[str, int]:
                return {
                    name: count
                    for status in await mesh.statuses()
                    if status.role is ServiceRole.DECODE_ROOT
                    for name, count in status.counters.items()
                    if name.startswith("PREFILL_DECISION_")
                }

            for load in loads:
                _say(f"{load.name}: starting a plain server on cores {load.plain_cores}")
                async with plain_server(config, load.plain_cores, logs) as plain_url:
                    mesh_url = f"http://{config.gateway.host}:{config.gateway.port}"
                    measured.append(await compare(load, config.model_name, plain_url, mesh_url, decisions, pairs))
    except (MeshStartError, LoadError) as error:
        print(f"bench-mesh: {error}", *getattr(error, "details", ()), sep="\n  ", file=sys.stderr)
        return 1
    wrong = [problem for load, some in zip(loads, measured, strict=True) for problem in problems(load, some)]
    report = Report(
        name="mesh",
        figures=figures(*measured),
        runs=[run for load, some in zip(loads, measured, strict=True) for run in runs(load, some)],
        notes=[*notes, *(f"NOT VALID: {problem}" for problem in wrong)],
        commit=started_at,
    )
    path = report.write(out)
    plot(out / "mesh.png", "mesh and plain vLLM, one point per pair, line: median", panels(*measured[:2]))
    for name, value in report.figures.items():
        print(f"{name:24} {value:8.3f}")
    for problem in wrong:
        print(f"bench-mesh: not valid: {problem}", file=sys.stderr)
    _say(f"wrote {path} after {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


def describe(loads: Sequence[Load], eager: bool, is_small: bool) -> list[str]:
    """The report's notes."""
    notes = [
        f"{load.name}: {load.requests} prompts of {load.prompt_tokens} distinct random tokens, {load.concurrency} at a"
        f" time, {load.output_tokens} output tokens each; plain engine on cores {load.plain_cores}, mesh with decode"
        " on core 0 and prefill on core 1"
        for load in loads
    ]
    notes += [
        f"{dtype()}, {'eager' if eager else 'compiled'}, max_model_len 4096, {KV_BYTES >> 20} MiB of KV per engine,"
        " otherwise defaults, same on both sides; VLLM_CPU_OMP_THREADS_BIND binds the engines' OpenMP threads only",
        "front ends, engine cores, gateway and the client (this process) float over all cores on both sides; the"
        " client's CPU seconds are in the runs",
        "the plain server is vLLM's own and runs on uvloop, as vllm serve does",
        "figures are medians over pairs of ratios, or of a difference, of the sides' values; a value is the median"
        " over requests (TTFT) or over all tokens (ITL); a chunk of n tokens counts as n gaps of an n-th",
        f"one warm-up pair per load is not counted; {SETTLE_S:g} s of rest before each side; order alternates",
        f"load average of the machine before the start: {os.getloadavg()[0]:.2f}",
    ]
    return [*notes, "SMALL: proves that it runs; its figures mean nothing"] if is_small else notes


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mesh", description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, help=f"per load, at least {MIN_PAIRS}, which is also the default")
    parser.add_argument("--small", action="store_true", help=f"{SMALL_PAIRS} pairs of 8 tokens, as a trial")
    parser.add_argument("--eager", action="store_true", help="engines that do not compile")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of mesh.json and mesh.png")
    options = parser.parse_args()
    pairs = options.pairs or (SMALL_PAIRS if options.small else MIN_PAIRS)
    if pairs < (1 if options.small else MIN_PAIRS):
        parser.error(f"--pairs must be at least {MIN_PAIRS}")
    if not {0, 1} <= os.sched_getaffinity(0):
        parser.error("cores 0 and 1 are needed")
    loads = [small(load) for load in LOADS] if options.small else LOADS
    notes = describe(loads, options.eager, options.small)
    return run_until_signal(bench(pairs, loads, options.eager, options.out, notes))


if __name__ == "__main__":
    sys.exit(main())
