"""A sender's connection to one owner."""

from __future__ import annotations

import asyncio

import numpy as np
import structlog

from tokenmesh.kv import wire
from tokenmesh.kv.memory import Payload
from tokenmesh.kv.ucx import UcxEndpoint, UcxError
from tokenmesh.kv.wire import HEADER_BYTES, HEADER_CHANNEL, PAYLOAD_CHANNEL, Header, Kind, WireError

log = structlog.get_logger()


class SendError(Exception):
    """A transfer cannot be completed; the message says why in one line."""


class Peer:
    """One connected owner. Sends in order, at most `window` payloads in flight; routes receipts to transfers."""

    def __init__(self, endpoint: UcxEndpoint, window: int) -> None:
        self.transport = endpoint.transport
        self._endpoint = endpoint
        self._window = asyncio.Semaphore(window)
        self._receipts: dict[tuple[bytes, int], asyncio.Future[Header]] = {}
        """By transfer and first head: shards of a relayed sender may each commit theirs."""
        self._reader = asyncio.create_task(self._read_receipts())
        self.failure: Exception | None = None
        self.goodput = 0.0
        """Measured at connection, bytes per second."""

    async def send(self, header: Header, payload: Payload | None = None) -> None:
        """Sends one message; returns, or raises SendError, once UCX no longer reads the payload.

        Header and payload are submitted back to back, so that messages of several transfers never mix.
        """
        if self.failure is not None:
            raise self.failure
        async with self._window:
            parts = [self._endpoint.send(header.to_buffer(), HEADER_CHANNEL)]
            if payload is not None:
                parts.append(self._endpoint.send(payload, PAYLOAD_CHANNEL, bulk=True))
            _, stuck = await asyncio.wait(parts, timeout=wire.STALL_S)
            if stuck:
                # UCX notices a process that has died, but not one that has stopped; others wait for what it holds.
                log.warning("a kv owner takes nothing any more", after_s=wire.STALL_S)
                await self.close()
                await asyncio.wait(stuck)
        for error in [part.exception() for part in parts]:
            if error is not None:
                raise SendError(f"lost the KV owner: {error}")

    async def commit(self, header: Header) -> bool:
        """Sends COMMIT and waits for the owner's answer: whether it has everything. Raises SendError."""
        key = (header.transfer_id, header.head)
        future = self._receipts.setdefault(key, asyncio.get_running_loop().create_future())
        try:
            await self.send(header)
            return (await future).first == 1
        finally:
            if self._receipts.pop(key, None) is not None and future.done() and not future.cancelled():
                # Taken note of, should the send have failed before anybody waited.
                future.exception()

    async def _read_receipts(self) -> None:
        buffer = np.empty(HEADER_BYTES, dtype=np.uint8)
        try:
            while True:
                buffer[:] = 0
                await self._endpoint.recv(buffer, HEADER_CHANNEL)
                header = Header.from_buffer(buffer)
                future = self._receipts.get((header.transfer_id, header.head))
                if header.kind is Kind.RECEIPT and future is not None and not future.done():
                    future.set_result(header)
        except (UcxError, WireError) as error:
            self._fail(SendError(f"lost the KV owner: {error}"))

    def _fail(self, failure: Exception) -> None:
        self.failure = self.failure or failure
        for future in self._receipts.values():
            if not future.done():
                future.set_exception(self.failure)

    async def close(self) -> None:
        """Closes the endpoint; transfers still using it fail."""
        self._fail(SendError("lost the KV owner: closed"))
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._endpoint.close()
