"""KV from a prefill to its owner, against UCX alone, NIXL and a plain socket: `make bench-kv`.

Two movers, each a process with a core of its own, move blocks as in a mesh: tickets, checksums, receipts. The others
move the same bytes between the same two cores: ucx_perftest in messages of the same size and with the same window,
NIXL the same blocks, the socket a stream. Then a real prefill engine shows what of a transfer is not hidden behind
computing, and a mesh what its first request pays.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.costs import Costs, costs
from benchmarks.exposure import Exposure, exposures, first_requests
from benchmarks.harness import Panel, Report, commit, median, plot
from benchmarks.load import LoadError
from benchmarks.movers import WINDOW, KvMoverError, Layout, mover_pair, scattered
from benchmarks.nixl import NixlError, install, nixl
from benchmarks.perftest import PerftestError, perftest
from benchmarks.servers import dtype
from benchmarks.socket_link import socket_link
from tokenmesh.cli.mesh import MeshStartError, run_until_signal

MIN_ROUNDS = 5
MB = 1 << 20
SAMPLE_BYTES = 256 * MB
"""A side moves about so much each time it is measured."""
SIDES = ["ucx_perftest", "ucx_perftest_whole", "nixl", "socket"]
LENGTHS = (500, 2000, 4000)
"""Prompt tokens."""


def sized(megabytes: int) -> Layout:
    """One contiguous piece of memory."""
    return Layout(f"{megabytes} MB", 1, MB, range(megabytes), range(megabytes))


def cache(name: str, layers: int, block_bytes: int, blocks: int) -> Layout:
    """A prompt's blocks in caches that have been in use, so that they lie in no order at either end."""
    return Layout(name, layers, block_bytes, scattered(blocks, 1), scattered(blocks, 2))


SIZES = [sized(megabytes) for megabytes in (1, 16, 64, 256)]
SMOLLM2, LLAMA = (30, 3 * 128 * 64 * 2 * 2), (32, 8 * 128 * 128 * 2 * 2)
"""Layers, and bytes of a block of 128 tokens: heads x tokens x channels x (K, V) x bfloat16."""
CACHES = [
    Layout("SmolLM2, 2048 tokens, in order", *SMOLLM2, range(16), range(16)),
    cache("SmolLM2, 2048 tokens, scattered", *SMOLLM2, 16),
    Layout("Llama 8B, 512 tokens, in order", *LLAMA, range(4), range(4)),
    cache("Llama 8B, 512 tokens, scattered", *LLAMA, 4),
]


@dataclass(frozen=True)
class Race:
    """All sides with the same work, in turn."""

    transport: str
    layout: Layout
    lanes: str
    """What UCX says our movers use."""
    rounds: list[dict[str, float]]
    """Bytes per second by side, one entry per round."""

    def values(self, side: str) -> list[float]:
        """Of one side, in order."""
        return [entry[side] for entry in self.rounds]

    def ratio(self, other: str) -> float:
        """Ours to another's, median over rounds."""
        return median([entry["ours"] / entry[other] for entry in self.rounds])


async def race(transport: str, layout: Layout, rounds: int, sides: Sequence[str]) -> Race:
    """Measures our movers and `sides` in turn, each round beginning with another one; one round of warm-up."""
    transfers = max(2, min(64, SAMPLE_BYTES // layout.nbytes))
    messages = max(8, transfers * layout.nbytes // layout.message_bytes)
    async with mover_pair(layout, transport) as pair:
        ours_alone = 0.0

        async def ours() -> float:
            nonlocal ours_alone
            goodput = await pair.measure(layout, transfers)
            ours_alone = goodput.alone
            return goodput.streamed

        runners: dict[str, Callable[[], Awaitable[float]]] = {
            "ours": ours,
            "ucx_perftest": lambda: perftest(transport, layout.message_bytes, WINDOW, messages),
            "ucx_perftest_whole": lambda: perftest(transport, layout.nbytes, 2, max(4, transfers)),
            "nixl": lambda: nixl(layout, transport, transfers),
            "socket": lambda: socket_link(layout.nbytes, transfers),
        }
        order = ["ours", *sides]
        measured = []
        for index in range(-1, rounds):
            first = index % len(order)
            entry = {side: await runners[side]() for side in order[first:] + order[:first]}
            if index >= 0:
                measured.append({**entry, "ours_alone": ours_alone})
    result = Race(transport, layout, pair.transport, measured)
    medians = ", ".join(f"{side} {median(result.values(side)) / 1e9:.2f}" for side in measured[0])
    print(f"{transport}, {layout.name}: {medians} GB/s", flush=True)
    return result


def figures(races: Sequence[Race], exposed: Sequence[Exposure], ttfts: Sequence[float]) -> dict[str, float]:
    """Those of shared memory; ratios are medians over rounds."""

    def ratio(layout: str, other: str) -> float:
        return next(r for r in races if r.transport == "shm" and r.layout.name == layout).ratio(other)

    return {
        "goodput_ratio_16mb": ratio("16 MB", "ucx_perftest"),
        "goodput_ratio_64mb": ratio("64 MB", "ucx_perftest"),
        "goodput_vs_nixl_64mb": ratio("64 MB", "nixl"),
        "exposed_ratio_2000": exposed_ratio(exposed, 2000),
        "first_request_ratio": ttfts[0] / ttfts[-1],
    }


def exposed_ratio(exposed: Sequence[Exposure], tokens: int) -> float:
    """Exposed time to prefill time, median over prompts of so many tokens."""
    return median([one.exposed / one.prefill for one in exposed if one.tokens == tokens])


def runs(races: Sequence[Race], exposed: Sequence[Exposure], ttfts: Sequence[float]) -> list[dict[str, Any]]:
    """For the report."""
    rows: list[dict[str, Any]] = [
        {
            "transport": one.transport,
            "lanes": one.lanes,
            "layout": one.layout.name,
            "bytes": one.layout.nbytes,
            "message_bytes": one.layout.message_bytes,
            "round": number,
            "bytes_per_s": entry,
        }
        for one in races
        for number, entry in enumerate(one.rounds)
    ]
    rows += [{"exposure_s": asdict(one)} for one in exposed]
    return [*rows, {"ttft_s_after_start": list(ttfts)}]


def panels(races: Sequence[Race], exposed: Sequence[Exposure]) -> list[Panel]:
    """Goodput of the larger sizes, and prefill beside what is left over of its transfer."""
    shown = [one for one in races if one.layout.name in ("16 MB", "64 MB", CACHES[-1].name)]
    goodput = [
        Panel(
            f"{one.transport}: {one.layout.name}",
            "GB/s",
            {side: [value / 1e9 for value in one.values(side)] for side in one.rounds[0]},
        )
        for one in shown
    ]
    ratios = {
        f"{tokens} tokens": [e.exposed / e.prefill for e in exposed if e.tokens == tokens]
        for tokens in sorted({e.tokens for e in exposed})
    }
    return [*goodput, Panel("exposed / prefill", "ratio", ratios)]


async def races(transports: Sequence[str], layouts: Sequence[Layout], rounds: int, sides: Sequence[str]) -> list[Race]:
    """All combinations; the socket runs under TCP only, since it is nothing else."""
    return [
        await race(transport, layout, rounds, [side for side in sides if side != "socket" or transport == "tcp"])
        for transport in transports
        for layout in layouts
    ]


async def bench(rounds: int, eager: bool, out: Path) -> int:
    """Runs everything and writes JSON and plot. Returns the exit status."""
    started_at, load = commit(), os.getloadavg()[0]
    try:
        install()
        some = await races(["shm", "tcp"], [*SIZES, *CACHES], rounds, SIDES)
        alone = await costs()
        print(alone, flush=True)
        exposed = await exposures(LENGTHS, rounds, eager)
        for tokens in LENGTHS:
            print(f"exposed / prefill at {tokens} tokens: {exposed_ratio(exposed, tokens):.4f}", flush=True)
        ttfts = await first_requests(400, eager, (out / "kv-logs").absolute())
    except (KvMoverError, NixlError, PerftestError, MeshStartError, LoadError) as error:
        print(f"bench-kv: {error}", file=sys.stderr)
        return 1
    report = Report(
        "kv", figures(some, exposed, ttfts), runs(some, exposed, ttfts), notes(some, alone, load), commit=started_at
    )
    path = report.write(out)
    plot(out / "kv.png", "KV from prefill to owner, one point per round, line: median", panels(some, exposed))
    for name, value in report.figures.items():
        print(f"{name:24} {value:8.3f}")
    print(f"wrote {path}")
    return 0


def notes(some: Sequence[Race], alone: Costs, load: float) -> list[str]:
    """The report's notes."""
    ratios = "; ".join(
        f"{one.transport} {one.layout.name}: "
        + ", ".join(f"{one.ratio(side):.2f} of {side}" for side in one.rounds[0] if not side.startswith("ours"))
        for one in some
    )
    return [
        "figures goodput_* are over shared memory; all ratios, medians over rounds: " + ratios,
        "ours: two real movers, driven by the engine's messages; includes checksums at both ends, tickets and receipts;"
        " two transfers under way at a time. ours_alone: one, until its receipt is reported; for latency, not compared",
        "ucx_perftest: tag_bw in messages of the same size and with the same window, always from and into the same"
        " buffer of one message, neither checked nor handed on; over TCP without endpoint error handling, which its way"
        " of connecting makes five times slower",
        "ucx_perftest_whole: the same with messages of a whole transfer, so that its buffer is as large as the KV and"
        " does not stay in the caches: what UCX can do with the memory that ours has to touch",
        f"beside moving bytes, one core of ours: checksum {alone.checksum_cached / 1e9:.0f} GB/s in cache and"
        f" {alone.checksum / 1e9:.0f} from memory, copy of staged bytes into scattered blocks {alone.copy / 1e9:.0f}"
        f" GB/s, {alone.message * 1e6:.0f} us per message, however small",
        "nixl: UCX backend, host memory, WRITE with notification, a descriptor per block, two transfers at a time, both"
        " ends polling, no checksum, memory in pages of 4 KiB like ours; from the nixl-cu12 wheel without its"
        " dependencies, which needs no CUDA",
        "socket: sendall and recv_into of 8 MB, each transfer acknowledged",
        "sender on core 0, receiver on core 1; the benchmark sleeps meanwhile, but for a moment per transfer of ours,"
        " which it is told of; a round of warm-up is not counted; order"
        " rotates; 1 MB = 2^20 bytes, GB = 10^9",
        f"exposed: real prefill engine (SmolLM2, {dtype()}) on core 0, owner's mover on core 1, prefix cache off;"
        " first_request_ratio: one start of a mesh, TTFT of request 1 / request 10, 400 random tokens each",
        f"load average of the machine before the start: {load:.2f}",
    ]


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help=f"at least {MIN_ROUNDS}")
    parser.add_argument("--small", action="store_true", help="seconds: one size, no NIXL, no engine, no report")
    parser.add_argument("--eager", action="store_true", help="engines that do not compile")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of kv.json and kv.png")
    options = parser.parse_args()
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds must be at least {MIN_ROUNDS}")
    if not {0, 1} <= os.sched_getaffinity(0):
        parser.error("cores 0 and 1 are needed")
    if options.small:
        asyncio.run(races(["shm", "tcp"], SIZES[:1], 1, ["ucx_perftest", "socket"]))
        return 0
    return run_until_signal(bench(options.rounds, options.eager, options.out))


if __name__ == "__main__":
    sys.exit(main())
