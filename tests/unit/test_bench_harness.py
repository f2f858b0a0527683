"""The benchmarks' own machinery, against fake servers: nothing here starts an engine."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmarks import mesh
from benchmarks.harness import FIGURES, Panel, Report, commit, machine, median, paired, plot, quantile
from benchmarks.load import LoadError, run_load

TOLERANCE_S = 0.03
"""Client and fake server share this machine with other tests."""


async def sides(pairs: int, warmup: int) -> tuple[list[str], list[Any]]:
    order: list[str] = []

    def side(name: str) -> Callable[[int], Any]:
        async def run(index: int) -> tuple[str, int]:
            order.append(f"{name}{index}")
            return name, index

        return run

    return order, await paired(side("a"), side("b"), pairs, warmup)


async def test_paired_alternates_order_and_excludes_warm_up() -> None:
    order, pairs = await sides(pairs=4, warmup=2)
    assert order[:4] == ["a-2", "b-2", "b-1", "a-1"]
    assert order[4:] == ["a0", "b0", "b1", "a1", "a2", "b2", "b3", "a3"]
    assert [(p.index, p.a, p.b, p.a_first) for p in pairs] == [(i, ("a", i), ("b", i), i % 2 == 0) for i in range(4)]


async def test_paired_rests_before_each_side_and_never_runs_both() -> None:
    running, idle_since, rests = 0, time.perf_counter(), []

    async def side(_: int) -> None:
        nonlocal running, idle_since
        rests.append(time.perf_counter() - idle_since)
        running += 1
        assert running == 1
        await asyncio.sleep(0.001)
        running -= 1
        idle_since = time.perf_counter()

    await paired(side, side, pairs=1, warmup=1, settle_s=0.02)
    assert len(rests) == 4
    assert min(rests) >= 0.019


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([7.0], 0.99, 7.0), ([3, 1, 2], 0.5, 2), ([4, 1, 2, 3], 0.5, 2.5), ([0, 10], 0.25, 2.5), ([1, 2, 9], 1.0, 9)],
)
def test_quantile(values: list[float], q: float, expected: float) -> None:
    assert quantile(values, q) == pytest.approx(expected)


async def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="no quantile"):
        median([])
    with pytest.raises(ValueError, match="cannot be measured"):
        await sides(pairs=0, warmup=1)


def test_report_has_the_schema(tmp_path: Path) -> None:
    figures = dict.fromkeys(FIGURES["mesh"], 1.5)
    path = Report("mesh", figures, [{"pair": 0}], ["a note"]).write(tmp_path / "new" / "folder")
    written = json.loads(path.read_text())
    assert path.name == "mesh.json"
    assert set(written) == {"name", "machine", "commit", "figures", "runs", "notes"}
    assert (written["name"], written["figures"]) == ("mesh", figures)
    assert (written["runs"], written["notes"]) == ([{"pair": 0}], ["a note"])
    assert set(written["machine"]) == {"cpu", "cores", "memory", "gpu", "versions"}
    assert set(written["machine"]["versions"]) == {"python", "torch", "vllm", "ucxx", "tokenmesh"}
    assert all(written["machine"]["versions"].values())
    assert written["machine"] == machine()


def test_figures_that_a_run_does_not_give_are_named(tmp_path: Path) -> None:
    first, *others = FIGURES["gpu"]
    # A figure may be absent if the report says so, and only then.
    path = Report("gpu", {first: 1.0}, [], [], unmeasured=list(others)).write(tmp_path)
    assert json.loads(path.read_text())["unmeasured"] == others
    with pytest.raises(ValueError, match=others[0]):
        Report("gpu", {first: 1.0}, [], [])


@pytest.mark.parametrize(
    "figures",
    [
        {"tok_s_ratio": 1.0},
        {**dict.fromkeys(FIGURES["mesh"], 1.0), "another": 1.0},
        {**dict.fromkeys(FIGURES["mesh"], 1.0), "itl_ratio": 1},
        {**dict.fromkeys(FIGURES["mesh"], 1.0), "itl_ratio": math.nan},
    ],
    ids=["missing", "unknown", "no-float", "nan"],
)
def test_report_refuses_figures(figures: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="figure"):
        Report("mesh", figures, [], [], machine={}, commit="")


def test_commit_says_when_files_differ(tmp_path: Path) -> None:
    assert commit(tmp_path) == "unknown"
    settings = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for args in (["init", "-q"], [*settings, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *args], check=True, timeout=30)
    clean = commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "new").touch()
    assert commit(tmp_path) == f"{clean}-dirty"


def test_plot_is_a_png(tmp_path: Path) -> None:
    plot(tmp_path / "x.png", "title", [Panel("one", "ms", {"a": [1, 2], "b": [2, 3]}), Panel("two", "s", {"a": [1]})])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# The client


@dataclass
class FakeServer:
    """Streams one chunk per entry of `chunks`, and remembers when it got requests and sent chunks."""

    chunks: Sequence[int] = (1, 1, 1)
    ttft_s: float = 0.02
    itl_s: float = 0.02
    cached: int = 4
    split: bool = False
    """Whether an event comes in two parts."""
    status: int = 200
    ending: bytes = b"data: [DONE]\n\n"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    received: list[float] = field(default_factory=list)
    sent: list[list[float]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        received = time.perf_counter()
        self.bodies.append(await request.json())
        if self.status != 200:
            return web.json_response({"error": {"message": "no such model"}}, status=self.status)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        response = web.StreamResponse()
        await response.prepare(request)
        times = []
        for number, count in enumerate(self.chunks):
            await asyncio.sleep(self.itl_s if number else self.ttft_s)
            event = self.event({"choices": [{"text": "x", "token_ids": [5] * count}]})
            if self.split:
                await response.write(event[:20])
                await asyncio.sleep(self.itl_s)
                event = event[20:]
            times.append(time.perf_counter())
            await response.write(event)
        self.running -= 1
        usage = {"prompt_tokens_details": {"cached_tokens": self.cached}}
        await response.write(self.event({"choices": [], "usage": usage}) + self.ending)
        self.received.append(received)
        self.sent.append(times)
        return response

    @staticmethod
    def event(data: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(data).encode() + b"\n\n"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeServer]:
        app = web.Application()
        app.router.add_post("/v1/completions", self.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield self
        await runner.cleanup()


async def load(server: FakeServer, prompts: int = 1, concurrency: int = 1, tokens: int | None = None) -> Any:
    asked = sum(server.chunks) if tokens is None else tokens
    return await run_load(server.url, "m", [[n, n + 1] for n in range(prompts)], concurrency, asked)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
async def test_client_measures_ttft_and_itl(split: bool) -> None:
    async with FakeServer(chunks=[1] * 8, ttft_s=0.1, itl_s=0.03, split=split).serving() as server:
        result = await load(server)
    # What the server did, not what it was told: other tests may slow it down.
    [received], [sent] = server.received, server.sent
    expected = [later - earlier for earlier, later in pairwise(sent)]
    assert result.ttft_ms() / 1e3 == pytest.approx(sent[0] - received, abs=TOLERANCE_S)
    assert result.itl_ms() / 1e3 == pytest.approx(median(expected), abs=TOLERANCE_S / 3)
    assert result.tokens == 8
    assert result.seconds == pytest.approx(sent[-1] - received, abs=TOLERANCE_S)
    assert result.tok_s == pytest.approx(8 / result.seconds)


async def test_client_divides_gaps_among_the_tokens_of_a_chunk() -> None:
    async with FakeServer(chunks=[1, 3], ttft_s=0, itl_s=0.06).serving() as server:
        result = await load(server)
    [stream] = result.streams
    gaps = list(stream.gaps())
    assert result.tokens == 4
    assert len(gaps) == 3
    assert sum(gaps) == pytest.approx(stream.end - stream.sent - stream.ttft)
    assert gaps[0] == gaps[1] == gaps[2] >= 0.019
    assert result.summary()["tokens_per_chunk"] == 2.0


async def test_client_keeps_the_concurrency_and_sends_every_prompt() -> None:
    async with FakeServer().serving() as server:
        result = await load(server, prompts=7, concurrency=3)
    assert server.most_running == 3
    assert sorted(body["prompt"] for body in server.bodies) == [[n, n + 1] for n in range(7)]
    assert (len(result.streams), result.tokens, result.cached_tokens) == (7, 21, 28)
    asked = {"model": "m", "max_tokens": 3, "temperature": 0, "ignore_eos": True, "stream": True}
    assert asked.items() <= server.bodies[0].items()


async def test_client_raises_what_the_server_said() -> None:
    async with FakeServer(status=404).serving() as server:
        with pytest.raises(LoadError, match=r"404.*no such model"):
            await load(server, prompts=3, concurrency=2)
    with pytest.raises(LoadError, match="ClientConnector"):
        await load(server)


@pytest.mark.parametrize(
    ("ending", "tokens", "says"),
    [
        (b"", 3, "3 of 3 tokens, unfinished"),
        (b"data: [DONE]\n\n", 4, "3 of 4 tokens$"),
        (FakeServer.event({"error": {"message": "gone"}}), 3, "gone"),
    ],
    ids=["cut", "short", "error"],
)
async def test_client_refuses_incomplete_streams(ending: bytes, tokens: int, says: str) -> None:
    async with FakeServer(ending=ending).serving() as server:
        with pytest.raises(LoadError, match=says):
            await load(server, tokens=tokens)


# The benchmark, over fake servers


def test_prompts_are_distinct_and_repeatable() -> None:
    for load_ in mesh.LOADS:
        prompts = [prompt for pair in range(-1, 5) for prompt in load_.prompts(pair)]
        assert {len(prompt) for prompt in prompts} == {load_.prompt_tokens}
        assert len({tuple(prompt[:16]) for prompt in prompts}) == len(prompts)
        assert load_.prompts(3) == load_.prompts(3)


async def test_figures_come_from_pairs() -> None:
    async with (
        FakeServer(chunks=[1] * 8, cached=0, ttft_s=0.04, itl_s=0.02).serving() as plain,
        FakeServer(chunks=[1] * 8, cached=0, ttft_s=0.08, itl_s=0.04).serving() as slow,
    ):

        def decider(decision: str) -> mesh.Decisions:
            async def decisions() -> dict[str, int]:
                return {decision: len(slow.bodies)} if slow.bodies else {}

            return decisions

        some = mesh.small(mesh.DECODE)
        pairs = await mesh.compare(some, "m", plain.url, slow.url, decider(*some.decisions), pairs=2, settle_s=0)
        figures = mesh.figures(pairs, pairs, pairs)
        assert set(figures) == set(FIGURES["mesh"])
        assert figures["tok_s_ratio"] == pytest.approx(0.5, abs=0.15)
        assert figures["added_ms_per_token_p50"] == pytest.approx(20, abs=10)
        assert figures["ttft_ratio"] == pytest.approx(2, abs=0.6)
        assert figures["itl_ratio"] == pytest.approx(2, abs=0.6)
        assert [run["first"] for run in mesh.runs(some, pairs)] == ["plain", "mesh"]
        assert [panel.unit for panel in mesh.panels(pairs, pairs)] == ["tokens/s"] + ["ms, median"] * 3
        assert mesh.problems(some, pairs) == []

        # Both sides were given the same work, and a result that is not what it should be says so.
        assert len(plain.bodies) == 3 * some.requests
        assert sorted(b["prompt"] for b in plain.bodies) == sorted(b["prompt"] for b in slow.bodies)
        plain.cached = 1
        pairs = await mesh.compare(some, "m", plain.url, slow.url, decider("OTHER"), pairs=1, settle_s=0)
        found = "\n".join(mesh.problems(some, pairs))
        assert "were cached" in found
        assert "the root decided {'OTHER': 4}" in found
