"""A sender's connection, as the owner keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from tokenmesh.kv.ucx import UcxEndpoint


class Inlet:
    """One sender's connection, and what goes on with its messages."""

    def __init__(self, endpoint: UcxEndpoint) -> None:
        self.endpoint = endpoint
        self.applied: set[asyncio.Task[None]] = set()
        """Payloads on their way into blocks."""
        self.relayed: set[asyncio.Task[None]] = set()
        """Commits on their way to another owner."""
        self.spoiled: set[bytes] = set()
        """Transfers with a wrong checksum since the last right one."""

    def start(self, tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts a task that is in `tasks` until it is done."""
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    def judge(self, transfer_id: bytes, reason: str) -> None:
        """Closes the endpoint if what came shows that headers and payloads no longer belong together."""
        if reason in ("", "duplicate"):
            self.spoiled.clear()
        elif reason == "corrupt":
            # Within one transfer it may be the source that has changed under the send.
            self.spoiled.add(transfer_id)
            if len(self.spoiled) > 1:
                self.endpoint.close()
