"""A decode worker: joins a root's group as a rank. Rows and KV bypass this process; it only opens and closes doors."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Sequence
from typing import Any

import grpc
import msgspec
import structlog

from services.decode.worker.processes import ShardProcesses
from tokenmesh.config import ConfigError, DecodeWorkerConfig
from tokenmesh.kv.codecs import codec_name
from tokenmesh.kv.geometry import BlockGeometry, GeometryMismatchError
from tokenmesh.kv.messages import (
    NOT_OPEN,
    CloseShard,
    Expect,
    FromShard,
    MoverReady,
    OpenShard,
    Settled,
    ShardClosed,
    ShardOpen,
    ShardState,
    ShardUp,
    ShardZeroed,
    Synced,
    ToService,
    ZeroShard,
)
from tokenmesh.kv.settling import MoverSilentError, Settling
from tokenmesh.parallel.rank import LayerSpec, RankSpec
from tokenmesh.parallel.rows import HeadShape
from tokenmesh.rpc.errors import MeshError, Reason, invalid, unavailable
from tokenmesh.rpc.server import Context
from tokenmesh.tasks import to_the_end
from tokenmesh.telemetry.tickets import TicketSpans
from tokenmesh.v1 import kv_pb2, worker_pb2, worker_pb2_grpc

log = structlog.get_logger()

MAX_SHARDS = 64
"""More than one model is cut into; each is a process."""
OPEN_TIMEOUT_S = 30.0
"""For allocating the partition and starting its movers."""
CLOSE_TIMEOUT_S = 10.0
ZERO_TIMEOUT_S = 10.0
LEASE_S = 30.0
"""A root asks every second how its rank is. One that has not asked for this long gives way to another: its machine may
have gone without a word, which TCP can take a quarter of an hour to notice."""


class _Attached:
    """The root that the rank belongs to, and what is open for it."""

    def __init__(self, root_id: str, rank: int, blocks: int, kv_bytes: int) -> None:
        self.root_id = root_id
        self.rank = rank
        self.blocks = blocks
        self.kv_bytes = kv_bytes
        self.heard = time.monotonic()
        """When the root last asked how the rank is."""
        self.tickets: set[bytes] = set()
        self.received_bytes = 0


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """See worker.proto."""

    def __init__(self, config: DecodeWorkerConfig) -> None:
        self._config = config
        self._shards: ShardProcesses | None = None
        self.attached: _Attached | None = None
        self.draining = False
        self._changing = asyncio.Lock()
        self._movers: dict[int, MoverReady] = {}
        self._states: dict[int, ShardState] = {}
        self._waiting: dict[tuple[type, int], asyncio.Future[Any]] = {}
        self.settling = Settling()
        """Tickets of this worker's movers, and what those dropped."""
        self._spans = TicketSpans()
        self._left = asyncio.Event()

    def attach(self, shards: ShardProcesses) -> None:
        """Gives the service its processes."""
        self._shards = shards

    @property
    def shards(self) -> ShardProcesses:
        """The processes. Raises MeshError UNAVAILABLE while they start."""
        if self._shards is None:
            raise unavailable(Reason.DRAINING, "the worker is still starting")
        return self._shards

    @property
    def kv_transport(self) -> str:
        """Transport of the rows; empty without a root."""
        state = self._states.get(0)
        return state.transport if state is not None else ""

    def handle(self, message: ToService) -> None:
        """Takes what shards and movers report."""
        match message:
            case MoverReady():
                self._movers[message.shard] = message
                self.settling.watch(message)
                self._resolve(message)
            case Synced() | Settled():
                self.settling.note(message)
            case ShardState():
                self._states[message.shard] = message
            case ShardUp() | ShardOpen() | ShardZeroed():
                self._resolve(message)
            case ShardClosed():
                # An answer that nobody waits for any more says nothing about whoever is attached by now.
                if not self._resolve(message) and self.attached is not None and message.reason != NOT_OPEN:
                    # Not our doing: the root has gone, or never came.
                    task = asyncio.ensure_future(self._close(message.reason))
                    task.add_done_callback(lambda t: t.cancelled() or t.exception())
            case _:
                log.warning("unexpected message", message=type(message).__name__)

    def _resolve(self, message: FromShard | MoverReady) -> bool:
        future = self._waiting.pop((type(message), message.shard), None)
        if future is None or future.done():
            return False
        future.set_result(message)
        return True

    async def _answers(self, kind: type, order: Any, shards: Sequence[int], timeout: float) -> list[Any]:
        """Sends an order to shards and waits for an answer of one kind from each. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        futures = {shard: self._waiting.setdefault((kind, shard), loop.create_future()) for shard in shards}
        for shard in shards:
            self.shards.hub.send(f"shard-{shard}", order)
        try:
            return await asyncio.wait_for(asyncio.gather(*futures.values()), timeout)
        finally:
            # Those without an answer are cancelled by now, and must not be waited for again.
            for shard, future in futures.items():
                if self._waiting.get((kind, shard)) is future:
                    del self._waiting[kind, shard]

    async def Attach(self, request: worker_pb2.AttachRequest, context: Context[Any, Any]) -> worker_pb2.AttachResponse:
        """See worker.proto."""
        if self.draining:
            raise unavailable(Reason.DRAINING, "the worker is leaving")
        spec, geometry = _spec(request)
        async with self._changing:
            others = self.attached is not None and self.attached.root_id != request.decode_root_id
            if self.attached is not None and others and time.monotonic() - self.attached.heard < LEASE_S:
                raise MeshError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    Reason.ALREADY_ATTACHED,
                    f"the rank belongs to {self.attached.root_id}",
                )
            if self.attached is not None:
                await self._close_locked("its root is silent, and another asks" if others else "attached again")
            await self._ensure(request.shards)
            per_shard = self._config.kv_cache_memory_bytes // (geometry.block_bytes * geometry.layers)
            blocks = request.blocks or per_shard
            if not 0 < blocks <= per_shard:
                raise MeshError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    Reason.NOT_ENOUGH_MEMORY,
                    f"{blocks} blocks wanted, {per_shard} fit into kv_cache_memory_bytes",
                )
            return await self._open(request, spec, geometry, blocks)

    async def _ensure(self, shards: int) -> None:
        try:
            await self.shards.ensure(shards)
        except ConfigError as error:
            raise invalid(Reason.BAD_REQUEST, str(error), param="shards") from error
        except (TimeoutError, OSError) as error:
            raise unavailable(Reason.KV_OWNER_UNREACHABLE, "a shard does not start") from error

    async def _open(
        self, request: worker_pb2.AttachRequest, spec: RankSpec, geometry: BlockGeometry, blocks: int
    ) -> worker_pb2.AttachResponse:
        token = secrets.token_bytes(16)
        order = OpenShard(msgspec.msgpack.encode(spec), geometry, blocks, token)
        shards = range(request.shards)
        loop = asyncio.get_running_loop()
        self._states.clear()
        self._movers.clear()
        with_movers = shards if self._config.kv_transfer.transport != "none" else ()
        movers = [self._waiting.setdefault((MoverReady, shard), loop.create_future()) for shard in with_movers]
        # From here on shards may hold memory, whether or not this call gets to its end.
        kv_bytes = blocks * geometry.block_bytes * geometry.layers * request.shards
        self.attached = _Attached(request.decode_root_id, request.rank, blocks, kv_bytes)
        try:
            opened: list[ShardOpen] = await self._answers(ShardOpen, order, shards, OPEN_TIMEOUT_S)
            problem = next((shard.error for shard in opened if shard.error), "")
            if problem:
                raise invalid(Reason.UNSUPPORTED_ATTENTION, problem, param="attention")
            ready: list[MoverReady] = await asyncio.wait_for(asyncio.gather(*movers), OPEN_TIMEOUT_S)
        except BaseException as error:
            await self._close_locked(f"not attached: {error}")
            if isinstance(error, TimeoutError):
                raise unavailable(Reason.KV_OWNER_UNREACHABLE, "a shard or its mover does not start") from error
            raise
        log.info("attached", root=request.decode_root_id, rank=request.rank, blocks=blocks)
        return worker_pb2.AttachResponse(
            blocks=blocks,
            shards=[
                worker_pb2.RankShard(
                    kv=kv_pb2.KvShard(host=mover.host, port=mover.port) if mover is not None else None,
                    exchange=kv_pb2.KvShard(host=self._config.host, port=shard.port),
                )
                for mover, shard in itertools.zip_longest(ready, opened)
            ],
            token=token,
        )

    async def _close(self, reason: str) -> None:
        async with self._changing:
            await self._close_locked(reason)

    async def _close_locked(self, reason: str) -> None:
        """Frees the partition; shards that do not answer are replaced."""
        if self.attached is None:
            return
        log.info("detached", root=self.attached.root_id, reason=reason)
        self.attached = None
        self._states.clear()
        self._spans.close_all(reason)
        # Callers may go before the shards have answered; what they answer then must not be taken for another's end.
        await to_the_end(self._close_shards())

    async def _close_shards(self) -> None:
        try:
            await self._answers(ShardClosed, CloseShard(), self.shards.numbers, CLOSE_TIMEOUT_S)
        except TimeoutError:
            log.error("a shard does not close; starting it anew")  # noqa: TRY400 - the traceback would say no more
            await self.shards.restart()
        self._waiting.clear()
        self._left.set()

    async def Detach(self, request: worker_pb2.DetachRequest, context: Context[Any, Any]) -> worker_pb2.DetachResponse:
        """See worker.proto."""
        if self.attached is not None and self.attached.root_id == request.decode_root_id:
            await self._close("the root asked for it")
        return worker_pb2.DetachResponse()

    async def Drain(
        self, request: worker_pb2.WorkerServiceDrainRequest, context: Context[Any, Any]
    ) -> worker_pb2.WorkerServiceDrainResponse:
        """See worker.proto."""
        remaining = await self.leave(max(0.1, (context.time_remaining() or 30.0) - 0.5))
        return worker_pb2.WorkerServiceDrainResponse(attached=bool(remaining))

    async def leave(self, timeout: float) -> int:
        """Refuses roots from now on and waits until ours, which sees that, has let us go. Returns how many remain."""
        self.draining = True
        return int(not await self.alone(timeout))

    async def alone(self, timeout: float) -> bool:
        """Waits until no root is attached; False if the time is up before."""
        deadline = time.monotonic() + timeout
        while self.attached is not None and time.monotonic() < deadline:
            self._left.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), max(0.0, deadline - time.monotonic()))
        return self.attached is None

    async def GetStats(
        self, request: worker_pb2.GetStatsRequest, context: Context[Any, Any]
    ) -> worker_pb2.GetStatsResponse:
        """See worker.proto."""
        at, state = self.attached, self._states.get(0)
        if at is not None:
            # Nobody but roots asks, and those that are not attached do not.
            at.heard = time.monotonic()
        response = worker_pb2.GetStatsResponse(draining=self.draining)
        if at is not None:
            response.decode_root_id, response.rank, response.blocks = at.root_id, at.rank, at.blocks
            response.kv_bytes, response.kv_received_bytes, response.kv_open = (
                at.kv_bytes,
                at.received_bytes,
                len(at.tickets),
            )
        if state is not None:
            response.steps, response.context_tokens = state.steps, state.context_tokens
            response.attention_seconds, response.exchange_transport = state.attention_seconds, state.transport
        return response

    async def ResetCache(
        self, request: worker_pb2.ResetCacheRequest, context: Context[Any, Any]
    ) -> worker_pb2.ResetCacheResponse:
        """See worker.proto."""
        at = self._of(request.decode_root_id)
        busy = bool(at.tickets)
        if not busy:
            try:
                order = ZeroShard(time.monotonic() + ZERO_TIMEOUT_S)
                answers = await self._answers(ShardZeroed, order, self.shards.numbers, ZERO_TIMEOUT_S)
                busy = not all(answer.ok for answer in answers)
            except TimeoutError:
                # A shard looks at its messages when it waits for the root's next one.
                busy = True
        if busy:
            raise MeshError(grpc.StatusCode.FAILED_PRECONDITION, Reason.BUSY, "a step or a transfer is under way")
        return worker_pb2.ResetCacheResponse()

    async def ExpectKv(
        self, request: worker_pb2.ExpectKvRequest, context: Context[Any, Any]
    ) -> worker_pb2.ExpectKvResponse:
        """See worker.proto."""
        at = self._of(request.decode_root_id)
        if len(request.transfer_id) != 16 or any(block >= at.blocks for block in request.block_ids):
            raise invalid(Reason.BAD_TARGET, "the ticket is no id of 16 bytes, or names blocks that are not there")
        try:
            codec = codec_name(request.codec)
        except GeometryMismatchError as error:
            raise invalid(Reason.BAD_TARGET, str(error)) from error
        at.tickets.add(request.transfer_id)
        self._spans.open(request.transfer_id, len(request.block_ids), at.rank)
        order = Expect(request.transfer_id, list(request.block_ids), codec)
        try:
            await self.settling.open(self.shards.hub, dict.fromkeys(self.shards.numbers, order))
        except MoverSilentError as error:
            raise unavailable(Reason.KV_OWNER_UNREACHABLE, str(error)) from error
        return worker_pb2.ExpectKvResponse()

    async def SettleKv(
        self, request: worker_pb2.SettleKvRequest, context: Context[Any, Any]
    ) -> worker_pb2.SettleKvResponse:
        """See worker.proto."""
        at = self._of(request.decode_root_id)
        try:
            outcome = await self.settling.settle(self.shards.hub, self.shards.numbers, request.transfer_id)
        finally:
            at.tickets.discard(request.transfer_id)
        self._spans.close(request.transfer_id, outcome)
        at.received_bytes += outcome.receipt.bytes
        return worker_pb2.SettleKvResponse(complete=outcome.complete, error=outcome.error, receipt=outcome.receipt)

    def _of(self, root_id: str) -> _Attached:
        if self.attached is None or self.attached.root_id != root_id:
            raise MeshError(grpc.StatusCode.FAILED_PRECONDITION, Reason.NOT_ATTACHED, f"{root_id} is not attached")
        return self.attached


def _spec(request: worker_pb2.AttachRequest) -> tuple[RankSpec, BlockGeometry]:
    """The model as the rank knows it. Raises MeshError INVALID_ARGUMENT."""
    geometry, attention = BlockGeometry.from_proto(request.geometry), request.attention
    cache = (geometry.layers, geometry.kv_heads, geometry.head_size, geometry.block_size, geometry.block_bytes)
    sizes = (*cache, attention.heads, attention.max_seqs, attention.max_tokens)
    problem = ""
    if not request.decode_root_id:
        problem = "decode_root_id is empty"
    elif not request.rank or not 0 < request.shards <= MAX_SHARDS:
        problem = f"rank and shards count from 1, and there are at most {MAX_SHARDS} shards"
    elif not all(sizes) or not attention.max_blocks:
        problem = "a size is 0"
    elif len(attention.layers) != geometry.layers:
        problem = f"{len(attention.layers)} layers described, the cache has {geometry.layers}"
    elif attention.dtype not in ("float32", "bfloat16", "float16") or attention.dtype != geometry.dtype:
        problem = f"q, k and v are {attention.dtype}, the cache is {geometry.dtype}"
    elif attention.heads % geometry.kv_heads:
        problem = f"{attention.heads} heads do not divide over {geometry.kv_heads} KV heads"
    if problem:
        raise invalid(Reason.BAD_REQUEST, problem, param="attention")
    spec = RankSpec(
        shape=HeadShape(attention.heads, geometry.kv_heads, geometry.head_size, attention.dtype),
        layers=[LayerSpec(layer.scale, layer.sliding_window, layer.softcap) for layer in attention.layers],
        block_size=geometry.block_size,
        packing=geometry.packing,
        max_seqs=attention.max_seqs,
        max_tokens=attention.max_tokens,
        max_blocks=attention.max_blocks,
        kv_split=attention.kv_split,
    )
    if spec.block_bytes != geometry.block_bytes:
        raise invalid(Reason.BAD_REQUEST, f"a block has {spec.block_bytes} bytes, not {geometry.block_bytes}")
    return spec, geometry
