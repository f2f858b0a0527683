"""The waterfall of one request in the terminal."""

from __future__ import annotations

import asyncio

import grpc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenmesh.cli.client import refused
from tokenmesh.cli.status import operator
from tokenmesh.config import MeshConfig
from tokenmesh.rpc.channel import dial, open_channel
from tokenmesh.telemetry import span_names as names
from tokenmesh.v1 import observe_pb2, observe_pb2_grpc

BAR_COLUMNS = 40
_STYLES = {"gateway": "cyan", "decode-root": "green", "prefill": "yellow", "decode-worker": "magenta"}

_WORTH_SAYING = {
    names.DECISION: "{}",
    names.PREFILL: "{}",
    names.RANK: "rank {}",
    names.KV_BYTES: "{} B",
    names.KV_TRANSPORT: "{}",
    names.KV_CODEC: "codec {}",
    names.KV_EXPOSED_SECONDS: "exposed {} s",
    names.GEN_AI_INPUT_TOKENS: "{} prompt tokens",
    names.GEN_AI_OUTPUT_TOKENS: "{} tokens",
    names.OUTCOME: "{}",
    names.ERROR_TYPE: "{}",
}


def trace(config: MeshConfig, key: str) -> int:
    """Prints what the gateway has kept of a request. Returns the exit status."""
    try:
        found = asyncio.run(_fetch(config, key))
    except grpc.aio.AioRpcError as error:
        return refused("trace", error)
    Console().print(waterfall(found))
    return 0


async def _fetch(config: MeshConfig, key: str) -> observe_pb2.GetTraceResponse:
    gateway = config.gateway
    async with open_channel(dial(gateway.host, gateway.grpc_port)) as channel:
        stub = observe_pb2_grpc.ObserveServiceStub(channel)
        request = observe_pb2.GetTraceRequest(id=key)
        answer: observe_pb2.GetTraceResponse = await stub.GetTrace(request, timeout=10, metadata=operator(gateway))
        return answer


def waterfall(found: observe_pb2.GetTraceResponse) -> Table:
    """One line per span: who, what, when, how long, and what there is to say of it."""
    table = Table(title=f"trace {found.trace_id}", title_justify="left", box=None, pad_edge=False)
    for heading, justify in (("service", "left"), ("span", "left"), ("", "left"), ("ms", "right"), ("", "left")):
        table.add_column(heading, justify=justify, no_wrap=heading != "")  # type: ignore[arg-type]
    begin = min((span.start.ToNanoseconds() for span in found.spans), default=0)
    end = max((span.start.ToNanoseconds() + span.duration.ToNanoseconds() for span in found.spans), default=0)
    for span in found.spans:
        style = "red" if span.error else _STYLES.get(span.service.rpartition("-")[0], "")
        table.add_row(
            span.service,
            Text("  " * span.depth + _short(span.name), style="red" if span.error else ""),
            Text(bar(span, begin, end), style=style),
            f"{span.duration.ToNanoseconds() / 1e6:.1f}",
            Text(", ".join(_notes(span)), style="dim"),
        )
    if found.dropped:
        table.caption = f"{found.dropped} more spans were not kept"
    return table


def bar(span: observe_pb2.SpanView, begin: int, end: int) -> str:
    """Where the span lies between two times in nanoseconds; never shorter than a mark."""
    scale = BAR_COLUMNS / max(1, end - begin)
    left = min(BAR_COLUMNS - 1, int((span.start.ToNanoseconds() - begin) * scale))
    length = max(1, min(BAR_COLUMNS - left, round(span.duration.ToNanoseconds() * scale)))
    return " " * left + "━" * length + " " * (BAR_COLUMNS - left - length)


def _short(name: str) -> str:
    return name.removeprefix("tokenmesh.v1.").removeprefix("tokenmesh.")


def _notes(span: observe_pb2.SpanView) -> list[str]:
    notes = [text.format(span.attributes[key]) for key, text in _WORTH_SAYING.items() if span.attributes.get(key)]
    return [*notes, span.message] if span.message else notes
