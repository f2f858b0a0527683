"""Remote prefill as the decode root drives it: ticket, call, settle, next candidate, tell the engine.

One task per prompt. Whatever happens, the engine's workers hear exactly once what became of a prompt's KV, and only
after its ticket is closed: until then vLLM keeps the blocks, and after that nobody can write them.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import structlog

from services.decode.root.group import Group
from services.decode.root.owners import KvOwner
from tokenmesh.config import DecodeConfig
from tokenmesh.context import WorkContext, bind
from tokenmesh.engine.host import EngineHost
from tokenmesh.kv.codecs import codec_label
from tokenmesh.kv.codecs.links import LinkCodecs
from tokenmesh.kv.messages import DropKv, KvArrived, RankDetached, Settled, StepTimes, Synced, ToService, WantKv
from tokenmesh.parallel.ids import split_owner
from tokenmesh.rpc.calls import calling
from tokenmesh.rpc.channel import open_channel
from tokenmesh.rpc.errors import MOST_DEATHS, MeshError, Reason, unavailable
from tokenmesh.tasks import to_the_end
from tokenmesh.telemetry import span_names, tracing
from tokenmesh.telemetry.metrics import Metrics
from tokenmesh.telemetry.tickets import receipt_attributes
from tokenmesh.telemetry.transfer_metrics import TransferMetrics
from tokenmesh.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc

log = structlog.get_logger()

CONNECT_TIMEOUT_S = 10.0

RECONNECT_S = 0.5

RETRY_AFTER_S = 2.0
"""A prefill service that was unreachable is tried last for this long."""


LOOKS_PER_S = 20.0
"""At pairs that are connected. Each is a call, and there are as many as roots times prefill services times ranks."""


def look_pause(pairs: int) -> float:
    """Seconds until a connected prefill service is looked at again; not all roots at the same moment."""
    return max(RETRY_AFTER_S, pairs / LOOKS_PER_S) * random.uniform(0.8, 1.2)


@dataclass
class Prompt:
    """What the hand-off must know of a request."""

    request_id: str
    token_ids: Sequence[int]
    candidates: Sequence[str]
    work: WorkContext
    cache_salt: str = ""
    priority: int = 0
    receipt: kv_pb2.KvReceipt | None = None
    """Set when the KV has arrived."""
    cached_tokens: int = 0
    """Prompt tokens that nobody had to compute, once the KV has arrived."""
    failed: bool = False
    """Set when every candidate has failed."""
    on_wait: Callable[[], None] = field(default=lambda: None)
    """Called when the engine starts to wait for this prompt's KV."""


@dataclass(frozen=True)
class _Landing:
    """Where a prompt's KV goes."""

    rank: int
    owner: KvOwner
    blocks: list[int]
    """The owner's ids."""


class HandOff:
    """All prompts of a decode root that are being prefilled elsewhere."""

    def __init__(self, config: DecodeConfig, root_id: str, group: Group, metrics: Metrics) -> None:
        self._config = config
        self._root_id = root_id
        self._group = group
        self._metrics = TransferMetrics(metrics)
        self._engine: EngineHost | None = None
        self._prompts: dict[str, Prompt] = {}
        self._fetches: dict[str, asyncio.Task[bool]] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._down_since: dict[str, float] = {}
        self._codecs = LinkCodecs(config.kv_transfer.codec)
        self.connected: set[str] = set()
        """Prefill services that were reachable, and connected to our shards, when last asked."""
        self.bytes = 0
        self.transfers = 0
        self.seconds = 0.0
        self.transport = ""
        self.failures: Counter[str] = Counter()

    @property
    def open(self) -> int:
        """Prompts whose KV is awaited."""
        return len(self._fetches)

    def attach(self, engine: EngineHost) -> None:
        """Gives the hand-off its engine."""
        self._engine = engine

    @property
    def engine(self) -> EngineHost:
        """The engine; messages arrive only once it exists."""
        assert self._engine is not None
        return self._engine

    @contextmanager
    def registered(self, request_id: str, prompt: Prompt | None) -> Iterator[None]:
        """Keeps a prompt known for the length of the block, in which the engine may ask for it; None: nothing."""
        if prompt is None:
            yield
            return
        self._prompts[request_id] = prompt
        try:
            yield
        finally:
            del self._prompts[request_id]

    def handle(self, message: ToService) -> None:
        """Takes what the scheduler wants and what movers report."""
        match message:
            case WantKv():
                task = asyncio.create_task(self._fetch(message))
                self._fetches[message.request_id] = task
                task.add_done_callback(lambda task: self._over(message, task))
            case DropKv(request_id):
                if request_id in self._fetches:
                    self._fetches[request_id].cancel()
            case Synced() | Settled():
                self._group.settling.note(message)
            case RankDetached() | StepTimes():
                self._group.handle(message)
            case _:
                log.warning("unexpected message", message=type(message).__name__)

    def _over(self, want: WantKv, fetch: asyncio.Task[bool]) -> None:
        """Tells the engine's workers. A fetch that was cancelled before it began could not do so itself."""
        self._fetches.pop(want.request_id, None)
        arrived = not fetch.cancelled() and fetch.result()
        for shard in range(self.engine.shards):
            self.engine.hub.send(f"worker-{shard}", KvArrived(want.request_id, arrived))

    async def _fetch(self, want: WantKv) -> bool:
        """Returns whether the KV has arrived; raises nothing but CancelledError."""
        prompt = self._prompts.get(want.key)
        if prompt is None:
            return False
        arrived = False
        try:
            prompt.on_wait()
            with bind(prompt.work), tracing.span(span_names.REMOTE_PREFILL) as whole:
                arrived = await self._try_candidates(want, prompt)
                if not arrived:
                    whole.fail(Reason.KV_TRANSFER_FAILED.value, "computed on the root instead")
        except asyncio.CancelledError:
            log.info("remote prefill cancelled", engine_request=want.request_id)
            raise
        except Exception:
            # The prompt is computed here instead; the fault must not take other requests along.
            log.exception("remote prefill failed unexpectedly", engine_request=want.request_id)
        prompt.failed = not arrived
        return arrived

    async def _try_candidates(self, want: WantKv, prompt: Prompt) -> bool:
        rank, blocks = split_owner(want.blocks)
        # Of this moment: if the rank goes and comes back, the same block ids are other sequences'.
        owner = self._group.owner(rank)
        if owner is None:
            return self._unreachable(rank)
        landing = _Landing(rank, owner, blocks)
        deadline, deaths = time.monotonic() + self._config.kv_transfer.timeout_s, 0
        for number, address in enumerate(sorted(prompt.candidates, key=self._recently_down), start=1):
            left = deadline - time.monotonic()
            if left <= 0:
                log.warning("remote prefill out of time", after_s=self._config.kv_transfer.timeout_s)
                self.failures[Reason.DEADLINE_EXCEEDED.value] += 1
                return False
            if not self._group.owns(owner):
                return self._unreachable(rank)
            begun = time.monotonic()
            try:
                attributes: dict[str, tracing.Value] = {span_names.PREFILL: address, span_names.ATTEMPT: number}
                with tracing.span(span_names.PREFILL_ATTEMPT, attributes) as attempt:
                    prompt.receipt = await self._attempt(want, prompt, landing, address, left, attempt)
                self._metrics.attempt("OK", time.monotonic() - begun)
                return True
            except MeshError as error:
                self._metrics.attempt(error.reason.value, time.monotonic() - begun)
                self.failures[error.reason.value] += 1
                log.warning("remote prefill failed", prefill=address, reason=error.reason.value, error=error.message)
                deaths += error.fatal
                if error.code is grpc.StatusCode.INVALID_ARGUMENT or deaths >= MOST_DEATHS:
                    # The prompt's fault. A service of another geometry says nothing about the next one.
                    return False
        return False

    def _unreachable(self, rank: int) -> bool:
        self.failures[Reason.KV_OWNER_UNREACHABLE.value] += 1
        log.warning("remote prefill failed", rank=rank, reason=Reason.KV_OWNER_UNREACHABLE.value)
        return False

    def _recently_down(self, address: str) -> bool:
        return time.monotonic() - self._down_since.get(address, -RETRY_AFTER_S) < RETRY_AFTER_S

    async def _attempt(
        self, want: WantKv, prompt: Prompt, landing: _Landing, address: str, timeout: float, span: tracing.Span
    ) -> kv_pb2.KvReceipt:
        """One ticket, one call. Returns what arrived; raises MeshError, and in every case leaves the ticket closed."""
        transfer_id = secrets.token_bytes(16)
        span.set({span_names.RANK: landing.rank, span_names.TRANSFER_ID: span_names.transfer_name(transfer_id)})
        owner, codec = landing.owner, self._codecs.of(address)
        request = prefill_pb2.PrefillRequest(
            request_id=prompt.request_id,
            prompt_token_ids=prompt.token_ids,
            target=kv_pb2.KvTarget(
                transfer_id=transfer_id,
                shards=owner.shards,
                geometry=self._geometry(),
                start_token=want.start_token,
                block_ids=landing.blocks,
                codec=codec_label(codec),
            ),
            cache_salt=prompt.cache_salt,
            decode_root_id=self._root_id,
            priority=prompt.priority,
        )
        call: MeshError | None = None
        reply: prefill_pb2.PrefillResponse | None = None
        try:
            await owner.expect(transfer_id, landing.blocks, codec)
            if not self._group.owns(owner):
                raise unavailable(Reason.KV_OWNER_UNREACHABLE, "the rank has gone since its blocks were reserved")
            stub = prefill_pb2_grpc.PrefillServiceStub(self._channel(address))
            with calling("tokenmesh.v1.PrefillService/Prefill", address) as metadata:
                reply = await stub.Prefill(request, timeout=timeout, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            call = MeshError.from_rpc(error)
            if call.code is grpc.StatusCode.UNAVAILABLE:
                self._down_since[address] = time.monotonic()
        finally:
            # The engine gives the blocks to others once this has ended, also where the request was cancelled.
            outcome = await to_the_end(owner.settle(transfer_id))
        if call is not None:
            if outcome.error:
                log.info("kv owner's view", transfer=transfer_id.hex()[:8], error=outcome.error)
            raise call
        if not outcome.complete:
            raise MeshError(grpc.StatusCode.INTERNAL, Reason.KV_TRANSFER_FAILED, outcome.error)
        receipt = outcome.receipt
        receipt.exposed_seconds = reply.receipt.exposed_seconds if reply is not None else 0.0
        prompt.cached_tokens = max(want.cached_tokens, reply.cached_tokens if reply is not None else 0)
        self.bytes += receipt.bytes
        self.transfers += 1
        self.seconds += receipt.seconds
        self.transport = receipt.transport
        self._metrics.transfer(receipt, codec)
        span.set(receipt_attributes(receipt))
        span.set({span_names.KV_EXPOSED_SECONDS: receipt.exposed_seconds, span_names.KV_CODEC: codec})
        log.info(
            "kv arrived",
            prefill=address,
            rank=landing.rank,
            bytes=receipt.bytes,
            seconds=round(receipt.seconds, 4),
            exposed_s=round(receipt.exposed_seconds, 4),
            transport=receipt.transport,
            codec=codec,
        )
        return receipt

    async def keep_connected(self, address: str) -> None:
        """Connects a prefill service to every owner, now and whenever one comes back. Runs until cancelled."""
        told = ""
        while True:
            try:
                goodput, transport = await self._connect(address)
                if address not in self.connected:
                    log.info(
                        "prefill connected", prefill=address, transport=transport, gb_per_s=round(goodput / 1e9, 2)
                    )
                self.connected.add(address)
                self.transport = self.transport or transport
                told = ""
            except grpc.aio.AioRpcError as error:
                self.connected.discard(address)
                failure = MeshError.from_rpc(error)
                if told != failure.reason.value:
                    log.warning(
                        "prefill not connected", prefill=address, reason=failure.reason.value, error=failure.message
                    )
                told = failure.reason.value
            pairs = len(self._channels) * len(self._group.owners())
            await asyncio.sleep(look_pause(pairs) if address in self.connected else RECONNECT_S)

    async def _connect(self, address: str) -> tuple[float, str]:
        """Connects a prefill service to every owner. Returns (slowest goodput, the root's transport)."""
        stub = prefill_pb2_grpc.PrefillServiceStub(self._channel(address))
        replies = []
        for owner in self._group.owners():
            request = prefill_pb2.ConnectOwnerRequest(
                shards=owner.shards,
                geometry=self._geometry(),
                codec=codec_label(self._codecs.of(address)),
            )
            replies.append(await stub.ConnectOwner(request, timeout=CONNECT_TIMEOUT_S))
        goodput = min(reply.goodput for reply in replies)
        await self._codecs.learn(address, goodput, self.engine.movers[0].geometry)
        return goodput, replies[0].transport

    def _geometry(self) -> kv_pb2.BlockGeometry:
        """What prefill services compare with theirs."""
        geometry = self.engine.movers[0].geometry.to_proto()
        if not self._config.kv_transfer.same_weights:
            geometry.ClearField("weights")
        return geometry

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]

    async def close(self) -> None:
        """Cancels what is under way and closes the channels."""
        for task in list(self._fetches.values()):
            task.cancel()
        await asyncio.gather(*self._fetches.values(), return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
