"""Spans of recent requests, kept in memory by a gateway: enough to look at a request without any collector."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from tokenmesh.telemetry import span_names as names
from tokenmesh.v1 import observe_pb2

MAX_SPANS = 512
"""Of one trace; a request of many choices may have more."""
TRACE_BYTES = 8 << 20
"""Of one trace, as it was sent."""
MAX_BYTES = 64 << 20
"""Of all. Spans are kept as they were sent: what is made of them to be shown takes ten times the memory, and time."""
IDS_PER_TRACE = 4
"""Request ids that lead to a trace, on average."""


@dataclass
class _Trace:
    spans: dict[bytes, tuple[str, bytes]] = field(default_factory=dict)
    """Span id → service, and the span as it was sent."""
    bytes: int = 0
    dropped: int = 0


class SpanStore:
    """The last so many traces. The oldest go first, whole."""

    def __init__(self, traces: int) -> None:
        self._limit = traces
        self._traces: OrderedDict[str, _Trace] = OrderedDict()
        self._bytes = 0
        self._ids: OrderedDict[str, str] = OrderedDict()
        """Request id of any service → trace id."""

    def __len__(self) -> int:
        return len(self._traces)

    def add(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        """Takes what a service exports."""
        for resource_spans in request.resource_spans:
            service = _text(resource_spans.resource.attributes).get("service.instance.id", "unknown")
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    self._add(span, service)

    def _add(self, span: trace_pb2.Span, service: str) -> None:
        if span.name == names.STEPS:
            # Traces of their own, several a second; what they say is on the decode spans as well.
            return
        trace_id = span.trace_id.hex()
        trace = self._traces.setdefault(trace_id, _Trace())
        raw = span.SerializeToString()
        if len(trace.spans) >= MAX_SPANS or trace.bytes + len(raw) > TRACE_BYTES:
            trace.dropped += 1
        elif span.span_id not in trace.spans:
            trace.spans[span.span_id] = service, raw
            trace.bytes += len(raw)
            self._bytes += len(raw)
        while len(self._traces) > self._limit or self._bytes > MAX_BYTES:
            self._bytes -= self._traces.popitem(last=False)[1].bytes
        request_id = next((_value(a.value) for a in span.attributes if a.key == names.REQUEST_ID), "")
        if request_id:
            self._ids[request_id] = trace_id
            while len(self._ids) > IDS_PER_TRACE * self._limit:
                self._ids.popitem(last=False)

    def trace(self, key: str) -> observe_pb2.GetTraceResponse | None:
        """The trace of a request id or trace id, as far as it has come; None if it is not here (any more)."""
        trace_id = self._ids.get(key, key)
        trace = self._traces.get(trace_id)
        if trace is None:
            return None
        response = observe_pb2.GetTraceResponse(trace_id=trace_id, dropped=trace.dropped)
        views = [_view(trace_pb2.Span.FromString(raw), service) for service, raw in trace.spans.values()]
        for depth, view in _ordered({view.span_id: view for view in views}):
            response.spans.add().CopyFrom(view)
            response.spans[-1].depth = depth
        return response


def _ordered(spans: dict[str, observe_pb2.SpanView]) -> Iterator[tuple[int, observe_pb2.SpanView]]:
    """Depth first, siblings by their start."""
    children: dict[str, list[observe_pb2.SpanView]] = {}
    for view in sorted(spans.values(), key=lambda view: view.start.ToNanoseconds()):
        parent = view.parent_span_id if view.parent_span_id in spans else ""
        children.setdefault(parent, []).append(view)
    todo = [(0, view) for view in reversed(children.get("", []))]
    while todo:
        depth, view = todo.pop()
        yield depth, view
        todo += [(depth + 1, child) for child in reversed(children.get(view.span_id, []))]


def _view(span: trace_pb2.Span, service: str) -> observe_pb2.SpanView:
    view = observe_pb2.SpanView(
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex(),
        service=service,
        name=span.name,
        start=_stamp(span.start_time_unix_nano),
        error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        message=span.status.message,
        attributes=_text(span.attributes),
        events=[
            observe_pb2.EventView(name=e.name, time=_stamp(e.time_unix_nano), attributes=_text(e.attributes))
            for e in span.events
        ],
    )
    view.duration.FromNanoseconds(max(0, span.end_time_unix_nano - span.start_time_unix_nano))
    return view


def _stamp(nanoseconds: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(nanoseconds)
    return stamp


def _text(attributes: Iterable[Any]) -> dict[str, str]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: Any) -> str:
    kind = value.WhichOneof("value")
    if kind is None:
        return ""
    if kind == "array_value":
        return ", ".join(_value(each) for each in value.array_value.values)
    plain = getattr(value, kind)
    return f"{plain:.6g}" if isinstance(plain, float) else str(plain)
