"""Three real movers over UCX: what a sender writes to a relay arrives at an owner that the sender never sees."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_mover import LAYERS, SIZE, LocalMover
from tokenmesh.kv.messages import Commit, Destination, Expect, OpenSend, Push, Relay, SendDone, Settle, Settled
from tokenmesh.kv.peer import Peer
from tokenmesh.kv.wire import Header, Kind

pytestmark = pytest.mark.timeout(120)

TICKET = b"t" * 16


class Route:
    """A sender, a relay, and an owner."""

    def __init__(self, folder: Path, transport: str) -> None:
        self.sender, self.relay, self.owner = (
            LocalMover(folder, name, transport) for name in ("sender", "relay", "owner")
        )
        self.movers = (self.sender, self.relay, self.owner)
        random = np.random.default_rng(1)
        self.sender.data[:] = random.integers(0, 256, self.sender.data.shape, dtype=np.uint8)

    async def expect(self, target: list[int], ticket: bytes = TICKET) -> None:
        """Opens a ticket at the owner, and the way to it."""
        self.owner.hub.send("mover-0", Expect(ticket, target))
        self.relay.hub.send("mover-0", Relay(ticket, *self.owner.address))
        # Both have taken it once they have answered what was sent after it.
        for mover in (self.owner, self.relay):
            assert await self.settle(mover, b"?" * 16) == "unknown transfer"

    async def push(self, source: list[int], layers: range = range(LAYERS), ticket: bytes = TICKET) -> None:
        for layer in layers:
            await self.sender.tell(Push(ticket, layer, 0, source))

    async def send(self, source: list[int], ticket: bytes = TICKET) -> SendDone:
        """All layers in two halves, as chunked prefill does."""
        await self.sender.tell(OpenSend(ticket, [Destination(*self.relay.address)]))
        half = len(source) // 2
        for first, blocks in ((0, source[:half]), (half, source[half:])):
            for layer in range(LAYERS):
                await self.sender.tell(Push(ticket, layer, first, blocks))
        await self.sender.tell(Commit(ticket))
        return await self.sender.expect(SendDone)

    async def settle(self, mover: LocalMover, ticket: bytes = TICKET) -> str:
        """What a mover says against a ticket; empty: it is complete."""
        mover.hub.send("mover-0", Settle(ticket))
        settled = await mover.expect(Settled)
        assert settled.transfer_id == ticket
        assert settled.complete == (settled.error == "")
        return settled.error

    def arrived(self, source: list[int], target: list[int]) -> bool:
        return all((self.owner.data[n, target] == self.sender.data[n, source]).all() for n in range(LAYERS))


@asynccontextmanager
async def running(folder: Path, transport: str) -> AsyncIterator[Route]:
    route = Route(folder, transport)
    await asyncio.gather(*(mover.start() for mover in route.movers))
    try:
        yield route
    finally:
        await asyncio.gather(*(mover.stop() for mover in route.movers))
    # Nobody has died, and nothing is left that nobody asked for.
    assert [mover.process.returncode for mover in route.movers] == [0, 0, 0]
    assert all(mover.messages.empty() for mover in route.movers)


@pytest.fixture(params=["auto", "tcp"])
async def route(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Route]:
    """Started."""
    async with running(tmp_path, request.param) as started:
        yield started


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Route]:
    """The same, over one transport."""
    async with running(tmp_path, "auto") as started:
        yield started


async def test_blocks_pass_through_intact(route: Route) -> None:
    for number, (source, target) in enumerate(
        [
            (list(range(20)), list(range(5, 25))),
            ([3, 9, 4, 30, 31, 1], [0, 2, 4, 6, 8, 10]),
            (list(range(12))[::-1], list(range(12))),
        ]
    ):
        # (1) The owner's receipt comes back through the relay.
        ticket = bytes([number + 1]) * 16
        await route.expect(target, ticket)
        done = await route.send(source, ticket)
        assert done.error == ""
        assert done.nbytes == LAYERS * len(source) * SIZE
        # (2) The owner is the witness; the relay knows of no ticket and has nothing in its own blocks.
        assert await route.settle(route.owner, ticket) == ""
        assert await route.settle(route.relay, ticket) == "unknown transfer"
        assert route.arrived(source, target)
        assert not route.relay.data.any()


async def test_a_relay_receives_for_itself_as_well(one: Route) -> None:
    # (1) Two transfers at the same time over the same connection: one passes through, one stays.
    mine = b"m" * 16
    await one.expect([7, 8])
    one.relay.hub.send("mover-0", Expect(mine, [20, 21]))
    assert await one.settle(one.relay, b"?" * 16) == "unknown transfer"
    for ticket in (TICKET, mine):
        await one.sender.tell(OpenSend(ticket, [Destination(*one.relay.address)]))
    for layer in range(LAYERS):
        await one.sender.tell(Push(TICKET, layer, 0, [1, 2]))
        await one.sender.tell(Push(mine, layer, 0, [3, 4]))
    for ticket in (TICKET, mine):
        await one.sender.tell(Commit(ticket))
    assert [(await one.sender.expect(SendDone)).error for _ in range(2)] == ["", ""]
    # (2) Each where it belongs, and nowhere else.
    assert await one.settle(one.owner) == ""
    assert await one.settle(one.relay, mine) == ""
    assert one.arrived([1, 2], [7, 8])
    assert (one.relay.data[:, [20, 21]] == one.sender.data[:, [3, 4]]).all()
    one.relay.data[:, [20, 21]] = 0
    one.owner.data[:, [7, 8]] = 0
    assert not one.relay.data.any()
    assert not one.owner.data.any()


@pytest.fixture
async def raw(one: Route) -> AsyncIterator[Peer]:
    """A connection to the relay that sends whatever the test wants."""
    from tokenmesh.kv.ucx import UcxWorker

    worker = UcxWorker()
    peer = Peer(await worker.connect(*one.relay.address), 4)
    yield peer
    await peer.close()
    worker.close()


def messages() -> Iterator[tuple[Header, np.ndarray]]:
    """A block of every layer."""
    for layer in range(LAYERS):
        payload = np.full(SIZE, layer + 1, dtype=np.uint8)
        yield Header(Kind.DATA, TICKET, layer, layer, 0, 1, SIZE).sealed(payload), payload


async def commit(peer: Peer) -> bool:
    header = Header(Kind.COMMIT, TICKET, LAYERS, first=LAYERS).sealed()
    return await asyncio.wait_for(peer.commit(header), 20)


async def test_the_owner_checks_what_the_first_sender_sealed(one: Route, raw: Peer) -> None:
    # (1) What is right passes.
    await one.expect([3])
    for header, payload in messages():
        await raw.send(header, payload)
    assert await commit(raw)
    assert await one.settle(one.owner) == ""
    assert one.owner.data[:, 3, 0].tolist() == [1, 2, 3, 4]
    # (2) A payload that is not what was sealed passes the relay, and is refused by the owner.
    one.owner.data[:] = 0
    await one.expect([3])
    for header, payload in messages():
        if header.layer == 2:
            payload[SIZE // 2] ^= 1
        await raw.send(header, payload)
    assert not await commit(raw)
    assert await one.settle(one.owner) == "message 2 is corrupt"
    assert one.owner.data[:, 3, 0].tolist() == [1, 2, 0, 4]
    # (3) So is one under a header that was changed on the way: it goes to no block.
    one.owner.data[:] = 0
    await one.expect([3, 4])
    for header, payload in messages():
        await raw.send(dataclasses.replace(header, first=1), payload)
    assert not await commit(raw)
    assert await one.settle(one.owner) == "message 3 is corrupt"
    assert not one.owner.data.any()
    await one.settle(one.relay)


async def test_a_closed_relay_fails_the_transfer(one: Route) -> None:
    # (1) Half of the layers are through, ...
    await one.expect([3, 4])
    await one.sender.tell(OpenSend(TICKET, [Destination(*one.relay.address)]))
    await one.push([1, 2], range(2))
    async with asyncio.timeout(20):
        # Blocks arrive without a word.
        while not (one.owner.data[1, [3, 4]] == one.sender.data[1, [1, 2]]).all():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    # (2) ... when the relay is closed: the rest is dropped there, and the sender is told that it did not work.
    assert await one.settle(one.relay) == "unknown transfer"
    await one.push([1, 2], range(2, LAYERS))
    await one.sender.tell(Commit(TICKET))
    assert "refused" in (await one.sender.expect(SendDone)).error
    assert "did not arrive" in await one.settle(one.owner)
    assert not one.owner.data[2:].any()
    assert not one.relay.data.any()
    # (3) The connections are as good as before.
    await one.expect([9, 10])
    assert (await one.send([5, 6])).error == ""
    assert await one.settle(one.owner) == ""
    assert one.arrived([5, 6], [9, 10])
    await one.settle(one.relay)


async def test_a_ticket_that_the_owner_does_not_know_is_refused(one: Route) -> None:
    one.relay.hub.send("mover-0", Relay(TICKET, *one.owner.address))
    assert await one.settle(one.relay, b"?" * 16) == "unknown transfer"
    assert "refused" in (await one.send([1, 2])).error
    assert not one.owner.data.any()
    await one.settle(one.relay)


async def test_a_dead_owner_fails_its_own_transfers_alone(one: Route) -> None:
    # (1) A pair that is connected; then the owner dies.
    await one.expect([3, 4])
    assert (await one.send([1, 2])).error == ""
    one.owner.process.kill()
    one.owner.process.wait()
    one.owner.process.returncode = 0
    # (2) The sender hears of it at once, though it never saw the owner.
    again = b"a" * 16
    one.relay.hub.send("mover-0", Relay(again, *one.owner.address))
    assert await one.settle(one.relay, b"?" * 16) == "unknown transfer"
    begin = asyncio.get_running_loop().time()
    assert "refused" in (await one.send([1, 2], again)).error
    assert asyncio.get_running_loop().time() - begin < 8
    # (3) The relay still takes what is its own.
    mine = b"m" * 16
    one.relay.hub.send("mover-0", Expect(mine, [20, 21]))
    assert await one.settle(one.relay, b"?" * 16) == "unknown transfer"
    assert (await one.send([1, 2], mine)).error == ""
    assert await one.settle(one.relay, mine) == ""
    assert (one.relay.data[:, [20, 21]] == one.sender.data[:, [1, 2]]).all()
    await one.settle(one.relay, again)
