"""The prefill service: computes prompts and pushes their KV to the ranks that will decode."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import msgspec
import structlog
from vllm import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from tokenmesh.config import PrefillConfig
from tokenmesh.engine.host import EngineHost
from tokenmesh.engine.settings import SendTo
from tokenmesh.kv.codecs import codec_name
from tokenmesh.kv.geometry import BlockGeometry, GeometryMismatchError
from tokenmesh.kv.messages import CancelSend, Connect, Connected, Destination, KvSent, SendDone, ToService
from tokenmesh.kv.routes import check_routes
from tokenmesh.lifecycle import LiveRequest, RequestState, RequestTable
from tokenmesh.prompts import check_prompt
from tokenmesh.rpc.errors import MeshError, Reason, invalid, unavailable
from tokenmesh.rpc.server import Context
from tokenmesh.telemetry import metric_names, span_names
from tokenmesh.telemetry.metrics import Metrics
from tokenmesh.telemetry.tickets import receipt_attributes
from tokenmesh.telemetry.tracing import Value, record, start
from tokenmesh.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc

log = structlog.get_logger()

REMEMBERED_TRANSFERS = 1 << 14
"""Engine and mover let go of a transfer some steps after its call has ended, and know it by its id alone. So an id
that was used is refused until many times as many as can be live have followed it."""


@dataclass
class _Send:
    """A transfer under way: resolved when every shard has reported, or one has failed."""

    shards: int
    reports: list[SendDone] = field(default_factory=list)
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def add(self, report: SendDone) -> None:
        self.reports.append(report)
        if not self.done.done() and (report.error or len(self.reports) == self.shards):
            self.done.set_result(None)

    @property
    def error(self) -> str:
        return next((report.error for report in self.reports if report.error), "")

    def receipt(self) -> kv_pb2.KvReceipt:
        return kv_pb2.KvReceipt(
            bytes=sum(r.nbytes for r in self.reports),
            block_layers=sum(r.block_layers for r in self.reports),
            seconds=max(r.seconds for r in self.reports),
            exposed_seconds=max(r.exposed_seconds for r in self.reports),
            transport=next((r.transport for r in self.reports if r.transport), ""),
        )


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """See prefill.proto."""

    def __init__(self, config: PrefillConfig, metrics: Metrics) -> None:
        self._config = config
        self._queue_seconds = metrics.histogram(metric_names.QUEUE_SECONDS)
        self._compute_seconds = metrics.histogram(metric_names.PREFILL_SECONDS)
        self._prompt_tokens = metrics.counter(metric_names.PROMPT_TOKENS)
        self._cached_tokens = metrics.counter(metric_names.CACHED_TOKENS)
        self.requests = RequestTable(config.max_queue, config.credits_per_root)
        self._sends: dict[bytes, _Send] = {}
        self._used: dict[bytes, None] = {}
        """Transfer ids of the past, oldest first."""
        self._connecting: defaultdict[tuple[int, str, int], list[asyncio.Future[Connected]]] = defaultdict(list)
        self._engine: EngineHost | None = None
        self.kv_bytes = 0
        self.kv_transfers = 0
        self.kv_seconds = 0.0
        self.kv_transport = ""

    @property
    def kv_open(self) -> int:
        """Transfers under way."""
        return len(self._sends)

    @property
    def engine(self) -> EngineHost:
        """The engine. Raises MeshError UNAVAILABLE while it starts."""
        if self._engine is None:
            raise unavailable(Reason.DRAINING, "the engine is still starting")
        return self._engine

    def attach(self, engine: EngineHost) -> None:
        """Gives the service its engine."""
        self._engine = engine

    def handle(self, message: ToService) -> None:
        """Takes what movers report."""
        if isinstance(message, SendDone):
            # That shard may free the blocks, whether or not anyone still waits for the transfer.
            self.engine.hub.send(f"worker-{message.shard}", KvSent(message.transfer_id))
            self.kv_bytes += message.nbytes
            self.kv_seconds += message.seconds
            self.kv_transfers += not message.error
            self.kv_transport = message.transport or self.kv_transport
            send = self._sends.get(message.transfer_id)
            if send is not None:
                send.add(message)
        elif isinstance(message, Connected):
            self.kv_transport = message.transport or self.kv_transport
            for future in self._connecting.pop((message.shard, message.host, message.port), ()):
                if not future.done():
                    future.set_result(message)

    async def GetPrefillLoad(
        self, request: prefill_pb2.GetPrefillLoadRequest, context: Context[Any, Any]
    ) -> prefill_pb2.GetPrefillLoadResponse:
        """See prefill.proto."""
        self.requests.check_open()
        counts = self.engine.counts
        running = self.requests.count(RequestState.RUNNING)
        return prefill_pb2.GetPrefillLoadResponse(
            running=running,
            waiting=len(self.requests) - running,
            queued_tokens=self.requests.tokens_before(RequestState.FINISHED),
            blocks_total=counts.blocks_total,
            blocks_free=counts.blocks_free,
            max_queue=self._config.max_queue,
            credits_per_root=self._config.credits_per_root,
        )

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: Context[Any, Any]
    ) -> prefill_pb2.PrefillResponse:
        """See prefill.proto."""
        if context.time_remaining() is None:
            raise invalid(Reason.DEADLINE_MISSING, "Prefill needs a deadline", param="deadline")
        engine = self.engine
        model = engine.llm.model_config
        check_prompt(request.prompt_token_ids, model.get_vocab_size(), model.max_model_len, room=1)
        target = self._check_target(request) if request.HasField("target") else None
        # Attempts of one request may overlap, so a transfer has its own identity here.
        name = f"{request.request_id}/{target.transfer_id.hex()[:8]}" if target else request.request_id
        live = LiveRequest(name, request.decode_root_id, len(request.prompt_token_ids))
        with self.requests.admit(live):
            try:
                return await self._compute(request, target, live)
            except EngineDeadError as error:
                raise unavailable(Reason.ENGINE_DEAD, "the prefill engine has died") from error

    async def ConnectOwner(
        self, request: prefill_pb2.ConnectOwnerRequest, context: Context[Any, Any]
    ) -> prefill_pb2.ConnectOwnerResponse:
        """See prefill.proto."""
        engine = self.engine
        loop = asyncio.get_running_loop()
        waiting = []
        for number, destinations in enumerate(self._destinations(request.geometry, request.shards, request.codec)):
            for to in destinations:
                future: asyncio.Future[Connected] = loop.create_future()
                self._connecting[number, to.host, to.port].append(future)
                engine.hub.send(f"mover-{number}", Connect(to.host, to.port))
                waiting.append(future)
        connected = await asyncio.gather(*waiting)
        problem = next((c.error for c in connected if c.error), "")
        if problem:
            raise unavailable(Reason.KV_OWNER_UNREACHABLE, problem)
        return prefill_pb2.ConnectOwnerResponse(
            transport=connected[0].transport, goodput=min(c.goodput for c in connected)
        )

    def _destinations(
        self, geometry: kv_pb2.BlockGeometry, shards: Sequence[kv_pb2.KvShard], codec: kv_pb2.KvCodec
    ) -> list[list[Destination]]:
        """Where each of our shards sends which of its heads. Raises MeshError."""
        if not shards:
            raise invalid(Reason.BAD_TARGET, "no shards given", param="shards")
        total = self.engine.llm.model_config.get_total_num_kv_heads()
        mine, theirs = self.engine.movers[0].geometry, BlockGeometry.from_proto(geometry)
        try:
            tensor_parallel = self._config.tensor_parallel_size
            routes = check_routes(total, mine, tensor_parallel, theirs, len(shards), codec_name(codec))
        except GeometryMismatchError as error:
            raise MeshError(grpc.StatusCode.FAILED_PRECONDITION, Reason.GEOMETRY_MISMATCH, str(error)) from error
        return [
            [Destination(shards[r.owner].host, shards[r.owner].port, r.source, r.target, r.heads) for r in way]
            for way in routes
        ]

    def _check_target(self, request: prefill_pb2.PrefillRequest) -> SendTo:
        target = request.target
        mine = self.engine.movers[0].geometry
        if not target.codec:
            raise invalid(Reason.BAD_TARGET, "codec must be given", param="target")
        destinations = self._destinations(target.geometry, target.shards, target.codec)
        missing = len(request.prompt_token_ids) - target.start_token
        problem = ""
        if len(target.transfer_id) != 16:
            problem = "transfer_id must be 16 bytes"
        elif target.start_token % mine.block_size or missing <= 0:
            problem = "start_token must be a multiple of the block size and inside the prompt"
        elif len(target.block_ids) != mine.blocks_for(missing):
            problem = f"{len(target.block_ids)} blocks given, {mine.blocks_for(missing)} needed"
        elif target.transfer_id in self._sends or target.transfer_id in self._used:
            problem = "transfer_id was used before"
        if problem:
            raise invalid(Reason.BAD_TARGET, problem, param="target")
        codec = codec_name(target.codec)
        return SendTo(target.transfer_id, destinations, target.start_token, len(target.block_ids), codec)

    async def _compute(
        self, request: prefill_pb2.PrefillRequest, target: SendTo | None, live: LiveRequest
    ) -> prefill_pb2.PrefillResponse:
        send: _Send | None = None
        if target is not None:
            send = self._sends[target.transfer_id] = _Send(self._config.tensor_parallel_size)
            self._remember(target.transfer_id)
        compute = asyncio.create_task(self._generate(request, target, live))
        push = start(span_names.KV_PUSH, _push_attributes(target)) if target is not None else None
        failure: BaseException | None = None
        try:
            if send is not None:
                # The transfer may end first: well, when the last layer beats the sampler, or badly.
                await asyncio.wait({compute, send.done}, return_when=asyncio.FIRST_COMPLETED)
                if send.error:
                    raise _transfer_error(send.error)
            output = await compute
            if send is not None:
                await send.done
                if send.error:
                    raise _transfer_error(send.error)
        except BaseException as error:
            failure = error
            raise
        finally:
            if push is not None and send is not None:
                if send.done.done() and not send.error:
                    push.set(_receipt_attributes(send.receipt()))
                push.end(failure)
            if not compute.done():
                compute.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await compute
            if target is not None:
                del self._sends[target.transfer_id]
                for shard in range(self._config.tensor_parallel_size):
                    self.engine.hub.send(f"mover-{shard}", CancelSend(target.transfer_id))
        stats = output.metrics
        response = prefill_pb2.PrefillResponse(
            cached_tokens=output.num_cached_tokens or 0,
            first_token_id=output.outputs[0].token_ids[0],
            queue_seconds=stats.scheduled_ts - stats.queued_ts if stats else 0.0,
            compute_seconds=stats.first_token_ts - stats.scheduled_ts if stats else 0.0,
            receipt=send.receipt() if send is not None else None,
        )
        self._queue_seconds.observe(response.queue_seconds)
        self._compute_seconds.observe(response.compute_seconds)
        self._prompt_tokens.inc(len(request.prompt_token_ids))
        self._cached_tokens.inc(response.cached_tokens)
        return response

    def _remember(self, transfer_id: bytes) -> None:
        self._used[transfer_id] = None
        if len(self._used) > REMEMBERED_TRANSFERS:
            del self._used[next(iter(self._used))]

    async def _generate(
        self, request: prefill_pb2.PrefillRequest, target: SendTo | None, live: LiveRequest
    ) -> RequestOutput:
        """Runs the prompt through the engine; its one sampled token closes the prefill."""
        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        if target is not None:
            params.extra_args = {"kv_transfer_params": {SendTo.KEY: msgspec.to_builtins(target)}}
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_token_ids))
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        live.enter(RequestState.RUNNING)
        # Until it is known when vLLM began, all of it counts as the queue.
        with start(span_names.QUEUE) as waiting:
            self.engine.rouse()
            outputs = self.engine.llm.generate(prompt, params, live.request_id, priority=request.priority)
            (output,) = [output async for output in outputs]
            stats = output.metrics
            if stats is not None:
                waiting.end(at=stats.scheduled_ts)
                record(
                    span_names.PREFILL_COMPUTE,
                    stats.scheduled_ts,
                    stats.first_token_ts,
                    {
                        span_names.GEN_AI_INPUT_TOKENS: live.prompt_tokens,
                        span_names.GEN_AI_CACHED_TOKENS: output.num_cached_tokens or 0,
                    },
                )
        return output


def _push_attributes(target: SendTo) -> dict[str, Value]:
    return {
        span_names.TRANSFER_ID: span_names.transfer_name(target.transfer_id),
        span_names.KV_BLOCKS: target.num_blocks,
    }


def _receipt_attributes(receipt: kv_pb2.KvReceipt) -> dict[str, Value]:
    return {**receipt_attributes(receipt), span_names.KV_EXPOSED_SECONDS: receipt.exposed_seconds}


def _transfer_error(error: str) -> MeshError:
    if "owner" in error:
        return unavailable(Reason.KV_OWNER_UNREACHABLE, error)
    return MeshError(grpc.StatusCode.INTERNAL, Reason.KV_TRANSFER_FAILED, error)
