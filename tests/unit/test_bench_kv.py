"""The KV benchmark's own machinery: real movers and ucx_perftest in the smallest size, figures from made-up runs."""

from __future__ import annotations

import pytest

from benchmarks import kv
from benchmarks.costs import Costs, costs
from benchmarks.exposure import Exposure
from benchmarks.harness import FIGURES, Report
from benchmarks.movers import CHUNK_BYTES, Layout, mover_pair, scattered
from benchmarks.nixl import pieces

pytestmark = pytest.mark.timeout(120)


def fake_race(transport: str, layout: Layout, **gb_per_s: list[float]) -> kv.Race:
    rounds = [dict(zip(gb_per_s, values, strict=True)) for values in zip(*gb_per_s.values(), strict=True)]
    return kv.Race(transport, layout, "sysv", rounds)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_small_race_measures_every_side(transport: str) -> None:
    # (1) Both ends are real; each round has a value of every side.
    [race] = await kv.races([transport], kv.SIZES[:1], 2, ["ucx_perftest", "socket"])
    sides = {"ours", "ours_alone", "ucx_perftest"} | ({"socket"} if transport == "tcp" else set())
    assert [set(entry) for entry in race.rounds] == [sides] * 2
    assert all(value > 1e6 for entry in race.rounds for value in entry.values())
    # (2) And it says what UCX used.
    assert ("tcp" in race.lanes) == (transport == "tcp")


async def test_scattered_blocks_arrive_where_they_belong() -> None:
    # measure() compares every block and raises if one is elsewhere.
    layout = Layout("small", 3, 4096, scattered(8, 1), scattered(8, 2))
    async with mover_pair(layout, "shm") as pair:
        goodput = await pair.measure(layout, 2)
    assert goodput.streamed > 0
    assert goodput.alone > 0


async def test_costs_are_measured_apart() -> None:
    alone = await costs()
    # Reading once is never slower than reading and writing, by any margin that a busy machine explains.
    assert alone.checksum_cached > alone.copy / 4
    assert 1e-6 < alone.message < 0.1


def test_layouts_are_what_their_names_say() -> None:
    assert [layout.nbytes for layout in kv.SIZES] == [megabytes << 20 for megabytes in (1, 16, 64, 256)]
    assert [layout.nbytes >> 20 for layout in kv.CACHES] == [45, 45, 64, 64]
    for layout in [*kv.SIZES, *kv.CACHES]:
        assert len(set(layout.source)) == len(set(layout.target)) == len(layout.source) == len(layout.target)
        assert layout.message_bytes <= CHUNK_BYTES
        assert sum(length for *_, length in pieces(layout)) == layout.nbytes
    assert list(kv.CACHES[1].source) != sorted(kv.CACHES[1].source)


def test_figures_are_medians_of_ratios() -> None:
    sixteen, sixty_four = kv.SIZES[1], kv.SIZES[2]
    sides = {"ours": [4.0, 9.0, 5.0], "ours_alone": [1.0, 1.0, 1.0], "ucx_perftest": [8.0, 9.0, 8.0]}
    some = [
        fake_race("tcp", sixteen, **sides, nixl=[1.0, 1.0, 1.0]),
        fake_race("shm", sixteen, **sides, nixl=[2.0, 2.0, 2.0]),
        fake_race("shm", sixty_four, **sides, nixl=[2.0, 2.0, 2.0]),
    ]
    exposed = [Exposure(2000, 2.0, exposed, 0.01, 1) for exposed in (0.02, 0.2, 0.04)] + [
        Exposure(500, 1.0, 1.0, 1.0, 1)
    ]
    figures = kv.figures(some, exposed, [0.3, 0.1, 0.2])
    assert figures == pytest.approx(
        {
            "goodput_ratio_16mb": 0.625,
            "goodput_ratio_64mb": 0.625,
            "goodput_vs_nixl_64mb": 2.5,
            "exposed_ratio_2000": 0.02,
            "first_request_ratio": 1.5,
        }
    )
    # They are those that the report wants, and everything that they were made of goes into it.
    report = Report(
        "kv", figures, kv.runs(some, exposed, [0.3, 0.1, 0.2]), kv.notes(some, Costs(5e10, 3e10, 1e10, 4e-5), 0.0)
    )
    assert set(report.figures) == set(FIGURES["kv"])
    assert len(report.runs) == 9 + 4 + 1
    assert any("shm 64 MB: 0.62 of ucx_perftest, 2.50 of nixl" in note for note in report.notes)
