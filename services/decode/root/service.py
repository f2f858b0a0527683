"""The decode root: the engine that holds the weights, samples every token and streams it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import structlog
from google.protobuf.json_format import MessageToDict
from vllm import TokensPrompt
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from services.decode.root.handoff import HandOff, Prompt
from services.decode.root.pace import Pace, PaceMetrics
from services.decode.root.sequence_spans import SequenceSpans, StepSpans
from tokenmesh.config import DecodeConfig
from tokenmesh.context import WorkContext, current
from tokenmesh.engine.host import EngineHost
from tokenmesh.engine.sampling import bad_params, logprobs_to_proto, to_vllm, tokens_only
from tokenmesh.engine.settings import FetchFrom
from tokenmesh.lifecycle import LiveRequest, RequestState, RequestTable
from tokenmesh.prompts import check_prompt
from tokenmesh.rpc.channel import MAX_MESSAGE_BYTES
from tokenmesh.rpc.errors import MeshError, Reason, invalid, unavailable
from tokenmesh.rpc.server import Context
from tokenmesh.telemetry import span_names
from tokenmesh.telemetry.metrics import Metrics
from tokenmesh.telemetry.status_metrics import decision_name
from tokenmesh.telemetry.tracing import Value
from tokenmesh.v1 import decode_pb2, decode_pb2_grpc, sampling_pb2

log = structlog.get_logger()

ROOM_BYTES = 64 << 10
"""Of a message, for what it has besides log-probabilities of its prompt."""

_FINISH = {
    "stop": sampling_pb2.FINISH_REASON_STOP,
    "length": sampling_pb2.FINISH_REASON_LENGTH,
    "abort": sampling_pb2.FINISH_REASON_ABORT,
    "error": sampling_pb2.FINISH_REASON_ERROR,
    "repetition": sampling_pb2.FINISH_REASON_REPETITION,
}


_LOCAL_REASONS = (sampling_pb2.PREFILL_DECISION_DECODE_ONLY, sampling_pb2.PREFILL_DECISION_PREFILL_BUSY)


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """See decode.proto."""

    def __init__(
        self, config: DecodeConfig, model_name: str, prefills: Sequence[str], handoff: HandOff, metrics: Metrics
    ) -> None:
        self._config = config
        self._model_name = model_name
        self._prefills = tuple(prefills)
        self._handoff = handoff
        self._metrics = PaceMetrics(metrics)
        self._moves_nothing = config.kv_transfer.transport == "none"
        self.requests = RequestTable(config.max_queue)
        self.decisions: Counter[str] = Counter()
        self.steps = StepSpans()
        self._engine: EngineHost | None = None

    @property
    def engine(self) -> EngineHost:
        """The engine. Raises MeshError UNAVAILABLE while it starts."""
        if self._engine is None:
            raise unavailable(Reason.DRAINING, "the engine is still starting")
        return self._engine

    def attach(self, engine: EngineHost) -> None:
        """Gives the service its engine."""
        self._engine = engine

    async def Generate(
        self, request: decode_pb2.GenerateRequest, context: Context[Any, Any]
    ) -> AsyncIterator[decode_pb2.GenerateResponse]:
        """See decode.proto."""
        pace = Pace(self._metrics)
        engine = self.engine
        model = engine.llm.model_config
        params = self._params(request)
        check_prompt(request.prompt_token_ids, model.get_vocab_size(), model.max_model_len, room=1)
        live = LiveRequest(request.request_id, prompt_tokens=len(request.prompt_token_ids))
        prompt = self._prompt(request)
        if prompt is not None:
            params.extra_args = {"kv_transfer_params": {FetchFrom.KEY: request.request_id}}
        tokens = TokensPrompt(prompt_token_ids=list(request.prompt_token_ids))
        if request.cache_salt:
            tokens["cache_salt"] = request.cache_salt
        try:
            with (
                self.requests.admit(live),
                SequenceSpans(self.steps) as spans,
                self._handoff.registered(request.request_id, prompt),
            ):
                if prompt is not None:
                    prompt.on_wait = lambda: _waits(live, spans)
                first = True
                engine.rouse()
                outputs = engine.llm.generate(
                    tokens, params, request.request_id, priority=request.priority, **_reasoning(request)
                )
                async for output in outputs:
                    response = _response(output)
                    if first or output.finished:
                        response.usage.CopyFrom(_usage(output, live, prompt))
                    if first:
                        live.enter(RequestState.RUNNING)
                        self._decide(response, request, prompt)
                        pace.first(response.usage, _queue_seconds(output))
                        spans.first_token(output, _attributes(response))
                        first = False
                    pace.message(len(response.token_ids))
                    if output.finished:
                        spans.finished(output.outputs[0].finish_reason or "", pace.tokens)
                    yield response
        except VLLMClientError as error:
            raise bad_params(error) from error
        except GracefulHTTPError as error:
            # Limits of vLLM's own on what waits, set through engine_args.
            raise MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL, error.message) from error
        except EngineDeadError as error:
            raise unavailable(Reason.ENGINE_DEAD, "the decode engine has died") from error

    def _params(self, request: decode_pb2.GenerateRequest) -> SamplingParams:
        if not request.request_id:
            raise invalid(Reason.BAD_REQUEST, "request_id is empty", param="request_id")
        if request.HasField("local_reason") and request.local_reason not in _LOCAL_REASONS:
            raise invalid(Reason.BAD_REQUEST, "local_reason does not name a reason", param="local_reason")
        if request.sampling_params.stop:
            raise invalid(
                Reason.BAD_SAMPLING_PARAMS, "stop strings are matched in the gateway", param="sampling_params.stop"
            )
        return tokens_only(to_vllm(request.sampling_params))

    def _prompt(self, request: decode_pb2.GenerateRequest) -> Prompt | None:
        """The request as the hand-off sees it, or None if its prompt must be computed here."""
        candidates = tuple(c.address for c in request.prefill_candidates)
        if not candidates:
            candidates = tuple(address for address in self._prefills if address in self._handoff.connected)
        too_short = len(request.prompt_token_ids) < self._config.remote_prefill_min_tokens
        wants_logprobs = request.sampling_params.HasField("prompt_logprobs")
        if request.HasField("local_reason") or self._moves_nothing or not candidates or too_short or wants_logprobs:
            return None
        return Prompt(
            request_id=request.request_id,
            token_ids=request.prompt_token_ids,
            candidates=candidates,
            work=current() or WorkContext.from_headers({}, request.request_id),
            cache_salt=request.cache_salt,
            priority=request.priority,
        )

    def _decide(
        self,
        response: decode_pb2.GenerateResponse,
        request: decode_pb2.GenerateRequest,
        prompt: Prompt | None,
    ) -> None:
        """Records in the first response where the prompt's KV came from, and counts it."""
        if prompt is not None and prompt.receipt is not None:
            decision = sampling_pb2.PREFILL_DECISION_DISAGGREGATED
            response.receipt.CopyFrom(prompt.receipt)
        elif prompt is not None and prompt.failed:
            decision = sampling_pb2.PREFILL_DECISION_PREFILL_FAILED
        elif prompt is not None:
            decision = sampling_pb2.PREFILL_DECISION_PREFIX_CACHED
        elif request.HasField("local_reason"):
            decision = request.local_reason
        elif self._moves_nothing:
            decision = sampling_pb2.PREFILL_DECISION_DECODE_ONLY
        elif request.sampling_params.HasField("prompt_logprobs"):
            decision = sampling_pb2.PREFILL_DECISION_PROMPT_LOGPROBS
        elif len(request.prompt_token_ids) < self._config.remote_prefill_min_tokens:
            decision = sampling_pb2.PREFILL_DECISION_TOO_SHORT
        else:
            decision = sampling_pb2.PREFILL_DECISION_NO_PREFILL
        response.prefill_decision = decision
        name = sampling_pb2.PrefillDecision.Name(decision)
        self.decisions[name] += 1
        log.info(
            "decoding",
            decision=name,
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=response.usage.cached_tokens,
        )

    async def Abort(self, request: decode_pb2.AbortRequest, context: Context[Any, Any]) -> decode_pb2.AbortResponse:
        """See decode.proto."""
        if not request.request_ids:
            raise invalid(Reason.BAD_REQUEST, "no request ids", param="request_ids")
        await self.engine.llm.abort(list(request.request_ids))
        return decode_pb2.AbortResponse()

    async def GetLoad(
        self, request: decode_pb2.GetLoadRequest, context: Context[Any, Any]
    ) -> decode_pb2.GetLoadResponse:
        """See decode.proto."""
        self.requests.check_open()
        engine = self.engine
        running = self.requests.count(RequestState.RUNNING)
        return decode_pb2.GetLoadResponse(
            running=running,
            waiting=len(self.requests) - running,
            blocks_total=engine.counts.blocks_total,
            blocks_free=engine.counts.blocks_free,
            block_size=engine.block_size,
            max_model_len=engine.llm.model_config.max_model_len,
            model=self._model_name,
            queued_tokens=self.requests.tokens_before(RequestState.RUNNING),
            kv_bytes_received=self._handoff.bytes,
            kv_transfers=self._handoff.transfers,
            kv_seconds=self._handoff.seconds,
            kv_transport=self._handoff.transport,
            decisions=dict(self.decisions),
        )


def _waits(live: LiveRequest, spans: SequenceSpans) -> None:
    live.enter(RequestState.AWAITING_KV)
    spans.waits_for_kv()


def _attributes(response: decode_pb2.GenerateResponse) -> dict[str, Value]:
    decision = sampling_pb2.PrefillDecision.Name(response.prefill_decision)
    return {
        span_names.DECISION: decision_name(decision),
        span_names.GEN_AI_INPUT_TOKENS: response.usage.prompt_tokens,
        span_names.GEN_AI_CACHED_TOKENS: response.usage.cached_tokens,
    }


def _queue_seconds(output: RequestOutput) -> float:
    stats = output.metrics
    return max(0.0, stats.scheduled_ts - stats.queued_ts) if stats else 0.0


def _usage(output: RequestOutput, live: LiveRequest, prompt: Prompt | None) -> sampling_pb2.Usage:
    stats = output.metrics
    arrived = prompt is not None and prompt.receipt is not None
    return sampling_pb2.Usage(
        prompt_tokens=live.prompt_tokens,
        completion_tokens=stats.num_generation_tokens if stats else 0,
        # vLLM counts fetched KV as cached; to a client, cached is what nobody had to compute.
        cached_tokens=prompt.cached_tokens if prompt is not None and arrived else output.num_cached_tokens or 0,
    )


def _reasoning(request: decode_pb2.GenerateRequest) -> dict[str, Any]:
    """What vLLM's structured outputs must know of thinking, as arguments of generate()."""
    values: dict[str, Any] = {}
    if request.HasField("reasoning_ended"):
        values["reasoning_ended"] = request.reasoning_ended
    if request.HasField("reasoning_parser_kwargs"):
        values["reasoning_parser_kwargs"] = MessageToDict(request.reasoning_parser_kwargs)
    return values


def _response(output: RequestOutput) -> decode_pb2.GenerateResponse:
    completion = output.outputs[0]
    response = decode_pb2.GenerateResponse(token_ids=completion.token_ids)
    if completion.logprobs is not None:
        response.logprobs.CopyFrom(logprobs_to_proto(completion.logprobs))
    # Sent once; vLLM repeats an empty list afterwards.
    if output.prompt_logprobs:
        response.prompt_logprobs.CopyFrom(logprobs_to_proto(output.prompt_logprobs))
        if response.ByteSize() > MAX_MESSAGE_BYTES - ROOM_BYTES:
            raise invalid(
                Reason.BAD_SAMPLING_PARAMS,
                f"the prompt's log-probabilities take {response.ByteSize() >> 20} MiB, more than a message can hold:"
                " ask for fewer, or of a shorter prompt",
                param="prompt_logprobs",
            )
    if completion.finish_reason is not None:
        response.finish_reason = _FINISH[completion.finish_reason]
        if isinstance(completion.stop_reason, int):
            response.stop_token_id = completion.stop_reason
    return response
