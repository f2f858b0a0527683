"""The sending half of a mover: pushes blocks of one or many transfers to their owners."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import structlog
from msgspec import structs

from tokenmesh.kv import wire
from tokenmesh.kv.codecs import NAMES, NONE, Codec, make_codec
from tokenmesh.kv.memory import BlockIds, BlockMemory, Heads, Payload
from tokenmesh.kv.messages import Commit, Connected, Destination, Push, SendDone
from tokenmesh.kv.peer import Peer, SendError
from tokenmesh.kv.stopwatch import Stopwatch
from tokenmesh.kv.ucx import UcxError, UcxWorker
from tokenmesh.kv.wire import PROBE_ID, Header, Kind

log = structlog.get_logger()

PROBE_BYTES = 4 << 20
"""Size of the message that measures a new pair."""


@dataclass
class _Way:
    """A transfer's way to one owner shard."""

    peer: Peer
    source: Heads
    target: int
    """The first head's place there."""
    messages: int = 0


@dataclass
class _Transfer:
    codec: str
    commands: asyncio.Queue[Push | Commit] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None
    begun: bool = False
    cancelled: bool = False
    bytes: int = 0
    block_layers: int = 0
    wire: Stopwatch = field(default_factory=Stopwatch)
    committed: float = 0.0
    transport: str = ""
    known: dict[int, tuple[list[int], BlockIds]] = field(default_factory=dict)
    next: Push | Commit | None = None
    """Taken out of `commands`, not yet done."""

    def block_ids(self, place: int, blocks: list[int]) -> BlockIds:
        """As an array. Layer after layer has the same blocks at a place, and whoever sees the same array again need not
        look at it."""
        known = self.known.get(place)
        if known is None or known[0] != blocks:
            known = self.known[place] = blocks, np.array(blocks, dtype=np.int64)
        return known[1]


@dataclass
class _Message:
    header: Header
    """Sealed."""
    payload: Payload
    staging: Payload | None
    """Borrowed until it is sent."""


class Sender:
    """All transfers that leave this mover."""

    def __init__(
        self,
        worker: UcxWorker,
        memory: BlockMemory,
        chunk_bytes: int,
        window: int,
        report: Callable[[SendDone | Connected], None],
        shard: int = 0,
    ) -> None:
        self._worker = worker
        self._shard = shard
        self._memory = memory
        self._window = window
        self._report = report
        self._chunk_bytes = max(chunk_bytes, memory.geometry.block_bytes)
        self._peers: dict[tuple[str, int], asyncio.Task[Peer]] = {}
        self._transfers: dict[bytes, _Transfer] = {}
        # Gathered messages borrow one of these; there is never a reason to hold more than the window.
        self._staging: asyncio.Queue[Payload] = asyncio.Queue()
        for buffer in memory.buffers(window, self._chunk_bytes):
            self._staging.put_nowait(buffer)

    @property
    def open(self) -> int:
        """Transfers not yet done."""
        return len(self._transfers)

    async def peer(self, host: str, port: int) -> Peer:
        """The connection to an owner, made once and made again after it broke. Raises SendError."""
        task = self._peers.get((host, port))
        if task is not None and task.done() and (task.cancelled() or task.exception() or task.result().failure):
            # Before waiting: others who find it broken meanwhile must make one new connection, not one each.
            del self._peers[host, port]
            if not task.cancelled() and not task.exception():
                await task.result().close()
            task = self._peers.get((host, port))
        if task is None:
            task = self._peers[host, port] = asyncio.create_task(self._connect(host, port))
        return await asyncio.shield(task)

    async def _connect(self, host: str, port: int) -> Peer:
        try:
            endpoint = await self._worker.connect(host, port)
        except UcxError as error:
            raise SendError(f"cannot reach the KV owner at {host}:{port}: {error}") from error
        peer = Peer(endpoint, self._window)
        peer.goodput = await self._probe(peer)
        log.info(
            "kv peer connected", peer=f"{host}:{port}", transport=peer.transport, gb_per_s=round(peer.goodput / 1e9, 2)
        )
        return peer

    async def _probe(self, peer: Peer) -> float:
        """Measures a new pair with some throw-away messages; returns bytes per second.

        It also pays for UCX's lazy wire-up, which the first request would pay otherwise; on a GPU for opening the
        staging memory that requests will leave from, too.
        """
        staging = await self._staging.get()
        try:
            fits = len(staging) >= PROBE_BYTES
            (payload,) = [staging[:PROBE_BYTES]] if fits else self._memory.buffers(1, PROBE_BYTES)
            best = 0.0
            for sequence in range(3):
                header = Header(Kind.DATA, PROBE_ID, sequence=sequence, length=PROBE_BYTES)
                header = replace(header, checksum=await self._memory.checksum(payload, header.seed))
                start = time.perf_counter()
                await peer.send(header, payload)
                best = max(best, PROBE_BYTES / (time.perf_counter() - start))
            return best
        finally:
            self._staging.put_nowait(staging)

    async def connect(self, host: str, port: int) -> None:
        """Connects ahead of the first transfer and reports how that went."""
        try:
            peer = await self.peer(host, port)
            self._report(Connected(host, port, "", peer.transport, peer.goodput, self._shard))
        except SendError as error:
            self._report(Connected(host, port, str(error), "", 0.0, self._shard))

    def start(self, transfer_id: bytes, destinations: Sequence[Destination], codec: str = NONE) -> None:
        """Opens a transfer. Its pushes are sent in order as they come."""
        transfer = self._transfers.setdefault(transfer_id, _Transfer(codec))
        if transfer.task is None:
            transfer.task = asyncio.create_task(self._run(transfer_id, transfer, destinations))

    def add(self, command: Push | Commit) -> None:
        """Queues a push or the commit of an open transfer; one that was cancelled is ignored."""
        transfer = self._transfers.get(command.transfer_id)
        if transfer is not None:
            if isinstance(command, Commit):
                transfer.committed = time.monotonic()
            transfer.commands.put_nowait(command)

    def cancel(self, transfer_id: bytes) -> None:
        """Stops a transfer; SendDone follows once nothing reads its blocks. One that is done or unknown is ignored."""
        transfer = self._transfers.get(transfer_id)
        # Once: a second cancellation would hit the wait for what is still on the wire.
        if transfer is not None and transfer.task is not None and not transfer.cancelled:
            transfer.cancelled = True
            # A task that has not begun yet would never report if it were cancelled; it looks at the flag instead.
            if transfer.begun:
                transfer.task.cancel()

    async def _run(self, transfer_id: bytes, transfer: _Transfer, destinations: Sequence[Destination]) -> None:
        error = ""
        ways: list[_Way] = []
        sends: set[asyncio.Task[None]] = set()
        transfer.begun = True
        try:
            if transfer.cancelled:
                raise asyncio.CancelledError
            for to in destinations:
                heads = Heads(to.source, to.heads) if to.heads else self._memory.all_heads
                ways.append(_Way(await self.peer(to.host, to.port), heads, to.target))
                transfer.transport = ways[0].peer.transport
            while push := await self._piled_up(transfer):
                for way in ways:
                    await self._push(transfer_id, transfer, way, *push, sends)
            await _landed(sends)
            for way in ways:
                header = Header(
                    Kind.COMMIT,
                    transfer_id,
                    sequence=way.messages,
                    first=way.messages,
                    head=way.target,
                    heads=way.source.count,
                )
                if not await way.peer.commit(header.sealed()):
                    error = "the KV owner refused the transfer"
        except asyncio.CancelledError:
            error = "cancelled"
        except Exception as failure:  # noqa: BLE001 - any fault ends this transfer alone, and is reported with it
            error = f"{type(failure).__name__}: {failure}" if not isinstance(failure, SendError) else str(failure)
        finally:
            # What still waits for its turn is not sent, and a cancellation that comes now finds nothing to cancel.
            transfer.cancelled = True
            # Blocks may be reused only when UCX has let go of them, whether or not the transfer succeeded.
            await _let_go(sends, ways)
            del self._transfers[transfer_id]
            now = time.monotonic()
            self._report(
                SendDone(
                    transfer_id,
                    error,
                    transfer.bytes,
                    transfer.block_layers,
                    transfer.wire.seconds,
                    now - (transfer.committed or now),
                    transfer.transport,
                    self._shard,
                )
            )

    async def _piled_up(self, transfer: _Transfer) -> tuple[Push, int] | None:
        """The next push, and of how many layers: with those of the same blocks in layers behind it that have piled up
        meanwhile, if they are small and leave as they are. None: the commit was next."""
        command = transfer.next or await transfer.commands.get()
        transfer.next = None
        if isinstance(command, Commit):
            return None
        size = self._memory.nbytes(max(1, len(command.blocks)), self._memory.all_heads)
        # Encoders need memory of their own, a multiple of what they encode.
        most = min(self._chunk_bytes, self._memory.joins) // size if transfer.codec == NONE else 1
        layers = 1
        while layers < most and not transfer.commands.empty():
            transfer.next = transfer.commands.get_nowait()
            if transfer.next != structs.replace(command, layer=command.layer + layers):
                break
            transfer.next = None
            layers += 1
        return command, layers

    async def _push(
        self,
        transfer_id: bytes,
        transfer: _Transfer,
        way: _Way,
        push: Push,
        layers: int,
        sends: set[asyncio.Task[None]],
    ) -> None:
        limit = max(1, self._chunk_bytes // (layers * self._memory.nbytes(1, way.source)))
        for start in range(0, len(push.blocks), limit):
            blocks = transfer.block_ids(push.first + start, push.blocks[start : start + limit])
            place = Header(
                Kind.DATA,
                transfer_id,
                sequence=way.messages,
                layer=push.layer,
                layers=layers,
                first=push.first + start,
                blocks=len(blocks),
                head=way.target,
                heads=way.source.count,
            )
            if self._memory.overlaps:
                staging = await self._staging.get()
                work = self._prepare_and_send(way, place, blocks, transfer, staging)
            else:
                work = self._send(way.peer, await self._prepare(place, blocks, way.source, transfer.codec), transfer)
            way.messages += 1
            task = asyncio.create_task(work)
            sends.add(task)
            # Failed sends stay in the set, for COMMIT to meet what they met.
            task.add_done_callback(lambda t: sends.discard(t) if not t.cancelled() and not t.exception() else None)
            await asyncio.sleep(0)

    async def _prepare_and_send(
        self, way: _Way, place: Header, blocks: BlockIds, transfer: _Transfer, staging: Payload
    ) -> None:
        await self._send(way.peer, await self._prepare(place, blocks, way.source, transfer.codec, staging), transfer)

    async def _prepare(
        self, header: Header, blocks: BlockIds, heads: Heads, codec_name: str, staging: Payload | None = None
    ) -> _Message:
        """A message, ready to go; borrows nothing if it fails. `staging`: lent by the caller; None: to be borrowed."""
        number, layers = 0, range(header.layer, header.layer + header.layers)
        try:
            codec = make_codec(codec_name, self._memory.geometry)
            in_place = self._memory.sends_in_place and header.layers == 1
            payload = self._memory.view(header.layer, blocks, heads) if in_place else None
            if staging is None and (payload is None or codec is not None):
                # With a codec, this bounds the encoded payloads under way.
                staging = await self._staging.get()
            if payload is None:
                assert staging is not None
                if codec is None:
                    header = replace(header, length=header.layers * self._memory.nbytes(header.blocks, heads))
                    payload, checksum = await self._memory.gather_checked(layers, blocks, heads, staging, header.seed)
                    return _Message(replace(header, checksum=checksum), payload, staging)
                payload = self._memory.gather(layers, blocks, heads, staging)
            if codec is not None:
                encoded = await _encode(codec, payload)
                if encoded is not None:
                    payload, number = encoded, NAMES.index(codec_name)
            header = replace(header, length=len(payload), codec=number)
            header = replace(header, checksum=await self._memory.checksum(payload, header.seed))
            return _Message(header, payload, staging)
        except BaseException:
            if staging is not None:
                self._staging.put_nowait(staging)
            raise

    async def _send(self, peer: Peer, message: _Message, transfer: _Transfer) -> None:
        try:
            if not transfer.cancelled:
                transfer.bytes += message.header.length
                transfer.block_layers += message.header.layers * message.header.blocks
                with transfer.wire.message():
                    await peer.send(message.header, message.payload)
        finally:
            if message.staging is not None:
                self._staging.put_nowait(message.staging)

    async def close(self) -> None:
        """Cancels every transfer and closes every pair."""
        tasks = [t.task for t in self._transfers.values() if t.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for peer_task in self._peers.values():
            with contextlib.suppress(SendError, asyncio.CancelledError):
                await (await peer_task).close()


async def _encode(codec: Codec, raw: Payload) -> Payload | None:
    """In a thread, since it takes its time."""
    work = asyncio.ensure_future(asyncio.to_thread(codec.encode, raw))
    try:
        return await asyncio.shield(work)
    except BaseException:
        # The blocks are read until the thread is done, whoever still waits for it.
        await asyncio.wait({work})
        raise


async def _landed(sends: set[asyncio.Task[None]]) -> None:
    """Waits for sends and raises what the first of them met. Unlike gather, being cancelled leaves them alone."""
    if sends:
        done, _ = await asyncio.wait(sends, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()


async def _let_go(sends: set[asyncio.Task[None]], ways: list[_Way]) -> None:
    """Returns once UCX reads no block of a transfer, if need be by giving up owners that take nothing."""
    if not sends:
        return
    _, stuck = await asyncio.wait(sends, timeout=wire.STALL_S)
    if stuck:
        log.warning("a kv owner takes nothing any more")
        for way in ways:
            await way.peer.close()
        await asyncio.wait(stuck)
