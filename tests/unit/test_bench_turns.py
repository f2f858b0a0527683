"""Sides of a GPU benchmark take turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import turns
from benchmarks.turns import LEFT_MIB, Side, in_turn, memory_used, wait_for_memory


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


def test_sides_write_in_order(use: Callable[..., None], tmp_path: Path) -> None:
    def side(name: str, status: int) -> Side:
        # What a side's process does: it waits for its turn, and writes.
        program = tmp_path / f"side_{name}.py"
        program.write_text(
            "import json, os, sys\n"
            "sys.stdin.readline()\n"
            f"json.dump([{name!r}, os.environ['GPU']], open(sys.argv[-1], 'w'))\n"
            f"sys.exit({status})\n"
        )
        return Side(
            name,
            [f"side_{name}"],
            [{"GPU": "0", "PYTHONPATH": str(tmp_path)}, {"GPU": "1", "PYTHONPATH": str(tmp_path)}],
        )

    results = in_turn([side("a", 0), side("b", 0), side("c", 1)], tmp_path / "out")
    assert [(s.name, given) for s, given in (next(results), next(results))] == [
        ("a", [["a", "0"], ["a", "1"]]),
        ("b", [["b", "0"], ["b", "1"]]),
    ]
    with pytest.raises(RuntimeError, match="c failed"):
        next(results)
