"""Sides of a GPU benchmark, one after the other, each in processes of its own, so that GPUs are free again afterwards.

Starting an engine takes longer than measuring it. So each side's processes are started while the side before starts its
engine, import what they need, and wait for their turn; and kernels that were compiled once are kept for all sides.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT

TURN_S = 300.0
END_S = 30.0
LEFT_MIB = 256
"""GPU memory by which the one before may differ from the first."""


@dataclass(frozen=True)
class Side:
    """What is measured in one turn."""

    name: str
    command: Sequence[str]
    """Module and arguments; `--out FILE` is added."""
    envs: Sequence[Mapping[str, str]] = ({},)
    """One process each, with these variables besides ours; all run at the same time."""


def wait_for_turn() -> None:
    """For a side's process: loads what takes long and no GPU, and returns when it is told to go on.

    Ends the process if who should tell it is gone.
    """
    importlib.import_module("vllm.v1.engine.async_llm")
    if not sys.stdin.readline():
        sys.exit("nobody is left to take turns with")


def memory_used() -> list[int]:
    """MiB in use on every GPU that this process may use."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    return [int(line) for line in answer.stdout.split()]


def wait_for_memory(before: Sequence[int]) -> None:
    """Until GPUs have as much memory free as before: an engine's processes outlive the one that started them a little.

    vLLM does not start where memory becomes free meanwhile. Raises TimeoutError.
    """
    deadline = time.monotonic() + END_S
    while True:
        used = memory_used()
        if all(now <= then + LEFT_MIB for now, then in zip(used, before, strict=True)):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{used} MiB of GPU memory are in use, {before} at first")
        time.sleep(0.2)


class _Turn:
    def __init__(self, side: Side, out: Path) -> None:
        self.side = side
        self._processes: list[tuple[subprocess.Popen[bytes], Path]] = []
        out.mkdir(parents=True, exist_ok=True)
        for index, env in enumerate(side.envs):
            file = out / f"{side.name.replace(' ', '-')}-{index}.json"
            command = [sys.executable, "-m", *side.command, "--out", str(file)]
            every = {**os.environ, "TRITON_CACHE_DIR": str(out / "triton"), **env}
            with file.with_suffix(".log").open("w") as log:
                process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, env=every)
            self._processes.append((process, file))

    def take(self) -> list[Any]:
        start = time.monotonic()
        for process, _ in self._processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        for process, file in self._processes:
            if process.wait(max(1.0, TURN_S - (time.monotonic() - start))):
                raise RuntimeError(f"{self.side.name} failed: see {file.with_suffix('.log')}")
        print(f"{self.side.name}: {time.monotonic() - start:.0f} s in all", flush=True)
        return [json.loads(file.read_text()) for _, file in self._processes]

    def end(self) -> None:
        running = [process for process, _ in self._processes if process.poll() is None]
        for process in running:
            # It has engines and workers to end.
            process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def in_turn(sides: Sequence[Side], out: Path) -> Iterator[tuple[Side, list[Any]]]:
    """Every side with what its processes wrote, in order. Raises RuntimeError if one failed."""
    before = memory_used()
    ahead = _Turn(sides[0], out)
    try:
        for following in [*sides[1:], None]:
            turn = ahead
            try:
                if following is not None:
                    ahead = _Turn(following, out)
                result = turn.take()
            finally:
                turn.end()
            wait_for_memory(before)
            yield turn.side, result
    finally:
        ahead.end()
