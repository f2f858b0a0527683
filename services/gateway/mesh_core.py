"""An engine core that is a mesh: what vLLM's front end calls, answered over gRPC by decode roots.

vLLM's AsyncLLM splits into a front end (tokenising, n choices, stop strings, log-probabilities, text) and an engine
core in another process. Here that other process is another machine, and there may be many.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import structlog
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from services.gateway.pulse import Pulse
from services.gateway.request_spans import SequenceSpan
from services.gateway.router import Route, Router
from tokenmesh.config import GatewayConfig
from tokenmesh.context import adopt
from tokenmesh.engine.sampling import from_vllm
from tokenmesh.lifecycle import LiveRequest, RequestState, RequestTable
from tokenmesh.rpc.calls import calling, start_call
from tokenmesh.rpc.errors import MOST_DEATHS, MeshError, Reason, invalid, unavailable
from tokenmesh.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, sampling_pb2

log = structlog.get_logger()

_FINISH = {
    sampling_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    sampling_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    sampling_pb2.FINISH_REASON_ABORT: FinishReason.ABORT,
    sampling_pb2.FINISH_REASON_ERROR: FinishReason.ERROR,
    sampling_pb2.FINISH_REASON_REPETITION: FinishReason.REPETITION,
}


class _Resources:
    """What AsyncLLM looks at to see whether its engine died; a mesh without roots refuses requests instead."""

    engine_dead = False


class MeshCore:
    """The part of vLLM's EngineCoreClient that AsyncLLM uses for generation."""

    engine_ranks_managed = (0,)
    resources = _Resources()

    def __init__(
        self,
        config: GatewayConfig,
        model_name: str,
        pulse: Pulse,
        router: Router,
        requests: RequestTable,
        fail: Callable[[str, MeshError], None],
    ) -> None:
        """`fail` is told of sequences that a service refused; it must tell whoever waits for them."""
        self._config = config
        self._model_name = model_name
        self._pulse = pulse
        self._router = router
        self._requests = requests
        self._fail = fail
        self._outputs: asyncio.Queue[EngineCoreOutput] = asyncio.Queue()
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._writing = asyncio.Lock()
        self._stopped: set[str] = set()
        """Streams that were cancelled since their text is complete."""

    # What AsyncLLM calls.

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        """Text generation."""
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Starts a sequence; its outputs come through get_output_async."""
        task = asyncio.create_task(self._follow(request))
        self._streams[request.request_id] = task
        task.add_done_callback(lambda _: self._over(request.request_id))

    def _over(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._stopped.discard(request_id)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Ends sequences whose text has come to a stop string: for their roots an abort, for clients an answer."""
        self._stopped.update(request_id for request_id in request_ids if request_id in self._streams)
        self.cancel(request_ids)

    def cancel(self, request_ids: list[str]) -> None:
        """Cancels the calls of sequences, which is what tells their roots."""
        for request_id in request_ids:
            if request_id in self._streams:
                self._streams[request_id].cancel()

    async def get_output_async(self) -> EngineCoreOutputs:
        """Everything that has come since the last call; waits for the first."""
        outputs = [await self._outputs.get()]
        while not self._outputs.empty():
            outputs.append(self._outputs.get_nowait())
        return EngineCoreOutputs(outputs=outputs)

    async def reset_mm_cache_async(self) -> None:
        """Nothing is cached here."""

    async def reset_prefix_cache_async(self, *_: Any) -> bool:
        """Prefix caches belong to the services; see AdminService.ResetPrefixCache."""
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        """Cancels every sequence."""
        for task in list(self._streams.values()):
            task.cancel()

    # One sequence.

    async def _follow(self, request: EngineCoreRequest) -> None:
        """Runs a sequence on one root; if that root refuses it before the first token, on another."""
        queued = time.monotonic()
        deadline = queued + self._config.request_timeout_s
        live = LiveRequest(request.request_id, prompt_tokens=len(request.prompt_token_ids or ()))
        tried: set[str] = set()
        deaths = 0
        refusal: MeshError | None = None
        try:
            with SequenceSpan(self._model_name, request, self._pulse) as span, self._requests.admit(live):
                if span.work is not None:
                    adopt(span.work)
                while True:
                    try:
                        begun = time.monotonic()
                        with self._router.route(
                            request.prompt_token_ids or (), request.cache_salt or "", tried
                        ) as route:
                            tried.add(route.entry.address)
                            span.routed(route, len(tried), begun)
                            serve = self._prefill_only if self._config.mode == "prefill" else self._decode
                            async for output in serve(request, route, span, deadline):
                                if live.state is RequestState.ACCEPTED:
                                    route.prompt_done()
                                    live.enter(RequestState.RUNNING)
                                    output.events = [
                                        EngineCoreEvent(EngineCoreEventType.QUEUED, queued),
                                        EngineCoreEvent(EngineCoreEventType.SCHEDULED, queued),
                                    ]
                                self._outputs.put_nowait(output)
                        return
                    except asyncio.CancelledError:
                        if request.request_id not in self._stopped:
                            raise
                        return
                    except grpc.aio.AioRpcError as error:
                        told = MeshError.from_rpc(error)
                        failure, deaths = _failure(told), deaths + told.fatal
                        started = live.state is not RequestState.ACCEPTED
                        if started or deaths >= MOST_DEATHS or not _may_go_elsewhere(told):
                            raise failure from error
                        refusal = failure
                        log.warning("root refused, trying another", tried=sorted(tried), reason=failure.reason.value)
                    except MeshError as error:
                        raise refusal or error from None
        except MeshError as error:
            self._fail(request.request_id, error)
        except Exception:
            # Whoever waits for this sequence must hear of it, whatever the fault.
            log.exception("sequence failed", sequence=request.request_id)
            self._fail(request.request_id, MeshError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, "internal error"))

    async def _decode(
        self, request: EngineCoreRequest, route: Route, span: SequenceSpan, deadline: float
    ) -> AsyncIterator[EngineCoreOutput]:
        params = request.sampling_params
        assert params is not None
        _check_text_only(request)
        async with self._writing:
            # A request may have many choices, each of which has its prompt to send: others' tokens come in between.
            await asyncio.sleep(0)
            message = _message(request, params, route)
        stub = decode_pb2_grpc.DecodeServiceStub(route.entry.channel)
        with start_call("tokenmesh.v1.DecodeService/Generate", route.entry.address) as called:
            metadata = called.work.to_metadata() if called.work is not None else []
            call = stub.Generate(message, timeout=_left(deadline), metadata=metadata)
            try:
                async for response in call:
                    span.received(response)
                    yield _output(request.request_id, response)
            finally:
                call.cancel()

    async def _prefill_only(
        self, request: EngineCoreRequest, route: Route, span: SequenceSpan, deadline: float
    ) -> AsyncIterator[EngineCoreOutput]:
        """Mode `prefill`: the prompt enters a prefill service's cache; its first token is the whole answer."""
        _check_text_only(request)
        params = request.sampling_params
        assert params is not None
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(params, name) is not None:
                raise invalid(Reason.BAD_SAMPLING_PARAMS, f"a gateway in mode prefill has no {name}", param=name)
        with _passing_on():
            message = prefill_pb2.PrefillRequest(
                request_id=request.request_id,
                prompt_token_ids=request.prompt_token_ids,
                cache_salt=request.cache_salt or "",
                decode_root_id="gateway",
                priority=request.priority,
            )
        stub = prefill_pb2_grpc.PrefillServiceStub(route.entry.channel)
        with calling("tokenmesh.v1.PrefillService/Prefill", route.entry.address) as metadata:
            reply = await stub.Prefill(message, timeout=_left(deadline), metadata=metadata)
        span.tokens(1)
        usage = sampling_pb2.Usage(prompt_tokens=len(request.prompt_token_ids or ()), cached_tokens=reply.cached_tokens)
        yield EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[reply.first_token_id],
            finish_reason=FinishReason.LENGTH,
            prefill_stats=_prefill_stats(usage),
        )


def _message(request: EngineCoreRequest, params: SamplingParams, route: Route) -> decode_pb2.GenerateRequest:
    with _passing_on():
        return decode_pb2.GenerateRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling_params=from_vllm(params),
            prefill_candidates=[decode_pb2.PrefillCandidate(address=address) for address in route.candidates],
            cache_salt=request.cache_salt or "",
            priority=request.priority,
            local_reason=route.local_reason,
            reasoning_ended=request.reasoning_ended,
            reasoning_parser_kwargs=request.reasoning_parser_kwargs,
        )


def _left(deadline: float) -> float:
    """Seconds; a call with none left ends at once."""
    return max(0.0, deadline - time.monotonic())


def _check_text_only(request: EngineCoreRequest) -> None:
    """Raises MeshError for a prompt of more than tokens: answered without the rest, it would be answered wrongly."""
    more = {
        "images, audio or video": request.mm_features,
        "prompt_embeds": request.prompt_embeds is not None,
        "lora": request.lora_request,
    }
    if beyond := [name for name, given in more.items() if given]:
        raise invalid(Reason.BAD_REQUEST, f"not supported by this version: {', '.join(beyond)}", param="prompt")


@contextmanager
def _passing_on() -> Iterator[None]:
    """JSON can hold what a message cannot, such as a priority of any size: that is the client's fault."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise invalid(Reason.BAD_REQUEST, f"the request cannot be passed on: {error}") from error


def _may_go_elsewhere(told: MeshError) -> bool:
    """Another root may have room, or live. What is too large for gRPC is too large everywhere."""
    full = told.code is grpc.StatusCode.RESOURCE_EXHAUSTED and told.reason is not Reason.INTERNAL
    return full or told.code is grpc.StatusCode.UNAVAILABLE


def _failure(told: MeshError) -> MeshError:
    """What a service answered; of one that is gone, what clients know as the lack of it."""
    if told.code is grpc.StatusCode.UNAVAILABLE and told.reason is Reason.INTERNAL:
        return unavailable(Reason.NO_DECODE_ROOT, told.message)
    return told


def _prefill_stats(usage: sampling_pb2.Usage) -> PrefillStats:
    stats = PrefillStats()
    stats.set(usage.prompt_tokens, usage.cached_tokens, 0)
    return stats


def _output(request_id: str, response: decode_pb2.GenerateResponse) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request_id,
        new_token_ids=list(response.token_ids),
        new_logprobs=_logprobs(response.logprobs) if response.HasField("logprobs") else None,
        new_prompt_logprobs_tensors=(
            _prompt_logprobs(response.prompt_logprobs) if response.HasField("prompt_logprobs") else None
        ),
        finish_reason=_FINISH[response.finish_reason] if response.HasField("finish_reason") else None,
        stop_reason=response.stop_token_id if response.HasField("stop_token_id") else None,
        prefill_stats=_prefill_stats(response.usage) if response.HasField("prefill_decision") else None,
    )


def _logprobs(message: sampling_pb2.Logprobs) -> LogprobsLists:
    """Rows of equal width, shape [positions, width]: ids int64, log-probabilities float32; ranks [positions]."""
    # The last message of an aborted sequence has no positions.
    width = max(message.width, default=1)
    ids = np.array(message.token_ids, dtype=np.int64).reshape(-1, width)
    values = np.array(message.logprobs, dtype=np.float32).reshape(-1, width)
    ranks = np.array(message.ranks, dtype=np.int64).reshape(-1, width)[:, 0]
    return LogprobsLists(ids, values, ranks)


def _prompt_logprobs(message: sampling_pb2.Logprobs) -> LogprobsTensors:
    """As for samples, in tensors; the first prompt token has no row."""
    width = max(message.width, default=0) or 1
    return LogprobsTensors(
        torch.tensor(list(message.token_ids), dtype=torch.int64).reshape(-1, width),
        torch.tensor(list(message.logprobs), dtype=torch.float32).reshape(-1, width),
        torch.tensor(list(message.ranks), dtype=torch.int64).reshape(-1, width)[:, 0],
    )
