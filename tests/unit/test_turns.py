"""Sides of a benchmark come one after the other, and none outlives it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks import turns
from benchmarks.turns import LEFT_MIB, Side, in_turn, memory_used, wait_for_memory

MODULE = "tests.unit.turn_side"


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what two GPUs are said to have in use, MiB."""
    said = tmp_path / "said"
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {said}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def use(*mib: int) -> None:
        said.write_text("".join(f"{one}\n" for one in mib))

    use(4, 5)
    return use


@pytest.mark.usefixtures("use")
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


def test_memory_is_that_of_visible_gpus(
    use: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory_used() == [4, 5]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    memory_used()
    assert "--id=2,3" in (tmp_path / "asked").read_text().split()


def test_the_next_side_waits_for_memory(use: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    # (1) As soon as it is free, up to what differs from moment to moment.
    use(4, 70_000)
    timer = threading.Timer(0.5, use, (4 + LEFT_MIB, 5))
    timer.start()
    begun = time.monotonic()
    wait_for_memory([4, 5])
    assert time.monotonic() - begun >= 0.5
    # (2) Not for ever.
    monkeypatch.setattr(turns, "END_S", 0.3)
    use(4, 70_000)
    with pytest.raises(TimeoutError, match="70000"):
        wait_for_memory([4, 5])
