"""The sending half of a mover: pushes blocks of one or many transfers to their owners."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import structlog

from tokenmesh.kv.checksum import checksum
from tokenmesh.kv.memory import Buffer, KvMemory
from tokenmesh.kv.messages import Commit, Connected, Push, SendDone
from tokenmesh.kv.stopwatch import Stopwatch
from tokenmesh.kv.ucx import UcxEndpoint, UcxError, UcxWorker
from tokenmesh.kv.wire import HEADER_BYTES, HEADER_CHANNEL, PAYLOAD_CHANNEL, Header, Kind, WireError

log = structlog.get_logger()

PROBE_BYTES = 4 << 20
"""Size of the message that measures a new pair."""


class SendError(Exception):
    """A transfer cannot be completed; the message says why in one line."""


class Peer:
    """One connected owner. Sends in order, at most `window` payloads in flight; routes receipts to transfers."""

    def __init__(self, endpoint: UcxEndpoint, window: int) -> None:
        self.transport = endpoint.transport
        self._endpoint = endpoint
        self._window = asyncio.Semaphore(window)
        self._receipts: dict[bytes, asyncio.Future[Header]] = {}
        self._reader = asyncio.create_task(self._read_receipts())
        self.failure: Exception | None = None
        self.goodput = 0.0
        """Measured at connection, bytes per second."""

    async def send(self, header: Header, payload: Buffer | None = None) -> None:
        """Sends one message; returns once UCX no longer reads the payload.

        Header and payload are submitted back to back, so that messages of several transfers never mix.
        """
        if self.failure is not None:
            raise self.failure
        async with self._window:
            parts = [self._endpoint.send(header.to_buffer(), HEADER_CHANNEL)]
            if payload is not None:
                parts.append(self._endpoint.send(payload, PAYLOAD_CHANNEL, bulk=True))
            await asyncio.gather(*parts)

    async def receipt(self, transfer_id: bytes) -> Header:
        """Waits for the owner's answer to COMMIT."""
        future = self._receipts.setdefault(transfer_id, asyncio.get_running_loop().create_future())
        try:
            return await future
        finally:
            self._receipts.pop(transfer_id, None)

    async def _read_receipts(self) -> None:
        buffer = np.empty(HEADER_BYTES, dtype=np.uint8)
        try:
            while True:
                await self._endpoint.recv(buffer, HEADER_CHANNEL)
                header = Header.from_buffer(buffer)
                future = self._receipts.get(header.transfer_id)
                if header.kind is Kind.RECEIPT and future is not None and not future.done():
                    future.set_result(header)
        except (UcxError, WireError) as error:
            self.failure = SendError(f"lost the KV owner: {error}")
            for future in self._receipts.values():
                if not future.done():
                    future.set_exception(self.failure)

    async def close(self) -> None:
        """Closes the endpoint; transfers still using it fail."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._endpoint.close()


@dataclass
class _Transfer:
    commands: asyncio.Queue[Push | Commit] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None
    begun: bool = False
    cancelled: bool = False
    messages: int = 0
    bytes: int = 0
    block_layers: int = 0
    wire: Stopwatch = field(default_factory=Stopwatch)
    committed: float = 0.0
    transport: str = ""


class Sender:
    """All transfers that leave this mover."""

    def __init__(
        self,
        worker: UcxWorker,
        memory: KvMemory,
        chunk_bytes: int,
        window: int,
        report: Callable[[SendDone | Connected], None],
    ) -> None:
        self._worker = worker
        self._memory = memory
        self._window = window
        self._report = report
        self._blocks_per_message = max(1, chunk_bytes // memory.geometry.block_bytes)
        self._peers: dict[tuple[str, int], asyncio.Task[Peer]] = {}
        self._transfers: dict[bytes, _Transfer] = {}
        # Gathered messages borrow one of these; there is never a reason to hold more than the window.
        self._staging: asyncio.Queue[Buffer] = asyncio.Queue()
        for _ in range(window):
            self._staging.put_nowait(np.zeros(self._blocks_per_message * memory.geometry.block_bytes, dtype=np.uint8))

    @property
    def open(self) -> int:
        """Transfers not yet done."""
        return len(self._transfers)

    async def peer(self, host: str, port: int) -> Peer:
        """The connection to an owner, made once and made again after it broke. Raises SendError."""
        task = self._peers.get((host, port))
        if task is not None and task.done() and (task.cancelled() or task.exception() or task.result().failure):
            if not task.cancelled() and not task.exception():
                await task.result().close()
            task = None
        if task is None:
            task = self._peers[host, port] = asyncio.create_task(self._connect(host, port))
        return await asyncio.shield(task)

    async def _connect(self, host: str, port: int) -> Peer:
        try:
            endpoint = await self._worker.connect(host, port)
        except UcxError as error:
            raise SendError(f"cannot reach the KV owner at {host}:{port}: {error}") from error
        peer = Peer(endpoint, self._window)
        peer.goodput = await _probe(peer)
        log.info(
            "kv peer connected", peer=f"{host}:{port}", transport=peer.transport, gb_per_s=round(peer.goodput / 1e9, 2)
        )
        return peer

    async def connect(self, host: str, port: int) -> None:
        """Connects ahead of the first transfer and reports how that went."""
        try:
            peer = await self.peer(host, port)
            self._report(Connected(host, port, "", peer.transport, peer.goodput))
        except SendError as error:
            self._report(Connected(host, port, str(error), "", 0.0))

    def start(self, transfer_id: bytes, host: str, port: int) -> None:
        """Opens a transfer. Its pushes are sent in order as they come."""
        transfer = self._transfers.setdefault(transfer_id, _Transfer())
        if transfer.task is None:
            transfer.task = asyncio.create_task(self._run(transfer_id, transfer, host, port))

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
        if transfer is not None and transfer.task is not None:
            transfer.cancelled = True
            # A task that has not begun yet would never report if it were cancelled; it looks at the flag instead.
            if transfer.begun:
                transfer.task.cancel()

    async def _run(self, transfer_id: bytes, transfer: _Transfer, host: str, port: int) -> None:
        error = ""
        sends: set[asyncio.Task[None]] = set()
        transfer.begun = True
        try:
            if transfer.cancelled:
                raise asyncio.CancelledError
            peer = await self.peer(host, port)
            transfer.transport = peer.transport
            while isinstance(command := await transfer.commands.get(), Push):
                await self._push(transfer_id, transfer, peer, command, sends)
            await asyncio.gather(*sends)
            header = Header(Kind.COMMIT, transfer_id, sequence=transfer.messages, first=transfer.messages)
            receipt = asyncio.ensure_future(peer.receipt(transfer_id))
            await peer.send(header.sealed())
            if (await receipt).first != 1:
                error = "the KV owner refused the transfer"
        except asyncio.CancelledError:
            error = "cancelled"
        except Exception as failure:  # noqa: BLE001 - any fault ends this transfer alone, and is reported with it
            error = f"{type(failure).__name__}: {failure}" if not isinstance(failure, SendError) else str(failure)
        finally:
            # Blocks may be reused only when UCX has let go of them, whether or not the transfer succeeded.
            await asyncio.gather(*sends, return_exceptions=True)
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
                )
            )

    async def _push(
        self, transfer_id: bytes, transfer: _Transfer, peer: Peer, push: Push, sends: set[asyncio.Task[None]]
    ) -> None:
        size = self._memory.geometry.block_bytes
        limit = self._blocks_per_message
        for start in range(0, len(push.blocks), limit):
            blocks = push.blocks[start : start + limit]
            runs = list(self._memory.runs(push.layer, blocks))
            staging: Buffer | None = None
            if len(runs) == 1:
                payload = runs[0][2]
            else:
                staging = await self._staging.get()
                payload = self._memory.gather(push.layer, blocks, staging)
            header = Header(
                Kind.DATA,
                transfer_id,
                sequence=transfer.messages,
                layer=push.layer,
                first=push.first + start,
                blocks=len(blocks),
                length=len(blocks) * size,
            )
            header = dataclasses.replace(header, checksum=await checksum(payload, header.seed))
            transfer.messages += 1
            transfer.bytes += header.length
            transfer.block_layers += len(blocks)
            task = asyncio.create_task(self._send(peer, header, payload, staging, transfer.wire))
            sends.add(task)
            # Failed sends stay in the set, so that the gather before COMMIT raises what they met.
            task.add_done_callback(lambda t: sends.discard(t) if not t.cancelled() and not t.exception() else None)
            await asyncio.sleep(0)

    async def _send(self, peer: Peer, header: Header, payload: Buffer, staging: Buffer | None, wire: Stopwatch) -> None:
        try:
            with wire.message():
                await peer.send(header, payload)
        finally:
            if staging is not None:
                self._staging.put_nowait(staging)

    async def close(self) -> None:
        """Cancels every transfer and closes every pair."""
        tasks = [t.task for t in self._transfers.values() if t.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for peer_task in self._peers.values():
            with contextlib.suppress(SendError, asyncio.CancelledError):
                await (await peer_task).close()


async def _probe(peer: Peer) -> float:
    """Measures a new pair with one throw-away message; returns bytes per second.

    It also pays for UCX's lazy wire-up, which the first request would pay otherwise.
    """
    payload = np.zeros(PROBE_BYTES, dtype=np.uint8)
    nobody = bytes(16)
    best = 0.0
    for sequence in range(3):
        header = Header(Kind.DATA, nobody, sequence=sequence, length=PROBE_BYTES).sealed(payload)
        start = time.perf_counter()
        await peer.send(header, payload)
        best = max(best, PROBE_BYTES / (time.perf_counter() - start))
    return best
