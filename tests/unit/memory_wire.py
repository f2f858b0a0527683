"""A wire in memory that behaves as UCX does at the seam of UcxEndpoint, and a sender and an owner on either wire."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tokenmesh.kv import transports
from tokenmesh.kv.geometry import BlockGeometry, LayerSpan
from tokenmesh.kv.memory import KvMemory
from tokenmesh.kv.messages import Connected, Expect, SendDone, Settled

SETTINGS = transports.environment("auto")

# UCX reads its environment here, and again as a worker is made. What other tests start has settings of its own.
with transports.in_environment(SETTINGS):
    from tokenmesh.kv import receiver as receiver_module
    from tokenmesh.kv import sender as sender_module
    from tokenmesh.kv.receiver import Receiver
    from tokenmesh.kv.sender import Sender
    from tokenmesh.kv.ucx import TooLongError, UcxEndpoint, UcxError, UcxWorker

WINDOW = 4
PROBE_BYTES = 4096


@pytest.fixture(autouse=True, scope="module")
def wire_settings() -> Iterator[None]:
    """UCX's, and probes that take no time: for the tests of every module that imports this, and for no others."""
    with transports.in_environment(SETTINGS), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sender_module, "PROBE_BYTES", PROBE_BYTES)
        yield


class MemoryEndpoint:
    """One end. A send is done when it was received, as in UCX's rendezvous: until then its buffer is not copied."""

    transport = "memory"

    def __init__(self) -> None:
        self.other: MemoryEndpoint
        self._arrived: dict[int, deque[tuple[np.ndarray, asyncio.Future[None]]]] = {}
        self._wanted: dict[int, deque[tuple[np.ndarray, asyncio.Future[None]]]] = {}
        self._closed = False

    @classmethod
    def pair(cls) -> tuple[MemoryEndpoint, MemoryEndpoint]:
        one, two = cls(), cls()
        one.other, two.other = two, one
        return one, two

    def send(self, buffer: np.ndarray, channel: int, bulk: bool = False) -> asyncio.Future[None]:
        return self.other._match(channel, self.other._arrived, buffer)

    def recv(self, buffer: np.ndarray, channel: int, bulk: bool = False) -> asyncio.Future[None]:
        return self._match(channel, self._wanted, buffer)

    def _match(self, channel: int, queues: Any, buffer: np.ndarray) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(UcxError("closed"))
            return future
        queues.setdefault(channel, deque()).append((buffer, future))
        arrived, wanted = self._arrived.get(channel), self._wanted.get(channel)
        while arrived and wanted:
            (message, sent), (room, received) = arrived.popleft(), wanted.popleft()
            room[: len(message)] = message[: len(room)]
            if not received.done():
                if len(message) > len(room):
                    received.set_exception(TooLongError("message truncated"))
                else:
                    received.set_result(None)
            if not sent.done():
                sent.set_result(None)
        return future

    def close(self) -> None:
        for end in (self, self.other):
            end._closed = True
            for queues in (end._arrived, end._wanted):
                for queue in queues.values():
                    for _, future in queue:
                        if not future.done():
                            future.set_exception(UcxError("closed"))
                queues.clear()


class MemoryWorker:
    """As much of UcxWorker as a sender and a receiver use."""

    def __init__(self) -> None:
        self._serving: dict[int, Callable[[Any], Awaitable[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self, port: int, serve: Callable[[Any], Awaitable[None]]) -> int:
        number = len(self._serving) + 1
        self._serving[number] = serve
        return number

    async def connect(self, host: str, port: int, timeout: float = 5.0) -> MemoryEndpoint:
        mine, theirs = MemoryEndpoint.pair()
        task = asyncio.ensure_future(self._serving[port](theirs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return mine

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


Wrap = Callable[[Any], Any]


class _Wrapped:
    """A worker whose outgoing endpoints go through `wrap`."""

    def __init__(self, worker: UcxWorker | MemoryWorker, wrap: Wrap) -> None:
        self._worker = worker
        self._wrap = wrap

    async def connect(self, host: str, port: int) -> UcxEndpoint:
        return self._wrap(await self._worker.connect(host, port))  # type: ignore[no-any-return]


class Cache:
    """A shard's KV memory; `data` is [layers, blocks, bytes of a block]."""

    def __init__(self, geometry: BlockGeometry, blocks: int) -> None:
        size = geometry.block_bytes
        self.geometry = geometry
        self.data = np.zeros((geometry.layers, blocks, size), dtype=np.uint8)
        spans = [LayerSpan(layer * blocks * size, size) for layer in range(geometry.layers)]
        self.memory = KvMemory(self.data.reshape(-1), geometry, spans)


class SendingEnd:
    """A real Sender and what it reports."""

    def __init__(self, worker: UcxWorker | MemoryWorker, cache: Cache, chunk: int, wrap: Wrap = lambda e: e) -> None:
        self.cache = cache
        self.reports: asyncio.Queue[SendDone | Connected] = asyncio.Queue()
        wrapped: Any = _Wrapped(worker, wrap)
        self.sender = Sender(wrapped, cache.memory, chunk, WINDOW, self.reports.put_nowait)

    async def done(self, timeout: float = 20) -> SendDone:
        report = await asyncio.wait_for(self.reports.get(), timeout)
        assert isinstance(report, SendDone)
        return report

    async def close(self) -> None:
        assert self.sender.open == 0
        assert self.sender._staging.qsize() == WINDOW
        await self.sender.close()


class OwningEnd:
    """A real Receiver and what it reports."""

    def __init__(self, worker: UcxWorker | MemoryWorker, cache: Cache, chunk: int, shard: int = 0) -> None:
        self.cache = cache
        self.reports: list[Settled] = []
        self.receiver = Receiver(shard, cache.memory, chunk, WINDOW, self.reports.append)
        self.address = ("127.0.0.1", worker.listen(0, self.receiver.serve))

    def expect(self, ticket: bytes, blocks: list[int], codec: str = "none") -> None:
        self.receiver.expect(Expect(ticket, blocks, codec))

    async def settle(self, ticket: bytes) -> Settled:
        """Reported at once, unless something is being received into the ticket's blocks."""
        self.receiver.settle(ticket)
        async with asyncio.timeout(10):
            while not self.reports or self.reports[-1].transfer_id != ticket:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return self.reports[-1]

    def idle(self) -> bool:
        """No ticket open, no staging lent."""
        return self.receiver.open == 0 and self.receiver._staging.qsize() == WINDOW


def receive_in_place(patch: pytest.MonkeyPatch, smallest: int | None) -> Counter[bool]:
    """Lets owners receive messages of `smallest` bytes or more in place, over the wire in memory too; None: nothing.

    Returns how many payloads are (True) and are not (False), of those under a ticket.
    """
    claims: Counter[bool] = Counter()
    claim = Receiver._claim

    def counted(receiver: Receiver, *arguments: Any) -> Any:
        place = claim(receiver, *arguments)
        claims[place is not None] += 1
        return place

    patch.setattr(Receiver, "_claim", counted)
    direct = frozenset() if smallest is None else receiver_module.DIRECT | {"memory"}
    patch.setattr(receiver_module, "DIRECT", direct)
    patch.setattr(receiver_module, "STAGED_BYTES", smallest or 0)
    return claims
