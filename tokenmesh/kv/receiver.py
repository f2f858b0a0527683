"""The receiving half of a mover: lets ticket holders write blocks, checks what they write, and says so.

A late or repeated message cannot touch a block that was given to somebody else, whatever the sender does. Where this
process itself copies what arrives (see `DIRECT`), a payload is received in place: into blocks of an open ticket, each
of them once. A ticket with such a receive is settled when UCX has let go of the blocks, for which its sender's endpoint
is closed if need be. Everything else is received into staging memory and copied while the ticket is open, within one
turn of the event loop, and so is settling.

Headers and payloads are matched by their order. Where that may be lost (a damaged header, a payload of another length,
wrong checksums in transfer after transfer) the endpoint is closed: its transfers fail, and the sender connects anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import structlog

from tokenmesh.kv import wire
from tokenmesh.kv.codecs import NAMES, CodecError, make_codec
from tokenmesh.kv.inlet import Inlet
from tokenmesh.kv.memory import STAGED_BYTES, BlockMemory, Heads, Payload
from tokenmesh.kv.messages import Expect, Settled, Synced
from tokenmesh.kv.relay import Relays
from tokenmesh.kv.ticket import Ticket
from tokenmesh.kv.ucx import TooLongError, UcxEndpoint, UcxError
from tokenmesh.kv.wire import HEADER_BYTES, HEADER_CHANNEL, PAYLOAD_CHANNEL, PROBE_ID, Header, Kind, WireError

log = structlog.get_logger()


DIRECT = frozenset(("sysv", "posix", "tcp"))
"""Transports with which only progress of the receiver's own worker writes into a posted buffer, so that nothing does
once the endpoint is closed. Others let the sender, or a device on its behalf, write by itself."""

LET_GO_S = 1.0
"""How long settling waits for payloads that are on their way before it closes their endpoints; then again for UCX."""


class Receiver:
    """All transfers that arrive at this mover."""

    def __init__(
        self,
        shard: int,
        memory: BlockMemory,
        chunk_bytes: int,
        window: int,
        report: Callable[[Settled | Synced], None],
        relays: Relays | None = None,
    ) -> None:
        """`relays`: tickets whose messages go on to another owner."""
        self._relays = relays or Relays()
        self._shard = shard
        self._memory = memory
        self._report = report
        self._tickets: dict[bytes, Ticket] = {}
        self.counts: Counter[str] = Counter()
        """Dropped messages by reason: stray, probe, duplicate, corrupt, out_of_range, undecodable, too_long, stalled,
        bad_header."""
        self._told: Counter[str] = Counter()
        self._settling: dict[bytes, asyncio.Task[None]] = {}
        # What a message may have, and staging memory be used for, without a ticket.
        self._limit = max(chunk_bytes, memory.geometry.block_bytes, 4 << 20)
        self._staging: asyncio.Queue[Payload] = asyncio.Queue()
        for buffer in memory.buffers(window, self._limit):
            self._staging.put_nowait(buffer)

    @property
    def open(self) -> int:
        """Tickets not yet settled."""
        return len(self._tickets) + len(self._settling)

    def expect(self, message: Expect) -> None:
        """Opens a ticket."""
        geometry = self._memory.geometry
        self._tickets[message.transfer_id] = Ticket(message.blocks, geometry.layers, geometry.kv_heads, message.codec)

    def sync(self, transfer_id: bytes) -> None:
        """Answers, which says that tickets sent before are open."""
        self._report(Synced(transfer_id, self._shard))

    def settle(self, transfer_id: bytes) -> None:
        """Closes a ticket, and reports it as soon as nothing writes its blocks any more."""
        if transfer_id in self._settling:
            # Asked again; the report is still to come.
            return
        self._relays.close(transfer_id)
        ticket = self._tickets.pop(transfer_id, None)
        if ticket is None:
            self._report(
                Settled(transfer_id, self._shard, False, "unknown transfer", 0, 0, 0.0, "", 0, self._dropped())
            )
        elif ticket.writes:
            task = self._settling[transfer_id] = asyncio.create_task(self._settle_later(transfer_id, ticket))
            task.add_done_callback(lambda _: self._settling.pop(transfer_id))
        else:
            self._report_settled(transfer_id, ticket)

    async def _settle_later(self, transfer_id: bytes, ticket: Ticket) -> None:
        _, late = await asyncio.wait(ticket.writes, timeout=LET_GO_S)
        for endpoint in {ticket.writes[write] for write in late if write in ticket.writes}:
            log.warning("kv sender stopped within a message", transport=endpoint.transport)
            endpoint.close()
        if late:
            _, stuck = await asyncio.wait(late, timeout=LET_GO_S)
            if stuck:
                # The service takes a mover that is silent for dead and uses the blocks again: so it must be.
                log.critical("UCX does not let go of KV blocks")
                os._exit(1)
        self._report_settled(transfer_id, ticket)

    def _report_settled(self, transfer_id: bytes, ticket: Ticket) -> None:
        error = ticket.error
        missing = ticket.missing.any(axis=2)
        if not error and missing.any():
            error = f"{int(missing.sum())} of {missing.size} block layers did not arrive"
        self._report(
            Settled(
                transfer_id,
                self._shard,
                ticket.complete,
                error,
                ticket.bytes,
                int((~missing).sum()),
                ticket.wire.seconds,
                ticket.transport,
                ticket.bad,
                self._dropped(),
            )
        )

    def _dropped(self) -> dict[str, int]:
        """What was dropped since this was last asked."""
        news, self._told = self.counts - self._told, self.counts.copy()
        return dict(news)

    async def serve(self, endpoint: UcxEndpoint) -> None:
        """Reads one sender's messages until it goes away or is out of step, and closes the endpoint."""
        inlet = Inlet(endpoint)
        raw = np.empty(HEADER_BYTES, dtype=np.uint8)
        try:
            while True:
                # A message that is too short must not be completed by the one before it.
                raw[:] = 0
                await endpoint.recv(raw, HEADER_CHANNEL)
                await self._take(Header.from_buffer(raw), inlet)
        except (WireError, TooLongError) as error:
            self.counts["bad_header"] += 1
            log.warning("kv sender out of step", error=str(error))
        except UcxError as error:
            log.info("kv sender gone", error=str(error))
        finally:
            # First, since a payload that never comes would be waited for.
            endpoint.close()
            await asyncio.gather(*inlet.applied, *inlet.relayed, return_exceptions=True)

    async def _take(self, header: Header, inlet: Inlet) -> None:
        """Handles one header; for DATA submits the receive of what follows it. Raises WireError."""
        if header.kind is Kind.DATA:
            known = header.transfer_id in self._tickets or header.transfer_id in self._relays
            if not 0 < header.length <= (wire.LARGEST_PAYLOAD if known else self._limit):
                raise WireError(f"payload of {header.length} bytes")
            ticket = self._tickets.get(header.transfer_id)
            place = self._claim(header, ticket, inlet.endpoint.transport) if ticket is not None else None
            # Either way submitted here: payloads must be received in the order of their headers.
            if ticket is not None and place is not None:
                received = inlet.endpoint.recv(place, PAYLOAD_CHANNEL, bulk=True)
                task = inlet.start(inlet.applied, self._receive_in_place(received, header, place, ticket, inlet))
                ticket.writes[task] = inlet.endpoint
                task.add_done_callback(ticket.writes.pop)
                return
            staging = await self._staging.get()
            if len(staging) < header.length:
                # Its sender is configured to send larger messages than we are.
                try:
                    (larger,) = self._memory.buffers(1, header.length)
                except BaseException:
                    self._staging.put_nowait(staging)
                    raise
                staging = larger
            received = inlet.endpoint.recv(staging[: header.length], PAYLOAD_CHANNEL, bulk=True)
            inlet.start(inlet.applied, self._receive(received, header, staging, inlet))
        elif header.kind is Kind.COMMIT:
            await asyncio.gather(*inlet.applied)
            if header.transfer_id in self._relays:
                # The owner may be slow, and this sender's other transfers must not wait for it.
                inlet.start(inlet.relayed, self._relay_commit(header, inlet.endpoint))
                return
            ticket = self._tickets.get(header.transfer_id)
            whole = header.intact() and ticket is not None and ticket.has(self._heads(header))
            await self._answer(header, whole, inlet.endpoint)
        else:
            raise WireError(f"{header.kind.name} is not for an owner")

    @staticmethod
    async def _answer(header: Header, whole: bool, endpoint: UcxEndpoint) -> None:
        answer = Header(Kind.RECEIPT, header.transfer_id, first=int(whole), head=header.head, heads=header.heads)
        await endpoint.send(answer.sealed().to_buffer(), HEADER_CHANNEL)

    async def _relay_commit(self, header: Header, endpoint: UcxEndpoint) -> None:
        whole = await self._relays.commit(header)
        with contextlib.suppress(UcxError):
            await self._answer(header, whole, endpoint)

    async def _receive(self, received: asyncio.Future[None], header: Header, staging: Payload, inlet: Inlet) -> None:
        ticket = self._tickets.get(header.transfer_id)
        try:
            with ticket.wire.message() if ticket is not None else contextlib.nullcontext():
                await asyncio.wait({received}, timeout=wire.STALL_S)
            if not received.done():
                # Its sender hangs, and would hold staging memory that others need.
                self._drop(self._tickets.get(header.transfer_id), "stalled")
                inlet.endpoint.close()
            await received
            if header.transfer_id in self._relays:
                await self._relays.forward(header, staging[: header.length])
            else:
                payload = staging[: header.length]
                known = header.transfer_id in self._tickets
                intact = known and await self._memory.checksum(payload, header.seed) == header.checksum
                raw = await self._decode(header, payload) if header.codec and intact else payload
                reason = self._apply(header, raw, intact, inlet.endpoint.transport)
                await self._written(header, inlet)
                self._judge(header, reason, inlet)
        except TooLongError:
            self._drop(self._tickets.get(header.transfer_id), "too_long")
            inlet.endpoint.close()
        except UcxError as error:
            log.debug("kv payload lost with its sender", error=str(error))
        finally:
            self._staging.put_nowait(staging)

    async def _written(self, header: Header, inlet: Inlet) -> None:
        """Holds the ticket open until what was copied is in its place."""
        ticket, task = self._tickets.get(header.transfer_id), asyncio.current_task()
        if ticket is not None and task is not None:
            ticket.writes[task] = inlet.endpoint
            try:
                await self._memory.landed()
            finally:
                del ticket.writes[task]

    def _claim(self, header: Header, ticket: Ticket, transport: str) -> Payload | None:
        """The blocks that a payload may be received into, for it alone from now on; None if it must be staged."""
        if (
            ticket.error
            or header.codec != 0
            or header.length < STAGED_BYTES
            or header.layers != 1
            or header.transfer_id in self._relays
            or not (DIRECT | self._memory.direct).issuperset(transport.split(","))
            or not self._fits(header, ticket)
        ):
            return None
        blocks = ticket.part(header.first, header.blocks)
        place = self._memory.view(header.layer, blocks, self._heads(header))
        free = self._part(ticket.free, header)
        if place is None or not free.all():
            return None
        free[:] = False
        ticket.transport = transport
        return place

    async def _receive_in_place(
        self, received: asyncio.Future[None], header: Header, place: Payload, ticket: Ticket, inlet: Inlet
    ) -> None:
        # Whatever goes wrong here, the blocks stay missing, and claimed.
        try:
            with ticket.wire.message():
                await asyncio.wait({received}, timeout=wire.STALL_S)
            if not received.done():
                self._drop(ticket, "stalled")
                inlet.endpoint.close()
            await received
        except UcxError as error:
            if isinstance(error, TooLongError):
                self._drop(ticket, "too_long")
            log.debug("kv payload lost with its sender", error=str(error))
            inlet.endpoint.close()
            self._memory.quiesce()
            return
        reason = ""
        if await self._memory.checksum(place, header.seed) == header.checksum:
            self._part(ticket.missing, header)[:] = False
            ticket.bytes += header.length
        else:
            ticket.error = f"message {header.sequence} is corrupt"
            reason = self._drop(ticket, "corrupt")
        self._judge(header, reason, inlet)

    @staticmethod
    def _judge(header: Header, reason: str, inlet: Inlet) -> None:
        inlet.judge(header.transfer_id, reason)
        if reason not in ("", "probe", "stray"):
            log.info(
                "kv message dropped",
                reason=reason,
                transfer=header.transfer_id.hex()[:8],
                sequence=header.sequence,
                layer=header.layer,
                layers=header.layers,
                first=header.first,
                blocks=header.blocks,
            )

    def _part(self, flags: npt.NDArray[np.bool_], header: Header) -> npt.NDArray[np.bool_]:
        """What a message is about, of an array [layers, blocks, KV heads]; a view."""
        heads = self._heads(header)
        return flags[
            header.layer : header.layer + header.layers,
            header.first : header.first + header.blocks,
            heads.first : heads.first + heads.count,
        ]

    def _heads(self, header: Header) -> Heads:
        return Heads(header.head, header.heads) if header.heads else self._memory.all_heads

    def _nbytes(self, header: Header) -> int:
        """Of what a message is about, as it lies in the cache."""
        return header.layers * self._memory.nbytes(header.blocks, self._heads(header))

    def _fits(self, header: Header, ticket: Ticket) -> bool:
        """Whether a message names nothing but what its ticket allows."""
        geometry, heads = self._memory.geometry, self._heads(header)
        return (
            0 < header.layers <= geometry.layers - header.layer
            and header.first + header.blocks <= len(ticket.blocks)
            and heads.first + heads.count <= geometry.kv_heads
            and (heads == self._memory.all_heads or geometry.by_head)
            and header.codec in ticket.codecs
            and (header.codec != 0 or header.length == self._nbytes(header))
        )

    async def _decode(self, header: Header, payload: Payload) -> Payload | None:
        """A payload as it will lie in the cache; None if it cannot be one. In a thread, since it takes its time."""
        ticket = self._tickets.get(header.transfer_id)
        if ticket is None or not self._fits(header, ticket):
            return None
        codec = make_codec(NAMES[header.codec], self._memory.geometry)
        assert codec is not None
        nbytes = self._nbytes(header)
        try:
            return await asyncio.to_thread(codec.decode, payload, nbytes)
        except CodecError as error:
            log.warning("kv payload not decoded", error=str(error))
            return None

    def _drop(self, ticket: Ticket | None, reason: str) -> str:
        self.counts[reason] += 1
        if ticket is not None:
            ticket.bad += 1
        return reason

    def _apply(self, header: Header, raw: Payload | None, intact: bool, transport: str) -> str:
        """Copies a decoded payload into its blocks, or drops and counts it; returns the reason, empty if it was copied.

        `intact`: it had the right checksum. Never awaits: see the module's docstring.
        """
        ticket = self._tickets.get(header.transfer_id)
        if ticket is None:
            return self._drop(None, "probe" if header.transfer_id == PROBE_ID else "stray")
        ticket.transport = transport
        if not intact:
            ticket.error = f"message {header.sequence} is corrupt"
            return self._drop(ticket, "corrupt")
        if not self._fits(header, ticket):
            ticket.error = f"message {header.sequence} points outside its ticket"
            return self._drop(ticket, "out_of_range")
        if raw is None:
            ticket.error = f"message {header.sequence} cannot be decoded"
            return self._drop(ticket, "undecodable")
        free = self._part(ticket.free, header)
        if not free.all():
            return self._drop(ticket, "duplicate")
        blocks = ticket.part(header.first, header.blocks)
        layers = range(header.layer, header.layer + header.layers)
        self._memory.scatter(layers, blocks, self._heads(header), raw)
        free[:] = False
        self._part(ticket.missing, header)[:] = False
        ticket.bytes += header.length
        return ""
