"""A mesh that exists only on the page: snapshots and spans that are made up."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator

from services.gateway.pulse import Pulse
from tests.unit.fake_service import STATUS
from tests.unit.test_span_store import export
from tokenmesh.telemetry.span_store import SpanStore
from tokenmesh.v1 import admin_pb2, observe_pb2

OUTCOMES = ("finished", "cancelled", "finished", "KV_TRANSFER_FAILED")
DECISIONS = ("disaggregated", "too_short", "prefix_cached", "prefill_failed")


class MadeUpWatcher:
    """Takes a Watcher's place; each snapshot brings one more request."""

    def __init__(self, store: SpanStore) -> None:
        self._store = store
        self._pulse = Pulse()
        self._numbers = itertools.count(1)

    async def watch(self) -> AsyncGenerator[observe_pb2.WatchResponse, None]:
        """See Watcher."""
        while True:
            await self._request(next(self._numbers))
            snapshot = observe_pb2.WatchResponse(pulse=self._pulse.describe(), requests=self._pulse.requests())
            snapshot.time.GetCurrentTime()
            for port, (role, status) in enumerate(STATUS.items(), start=9000):
                named = admin_pb2.GetStatusResponse()
                named.CopyFrom(status)
                named.instance_id = f"{role}-0"
                snapshot.services.add(address=f"127.0.0.1:{port}", status=named)
            snapshot.services[-1].error = "connection refused"
            yield snapshot
            await asyncio.sleep(0.3)

    async def _request(self, number: int) -> None:
        # What a client sends must stay text: this one would like to be markup.
        name = f"cmpl-{number}-<img src=x onerror=alert(1)>"
        sequence = self._pulse.begin(name, 40 + number)
        self._pulse.decided(sequence, DECISIONS[number % 4])
        for _ in range(5):
            await asyncio.sleep(0.01)
            self._pulse.message(sequence, 1)
        self._pulse.end(sequence, OUTCOMES[number % 4])
        add = self._store.add
        add(export("gateway-0", number, (1, 0, "POST /v1/completions", 0, 100), request_id=name))
        add(export("decode-root-0", number, (2, 1, "tokenmesh.v1.DecodeService/Generate", 4, 96)))
        add(export("decode-root-0", number, (3, 2, "tokenmesh.remote_prefill", 9, 50)))
        add(export("decode-worker-0", number, (4, 3, "tokenmesh.kv_receive", 12, 49)))
        add(export("prefill-0", number, (5, 3, "tokenmesh.kv_push", 20, 48), error="refused" if number % 2 else ""))
        add(export("decode-root-0", number, (6, 2, "tokenmesh.decode", 55, 96)))
