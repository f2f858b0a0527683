"""What recording spans costs: a mesh that records them against one that does not, on the same two cores.

Both meshes run all the time, one of them under load: an idle engine sleeps a second after its last step. Every request
of the recording mesh is sampled, sent to its gateway and kept there. `make bench-telemetry`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import Pair, Panel, Report, commit, median, paired, plot
from benchmarks.load import LoadError, LoadResult, run_load
from benchmarks.mesh import DECODE, MIN_PAIRS, SETTLE_S, SMALL_PAIRS, Load, small
from benchmarks.servers import START_TIMEOUT_S, dtype, mesh_config
from tokenmesh.cli.mesh import Mesh, MeshStartError, run_until_signal
from tokenmesh.config import MeshConfig, TelemetryConfig

PAIRS = 25
"""The effect is small: with 9, medians of two runs were 4 % apart."""


def config(eager: bool, traces: str) -> MeshConfig:
    """A mesh of one rank, which is where spans cost most of a step: it is the shortest."""
    plain = mesh_config(eager)
    sections = {name: getattr(plain, name) for name in MeshConfig.model_fields if name != "telemetry"}
    return MeshConfig(**sections, telemetry=TelemetryConfig.model_validate({"traces": traces}))


def url(mesh: MeshConfig) -> str:
    """Base URL of a mesh's REST API."""
    return f"http://{mesh.gateway.host}:{mesh.gateway.port}"


async def spans_kept(mesh: MeshConfig) -> int:
    """Traces of the gateway's recent requests that it really has."""
    async with (
        httpx.AsyncClient(base_url=url(mesh), timeout=10) as client,
        client.stream("GET", "/dashboard/api/watch") as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                requests = json.loads(line.removeprefix("data: "))["requests"]
                break
    async with httpx.AsyncClient(base_url=url(mesh), timeout=10) as client:
        answers = [await client.get(f"/dashboard/api/traces/{each['request_id']}") for each in requests[:10]]
    return sum(answer.status_code == 200 for answer in answers)


def figures(pairs: Sequence[Pair[LoadResult]]) -> dict[str, float]:
    """The median over pairs; 1 means that spans are free."""
    return {"tok_s_ratio_on_off": median([pair.b.tok_s / pair.a.tok_s for pair in pairs])}


async def bench(pairs: int, load: Load, eager: bool, out: Path, notes: list[str]) -> int:
    """Measures and writes the report. Returns the exit status: 1 if it measured something else than it should."""
    off, on = config(eager, "off"), config(eager, "on")
    logs, started_at, began = (out / "telemetry-logs").absolute(), commit(), time.monotonic()

    async def side(mesh: MeshConfig, index: int) -> LoadResult:
        return await run_load(url(mesh), mesh.model_name, load.prompts(index), load.concurrency, load.output_tokens)

    def tell(pair: Pair[LoadResult]) -> None:
        name = "warm-up" if pair.index < 0 else f"pair {pair.index}"
        print(f"{name}: off {pair.a.tok_s:6.1f} tok/s, on {pair.b.tok_s:6.1f} tok/s", flush=True)

    try:
        async with AsyncExitStack() as stack:
            for name, mesh in (("off", off), ("on", on)):
                print(f"starting a mesh with spans {name} (logs in {logs / name})", flush=True)
                await stack.enter_async_context(Mesh(mesh, logs / name, START_TIMEOUT_S))
            measured = await paired(
                lambda index: side(off, index), lambda index: side(on, index), pairs, settle_s=SETTLE_S, note=tell
            )
            kept = {"off": await spans_kept(off), "on": await spans_kept(on)}
    except (MeshStartError, LoadError) as error:
        print(f"bench-telemetry: {error}", *getattr(error, "details", ()), sep="\n  ", file=sys.stderr)
        return 1
    wrong = [] if kept["on"] == 10 and not kept["off"] else [f"traces kept of 10 recent requests: {kept}"]
    report = Report(
        name="telemetry",
        figures=figures(measured),
        runs=[run(pair) for pair in measured],
        notes=[*notes, *(f"NOT VALID: {problem}" for problem in wrong)],
        commit=started_at,
    )
    path = report.write(out)
    sides = {"off": [pair.a.tok_s for pair in measured], "on": [pair.b.tok_s for pair in measured]}
    plot(out / "telemetry.png", "spans off and on", [Panel("decode: output", "tokens/s", sides)])
    print(f"tok_s_ratio_on_off {report.figures['tok_s_ratio_on_off']:.3f}")
    for problem in wrong:
        print(f"bench-telemetry: not valid: {problem}", file=sys.stderr)
    print(f"wrote {path} after {time.monotonic() - began:.0f} s", flush=True)
    return 1 if wrong else 0


def run(pair: Pair[LoadResult]) -> dict[str, Any]:
    """For the report."""
    first = "off" if pair.a_first else "on"
    return {"pair": pair.index, "first": first, "off": pair.a.summary(), "on": pair.b.summary()}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.telemetry", description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, help=f"at least {MIN_PAIRS}; default {PAIRS}")
    parser.add_argument("--small", action="store_true", help=f"{SMALL_PAIRS} pairs of 8 tokens, as a trial")
    parser.add_argument("--eager", action="store_true", help="engines that do not compile")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of telemetry.json and .png")
    options = parser.parse_args()
    pairs = options.pairs or (SMALL_PAIRS if options.small else PAIRS)
    if pairs < (1 if options.small else MIN_PAIRS):
        parser.error(f"--pairs must be at least {MIN_PAIRS}")
    load = small(DECODE) if options.small else DECODE
    notes = [
        f"{load.requests} prompts of {load.prompt_tokens} distinct random tokens, {load.concurrency} at a time,"
        f" {load.output_tokens} output tokens each, streamed over REST; computed by the decode root on core 0",
        f"{dtype()}, {'eager' if options.eager else 'compiled'}; both meshes run throughout, one under load at a time",
        "on: every request sampled, spans sent to the gateway and kept; off: telemetry.traces off; metrics on both",
        f"one warm-up pair is not counted; {SETTLE_S:g} s of rest before each side; order alternates",
        f"load average of the machine before the start: {os.getloadavg()[0]:.2f}",
        *(["SMALL: proves that it runs; its figures mean nothing"] if options.small else []),
    ]
    return run_until_signal(bench(pairs, load, options.eager, options.out, notes))


if __name__ == "__main__":
    sys.exit(main())
