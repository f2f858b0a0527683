"""What a gateway keeps of traces, and how a terminal shows one."""

from __future__ import annotations

import io

import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from rich.console import Console

from tokenmesh.cli.trace import BAR_COLUMNS, bar, waterfall
from tokenmesh.telemetry import span_names as names
from tokenmesh.telemetry import span_store
from tokenmesh.telemetry.span_store import IDS_PER_TRACE, MAX_SPANS, SpanStore
from tokenmesh.v1 import observe_pb2

MS = 1_000_000


def export(
    service: str, trace: int, *spans: tuple[int, int, str, int, int], request_id: str = "", error: str = ""
) -> trace_service_pb2.ExportTraceServiceRequest:
    """As a service sends it. A span is (id, parent, name, start ms, end ms); the first bears the request id."""
    request = trace_service_pb2.ExportTraceServiceRequest()
    resource = request.resource_spans.add()
    resource.resource.attributes.add(key="service.instance.id").value.string_value = service
    scope = resource.scope_spans.add()
    for number, (span_id, parent, name, start, end) in enumerate(spans):
        span = scope.spans.add(
            trace_id=trace.to_bytes(16, "big"),
            span_id=span_id.to_bytes(8, "big"),
            parent_span_id=parent.to_bytes(8, "big") if parent else b"",
            name=name,
            start_time_unix_nano=start * MS,
            end_time_unix_nano=end * MS,
        )
        if request_id and not number:
            span.attributes.add(key=names.REQUEST_ID).value.string_value = request_id
        if error:
            span.status.code, span.status.message = 2, error
    return request


def test_a_trace_is_put_together_from_what_services_send() -> None:
    # 1. Children come before their parents, in messages of several services, and in any order.
    store = SpanStore(10)
    store.add(export("prefill-0", 1, (4, 3, "compute", 30, 40), (5, 3, "push", 32, 50), request_id="inner"))
    store.add(export("decode-root-0", 1, (3, 2, "handoff", 20, 55), (6, 2, "decode", 60, 90)))
    store.add(export("gateway-0", 1, (2, 99, "POST", 10, 100), request_id="outer"))
    # 2. Any service's request id leads to it, and the trace id itself.
    for key in ("inner", "outer", f"{1:032x}"):
        assert store.trace(key) == store.trace("inner")
    trace = store.trace("outer")
    assert trace is not None
    # 3. Parents first, siblings by start; a parent that is not ours does not matter.
    shown = [(span.depth, span.service, span.name) for span in trace.spans]
    assert shown == [
        (0, "gateway-0", "POST"),
        (1, "decode-root-0", "handoff"),
        (2, "prefill-0", "compute"),
        (2, "prefill-0", "push"),
        (1, "decode-root-0", "decode"),
    ]
    assert trace.spans[0].duration.ToMilliseconds() == 90
    # 4. Another id leads nowhere.
    assert store.trace("nobody") is None


def test_the_store_is_bounded() -> None:
    # 1. More traces than it keeps, each with more ids than are kept.
    store = SpanStore(3)
    for trace in range(1, 101):
        for number in range(IDS_PER_TRACE + 2):
            store.add(export("gateway-0", trace, (number + 1, 0, "POST", 1, 2), request_id=f"{trace}-{number}"))
    # 2. The last ones are there, whole; of the others nothing.
    assert len(store) == 3
    assert store.trace("100-0") is not None
    assert store.trace("97-0") is store.trace(f"{97:032x}") is None
    assert len(store._ids) <= 3 * IDS_PER_TRACE
    # 3. A trace that will not end is cut, and says so.
    for number in range(1, MAX_SPANS + 11):
        store.add(export("gateway-0", 200, (number, 0, "x", 1, 2)))
    trace = store.trace(f"{200:032x}")
    assert trace is not None
    assert (len(trace.spans), trace.dropped) == (MAX_SPANS, 10)


def test_large_spans_take_no_more_memory_than_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. Spans with much to say, of more traces than there is room for.
    monkeypatch.setattr(span_store, "MAX_BYTES", 100_000)
    monkeypatch.setattr(span_store, "TRACE_BYTES", 30_000)
    store = SpanStore(1000)
    for trace in range(1, 51):
        store.add(export("s", trace, (1, 0, "x" * 9000, 1, 2), request_id=f"r-{trace}"))
    assert len(store) == 11
    # 2. The last ones are there, whole.
    assert store.trace("r-1") is None
    kept = store.trace("r-50")
    assert kept is not None
    assert kept.spans[0].name == "x" * 9000
    # 3. One trace cannot push out all others.
    for number in range(2, 12):
        store.add(export("s", 50, (number, 1, "x" * 9000, 1, 2)))
    kept = store.trace("r-50")
    assert kept is not None
    assert (len(kept.spans), kept.dropped) == (3, 8)
    assert len(store) > 5


def test_steps_do_not_push_requests_out() -> None:
    # 1. A request, and many reports of steps after it, each a trace of its own.
    store = SpanStore(2)
    store.add(export("gateway-0", 1, (1, 0, "POST", 1, 2), request_id="r"))
    for trace in range(2, 50):
        store.add(export("decode-root-0", trace, (1, 0, names.STEPS, 1, 2)))
    # 2. The request is still there.
    assert store.trace("r") is not None
    assert len(store) == 1


def test_a_store_of_nothing_keeps_nothing() -> None:
    store = SpanStore(0)
    store.add(export("gateway-0", 1, (1, 0, "POST", 1, 2), request_id="r"))
    assert len(store) == 0
    assert store.trace("r") is None


def test_the_waterfall_shows_who_did_what_when() -> None:
    # 1. A request of 100 ms, whose prefill failed.
    store = SpanStore(1)
    store.add(export("gateway-0", 1, (1, 0, "POST /v1/completions", 0, 100), request_id="r"))
    store.add(export("prefill-0", 1, (2, 1, "tokenmesh.kv_push", 25, 75), error="the KV owner refused"))
    trace = store.trace("r")
    assert trace is not None
    out = io.StringIO()
    Console(file=out, width=160).print(waterfall(trace))
    lines = out.getvalue().splitlines()
    # 2. A line for each, children indented, with milliseconds and the reason.
    assert f"{1:032x}" in lines[0]
    (post,) = [line for line in lines if "POST" in line]
    (push,) = [line for line in lines if "kv_push" in line]
    assert "100.0" in post
    assert "prefill-0" in push
    assert "50.0" in push
    assert "the KV owner refused" in push
    # 3. The bars lie where the spans lay.
    assert post.count("━") == BAR_COLUMNS
    assert push.count("━") == BAR_COLUMNS // 2


def test_the_shortest_span_has_a_mark_inside() -> None:
    # 1. Nothing long, at the very end of a second.
    span = observe_pb2.SpanView()
    span.start.FromMilliseconds(1000)
    # 2. It is seen, and the line is not longer for it.
    shown = bar(span, 0, 1000 * MS)
    assert (len(shown), shown.count("━")) == (BAR_COLUMNS, 1)
