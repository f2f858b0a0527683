"""A wire that damages, cuts, repeats and reorders: nothing of that is served, all of it is counted, nothing is left.

Whether payloads reach their blocks through staging memory, in place, or now this way and now that.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.unit.memory_wire import Cache, MemoryWorker, OwningEnd, SendingEnd, receive_in_place
from tests.unit.memory_wire import wire_settings as wire_settings
from tokenmesh.kv import receiver, wire
from tokenmesh.kv.geometry import BlockGeometry
from tokenmesh.kv.messages import Commit, Destination, Push, SendDone, Settled
from tokenmesh.kv.ucx import UcxEndpoint, UcxWorker
from tokenmesh.kv.wire import HEADER_BYTES, HEADER_CHANNEL, PAYLOAD_CHANNEL, PROBE_ID, Header, Kind

LAYERS, BLOCKS, SIZE = 4, 16, 256
GEOMETRY = BlockGeometry(LAYERS, 1, 16, 4, "float32", SIZE, "test")
CHUNK = 2 * SIZE
SOURCE, TARGET = [3, 4, 5, 6], [8, 9, 2, 12]
MESSAGES = LAYERS * len(SOURCE) * SIZE // CHUNK

pytestmark = pytest.mark.timeout(120)

Message = tuple[np.ndarray, np.ndarray]
Parts = list[tuple[np.ndarray, int]]


def whole(*messages: Message) -> Parts:
    return [part for header, payload in messages for part in ((header, HEADER_CHANNEL), (payload, PAYLOAD_CHANNEL))]


def flipped(data: np.ndarray, rng: random.Random) -> np.ndarray:
    data = data.copy()
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def flip_payload(rng: random.Random, this: Message, then: Message) -> Parts:
    return whole((this[0], flipped(this[1], rng)), then)


def flip_header(rng: random.Random, this: Message, then: Message) -> Parts:
    return whole((flipped(this[0], rng), this[1]), then)


def cut_payload(rng: random.Random, this: Message, then: Message) -> Parts:
    return whole((this[0], this[1][: rng.randrange(len(this[1]))]), then)


def cut_header(rng: random.Random, this: Message, then: Message) -> Parts:
    return whole((this[0][: rng.randrange(HEADER_BYTES)], this[1]), then)


def grow_payload(rng: random.Random, this: Message, then: Message) -> Parts:
    return whole((this[0], np.concatenate([this[1], this[1][: rng.randrange(1, len(this[1]))]])), then)


def repeat(rng: random.Random, this: Message, then: Message) -> Parts:
    return whole(this, then, this)


def repeat_header(rng: random.Random, this: Message, then: Message) -> Parts:
    return [(this[0], HEADER_CHANNEL), *whole(this, then)]


def repeat_payload(rng: random.Random, this: Message, then: Message) -> Parts:
    return [*whole(this), (this[1], PAYLOAD_CHANNEL), *whole(then)]


def swap(rng: random.Random, this: Message, then: Message) -> Parts:
    return whole(then, this)


def swap_payloads(rng: random.Random, this: Message, then: Message) -> Parts:
    return whole((this[0], then[1]), (then[0], this[1]))


Fault = Callable[[random.Random, Message, Message], Parts]

# How often each is injected into 10,000 transfers, and how its messages are counted at least; "": it does no harm.
FAULTS: list[tuple[Fault, int, str]] = [
    (flip_payload, 2480, "corrupt"),
    (flip_header, 2000, "bad_header"),
    (cut_payload, 1200, "corrupt"),
    (cut_header, 800, "bad_header"),
    (grow_payload, 500, "too_long"),
    (repeat, 1000, "duplicate"),
    # These two leave one end waiting for the other until the stall is noticed.
    (repeat_header, 10, "corrupt"),
    (repeat_payload, 10, "corrupt"),
    (swap, 1000, ""),
    (swap_payloads, 1000, "corrupt"),
]


STALLING = (repeat_header, repeat_payload)


def stall_s(kind: type[UcxWorker] | type[MemoryWorker], fault: Fault) -> float:
    """Short where a stall is waited for, ten times a test; elsewhere a busy machine must not look like one."""
    if kind is MemoryWorker:
        return 0.1 if fault in STALLING else 10.0
    # Over UCX what follows a repeated header brings it to light, and a little more time goes by without a fault.
    return 0.5 if fault is repeat_payload else 10.0


class FaultyEndpoint:
    """A sender's endpoint. Once armed, two messages of a transfer that follow each other go through the fault."""

    def __init__(self, inner: UcxEndpoint, arming: Arming) -> None:
        self._inner = inner
        self._arming = arming
        self.transport = inner.transport
        self._header: np.ndarray | None = None
        self._pending: list[tuple[Message, asyncio.Future[None]]] = []

    def send(self, buffer: np.ndarray, channel: int, bulk: bool = False) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if channel == HEADER_CHANNEL:
            header = Header.from_buffer(buffer)
            if header.kind is not Kind.DATA or header.transfer_id == PROBE_ID:
                return self._inner.send(buffer, channel, bulk)
            self._header = buffer
            done.set_result(None)
            return done
        if self._header is None:
            return self._inner.send(buffer, channel, bulk)
        self._pending.append(((self._header, buffer), done))
        self._header = None
        if self._arming.armed is None:
            self._submit(whole(self._pending[0][0]))
        elif len(self._pending) == 2:
            fault, self._arming.armed = self._arming.armed, None
            self._submit(fault(self._arming.rng, self._pending[0][0], self._pending[1][0]))
            self._arming.struck.set()
        return done

    def _submit(self, parts: Parts) -> None:
        """The future of a real send may wait for a receive that never comes; the owner's closing ends it."""
        sent = [self._inner.send(data, channel, channel == PAYLOAD_CHANNEL) for data, channel in parts]
        waiting, self._pending = [future for _, future in self._pending], []

        def ended(group: asyncio.Future[Any]) -> None:
            for future in waiting:
                if not future.done():
                    future.set_result(None)

        asyncio.gather(*sent, return_exceptions=True).add_done_callback(ended)

    def recv(self, buffer: np.ndarray, channel: int, bulk: bool = False) -> asyncio.Future[None]:
        return self._inner.recv(buffer, channel, bulk)

    def close(self) -> None:
        self._inner.close()


class Arming:
    """The fault that waits for its messages."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.armed: Fault | None = None
        self.struck = asyncio.Event()


@dataclass(frozen=True)
class Path:
    """How payloads reach their blocks: whether owners receive in place what lies in one piece, and what does."""

    name: str
    in_place: bool
    target: list[int]
    size: int = SIZE
    layers: int = 0
    """How many leave in one message; 0: each in two."""

    @property
    def chunk(self) -> int:
        """Largest messages, in bytes."""
        return (self.layers * len(SOURCE) or 2) * self.size

    @property
    def geometry(self) -> BlockGeometry:
        """Of blocks of that size."""
        return BlockGeometry(LAYERS, 1, 16, self.size // 64, "float32", self.size, "test")


STAGED = Path("staged", False, TARGET)
IN_PLACE = Path("in place", True, [8, 9, 2, 3])
BOTH = Path("both", True, TARGET)
JOINED = Path("joined", False, TARGET, layers=2)
# As large as what is received in place outside of tests.
LARGE = [replace(path, size=receiver.STAGED_BYTES // 2) for path in (IN_PLACE, BOTH)]


class Link:
    """A sender and an owner, and the wire between them."""

    def __init__(self, worker: UcxWorker | MemoryWorker, path: Path) -> None:
        self.arming = Arming(11)
        self.target = path.target
        source, target, chunk = Cache(path.geometry, BLOCKS), Cache(path.geometry, BLOCKS), path.chunk
        self.sending = SendingEnd(worker, source, chunk, lambda e: FaultyEndpoint(e, self.arming))
        self.owning = OwningEnd(worker, target, chunk)
        self.tickets = (number.to_bytes(16, "big") for number in itertools.count(1))
        self.sending.cache.data[:] = np.random.default_rng(5).integers(1, 256, self.sending.cache.data.shape)

    @property
    def arrived(self) -> bool:
        """The target's blocks are those of the source."""
        return bool((self.owning.cache.data[:, self.target] == self.sending.cache.data[:, SOURCE]).all())

    async def transfer(self, fault: Fault | None) -> tuple[SendDone, Settled]:
        """One transfer with one fault, settled the moment the sender has its answer."""
        ticket, sender = next(self.tickets), self.sending.sender
        self.owning.cache.data[:] = 0
        self.arming.armed = fault
        self.arming.struck.clear()
        self.owning.expect(ticket, self.target)
        sender.start(ticket, [Destination(*self.owning.address)])
        for layer in range(LAYERS):
            sender.add(Push(ticket, layer, 0, SOURCE))
        sender.add(Commit(ticket))
        if fault is not None:
            # Until then the sender may have to connect anew.
            await asyncio.wait_for(self.arming.struck.wait(), 20)
        try:
            done = await self.sending.done(0.3 if fault in STALLING else 20)
        except TimeoutError:
            # The deadline of the call that asked for the transfer.
            sender.cancel(ticket)
            done = await self.sending.done()
        return done, await self.owning.settle(ticket)


@asynccontextmanager
async def link(kind: type[UcxWorker] | type[MemoryWorker], path: Path, fault: Fault) -> AsyncIterator[Link]:
    """Ends by proving that nothing is left, and that payloads came the way they should."""
    worker = kind()
    with pytest.MonkeyPatch.context() as patch, closing(worker):
        patch.setattr(wire, "STALL_S", stall_s(kind, fault))
        claims = receive_in_place(patch, 2 * path.size if path.in_place else None)
        made = Link(worker, path)
        yield made
        await made.sending.close()
        async with asyncio.timeout(10):
            # The owner hears of the closed connection a moment later.
            while not made.owning.idle():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert (claims[True] > 0) == path.in_place


async def inject(at: Link, fault: Fault, times: int, reason: str) -> None:
    """Injects a fault into as many transfers."""
    counted: dict[str, int] = {}
    for _ in range(times):
        done, settled = await at.transfer(fault)
        # (1) Complete means: every byte is what the sender had. Anything else is not complete.
        assert settled.complete == (settled.error == "")
        assert not settled.complete or at.arrived
        # (2) What does no harm is served, what does is not; the sender never takes a refusal for a receipt.
        assert settled.complete == (reason in ("", "duplicate"))
        assert settled.complete or done.error
        # (3) Blocks that are not the ticket's are never touched.
        others = [block for block in range(BLOCKS) if block not in at.target]
        assert not at.owning.cache.data[:, others].any()
        for name, number in settled.dropped.items():
            counted[name] = counted.get(name, 0) + number
    # (4) The next transfer is as good as any, and brings what came in late.
    settled = await healthy(at)
    assert settled.complete
    assert at.arrived
    for name, number in settled.dropped.items():
        counted[name] = counted.get(name, 0) + number
    # (5) All are counted by reason.
    counted.pop("probe", None)
    assert counted.get(reason, 0) >= times if reason else not counted
    if reason in ("corrupt", "duplicate") and fault in (flip_payload, cut_payload, repeat):
        assert counted == {reason: times}


async def healthy(at: Link) -> Settled:
    """A transfer without a fault; that a connection is out of step shows at the next transfer's first message."""
    _, settled = await at.transfer(None)
    return settled if settled.complete else (await at.transfer(None))[1]


@pytest.mark.parametrize("path", [STAGED, IN_PLACE, BOTH, JOINED], ids=lambda path: path.name)
@pytest.mark.parametrize(("fault", "times", "reason"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
async def test_ten_thousand_faults(fault: Fault, times: int, reason: str, path: Path) -> None:
    async with link(MemoryWorker, path, fault) as at:
        await inject(at, fault, times if path is not JOINED else -(-times // 4), reason)


@pytest.mark.parametrize("path", [STAGED, *LARGE], ids=lambda path: path.name)
@pytest.mark.parametrize(("fault", "times", "reason"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
async def test_the_same_over_ucx(fault: Fault, times: int, reason: str, path: Path) -> None:
    async with link(UcxWorker, path, fault) as at:
        await inject(at, fault, min(20, times), reason)
