"""Sets of cores as operators write them, and what they are applied to."""

from __future__ import annotations

import os

LEAST_WEIGHT = 19
"""The niceness of who only waits."""

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


def stand_back(bind: str) -> None:
    """Has this thread, which spins as long as a step takes, take no time from the engine workers that compute it.

    It gets the least weight, and their cores: they compute while it waits, and wait while it works. On another core
    it would disturb somebody else, or have to wait for them. `bind`: as VLLM_CPU_OMP_THREADS_BIND; where it names no
    cores, the thread keeps those that it has.
    """
    os.setpriority(os.PRIO_PROCESS, 0, LEAST_WEIGHT)
    try:
        cores = {core for shard in bind.split("|") for core in parse_cpus(shard)}
        os.sched_setaffinity(0, cores)
    except (ValueError, OSError):
        # No list, as `auto` and `nobind` are none, or cores that a container does not have.
        return
