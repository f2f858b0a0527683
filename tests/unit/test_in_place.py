"""Receiving in place: whatever the sender does, a settled ticket's blocks are not written any more."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from benchmarks.movers import Layout, MoverPair, mover_pair
from tests.unit.test_receiver import TICKET, WANTED, Owner, message
from tokenmesh.kv import receiver, wire
from tokenmesh.kv.codecs import NAMES
from tokenmesh.kv.messages import Commit, Destination, Expect, OpenSend, Push, SendDone, Settle, Settled
from tokenmesh.kv.receiver import LET_GO_S
from tokenmesh.kv.ucx import UcxEndpoint, UcxError
from tokenmesh.kv.wire import HEADER_CHANNEL, Buffer, Header

pytestmark = pytest.mark.timeout(120)

BLOCKS = 64
LAYOUT = Layout("one piece", 1, 1 << 20, range(BLOCKS), range(BLOCKS))
ATTEMPTS = 8


async def begin(pair: MoverPair, ticket: bytes) -> None:
    """All blocks of a layout, as one prompt's."""
    pair.owner.hub.send("mover-0", Expect(ticket, list(LAYOUT.target)))
    await asyncio.sleep(0.02)
    pair.sender.command(OpenSend(ticket, [Destination(*pair.owner.address)]))
    pair.sender.command(Push(ticket, 0, 0, list(LAYOUT.source)))
    pair.sender.command(Commit(ticket))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_sender_frozen_within_a_message_writes_nothing_when_it_thaws(transport: str) -> None:
    clock, chance = asyncio.get_running_loop().time, random.Random(5)
    waits = []
    async with mover_pair(LAYOUT, transport) as pair:
        for attempt in range(ATTEMPTS):
            # (1) A sender stops somewhere in the middle, as a paused virtual machine does.
            await begin(pair, bytes([attempt + 1]) * 16)
            await asyncio.sleep(chance.uniform(0.002, 0.02))
            os.kill(pair.sender.process.pid, signal.SIGSTOP)
            try:
                # (2) The ticket is settled all the same, soon enough for the service to wait for it.
                asked = clock()
                pair.owner.hub.send("mover-0", Settle(bytes([attempt + 1]) * 16))
                settled = await pair.owner.hear(Settled)
                waits.append(clock() - asked)
                assert waits[-1] < 2 * LET_GO_S + 1
                # (3) The blocks are given to somebody else.
                pair.owner.blocks.data[:] = 77
            finally:
                os.kill(pair.sender.process.pid, signal.SIGCONT)
            # (4) The sender goes on, and its transfer ends: well only if everything had arrived before.
            done = await pair.sender.hear(SendDone)
            assert settled.complete or done.error
            # (5) Nothing has touched the blocks.
            await asyncio.sleep(0.1)
            assert (pair.owner.blocks.data == 77).all()
        # (6) A message was under way at least once, and the pair still works, over a new connection.
        assert max(waits) > LET_GO_S * 0.9
        goodput = await pair.measure(LAYOUT, 1)
    assert goodput.streamed > 0


async def test_blocks_in_order_and_scattered_ones_arrive_alike() -> None:
    # The first layout is received in place, the second through staging memory; measure() compares every block.
    backwards = Layout("backwards", 1, 1 << 20, range(BLOCKS), range(BLOCKS)[::-1])
    async with mover_pair(LAYOUT, "shm") as pair:
        await pair.measure(LAYOUT, 2)
        assert np.array_equal(pair.owner.blocks.data[0, 5], pair.sender.blocks.data[0, 5])
        await pair.measure(backwards, 2)
        assert np.array_equal(pair.owner.blocks.data[0, BLOCKS - 6], pair.sender.blocks.data[0, 5])


class Line:
    """An endpoint whose messages the test delivers, in any order."""

    transport = "sysv"

    def __init__(self) -> None:
        self.headers: asyncio.Queue[tuple[Buffer, asyncio.Future[None]]] = asyncio.Queue()
        self.payloads: list[tuple[Buffer, asyncio.Future[None]]] = []
        self.closed = False
        self.lets_go = True
        """Whether closing it ends what is awaited, as it should."""

    def recv(self, buffer: Buffer, channel: int, bulk: bool = False) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if channel == HEADER_CHANNEL:
            self.headers.put_nowait((buffer, future))
        else:
            self.payloads.append((buffer, future))
        return future

    async def head(self, header: Header) -> None:
        """Delivers a header after which its payload is awaited."""
        buffer, future = await self.headers.get()
        buffer[:] = header.to_buffer()
        future.set_result(None)
        await asyncio.sleep(0.01)

    async def pay(self, number: int, payload: Buffer) -> None:
        """Delivers the payload of the so-manieth header."""
        buffer, future = self.payloads[number]
        buffer[:] = payload
        future.set_result(None)
        await asyncio.sleep(0.01)

    def close(self) -> None:
        self.closed = True
        for _, future in self.payloads if self.lets_go else ():
            if not future.done():
                future.set_exception(UcxError("closed"))


@pytest.fixture
async def line(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Owner, Line]]:
    """An owner with an open ticket that takes even small payloads in place, and a sender's line to it."""
    monkeypatch.setattr(receiver, "STAGED_BYTES", 0)
    monkeypatch.setattr(receiver, "LET_GO_S", 0.2)
    owner, line = Owner(), Line()
    owner.receiver.expect(Expect(TICKET, WANTED))
    serving = asyncio.create_task(owner.receiver.serve(cast(UcxEndpoint, line)))
    yield owner, line
    # Nothing is left open.
    line.lets_go = True
    line.close()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert owner.receiver.open == 0


async def test_damage_in_place_fails_the_transfer(line: tuple[Owner, Line]) -> None:
    owner, sender = line
    header, payload = message(0, 0, 2)
    await sender.head(header)
    # (1) It is awaited in the ticket's own first two blocks.
    assert np.shares_memory(sender.payloads[0][0], owner.block(0, WANTED[0]))
    # (2) One bit is wrong.
    payload[7] ^= 4
    await sender.pay(0, payload)
    assert owner.receiver.counts["corrupt"] == 1
    owner.receiver.settle(TICKET)
    assert owner.reports[-1].error == "message 0 is corrupt"
    assert owner.reports[-1].nbytes == 0


async def test_a_repeat_does_not_write_where_the_first_is_being_received(line: tuple[Owner, Line]) -> None:
    owner, sender = line
    header, payload = message(1, 0, 2)
    await sender.head(header)
    await sender.head(header)
    # (1) The repeat is awaited elsewhere, arrives first, and is dropped.
    assert not np.shares_memory(sender.payloads[1][0], owner.data)
    await sender.pay(1, payload)
    assert not owner.data.any()
    assert owner.receiver.counts["duplicate"] == 1
    # (2) The first counts.
    await sender.pay(0, payload)
    assert (owner.block(1, WANTED[1]) == payload[-1]).all()
    owner.receiver.settle(TICKET)
    assert owner.reports[-1].block_layers == 2


async def test_settling_waits_for_what_is_being_received(line: tuple[Owner, Line]) -> None:
    owner, sender = line
    header, payload = message(2, 0, 2)
    await sender.head(header)
    # (1) Not reported while the blocks may still be written, however often it is asked for.
    owner.receiver.settle(TICKET)
    await asyncio.sleep(0.05)
    owner.receiver.settle(TICKET)
    await asyncio.sleep(0.05)
    assert owner.reports == []
    # (2) What comes now for the same ticket is a stranger's.
    await sender.head(message(0, 0, 2)[0])
    assert not np.shares_memory(sender.payloads[1][0], owner.data)
    # (3) The payload has arrived.
    await sender.pay(0, payload)
    assert [(report.block_layers, report.complete) for report in owner.reports] == [(2, False)]
    assert not sender.closed
    await sender.pay(1, message(0, 0, 2)[1])
    assert owner.receiver.counts["stray"] == 1


async def test_settling_closes_the_endpoint_of_a_payload_that_does_not_come(line: tuple[Owner, Line]) -> None:
    owner, sender = line
    await sender.head(message(2, 0, 2)[0])
    owner.receiver.settle(TICKET)
    await asyncio.sleep(0.4)
    assert sender.closed
    assert [report.error for report in owner.reports] == ["12 of 12 block layers did not arrive"]


class EndedError(Exception):
    """The process would be gone."""


async def test_a_mover_ends_rather_than_settle_what_may_still_be_written(
    line: tuple[Owner, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, sender = line

    def end(status: int) -> None:
        raise EndedError(status)

    monkeypatch.setattr(os, "_exit", end)
    # (1) UCX keeps the buffer although the endpoint is closed.
    sender.lets_go = False
    await sender.head(message(2, 0, 2)[0])
    owner.receiver.settle(TICKET)
    (settling,) = owner.receiver._settling.values()
    # (2) The mover dies of it, so that nobody takes the blocks for free.
    with pytest.raises(EndedError, match="1"):
        await settling
    assert sender.closed
    assert owner.reports == []


async def test_a_payload_that_does_not_come_is_given_up(
    line: tuple[Owner, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, sender = line
    monkeypatch.setattr(wire, "STALL_S", 0.2)
    await sender.head(message(2, 0, 2)[0])
    await asyncio.sleep(0.4)
    assert sender.closed
    # The ticket is settled at once, then.
    owner.receiver.settle(TICKET)
    assert owner.reports[-1].error == "12 of 12 block layers did not arrive"
    assert owner.reports[-1].dropped == {"stalled": 1}


async def test_payloads_in_step_no_longer_are_not_served(line: tuple[Owner, Line]) -> None:
    owner, sender = line
    other = b"u" * 16
    owner.receiver.expect(Expect(other, [10, 11, 12, 13]))
    one, stray, following = message(0, 0, 2), message(1, 0, 2), message(2, 0, 2, transfer_id=other)
    # (1) A payload that belongs to no header is taken for the next one's, here and in the next transfer.
    await sender.head(one[0])
    await sender.pay(0, stray[1])
    assert not sender.closed
    await sender.head(following[0])
    await sender.pay(1, one[1])
    # (2) Two transfers in a row: the connection is closed, both have failed, and no other block was touched.
    assert sender.closed
    for ticket in (TICKET, other):
        owner.receiver.settle(ticket)
        assert owner.reports[-1].error == "message 0 is corrupt"
        assert owner.reports[-1].block_layers == 0
    for block in set(range(16)) - {*WANTED[:2], 10, 11}:
        assert not any(owner.block(layer, block).any() for layer in range(3))


async def test_what_is_staged(line: tuple[Owner, Line]) -> None:
    owner, sender = line
    # (1) What has to be decoded.
    encoded = b"e" * 16
    owner.receiver.expect(Expect(encoded, WANTED, "lossless"))
    header, payload = message(0, 0, 2, transfer_id=encoded)
    await sender.head(replace(header, codec=NAMES.index("lossless")).sealed(payload))
    # (2) What may be written by others than UCX in this process.
    sender.transport = "sysv,cma"
    await sender.head(message(0, 0, 2)[0])
    assert len(sender.payloads) == 2
    assert not any(np.shares_memory(buffer, owner.data) for buffer, _ in sender.payloads)
    for ticket in (encoded, TICKET):
        owner.receiver.settle(ticket)
        assert owner.reports[-1].error == "12 of 12 block layers did not arrive"
