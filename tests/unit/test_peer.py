"""A sender's connection to an owner that stops, and connections that are made again."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from tests.unit.test_mover import LAYERS, SIZE
from tokenmesh.kv import wire
from tokenmesh.kv.geometry import BlockGeometry
from tokenmesh.kv.peer import Peer, SendError
from tokenmesh.kv.sender import Sender
from tokenmesh.kv.ucx import UcxError
from tokenmesh.kv.wire import Header, Kind


class Frozen:
    """An endpoint whose owner takes nothing and says nothing, until it is closed."""

    transport = "none"

    def __init__(self) -> None:
        self.under_way: list[asyncio.Future[None]] = []
        self.closed = 0

    def _never(self) -> asyncio.Future[None]:
        self.under_way.append(asyncio.get_running_loop().create_future())
        return self.under_way[-1]

    def send(self, *_: Any, **__: Any) -> asyncio.Future[None]:
        return self._never()

    async def recv(self, *_: Any) -> None:
        await self._never()

    def close(self) -> None:
        self.closed += 1
        for future in self.under_way:
            if not future.done():
                future.set_exception(UcxError("closed"))


@pytest.fixture
def frozen() -> Any:
    return Frozen()


async def test_an_owner_that_takes_nothing_is_given_up(frozen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "STALL_S", 0.1)
    peer = Peer(frozen, window=1)
    # 1. Two messages: one under way, one that waits for the window.
    sends = [asyncio.create_task(peer.send(Header(Kind.DATA, bytes(16)), np.zeros(8, np.uint8))) for _ in range(2)]
    # 2. Both end, and UCX has let go of what was under way by then.
    outcomes = await asyncio.wait_for(asyncio.gather(*sends, return_exceptions=True), 5)
    assert [type(outcome) for outcome in outcomes] == [SendError, SendError]
    assert frozen.closed >= 1
    # 3. Nothing more is tried.
    with pytest.raises(SendError):
        await peer.send(Header(Kind.DATA, bytes(16)))


async def test_a_commit_does_not_outlive_its_connection(frozen: Any) -> None:
    peer = Peer(frozen, window=2)
    # 1. COMMIT has left; its receipt has not come.
    commit = asyncio.create_task(peer.commit(Header(Kind.COMMIT, bytes(16))))
    await asyncio.sleep(0.01)
    frozen.under_way[1].set_result(None)
    await asyncio.sleep(0.01)
    assert not commit.done()
    # 2. Another transfer finds the owner gone and closes the connection.
    await peer.close()
    with pytest.raises(SendError, match="closed"):
        await asyncio.wait_for(commit, 5)


class Memory:
    """As much of a BlockMemory as a sender without transfers needs."""

    geometry = BlockGeometry(LAYERS, 1, 64, 32, "float32", SIZE, "cpu_attn/vec")

    def buffers(self, count: int, nbytes: int) -> list[Any]:
        return [np.zeros(nbytes, np.uint8) for _ in range(count)]


class Connection:
    """A peer that may have failed."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.closed = 0

    async def close(self) -> None:
        self.closed += 1
        await asyncio.sleep(0.01)


async def test_a_broken_connection_is_made_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Connection] = []

    async def connect(self: Sender, host: str, port: int) -> Any:
        await asyncio.sleep(0.01)
        made.append(Connection())
        return made[-1]

    monkeypatch.setattr(Sender, "_connect", connect)
    memory: Any = Memory()
    worker: Any = None
    sender = Sender(worker, memory, 1 << 20, 2, lambda _: None)
    # 1. A connection that has failed is met by several transfers at once.
    first: Any = await sender.peer("owner", 1)
    first.failure = SendError("gone")
    again = await asyncio.gather(*(sender.peer("owner", 1) for _ in range(4)))
    # 2. It is closed once, and all use the one that follows it.
    assert len(made) == 2
    assert all(peer is made[1] for peer in again)
    assert [connection.closed for connection in made] == [1, 0]
