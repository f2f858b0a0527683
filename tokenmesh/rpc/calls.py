"""Calls as spans and metrics: one object per call, on the side that serves and on the side that asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.trace import SpanKind
from prometheus_client import Histogram

from tokenmesh.context import WorkContext, outgoing_metadata
from tokenmesh.rpc.errors import MeshError
from tokenmesh.telemetry import span_names as names
from tokenmesh.telemetry.tracing import Span, Value, enabled, span, start

_ENTRIES = (
    "tokenmesh.v1.InferenceService/",
    "tokenmesh.v1.DecodeService/Generate",
    "tokenmesh.v1.PrefillService/Prefill",
)
"""Calls that begin a trace. Of all others, polls among them, those that belong to one already are in it."""

_SERVERS_FAULT = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""As OpenTelemetry has it: with any other status the serving side did its work."""


DEADLINE_SLACK_S = 0.2
"""A client's clock starts before ours: its cancellation comes up to this long before we would have seen the deadline
pass ourselves."""


def _attributes(method: str) -> dict[str, Value]:
    return {names.RPC_SYSTEM: "grpc", names.RPC_METHOD: method}


class ServedCall:
    """A call that is being served, until its status is known. A context; may be held across a yield."""

    def __init__(self, method: str, work: WorkContext, context: Any, seconds: Histogram) -> None:
        """`method`: ``package.Service/Method``."""
        self._method = method
        self._context = context
        self._seconds = seconds
        self._start = time.perf_counter()
        self._span: Span | None = None
        self.work = work
        """What the handler works under."""
        if enabled() and (work.has_parent or method.startswith(_ENTRIES)):
            attributes = {**_attributes(method), names.REQUEST_ID: work.request_id}
            self._span = start(method, attributes, kind=SpanKind.SERVER, work=work)
            self.work = self._span.work or work

    def __enter__(self) -> ServedCall:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        code = grpc.StatusCode.OK if error is None else self._code(error)
        self._seconds.labels(self._method, code.name).observe(time.perf_counter() - self._start)
        if self._span is None:
            return
        self._span.set({names.RPC_STATUS: code.name})
        reason = error.reason.value if isinstance(error, MeshError) else code.name
        if code in _SERVERS_FAULT:
            self._span.fail(reason, str(error) if isinstance(error, MeshError) else "")
        elif code is grpc.StatusCode.CANCELLED:
            self._span.set({names.OUTCOME: names.CANCELLED})
        elif error is not None:
            self._span.set({names.ERROR_TYPE: reason})
        self._span.end()

    def _code(self, error: BaseException) -> grpc.StatusCode:
        """The status that an exception ends the call with."""
        if isinstance(error, MeshError):
            return error.code
        if isinstance(error, Exception):
            return grpc.StatusCode.INTERNAL
        # gRPC cancels the handler, whether the client went away or its deadline passed.
        left = self._context.time_remaining()
        late = left is not None and left <= DEADLINE_SLACK_S
        return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED


def start_call(method: str, address: str) -> Span:
    """The span of a call that is about to be made: its `work` goes along as metadata. May be held across a yield."""
    return start(method, {**_attributes(method), names.SERVER_ADDRESS: address}, kind=SpanKind.CLIENT)


@contextmanager
def calling(method: str, address: str) -> Iterator[list[tuple[str, str]]]:
    """Around a call that has one answer, on behalf of the current work; gives its metadata."""
    attributes = {**_attributes(method), names.SERVER_ADDRESS: address}
    with span(method, attributes, SpanKind.CLIENT):
        yield outgoing_metadata()
