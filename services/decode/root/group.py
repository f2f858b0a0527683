"""The root's group: attaches ranks, watches them, and knows how well they do.

A rank takes part once three have agreed: the worker service has allocated blocks, every engine worker is connected to
its shard, and the scheduler has it in its ledger. It leaves when any of them says so, and is attached again when its
worker is back, under a new epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import msgspec
import structlog

from services.decode.root.group_stats import GroupStats
from services.decode.root.owners import KvOwner, RelayedOwner, RootOwner, WorkerOwner
from tokenmesh.config import DecodeConfig
from tokenmesh.engine.host import EngineHost
from tokenmesh.engine.join import JoinRank
from tokenmesh.kv.geometry import BlockGeometry
from tokenmesh.kv.messages import AttachRank, DetachRank, RankDetached, StepTimes
from tokenmesh.kv.settling import Settling
from tokenmesh.parallel.partition import split_blocks
from tokenmesh.parallel.rank import RankSpec
from tokenmesh.rpc.channel import open_channel
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.v1 import admin_pb2, worker_pb2, worker_pb2_grpc

log = structlog.get_logger()

ATTACH_TIMEOUT_S = 60.0
RETRY_S = 1.0
LONGEST_RETRY_S = 30.0
STEADY_S = 60.0
"""A rank that was there for longer than this is attached again at once."""
WATCH_S = 1.0
STATS_TIMEOUT_S = 2.0
SILENCES = 3
"""Unanswered looks at a rank after which it is given up, though no step has missed it; not before `timeout_s`."""


@dataclass
class Rank:
    """One rank other than the root."""

    rank: int
    address: str
    stub: worker_pb2_grpc.WorkerServiceStub | None = None
    attached: bool = False
    epoch: int = 0
    blocks: int = 0
    owner: KvOwner | None = None
    transport: str = ""
    error: str = "not attached yet"
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the scheduler has let it go."""


class Group:
    """All ranks of one root. Of a group of one it knows the root alone."""

    def __init__(self, config: DecodeConfig, root_id: str, workers: Sequence[str]) -> None:
        """`workers`: host:port of decode workers, rank 1 first."""
        self._config = config
        self._root_id = root_id
        local = config.group.exchange == "local"
        addresses = ["local"] * (config.token_parallel_size - 1) if local else list(workers)
        self.ranks = [Rank(i + 1, address) for i, address in enumerate(addresses[: config.token_parallel_size - 1])]
        self.settling = Settling()
        self.stats = GroupStats()
        self._channels: list[grpc.aio.Channel] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._engine: EngineHost | None = None
        self._root: RootOwner | None = None
        self._spec: RankSpec | None = None
        self._epochs = 0
        self._joining = asyncio.Lock()

    @property
    def engine(self) -> EngineHost:
        """The engine; messages arrive only once it exists."""
        assert self._engine is not None
        return self._engine

    async def start(self, engine: EngineHost) -> None:
        """Takes the engine and begins to attach ranks. Raises MeshError if the model's attention is not supported."""
        self._engine = engine
        self._root = RootOwner(engine, self.settling)
        for mover in engine.movers.values():
            self.settling.watch(mover)
        if not self.ranks:
            return
        try:
            specs = await engine.llm.collective_rpc("rank_spec")
        except Exception as error:
            raise MeshError(
                grpc.StatusCode.INVALID_ARGUMENT, Reason.UNSUPPORTED_ATTENTION, str(error).splitlines()[-1]
            ) from error
        self._spec = msgspec.convert(specs[0], RankSpec)
        for rank in self.ranks:
            if rank.address != "local":
                channel = open_channel(rank.address)
                self._channels.append(channel)
                rank.stub = worker_pb2_grpc.WorkerServiceStub(channel)
            self._keepers.append(asyncio.create_task(self._keep(rank)))

    def owner(self, rank: int) -> KvOwner | None:
        """Who owns the blocks of a rank; None if KV cannot be written there now."""
        if rank == 0:
            return self._root
        known = self.ranks[rank - 1] if rank <= len(self.ranks) else None
        return known.owner if known is not None and known.attached else None

    def owns(self, owner: KvOwner) -> bool:
        """Whether it still is one: a rank that was lost and is back has another owner."""
        return owner is self._root or any(rank.attached and rank.owner is owner for rank in self.ranks)

    def owners(self) -> list[KvOwner]:
        """All that prefill services should be connected to."""
        found = [self.owner(rank) for rank in range(len(self.ranks) + 1)]
        relayed = [owner for owner in found if not isinstance(owner, RelayedOwner)]
        return [owner for owner in relayed if owner is not None]

    def handle(self, message: RankDetached | StepTimes) -> None:
        """Takes what scheduler and engine workers report."""
        if isinstance(message, StepTimes):
            self.stats.add(message)
            return
        self.stats.detached += 1
        self.stats.recomputed += message.recomputed
        rank = self.ranks[message.rank - 1]
        if rank.epoch == message.epoch:
            self._let_go(rank, message.reason)

    def _let_go(self, rank: Rank, reason: str) -> None:
        if rank.attached:
            log.warning("rank detached", rank=rank.rank, worker=rank.address, reason=reason)
        rank.attached, rank.owner, rank.blocks, rank.error = False, None, 0, reason
        rank.changed.set()

    # One keeper per rank.

    async def _keep(self, rank: Rank) -> None:
        """Attaches a rank, watches it, and attaches it again when it has gone. Runs until cancelled."""
        told, pause, short_lives = "", RETRY_S, 0
        while True:
            try:
                await self._attach(rank)
                told, attached = "", time.monotonic()
                await self._watch(rank)
                # One that is lost as soon as it has rows to attend over stops the engine each time it is back.
                short_lives = short_lives + 1 if time.monotonic() - attached < STEADY_S else 0
                pause = min(RETRY_S * 2 ** min(max(0, short_lives - 1), 10), LONGEST_RETRY_S)
            except MeshError as error:
                if error.reason is Reason.RANK_UNREACHABLE:
                    # The engine stood still while it tried to connect.
                    pause = min(2 * pause, LONGEST_RETRY_S)
                rank.error = f"{error.reason.value}: {error.message}"
                if told != rank.error:
                    told = rank.error
                    log.warning("rank not attached", rank=rank.rank, worker=rank.address, error=rank.error)
            await asyncio.sleep(pause)

    async def _attach(self, rank: Rank) -> None:
        """Raises MeshError."""
        join = await self._offer(rank)
        try:
            # One after the other: every engine worker connects between two steps.
            async with self._joining:
                answers = await self.engine.llm.collective_rpc("join_rank", args=(msgspec.msgpack.encode(join),))
            why = next((error for _, error in answers if error), "")
        except Exception as error:  # noqa: BLE001 - vLLM's own, whatever has become of its workers
            why = str(error).strip() or type(error).__name__
        if why:
            await self._detach(rank)
            raise MeshError(grpc.StatusCode.UNAVAILABLE, Reason.RANK_UNREACHABLE, why.strip().splitlines()[-1])
        rank.epoch, rank.blocks, rank.transport, rank.error = join.epoch, join.blocks, answers[0][0], ""
        rank.changed.clear()
        rank.attached = True
        self.engine.hub.send("scheduler", AttachRank(rank.rank, join.epoch, join.blocks))
        log.info("rank attached", rank=rank.rank, worker=rank.address, blocks=join.blocks, transport=rank.transport)

    async def _offer(self, rank: Rank) -> JoinRank:
        """Has the worker allocate, and returns how engine workers reach it."""
        self._epochs += 1
        blocks = self._blocks(rank.rank)
        group = self._config.group
        if rank.stub is None:
            if self.engine.device_blocks and self.engine.movers:
                rank.owner = RootOwner(self.engine, self.settling, rank.rank)
            # As many as the root has, less the one that vLLM sets aside.
            blocks = blocks or self.engine.llm.vllm_config.cache_config.num_gpu_blocks - 1
            return JoinRank(rank.rank, self._epochs, [], b"", group.transport, group.timeout_s, blocks)
        assert self._spec is not None
        request = worker_pb2.AttachRequest(
            decode_root_id=self._root_id,
            geometry=_geometry(self._spec).to_proto(),
            rank=rank.rank,
            blocks=blocks,
            attention=_attention(self._spec),
            shards=self.engine.shards,
        )
        try:
            reply = await rank.stub.Attach(request, timeout=ATTACH_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise MeshError.from_rpc(error) from error
        shards = [shard.kv for shard in reply.shards]
        worker = WorkerOwner(rank.stub, rank.address, self._root_id, shards, lambda: self.owns(owner))
        relayed = group.kv_route == "via_root"
        owner: KvOwner = RelayedOwner(self.engine, self.settling, worker) if relayed else worker
        rank.owner = owner
        addresses = [(shard.exchange.host, shard.exchange.port) for shard in reply.shards]
        return JoinRank(rank.rank, self._epochs, addresses, reply.token, group.transport, group.timeout_s, reply.blocks)

    def _blocks(self, rank: int) -> int:
        """Blocks to ask for; 0: as many as there are."""
        group = self._config.group
        if self.engine.device_blocks:
            return self.engine.device_blocks[rank]
        if group.kv_blocks is None:
            return 0
        return split_blocks(group.kv_blocks, self._config.token_parallel_size, group.root_share)[rank]

    async def _watch(self, rank: Rank) -> None:
        """Returns when the rank has gone, for whatever reason."""
        silent, heard = 0, time.monotonic()
        while rank.attached:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(rank.changed.wait(), WATCH_S)
            if not rank.attached or rank.stub is None:
                continue
            try:
                stats = await rank.stub.GetStats(worker_pb2.GetStatsRequest(), timeout=STATS_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                silent += 1
                if silent >= SILENCES and time.monotonic() - heard >= self._config.group.timeout_s:
                    self._give_up(rank, MeshError.from_rpc(error).message)
                continue
            silent, heard = 0, time.monotonic()
            if stats.decode_root_id != self._root_id:
                self._give_up(rank, "the worker has left the group")
            elif stats.draining:
                self._give_up(rank, "drained")
        await self._detach(rank)

    def _give_up(self, rank: Rank, reason: str) -> None:
        # The scheduler hears of it at its next step; until then nothing runs there.
        self.engine.hub.send("scheduler", DetachRank(rank.rank, rank.epoch, reason))
        self._let_go(rank, reason)

    async def _detach(self, rank: Rank) -> None:
        if rank.stub is None:
            return
        try:
            await rank.stub.Detach(worker_pb2.DetachRequest(decode_root_id=self._root_id), timeout=STATS_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            log.debug("worker not told that it is detached", worker=rank.address, error=error.details())

    async def reset_caches(self) -> None:
        """Zeroes the blocks of every rank. Raises MeshError if one is busy or does not answer."""
        for rank in self.ranks:
            if rank.attached and rank.stub is not None:
                request = worker_pb2.ResetCacheRequest(decode_root_id=self._root_id)
                try:
                    await rank.stub.ResetCache(request, timeout=15)
                except grpc.aio.AioRpcError as error:
                    raise MeshError.from_rpc(error) from error

    def describe(self) -> list[admin_pb2.RankStatus]:
        """Every rank, the root first; empty for a group of one."""
        if not self.ranks or self._engine is None:
            return []
        counts = {entry.rank: entry for entry in self._engine.counts.ranks}
        rows = [admin_pb2.RankStatus(rank=0, attached=True)]
        rows += [
            admin_pb2.RankStatus(
                rank=rank.rank,
                address=rank.address,
                attached=rank.attached,
                # The ledger takes a rank in at its next step; until then nobody lives there.
                blocks_total=rank.blocks,
                blocks_free=rank.blocks,
                exchange_transport=rank.transport,
                error=rank.error,
            )
            for rank in self.ranks
        ]
        for row in rows:
            if row.rank in counts:
                entry = counts[row.rank]
                row.blocks_total, row.blocks_free = entry.blocks_total, entry.blocks_free
                row.context_tokens, row.sequences = entry.context_tokens, entry.sequences
            row.step_share = self.stats.step_share(row.rank)
        return rows

    async def close(self) -> None:
        """Lets every rank go."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(self._detach(rank) for rank in self.ranks))
        for channel in self._channels:
            await channel.close()


def _geometry(spec: RankSpec) -> BlockGeometry:
    """The blocks of a rank, which are like the root's."""
    shape = spec.shape
    return BlockGeometry(
        layers=len(spec.layers),
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        block_size=spec.block_size,
        dtype=shape.dtype,
        block_bytes=spec.block_bytes,
        packing=spec.packing,
    )


def _attention(spec: RankSpec) -> worker_pb2.Attention:
    layers: list[Any] = [
        worker_pb2.LayerAttention(scale=x.scale, sliding_window=x.sliding_window, softcap=x.softcap)
        for x in spec.layers
    ]
    return worker_pb2.Attention(
        heads=spec.shape.heads,
        dtype=spec.shape.dtype,
        layers=layers,
        max_seqs=spec.max_seqs,
        max_tokens=spec.max_tokens,
        max_blocks=spec.max_blocks,
        kv_split=spec.kv_split,
    )
