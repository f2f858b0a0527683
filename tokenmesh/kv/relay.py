"""Tickets whose KV a mover passes on: for owners that prefill services cannot reach themselves.

Messages go on as they came, header, checksum and all, so the owner checks what the first sender sealed, and its own
ticket decides what may be written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from tokenmesh.kv.memory import Payload
from tokenmesh.kv.messages import Relay
from tokenmesh.kv.peer import Peer, SendError
from tokenmesh.kv.wire import Header

log = structlog.get_logger()

RECEIPT_TIMEOUT_S = 10.0
"""For the owner's answer to a relayed COMMIT; it has everything by then."""


class Relays:
    """Open relays of this mover."""

    def __init__(self, connect: Callable[[str, int], Awaitable[Peer]] | None = None) -> None:
        """`connect` gives the connection to an owner, made once. Without it nothing can be relayed."""
        self._connect = connect
        self._open: dict[bytes, tuple[str, int]] = {}

    def __contains__(self, transfer_id: bytes) -> bool:
        return transfer_id in self._open

    def open(self, message: Relay) -> None:
        """Passes messages of a ticket on from now on."""
        self._open[message.transfer_id] = (message.host, message.port)

    def close(self, transfer_id: bytes) -> None:
        """Drops them from now on. Unknown: nothing."""
        self._open.pop(transfer_id, None)

    async def _peer(self, transfer_id: bytes) -> Peer:
        address = self._open.get(transfer_id)
        if address is None or self._connect is None:
            raise SendError("the relay is closed")
        return await self._connect(*address)

    async def forward(self, header: Header, payload: Payload) -> None:
        """Sends a message on; returns once UCX no longer reads the payload. One that is lost fails its transfer."""
        try:
            await (await self._peer(header.transfer_id)).send(header, payload)
        except SendError as error:
            log.warning("kv not relayed", error=str(error))

    async def commit(self, header: Header) -> bool:
        """Sends COMMIT on and returns whether the owner has everything."""
        try:
            peer = await self._peer(header.transfer_id)
            return await asyncio.wait_for(peer.commit(header), RECEIPT_TIMEOUT_S)
        except (SendError, TimeoutError) as error:
            log.warning("kv commit not relayed", error=str(error))
            return False
