"""Moves host memory with NIXL's UCX backend between two processes, as a program of an environment of its own.

`python benchmarks/nixl_peer.py JSON` with the fields of `Task`; prints bytes per second. Needs nixl and numpy, nothing
of tokenmesh. The sender writes into the owner's memory and notifies it, as a prefill that pushes would.
"""

from __future__ import annotations

import importlib
import json
import mmap
import multiprocessing
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Task:
    """What to move: pieces of one memory of `nbytes`, (offset here, offset there, length) each, `transfers` times."""

    nbytes: int
    pieces: list[tuple[int, int, int]]
    transfers: int
    depth: int


def _agent(name: str, core: int) -> Any:
    os.sched_setaffinity(0, {core})
    api = importlib.import_module("nixl_cu12._api")
    # Its progress thread would take the one core from the thread that asks for progress anyway.
    return api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False))


def _memory(agent: Any, nbytes: int) -> Any:
    # Pages of 4 KiB, as those of a KV cache are; numpy would take huge ones, which are copied at twice the speed.
    memory = np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
    memory[:] = 1
    agent.register_memory([(memory.ctypes.data, nbytes, 0, "")], "DRAM")
    return memory


def _own(task: Task, pipe: Connection) -> None:
    agent = _agent("owner", 1)
    memory = _memory(agent, task.nbytes)
    memory[:] = 0
    pipe.send((agent.get_agent_metadata(), memory.ctypes.data))
    agent.add_remote_agent(pipe.recv())
    arrived = 0
    while arrived < task.transfers + 1:
        arrived += sum(len(some) for some in agent.get_new_notifs().values())
    pipe.send(all(memory[there] == 1 and memory[there + length - 1] == 1 for _, there, length in task.pieces))
    pipe.recv()


def _send(task: Task, pipe: Connection) -> float:
    agent = _agent("sender", 0)
    memory = _memory(agent, task.nbytes)
    metadata, address = pipe.recv()
    owner = agent.add_remote_agent(metadata)
    pipe.send(agent.get_agent_metadata())
    here = np.array([(memory.ctypes.data + mine, length, 0) for mine, _, length in task.pieces], dtype=np.uint64)
    there = np.array([(address + theirs, length, 0) for _, theirs, length in task.pieces], dtype=np.uint64)
    local, remote = agent.prep_xfer_dlist("", here, "DRAM"), agent.prep_xfer_dlist(owner, there, "DRAM")
    every = np.arange(len(task.pieces), dtype=np.int32)
    flying: deque[Any] = deque()

    def run(transfers: int) -> float:
        begun = time.perf_counter()
        for number in range(transfers):
            handle = agent.make_prepped_xfer("WRITE", local, every, remote, every, f"{number}".encode())
            flying.append((handle, agent.transfer(handle)))
            if len(flying) >= task.depth:
                finish()
        while flying:
            finish()
        return time.perf_counter() - begun

    def finish() -> None:
        handle, state = flying.popleft()
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL's transfer ended as {state}")
        agent.release_xfer_handle(handle)

    run(1)
    seconds = run(task.transfers)
    # UCX may still hold a notification back.
    while not pipe.poll():
        agent.get_new_notifs()
    if not pipe.recv():
        raise RuntimeError("NIXL's owner does not have what was sent")
    pipe.send("done")
    return seconds


def main() -> None:
    """Prints bytes per second."""
    fields = json.loads(sys.argv[1])
    task = Task(**{**fields, "pieces": [tuple(piece) for piece in fields["pieces"]]})
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=_own, args=(task, theirs), daemon=True)
    owner.start()
    try:
        seconds = _send(task, ours)
        owner.join(10)
    finally:
        owner.kill()
    print(task.transfers * sum(length for _, _, length in task.pieces) / seconds)


if __name__ == "__main__":
    main()
