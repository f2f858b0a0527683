"""The gateway's spans: of an HTTP request, of a sequence, of the choice of services for it."""

from __future__ import annotations

from typing import Any

from opentelemetry.trace import SpanKind
from starlette.types import Message, Scope
from vllm.v1.engine import EngineCoreRequest

from services.gateway.pulse import Pulse
from services.gateway.router import Route
from tokenmesh.context import WorkContext
from tokenmesh.rpc.errors import MeshError
from tokenmesh.telemetry import span_names as names
from tokenmesh.telemetry.status_metrics import decision_name
from tokenmesh.telemetry.tracing import Span, Value, enabled, start
from tokenmesh.v1 import decode_pb2, sampling_pb2


class HttpSpan:
    """The server span of a REST request that may cost something, which is a POST. A context."""

    def __init__(self, scope: Scope, work: WorkContext) -> None:
        self._scope = scope
        self._span: Span | None = None
        self._status = 0
        self._complete = False
        self._left = False
        self.work = work
        """What the request is worked on under."""
        if enabled() and scope["method"] == "POST":
            attributes = {names.HTTP_METHOD: "POST", names.REQUEST_ID: work.request_id}
            self._span = start("POST", attributes, kind=SpanKind.SERVER, work=work)
            self.work = self._span.work or work

    def sent(self, message: Message) -> None:
        """The application answers."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True

    def received(self, message: Message) -> None:
        """The client has sent something, or has gone."""
        if message["type"] == "http.disconnect" and not self._complete:
            self._left = True

    def __enter__(self) -> HttpSpan:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._span is None:
            return
        route = getattr(self._scope.get("route"), "path", None)
        if route is not None:
            self._span.rename(f"POST {route}")
            self._span.set({names.HTTP_ROUTE: route})
        if self._status:
            self._span.set({names.HTTP_STATUS: self._status})
        if self._left:
            self._span.set({names.OUTCOME: names.CANCELLED})
        elif self._status >= 500:
            self._span.fail(str(self._status))
        elif self._status >= 400:
            self._span.set({names.ERROR_TYPE: str(self._status)})
        self._span.end(error)


class SequenceSpan:
    """One sequence: a request has one per choice. A context; may be held across a yield."""

    def __init__(self, model: str, request: EngineCoreRequest, pulse: Pulse) -> None:
        self._pulse = pulse
        self._sequence = pulse.begin(request.request_id, len(request.prompt_token_ids or ()))
        self._span = start(f"text_completion {model}", _asked(model, request) if enabled() else None)
        if enabled() and self._span.work is not None:
            self._sequence.trace_id = self._span.work.trace_id
        self.work = self._span.work
        """What the sequence's calls carry."""

    def routed(self, route: Route, attempt: int, begun: float) -> None:
        """A root was chosen; `begun` a time of time.monotonic()."""
        if not enabled():
            return
        attributes: dict[str, Value] = {
            names.ROOT: route.entry.address,
            names.CANDIDATES: route.candidates,
            names.ATTEMPT: attempt,
        }
        if route.local_reason is not None:
            attributes[names.DECISION] = decision_name(sampling_pb2.PrefillDecision.Name(route.local_reason))
        start(names.ROUTE, attributes, at=begun).end()

    def tokens(self, count: int) -> None:
        """So many have come."""
        self._pulse.message(self._sequence, count)

    def received(self, response: decode_pb2.GenerateResponse) -> None:
        """A root has answered."""
        self.tokens(len(response.token_ids))
        if response.HasField("prefill_decision"):
            decision = decision_name(sampling_pb2.PrefillDecision.Name(response.prefill_decision))
            self._pulse.decided(self._sequence, decision)
            self._span.set({names.DECISION: decision})
        if response.HasField("finish_reason") and enabled():
            reason = sampling_pb2.FinishReason.Name(response.finish_reason).removeprefix("FINISH_REASON_").lower()
            self._span.set(
                {
                    names.GEN_AI_FINISH_REASONS: [reason],
                    names.GEN_AI_INPUT_TOKENS: response.usage.prompt_tokens,
                    names.GEN_AI_CACHED_TOKENS: response.usage.cached_tokens,
                    names.GEN_AI_OUTPUT_TOKENS: self._sequence.tokens,
                    names.GEN_AI_FIRST_CHUNK: self._sequence.first - self._sequence.begun,
                }
            )

    def __enter__(self) -> SequenceSpan:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._span.end(error)
        if error is None:
            outcome = "finished"
        elif isinstance(error, MeshError):
            outcome = error.reason.value
        else:
            outcome = "INTERNAL" if isinstance(error, Exception) else names.CANCELLED
        self._pulse.end(self._sequence, outcome)


def _asked(model: str, request: EngineCoreRequest) -> dict[str, Value]:
    params: Any = request.sampling_params
    return {
        names.GEN_AI_OPERATION: "text_completion",
        names.GEN_AI_PROVIDER: "tokenmesh",
        names.GEN_AI_MODEL: model,
        names.REQUEST_ID: request.request_id,
        names.GEN_AI_INPUT_TOKENS: len(request.prompt_token_ids or ()),
        names.GEN_AI_TEMPERATURE: float(params.temperature),
        names.GEN_AI_TOP_P: float(params.top_p),
        **({names.GEN_AI_MAX_TOKENS: params.max_tokens} if params.max_tokens is not None else {}),
    }
