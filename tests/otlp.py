"""An OTLP receiver inside the test's process, and what tests ask of the spans that came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from tokenmesh.telemetry import span_names as names


@dataclass(frozen=True)
class SeenSpan:
    """One span as it arrived."""

    role: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    """Empty for a root."""
    kind: int
    start_ns: int
    end_ns: int
    error: bool
    message: str
    attributes: dict[str, Any]
    events: tuple[str, ...]
    details: tuple[dict[str, Any], ...]
    """Of each event: its attributes."""
    links: tuple[str, ...]
    """Span ids."""


@dataclass(frozen=True)
class Trace:
    """All spans of one trace."""

    spans: tuple[SeenSpan, ...]

    def named(self, name: str) -> list[SeenSpan]:
        """Spans whose name begins so, in the order of their start."""
        return sorted((s for s in self.spans if s.name.startswith(name)), key=lambda s: s.start_ns)

    def one(self, name: str) -> SeenSpan:
        """The only one."""
        (span,) = self.named(name)
        return span

    def orphans(self, known: set[str]) -> list[str]:
        """Names of spans whose parent never came; `known`: ids of spans that are not ours."""
        ids = {span.span_id for span in self.spans} | known | {""}
        return [span.name for span in self.spans if span.parent_id not in ids]

    def edges(self) -> set[tuple[str, str]]:
        """(role, role) wherever a span's parent is another service's."""
        by_id = {span.span_id: span for span in self.spans}
        pairs = {(by_id[s.parent_id].role, s.role) for s in self.spans if s.parent_id in by_id}
        return {(a, b) for a, b in pairs if a != b}

    def path(self, span: SeenSpan) -> list[str]:
        """Names from the root to a span."""
        by_id = {s.span_id: s for s in self.spans}
        names_ = [span.name]
        while span.parent_id in by_id:
            span = by_id[span.parent_id]
            names_.insert(0, span.name)
        return names_


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps everything."""

    def __init__(self) -> None:
        self.address = ""
        self._spans: list[SeenSpan] = []

    def Export(self, request: Any, context: Any) -> Any:
        for resource_spans in request.resource_spans:
            resource = _values(resource_spans.resource.attributes)
            for scope_spans in resource_spans.scope_spans:
                self._spans += [_seen(span, resource) for span in scope_spans.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> Trace:
        """What has come of a trace."""
        return Trace(tuple(span for span in list(self._spans) if span.trace_id == trace_id))

    def all(self) -> list[SeenSpan]:
        """What has come."""
        return list(self._spans)

    def wait(self, trace_id: str, done: Callable[[Trace], Any], timeout: float = 10.0) -> Trace:
        """The trace, once `done` says that it is whole, or as it is when the time is up."""
        deadline = time.monotonic() + timeout
        while not done(trace := self.trace(trace_id)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return trace


def _values(attributes: Any) -> dict[str, Any]:
    return {a.key: _value(a.value) for a in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def _seen(span: trace_pb2.Span, resource: dict[str, Any]) -> SeenSpan:
    return SeenSpan(
        # vLLM exports spans of its own, of loading and the like, when the environment names a collector.
        role=resource.get(names.SERVICE_ROLE, "vllm"),
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=span.kind,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        message=span.status.message,
        attributes=_values(span.attributes),
        events=tuple(event.name for event in span.events),
        details=tuple(_values(event.attributes) for event in span.events),
        links=tuple(link.span_id.hex() for link in span.links),
    )


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver for the length of the block."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    receiver = Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield receiver
    finally:
        server.stop(0).wait()
