"""Spans, on OpenTelemetry's SDK, with the work's own context as the only carrier.

A span never becomes OpenTelemetry's current one: `Span.work` is the context that its children and outgoing calls
carry, and what is bound in `tokenmesh.context` is found there. So a span may stay open across a yield. Without `record`
every function here does next to nothing, and the SDK is not even imported.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import grpc
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace.span import TraceState

from tokenmesh.context import WorkContext, bind, current
from tokenmesh.rpc.errors import MeshError
from tokenmesh.telemetry import span_names as names

Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]

_tracer: Tracer | None = None


def use(tracer: Tracer | None) -> None:
    """Records spans with a tracer from now on; None: no longer."""
    global _tracer
    _tracer = tracer


def enabled() -> bool:
    """Whether spans are recorded."""
    return _tracer is not None


class Span:
    """An open span, or nothing where none are recorded. A context that ends it, with whatever ended the block."""

    __slots__ = ("_span", "work")

    def __init__(self, span: OtelSpan | None, work: WorkContext | None) -> None:
        self._span = span
        self.work = work
        """What is done under the span carries this."""

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Adds attributes."""
        if self._span is not None:
            self._span.set_attributes(attributes)

    def rename(self, name: str) -> None:
        """Gives it another name, once more is known."""
        if self._span is not None:
            self._span.update_name(name)

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Notes something that happened now."""
        if self._span is not None:
            self._span.add_event(name, attributes)

    def fail(self, kind: str, message: str = "") -> None:
        """Marks it as failed; `kind` is a stable reason."""
        if self._span is not None:
            self._span.set_attribute(names.ERROR_TYPE, kind)
            self._span.set_status(Status(StatusCode.ERROR, message or None))

    def end(self, error: BaseException | None = None, at: float | None = None) -> None:
        """Ends it, `at` a time of time.monotonic(). Ending it twice changes nothing."""
        if self._span is None:
            return
        if isinstance(error, grpc.aio.AioRpcError):
            error = MeshError.from_rpc(error)
        if _is_cancel(error):
            self._span.set_attribute(names.OUTCOME, names.CANCELLED)
        elif isinstance(error, MeshError):
            self.fail(error.reason.value, error.message)
        elif error is not None:
            # Its message may quote what nobody should read.
            self.fail(type(error).__name__)
        self._span.end(_epoch_ns(at))
        self._span = None

    @property
    def link(self) -> Link | None:
        """To point at it from another trace."""
        return Link(self._span.get_span_context()) if self._span is not None else None

    def __enter__(self) -> Span:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.end(error)


def start(
    name: str,
    attributes: Mapping[str, Value] | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    work: WorkContext | None = None,
    at: float | None = None,
    links: Sequence[Link] = (),
) -> Span:
    """Opens a span under `work`, or else under the current work; a root if there is neither or it has no parent.

    `at` is a time of time.monotonic(), of any process of this machine.
    """
    work = work or current()
    if _tracer is None:
        return Span(None, work)
    span = _tracer.start_span(
        name,
        context=set_span_in_context(NonRecordingSpan(_parent(work))) if work is not None and work.has_parent else None,
        kind=kind,
        attributes=attributes,
        links=links,
        start_time=_epoch_ns(at),
    )
    if work is not None:
        context = span.get_span_context()
        parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        work = replace(work, traceparent=parent, has_parent=True)
    return Span(span, work)


@contextmanager
def span(
    name: str, attributes: Mapping[str, Value] | None = None, kind: SpanKind = SpanKind.INTERNAL
) -> Iterator[Span]:
    """A span of the current work, and the current work while the block runs. Not to be held across a yield."""
    with start(name, attributes, kind=kind) as opened:
        if _tracer is None or opened.work is None:
            yield opened
            return
        with bind(opened.work):
            yield opened


def record(name: str, begin: float, end: float, attributes: Mapping[str, Value] | None = None) -> None:
    """A span of the current work that is over; times of time.monotonic(). One that never began is left out."""
    if _tracer is not None and 0 < begin <= end:
        start(name, attributes, at=begin).end(at=end)


def _is_cancel(error: BaseException | None) -> bool:
    if isinstance(error, MeshError):
        return error.code is grpc.StatusCode.CANCELLED
    return isinstance(error, asyncio.CancelledError | GeneratorExit)


def _parent(work: WorkContext) -> SpanContext:
    _, trace_id, span_id, flags = work.traceparent.split("-")
    return SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16)),
        trace_state=TraceState.from_header([work.tracestate]) if work.tracestate else None,
    )


def _epoch_ns(at: float | None) -> int | None:
    return None if at is None else time.time_ns() - int((time.monotonic() - at) * 1e9)
