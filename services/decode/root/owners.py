"""Where a prompt's KV may land: the root's own blocks, or those of one of its ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import grpc

from tokenmesh.engine.host import EngineHost
from tokenmesh.kv.codecs import codec_label
from tokenmesh.kv.messages import Expect, Relay
from tokenmesh.kv.settling import SETTLE_TIMEOUT_S, MoverSilentError, Outcome, Settling
from tokenmesh.rpc.calls import calling
from tokenmesh.rpc.errors import MeshError, Reason, unavailable
from tokenmesh.telemetry.tickets import TicketSpans
from tokenmesh.v1 import kv_pb2, worker_pb2, worker_pb2_grpc

RETRY_S = 0.2


class KvOwner(Protocol):
    """One owner of blocks, as the hand-off uses it."""

    @property
    def shards(self) -> Sequence[kv_pb2.KvShard]:
        """Where prefill services write, per tensor-parallel shard."""

    async def expect(self, transfer_id: bytes, blocks: list[int], codec: str) -> None:
        """Opens a ticket for local block ids, and payloads encoded so. Raises MeshError."""

    async def settle(self, transfer_id: bytes) -> Outcome:
        """Closes it and says what came. Never raises: an owner that does not answer has received nothing."""


class RootOwner:
    """The root's own movers: for its blocks, and for those of a rank that shares its GPU."""

    def __init__(self, engine: EngineHost, settling: Settling, rank: int = 0) -> None:
        self._engine = engine
        self._settling = settling
        self._spans = TicketSpans()
        self._rank = rank
        self._first = sum(engine.device_blocks[:rank])

    @property
    def shards(self) -> Sequence[kv_pb2.KvShard]:
        """See `KvOwner`."""
        return [kv_pb2.KvShard(host=m.host, port=m.port) for _, m in sorted(self._engine.movers.items())]

    async def expect(self, transfer_id: bytes, blocks: list[int], codec: str) -> None:
        """See `KvOwner`."""
        self._spans.open(transfer_id, len(blocks), self._rank)
        order = Expect(transfer_id, [self._first + block for block in blocks], codec)
        await _open(self._settling, self._engine, dict.fromkeys(range(self._engine.shards), order))

    async def settle(self, transfer_id: bytes) -> Outcome:
        """See `KvOwner`."""
        outcome = await self._settling.settle(self._engine.hub, range(self._engine.shards), transfer_id)
        self._spans.close(transfer_id, outcome)
        return outcome


class WorkerOwner:
    """A decode worker's movers."""

    def __init__(
        self,
        stub: worker_pb2_grpc.WorkerServiceStub,
        address: str,
        root_id: str,
        shards: Sequence[kv_pb2.KvShard],
        attached: Callable[[], bool],
    ) -> None:
        """`attached`: whether the worker still belongs to the group, as it did when this was made."""
        self._attached = attached
        self._stub = stub
        self._address = address
        self._root_id = root_id
        self.shards = shards
        """See `KvOwner`."""

    async def expect(self, transfer_id: bytes, blocks: list[int], codec: str) -> None:
        """See `KvOwner`."""
        request = worker_pb2.ExpectKvRequest(
            decode_root_id=self._root_id, transfer_id=transfer_id, block_ids=blocks, codec=codec_label(codec)
        )
        try:
            with calling("tokenmesh.v1.WorkerService/ExpectKv", self._address) as metadata:
                await self._stub.ExpectKv(request, timeout=SETTLE_TIMEOUT_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise MeshError.from_rpc(error) from error

    async def settle(self, transfer_id: bytes) -> Outcome:
        """See `KvOwner`."""
        request = worker_pb2.SettleKvRequest(decode_root_id=self._root_id, transfer_id=transfer_id)
        # A ticket that is left open may be written under, so this asks until the rank answers or is given up.
        while True:
            try:
                with calling("tokenmesh.v1.WorkerService/SettleKv", self._address) as metadata:
                    reply = await self._stub.SettleKv(request, timeout=SETTLE_TIMEOUT_S + 1, metadata=metadata)
                return Outcome(reply.complete, reply.error, reply.receipt)
            except grpc.aio.AioRpcError as error:
                again = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
                if not again or not self._attached():
                    why = f"the rank does not answer: {MeshError.from_rpc(error).message}"
                    return Outcome(False, why, kv_pb2.KvReceipt())
            await asyncio.sleep(RETRY_S)


class RelayedOwner:
    """A decode worker that only the root can reach: its movers pass on what is written to them."""

    def __init__(self, engine: EngineHost, settling: Settling, worker: WorkerOwner) -> None:
        self._root = RootOwner(engine, settling)
        self._engine = engine
        self._settling = settling
        self._worker = worker

    @property
    def shards(self) -> Sequence[kv_pb2.KvShard]:
        """See `KvOwner`."""
        return self._root.shards

    async def expect(self, transfer_id: bytes, blocks: list[int], codec: str) -> None:
        """See `KvOwner`."""
        await self._worker.expect(transfer_id, blocks, codec)
        orders = {n: Relay(transfer_id, shard.host, shard.port) for n, shard in enumerate(self._worker.shards)}
        await _open(self._settling, self._engine, orders)

    async def settle(self, transfer_id: bytes) -> Outcome:
        """See `KvOwner`. The worker is the witness; the relay is closed with it."""
        outcome = await self._worker.settle(transfer_id)
        await self._root.settle(transfer_id)
        return outcome


async def _open(settling: Settling, engine: EngineHost, orders: Mapping[int, Expect | Relay]) -> None:
    try:
        await settling.open(engine.hub, orders)
    except MoverSilentError as error:
        raise unavailable(Reason.KV_OWNER_UNREACHABLE, str(error)) from error
