"""Opening and closing tickets on every mover of an owner, and adding up what arrived."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from tokenmesh.kv.hub import LinkHub
from tokenmesh.kv.lives import MoverLives
from tokenmesh.kv.messages import Expect, MoverReady, Relay, Settle, Settled, Sync, Synced
from tokenmesh.v1 import kv_pb2

log = structlog.get_logger()

SETTLE_TIMEOUT_S = 5.0
"""How long callers wait: a mover answers at once."""
SILENT_S = 20.0
"""A mover that is silent for this long is killed. It may be stopped or starved, and would write when it goes on, into
blocks that are somebody else's by then."""


@dataclass(frozen=True)
class Outcome:
    """What came under a ticket, over all shards."""

    complete: bool
    error: str
    receipt: kv_pb2.KvReceipt


class MoverSilentError(Exception):
    """A mover does not answer; its blocks cannot be written to."""


class Settling:
    """Tickets whose movers have been asked."""

    def __init__(self) -> None:
        self._opening: dict[bytes, dict[int, asyncio.Future[Synced]]] = {}
        self._waiting: dict[bytes, dict[int, asyncio.Future[Settled | None]]] = {}
        self._movers = MoverLives(self._gone)
        self._settling: dict[bytes, asyncio.Task[Outcome]] = {}
        self.dropped: Counter[str] = Counter()
        """Messages that movers dropped, by reason, less those that only measured a pair."""

    def note(self, message: Synced | Settled) -> None:
        """Takes a mover's answer."""
        if isinstance(message, Synced):
            opening = self._opening.get(message.transfer_id, {}).get(message.shard)
            if opening is not None and not opening.done():
                opening.set_result(message)
            return
        self.dropped.update({reason: n for reason, n in message.dropped.items() if reason != "probe"})
        future = self._waiting.get(message.transfer_id, {}).get(message.shard)
        if future is not None and not future.done():
            future.set_result(message)

    def watch(self, mover: MoverReady) -> None:
        """Knows whether this mover lives."""
        if mover.pid:
            self._movers.watch(mover.shard, mover.pid)

    def _gone(self, shard: int) -> None:
        for waiting in self._waiting.values():
            future = waiting.get(shard)
            if future is not None and not future.done():
                future.set_result(None)

    async def open(self, hub: LinkHub, orders: Mapping[int, Expect | Relay]) -> None:
        """Opens a ticket, shard by shard; when it returns, all movers know of it. Raises MoverSilentError.

        Without the wait, what a fast sender writes first could come before the ticket, and would be dropped.
        """
        transfer_id = next(iter(orders.values())).transfer_id
        loop = asyncio.get_running_loop()
        opening = self._opening[transfer_id] = {shard: loop.create_future() for shard in orders}
        try:
            for shard, order in orders.items():
                hub.send(f"mover-{shard}", order)
                hub.send(f"mover-{shard}", Sync(transfer_id))
            await asyncio.wait_for(asyncio.gather(*opening.values()), SETTLE_TIMEOUT_S)
        except TimeoutError as error:
            raise MoverSilentError("a mover does not answer") from error
        finally:
            self._opening.pop(transfer_id, None)

    async def settle(self, hub: LinkHub, shards: Sequence[int], transfer_id: bytes) -> Outcome:
        """Closes a ticket on every shard. When it returns, nothing can be written under it any more.

        Whoever asks again meanwhile waits for the same; one who gives up ends nothing.
        """
        task = self._settling.get(transfer_id)
        if task is None:
            task = self._settling[transfer_id] = asyncio.create_task(self._settle(hub, shards, transfer_id))
            task.add_done_callback(lambda _: self._settling.pop(transfer_id))
        return await asyncio.shield(task)

    async def _settle(self, hub: LinkHub, shards: Sequence[int], transfer_id: bytes) -> Outcome:
        loop = asyncio.get_running_loop()
        waiting = self._waiting[transfer_id] = {shard: loop.create_future() for shard in shards}
        try:
            for shard in shards:
                hub.send(f"mover-{shard}", Settle(transfer_id))
                if self._movers.gone(shard):
                    waiting[shard].set_result(None)
            _, silent = await asyncio.wait(waiting.values(), timeout=SILENT_S)
            if silent:
                log.error("a mover does not answer, and is ended")
                known = [self._movers.kill(shard) for shard, future in waiting.items() if future in silent]
                # Its last write may be under way in the kernel.
                if all(known):
                    await asyncio.wait(silent)
            settled = [future.result() if future.done() else None for future in waiting.values()]
        finally:
            del self._waiting[transfer_id]
        if None in settled:
            return Outcome(False, "a mover does not answer", kv_pb2.KvReceipt())
        return self._outcome([answer for answer in settled if answer is not None])

    @staticmethod
    def _outcome(settled: Sequence[Settled]) -> Outcome:
        problem = next((s.error or "incomplete" for s in settled if not s.complete), "")
        receipt = kv_pb2.KvReceipt(
            bytes=sum(s.nbytes for s in settled),
            block_layers=sum(s.block_layers for s in settled),
            seconds=max(s.seconds for s in settled),
            transport=settled[0].transport,
        )
        return Outcome(not problem, problem, receipt)
