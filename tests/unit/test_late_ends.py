"""Ends that are late, hang or go: blocks are touched only by those whose they are, and nothing is held on to."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from tests.unit.memory_wire import PROBE_BYTES, WINDOW, Cache, MemoryWorker, OwningEnd, SendingEnd
from tests.unit.memory_wire import wire_settings as wire_settings
from tests.unit.test_integrity import BLOCKS, CHUNK, GEOMETRY, LAYERS, SIZE, SOURCE, TARGET
from tokenmesh.kv import wire
from tokenmesh.kv.geometry import BlockGeometry
from tokenmesh.kv.messages import Commit, Destination, Push, SendDone
from tokenmesh.kv.ucx import UcxEndpoint, UcxWorker
from tokenmesh.kv.wire import HEADER_BYTES, HEADER_CHANNEL, PAYLOAD_CHANNEL, Header, Kind

pytestmark = pytest.mark.timeout(120)


class HoldingEndpoint:
    """A sender's endpoint that keeps the last message of a ticket back until it is told to let go."""

    def __init__(self, inner: UcxEndpoint, ticket: bytes, payload_only: bool) -> None:
        self._inner = inner
        self._ticket = ticket
        self._kept = (PAYLOAD_CHANNEL,) if payload_only else (HEADER_CHANNEL, PAYLOAD_CHANNEL)
        self.transport = inner.transport
        self._holding = False
        self.held: list[tuple[np.ndarray, int, asyncio.Future[None]]] = []

    def send(self, buffer: np.ndarray, channel: int, bulk: bool = False) -> asyncio.Future[None]:
        if channel == HEADER_CHANNEL:
            header = Header.from_buffer(buffer)
            last = header.kind is Kind.DATA and header.layer == LAYERS - 1 and header.first == 2
            self._holding = last and header.transfer_id == self._ticket
        if not self._holding or channel not in self._kept:
            return self._inner.send(buffer, channel, bulk)
        self.held.append((buffer, channel, asyncio.get_running_loop().create_future()))
        return self.held[-1][2]

    async def let_go(self) -> None:
        for buffer, channel, future in self.held:
            await self._inner.send(buffer, channel, channel == PAYLOAD_CHANNEL)
            future.set_result(None)

    def recv(self, buffer: np.ndarray, channel: int, bulk: bool = False) -> asyncio.Future[None]:
        return self._inner.recv(buffer, channel, bulk)

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("kind", [MemoryWorker, UcxWorker])
@pytest.mark.parametrize("payload_only", [False, True], ids=["message", "payload"])
async def test_a_delayed_sender_cannot_write_into_reused_blocks(
    kind: type[UcxWorker] | type[MemoryWorker], payload_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "STALL_S", 20.0)
    worker = kind()
    late, soon, wires = b"l" * 16, b"s" * 16, []

    def slow(endpoint: Any) -> Any:
        wires.append(HoldingEndpoint(endpoint, late, payload_only))
        return wires[-1]

    slow_end = SendingEnd(worker, Cache(GEOMETRY, BLOCKS), CHUNK, slow)
    quick_end = SendingEnd(worker, Cache(GEOMETRY, BLOCKS), CHUNK)
    owning = OwningEnd(worker, Cache(GEOMETRY, BLOCKS), CHUNK)
    slow_end.cache.data[:], quick_end.cache.data[:] = 1, 2

    def start(end: SendingEnd, ticket: bytes) -> None:
        owning.expect(ticket, TARGET)
        end.sender.start(ticket, [Destination(*owning.address)])
        for layer in range(LAYERS):
            end.sender.add(Push(ticket, layer, 0, SOURCE))
        end.sender.add(Commit(ticket))

    # (1) All but one message of a transfer have come when its time is up: the ticket is closed.
    start(slow_end, late)
    async with asyncio.timeout(20):
        while not (owning.cache.data[LAYERS - 1, TARGET[:2]] == 1).all():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await owning.settle(late)).error == f"2 of {LAYERS * len(TARGET)} block layers did not arrive"
    # (2) Its blocks are given to another request, whose KV comes from elsewhere.
    start(quick_end, soon)
    assert (await quick_end.done()).error == ""
    assert (await owning.settle(soon)).complete
    # (3) Now the late message arrives, and is counted.
    assert len(wires[0].held) == 2 - payload_only
    await wires[0].let_go()
    assert "refused" in (await slow_end.done()).error
    assert owning.receiver.counts["stray"] == 1
    # (4) Not a byte has changed, and nothing is left.
    assert (owning.cache.data[:, TARGET] == 2).all()
    await slow_end.close()
    await quick_end.close()
    async with asyncio.timeout(10):
        while not owning.idle():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    worker.close()


async def test_messages_larger_than_ones_own_are_taken_under_a_ticket() -> None:
    worker = MemoryWorker()
    # (1) A sender that was told to send 5 MiB at a time, and an owner that sends less.
    size = 1 << 20
    large = BlockGeometry(1, 1, 16, 4, "float32", size, "test")
    sending, owning = SendingEnd(worker, Cache(large, 8), 5 * size), OwningEnd(worker, Cache(large, 8), size)
    sending.cache.data[:] = np.random.default_rng(3).integers(0, 256, sending.cache.data.shape, dtype=np.uint8)
    blocks = [1, 2, 3, 4, 5]

    async def transfer(ticket: bytes) -> SendDone:
        sending.sender.start(ticket, [Destination(*owning.address)])
        sending.sender.add(Push(ticket, 0, 0, blocks))
        sending.sender.add(Commit(ticket))
        return await sending.done()

    owning.expect(b"1" * 16, blocks)
    assert (await transfer(b"1" * 16)).error == ""
    assert (await owning.settle(b"1" * 16)).complete
    assert (owning.cache.data[0, blocks] == sending.cache.data[0, blocks]).all()
    # (2) Nobody gets so much memory without one: the connection is closed.
    assert (await transfer(b"2" * 16)).error != ""
    assert (await owning.settle(b"2" * 16)).dropped["bad_header"] == 1
    assert owning.idle()
    await sending.close()
    worker.close()


async def test_a_sender_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "STALL_S", 0.2)
    worker = MemoryWorker()
    owning = OwningEnd(worker, Cache(GEOMETRY, BLOCKS), CHUNK)
    # (1) A header, and then nothing: it has a staging buffer of the owner's.
    endpoint = await worker.connect("", owning.address[1])
    owning.expect(b"h" * 16, TARGET)
    header = Header(Kind.DATA, b"h" * 16, 0, 0, 0, 1, SIZE).sealed(np.zeros(SIZE, dtype=np.uint8))
    await endpoint.send(header.to_buffer(), HEADER_CHANNEL)
    await asyncio.sleep(0.05)
    assert not owning.idle()
    # (2) The owner gives it up, and has its buffer back.
    await asyncio.sleep(0.4)
    assert (await owning.settle(b"h" * 16)).dropped == {"stalled": 1}
    assert owning.idle()
    worker.close()


async def answer_probe(endpoint: Any) -> None:
    for _ in range(3):
        await endpoint.recv(np.zeros(HEADER_BYTES, dtype=np.uint8), HEADER_CHANNEL)
        await endpoint.recv(np.zeros(PROBE_BYTES, dtype=np.uint8), PAYLOAD_CHANNEL)


async def hang(endpoint: Any) -> None:
    """An owner that takes nothing."""
    await answer_probe(endpoint)
    await asyncio.sleep(60)


async def die(endpoint: Any) -> None:
    """An owner that takes one header and goes."""
    await answer_probe(endpoint)
    await endpoint.recv(np.zeros(HEADER_BYTES, dtype=np.uint8), HEADER_CHANNEL)
    endpoint.close()


async def test_an_owner_that_hangs_lets_go_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "STALL_S", 0.2)
    worker = MemoryWorker()
    sending = SendingEnd(worker, Cache(GEOMETRY, BLOCKS), CHUNK)
    sending.sender.start(b"h" * 16, [Destination("", worker.listen(0, hang))])
    sending.sender.add(Push(b"h" * 16, 0, 0, SOURCE))
    sending.sender.add(Commit(b"h" * 16))
    await asyncio.sleep(0.1)
    # (1) The call is cancelled, twice, as engine and service do: that alone does not free what UCX may be reading.
    sending.sender.cancel(b"h" * 16)
    sending.sender.cancel(b"h" * 16)
    with pytest.raises(TimeoutError):
        await sending.done(0.05)
    # (2) The connection is given up, and with it the blocks are free.
    assert (await sending.done()).error == "cancelled"
    await sending.close()
    worker.close()


async def test_a_transfer_that_has_failed_is_not_lost_by_being_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "STALL_S", 0.3)
    worker = MemoryWorker()
    sending = SendingEnd(worker, Cache(GEOMETRY, BLOCKS), CHUNK)
    # (1) Two owners; one goes, which fails the transfer, and the other still has blocks of it in its hands.
    there = [Destination("", worker.listen(0, serve)) for serve in (hang, die)]
    sending.sender.start(b"f" * 16, there)
    sending.sender.add(Push(b"f" * 16, 0, 0, SOURCE))
    sending.sender.add(Commit(b"f" * 16))
    async with asyncio.timeout(5):
        while not sending.sender._transfers[b"f" * 16].cancelled:  # noqa: ASYNC110 - as failed ones are, at once
            await asyncio.sleep(0.01)
    # (2) The service cancels what it has given up; the engine still hears when the blocks are free, and why.
    sending.sender.cancel(b"f" * 16)
    assert "lost the KV owner" in (await sending.done()).error
    await sending.close()
    worker.close()


async def test_a_transfer_cancelled_under_its_checksum_gives_staging_back(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = MemoryWorker()
    sending, owning = (
        SendingEnd(worker, Cache(GEOMETRY, BLOCKS), CHUNK),
        OwningEnd(worker, Cache(GEOMETRY, BLOCKS), CHUNK),
    )
    # (1) Scattered blocks are gathered, and then summed for many turns of the loop.
    await sending.sender.peer(*owning.address)
    monkeypatch.setattr("tokenmesh.kv.checksum.SLICE_BYTES", 1)
    sending.sender.start(b"c" * 16, [Destination(*owning.address)])
    sending.sender.add(Push(b"c" * 16, 0, 0, [6, 3]))
    async with asyncio.timeout(10):
        while sending.sender._staging.qsize() == WINDOW:  # noqa: ASYNC110
            await asyncio.sleep(0)
    # (2) Cancelled meanwhile: nothing was sent, and nothing is lent (which closing asserts).
    sending.sender.cancel(b"c" * 16)
    done = await sending.done()
    assert (done.error, done.nbytes) == ("cancelled", 0)
    await sending.close()
    worker.close()
