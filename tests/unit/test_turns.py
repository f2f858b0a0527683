"""Sides of a benchmark come one after the other, and none outlives it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from benchmarks.turns import Side, in_turn

MODULE = "tests.unit.turn_side"


def test_each_side_waits_for_its_turn_and_none_is_left(tmp_path: Path) -> None:
    sides = [
        Side("first", [MODULE, "0"]),
        Side("two at once", [MODULE, "0"], [{"NUMBER": "1"}, {"NUMBER": "2"}]),
        Side("broken", [MODULE, "3"]),
        Side("never", [MODULE, "0"]),
    ]
    # (1) Results come in order, those of processes that ran together in theirs; who was started early has waited.
    results = in_turn(sides, tmp_path)
    side, [first] = next(results)
    assert (side.name, first["number"]) == ("first", None)
    side, both = next(results)
    assert side.name == "two at once"
    assert [one["number"] for one in both] == ["1", "2"]
    assert all(one["waited"] > 0.2 for one in both)
    # (2) A failure ends it, says where to look, and leaves no process behind, also not of a side that waits.
    with pytest.raises(RuntimeError, match=r"broken failed: see .*broken-0\.log"):
        next(results)
    assert not [child for child in psutil.Process().children() if MODULE in child.cmdline()]
