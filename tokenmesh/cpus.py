"""Sets of cores as operators write them, and what they are applied to."""

from __future__ import annotations

import os

MAX_CORE = 65_535


def parse_cpus(text: str) -> set[int]:
    """The cores that a list such as ``0-3,8`` names, as in a cpuset. Raises ValueError."""
    cores: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{text!r} is no list of cores like 0-3,8")
        start, stop = int(first), int(last or first)
        if stop < start or stop > MAX_CORE:
            raise ValueError(f"{text!r} is no list of cores like 0-3,8")
        cores.update(range(start, stop + 1))
    return cores


def confine(text: str | None) -> None:
    """Keeps this process, and all that it starts, on some cores; None: no change. Raises ValueError if it has none."""
    if text is None:
        return
    try:
        os.sched_setaffinity(0, parse_cpus(text))
    except OSError as error:
        raise ValueError(f"none of the cores {text} is this process's to use") from error
