"""The receiving half of a mover: lets ticket holders write blocks, checks what they write, and says so.

A late or repeated message cannot touch a block that was given to somebody else, whatever the sender does. Where this
process itself copies what arrives (see `DIRECT`), a payload is received in place: into blocks of an open ticket, each
of them once. A ticket with such a receive is settled when UCX has let go of the blocks, for which its sender's endpoint
is closed if need be. Everything else is received into staging memory and copied while the ticket is open, within one
turn of the event loop, and so is settling.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Callable

import numpy as np
import structlog

from tokenmesh.kv.checksum import checksum
from tokenmesh.kv.memory import Buffer, KvMemory
from tokenmesh.kv.messages import Expect, Settled
from tokenmesh.kv.relay import Relays
from tokenmesh.kv.stopwatch import Stopwatch
from tokenmesh.kv.ucx import UcxEndpoint, UcxError
from tokenmesh.kv.wire import HEADER_BYTES, HEADER_CHANNEL, PAYLOAD_CHANNEL, Header, Kind, WireError

log = structlog.get_logger()

DIRECT = frozenset(("sysv", "posix", "tcp"))
"""Transports with which only progress of the receiver's own worker writes into a posted buffer, so that nothing does
once the endpoint is closed. Others let the sender, or a device on its behalf, write by itself."""

DIRECT_BYTES = 512 << 10
"""Smaller payloads are staged, which costs little while they fit into a core's cache. UCX must send by rendezvous what
is received in place: parts of an eager message may be taken in even when its endpoint is closed."""

LET_GO_S = 1.0
"""How long settling waits for payloads that are on their way before it closes their endpoints; then again for UCX."""


class _Ticket:
    """Blocks that one transfer may write once."""

    def __init__(self, blocks: list[int], layers: int) -> None:
        self.blocks = blocks
        self.missing = np.ones((layers, len(blocks)), dtype=bool)
        self.free = self.missing.copy()
        """Neither here nor being received in place."""
        self.writes: dict[asyncio.Task[None], UcxEndpoint] = {}
        """Receives in place that are under way, and whom they come from."""
        self.bytes = 0
        self.bad = 0
        self.error = ""
        self.wire = Stopwatch()
        self.transport = ""

    @property
    def complete(self) -> bool:
        return not self.error and not self.missing.any()


class Receiver:
    """All transfers that arrive at this mover."""

    def __init__(
        self,
        shard: int,
        memory: KvMemory,
        chunk_bytes: int,
        window: int,
        report: Callable[[Settled], None],
        relays: Relays | None = None,
    ) -> None:
        """`relays`: tickets whose messages go on to another owner."""
        self._relays = relays or Relays()
        self._shard = shard
        self._memory = memory
        self._report = report
        self._tickets: dict[bytes, _Ticket] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()
        """Dropped messages by reason: stray, duplicate, corrupt, out_of_range."""
        # Chunks are cut by the sender at its own block count, but never above the larger of these two.
        self._limit = max(chunk_bytes, memory.geometry.block_bytes, 4 << 20)
        self._staging: asyncio.Queue[Buffer] = asyncio.Queue()
        for _ in range(window):
            self._staging.put_nowait(np.zeros(self._limit, dtype=np.uint8))

    @property
    def open(self) -> int:
        """Tickets not yet settled."""
        return len(self._tickets) + len(self._settling)

    def expect(self, message: Expect) -> None:
        """Opens a ticket."""
        self._tickets[message.transfer_id] = _Ticket(message.blocks, self._memory.geometry.layers)

    def settle(self, transfer_id: bytes) -> None:
        """Closes a ticket, and reports it as soon as nothing writes its blocks any more."""
        self._relays.close(transfer_id)
        ticket = self._tickets.pop(transfer_id, None)
        if ticket is None:
            self._report(Settled(transfer_id, self._shard, False, "unknown transfer", 0, 0, 0.0, "", 0))
        elif ticket.writes:
            task = asyncio.create_task(self._settle_later(transfer_id, ticket))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)
        else:
            self._report_settled(transfer_id, ticket)

    async def _settle_later(self, transfer_id: bytes, ticket: _Ticket) -> None:
        _, late = await asyncio.wait(ticket.writes, timeout=LET_GO_S)
        for endpoint in {ticket.writes[write] for write in late}:
            log.warning("kv sender stopped within a message", transport=endpoint.transport)
            endpoint.close()
        if late:
            _, stuck = await asyncio.wait(late, timeout=LET_GO_S)
            if stuck:
                # The service takes a mover that is silent for dead and uses the blocks again: so it must be.
                log.critical("UCX does not let go of KV blocks")
                os._exit(1)
        self._report_settled(transfer_id, ticket)

    def _report_settled(self, transfer_id: bytes, ticket: _Ticket) -> None:
        error = ticket.error
        if not error and not ticket.complete:
            error = f"{int(ticket.missing.sum())} of {ticket.missing.size} block layers did not arrive"
        self._report(
            Settled(
                transfer_id,
                self._shard,
                ticket.complete,
                error,
                ticket.bytes,
                int((~ticket.missing).sum()),
                ticket.wire.seconds,
                ticket.transport,
                ticket.bad,
            )
        )

    async def serve(self, endpoint: UcxEndpoint) -> None:
        """Reads one sender's messages until it goes away; the caller closes the endpoint."""
        applied: set[asyncio.Task[None]] = set()
        relayed: set[asyncio.Task[None]] = set()
        raw = np.empty(HEADER_BYTES, dtype=np.uint8)
        try:
            while True:
                await endpoint.recv(raw, HEADER_CHANNEL)
                header = Header.from_buffer(raw)
                if header.kind is Kind.DATA:
                    if not 0 < header.length <= self._limit:
                        raise WireError(f"payload of {header.length} bytes")
                    # Submitted here and now: payloads must be received in the order of their headers.
                    ticket = self._tickets.get(header.transfer_id)
                    place = self._claim(header, ticket, endpoint.transport)
                    if ticket is not None and place is not None:
                        received = endpoint.recv(place, PAYLOAD_CHANNEL, bulk=True)
                        task = asyncio.create_task(self._receive_in_place(received, header, place, ticket))
                        ticket.writes[task] = endpoint
                        task.add_done_callback(ticket.writes.pop)
                    else:
                        staging = await self._staging.get()
                        received = endpoint.recv(staging[: header.length], PAYLOAD_CHANNEL, bulk=True)
                        task = asyncio.create_task(self._receive(received, header, staging, endpoint.transport))
                    applied.add(task)
                    task.add_done_callback(applied.discard)
                elif header.kind is Kind.COMMIT:
                    await asyncio.gather(*applied)
                    if header.transfer_id in self._relays:
                        # The owner may be slow, and this sender's other transfers must not wait for it.
                        task = asyncio.create_task(self._relay_commit(header, endpoint))
                        relayed.add(task)
                        task.add_done_callback(relayed.discard)
                        continue
                    ticket = self._tickets.get(header.transfer_id)
                    whole = header.intact() and ticket is not None and ticket.complete
                    await self._answer(header, whole, endpoint)
        except WireError as error:
            log.warning("kv sender out of step", error=str(error))
        except UcxError as error:
            log.info("kv sender gone", error=str(error))
        finally:
            await asyncio.gather(*applied, *relayed, return_exceptions=True)

    @staticmethod
    async def _answer(header: Header, whole: bool, endpoint: UcxEndpoint) -> None:
        answer = Header(Kind.RECEIPT, header.transfer_id, first=int(whole))
        await endpoint.send(answer.sealed().to_buffer(), HEADER_CHANNEL)

    async def _relay_commit(self, header: Header, endpoint: UcxEndpoint) -> None:
        whole = await self._relays.commit(header)
        with contextlib.suppress(UcxError):
            await self._answer(header, whole, endpoint)

    async def _receive(self, received: asyncio.Future[None], header: Header, staging: Buffer, transport: str) -> None:
        ticket = self._tickets.get(header.transfer_id)
        try:
            with ticket.wire.message() if ticket is not None else contextlib.nullcontext():
                await received
            if header.transfer_id in self._relays:
                await self._relays.forward(header, staging[: header.length])
            else:
                self._apply(header, staging[: header.length], transport)
        finally:
            self._staging.put_nowait(staging)

    def _fits(self, header: Header, ticket: _Ticket) -> bool:
        geometry = self._memory.geometry
        return (
            header.layer < geometry.layers
            and header.first + header.blocks <= len(ticket.blocks)
            and header.length == header.blocks * geometry.block_bytes
        )

    def _claim(self, header: Header, ticket: _Ticket | None, transport: str) -> Buffer | None:
        """The blocks that a payload may be received into, for it alone from now on; None if it must be staged."""
        if (
            ticket is None
            or ticket.error
            or header.length < DIRECT_BYTES
            or header.transfer_id in self._relays
            or not DIRECT.issuperset(transport.split(","))
            or not self._fits(header, ticket)
        ):
            return None
        stop = header.first + header.blocks
        free = ticket.free[header.layer, header.first : stop]
        place = self._memory.contiguous(header.layer, ticket.blocks[header.first : stop])
        if place is None or not free.all():
            return None
        free[:] = False
        ticket.transport = transport
        return place

    async def _receive_in_place(
        self, received: asyncio.Future[None], header: Header, place: Buffer, ticket: _Ticket
    ) -> None:
        try:
            with ticket.wire.message():
                await received
        except UcxError as error:
            # The blocks stay missing, and claimed.
            log.debug("kv payload lost with its sender", error=str(error))
            return
        if await checksum(place, header.seed) == header.checksum:
            ticket.missing[header.layer, header.first : header.first + header.blocks] = False
            ticket.bytes += header.length
        else:
            ticket.error = f"message {header.sequence} is corrupt"
            ticket.bad += 1
            self.counts["corrupt"] += 1

    def _apply(self, header: Header, payload: Buffer, transport: str) -> None:
        """Copies a payload into its blocks, or drops and counts it. Never awaits: see the module's docstring."""
        ticket = self._tickets.get(header.transfer_id)
        if ticket is None:
            self.counts["probe" if header.transfer_id == bytes(16) else "stray"] += 1
            return
        ticket.transport = transport
        stop = header.first + header.blocks
        if not header.intact(payload):
            ticket.error = f"message {header.sequence} is corrupt"
            reason = "corrupt"
        elif not self._fits(header, ticket):
            ticket.error = f"message {header.sequence} points outside its ticket"
            reason = "out_of_range"
        elif not ticket.free[header.layer, header.first : stop].all():
            reason = "duplicate"
        else:
            self._memory.scatter(header.layer, ticket.blocks[header.first : stop], payload)
            ticket.free[header.layer, header.first : stop] = False
            ticket.missing[header.layer, header.first : stop] = False
            ticket.bytes += header.length
            return
        ticket.bad += 1
        self.counts[reason] += 1
