"""Settling: whoever asks is answered when nothing can be written any more, and not before."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import Any

import pytest

from tokenmesh.kv import settling as settling_module
from tokenmesh.kv.geometry import BlockGeometry
from tokenmesh.kv.messages import MoverReady, Settle, Settled
from tokenmesh.kv.settling import Settling

TICKET = b"t" * 16
GEOMETRY = BlockGeometry(1, 1, 1, 1, "uint8", 1, "test")


class Movers:
    """Two movers that answer when they are told to."""

    def __init__(self) -> None:
        self.settling = Settling()
        self.asked: list[str] = []

    def send(self, peer: str, message: Any) -> None:
        assert message == Settle(TICKET)
        self.asked.append(peer)

    def settle(self) -> asyncio.Task[Any]:
        hub: Any = self
        return asyncio.create_task(self.settling.settle(hub, (0, 1), TICKET))

    def answer(self, complete: bool = True) -> None:
        for shard in (0, 1):
            self.settling.note(Settled(TICKET, shard, complete, "", 100, 2, 0.5, "tcp", 0))


async def test_who_asks_again_waits_for_the_same() -> None:
    movers = Movers()
    tasks = [movers.settle(), movers.settle()]
    await asyncio.sleep(0.01)
    assert movers.asked == ["mover-0", "mover-1"]
    assert not any(task.done() for task in tasks)
    movers.answer()
    outcomes = await asyncio.gather(*tasks)
    assert [(outcome.complete, outcome.receipt.bytes) for outcome in outcomes] == [(True, 200)] * 2


async def test_who_gives_up_ends_nothing() -> None:
    movers = Movers()
    first = movers.settle()
    await asyncio.sleep(0.01)
    # (1) Whoever comes next is not told that it is over.
    first.cancel()
    second = movers.settle()
    await asyncio.sleep(0.01)
    assert not second.done()
    assert len(movers.asked) == 2
    # (2) It is told what came.
    movers.answer()
    assert (await second).complete
    # (3) Afterwards movers are asked anew.
    third = movers.settle()
    await asyncio.sleep(0.01)
    assert len(movers.asked) == 4
    movers.answer(complete=False)
    assert not (await third).complete


async def test_a_mover_that_is_silent_and_not_known_counts_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling_module, "SILENT_S", 0.05)
    movers = Movers()
    outcome = await movers.settle()
    assert (outcome.complete, outcome.error) == (False, "a mover does not answer")


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


async def test_a_stopped_mover_is_dead_before_its_blocks_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling_module, "SILENT_S", 0.1)
    movers = Movers()
    with sleeper() as process:
        # (1) One answers; the other one has been stopped, and would go on writing.
        movers.settling.watch(MoverReady(1, "h", 1, GEOMETRY, process.pid))
        process.send_signal(signal.SIGSTOP)
        task = movers.settle()
        await asyncio.sleep(0.01)
        movers.settling.note(Settled(TICKET, 0, True, "", 100, 2, 0.5, "tcp", 0))
        # (2) It has ended when that is told.
        outcome = await task
        assert (outcome.complete, outcome.error) == (False, "a mover does not answer")
        assert process.wait(0) == -signal.SIGKILL
    # (3) From then on nobody waits for it.
    monkeypatch.setattr(settling_module, "SILENT_S", 60.0)
    task = movers.settle()
    await asyncio.sleep(0.01)
    movers.settling.note(Settled(TICKET, 0, True, "", 100, 2, 0.5, "tcp", 0))
    assert not (await asyncio.wait_for(task, 5)).complete


async def test_a_mover_that_ends_by_itself_is_not_waited_for() -> None:
    movers = Movers()
    with sleeper() as process:
        for shard in (0, 1):
            movers.settling.watch(MoverReady(shard, "h", 1, GEOMETRY, process.pid))
        task = movers.settle()
        await asyncio.sleep(0.01)
        process.kill()
        assert not (await asyncio.wait_for(task, 5)).complete
        # A new one in its place is asked, and waited for.
        with sleeper() as other:
            for shard in (0, 1):
                movers.settling.watch(MoverReady(shard, "h", 1, GEOMETRY, other.pid))
            task = movers.settle()
            await asyncio.sleep(0.01)
            movers.answer()
            assert (await task).complete
            other.kill()
