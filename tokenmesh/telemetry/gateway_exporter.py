"""Sends a process's spans to the gateway, which keeps those of recent requests."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import structlog
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from tokenmesh.rpc.channel import CHANNEL_OPTIONS

log = structlog.get_logger()

TIMEOUT_S = 1.0


class GatewayExporter(SpanExporter):
    """OTLP over gRPC, tried once: spans for looking at now are not worth holding a shutdown up."""

    def __init__(self, address: str, api_key: str | None) -> None:
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = trace_service_pb2_grpc.TraceServiceStub(self._channel)
        self._metadata = [("authorization", f"Bearer {api_key}")] if api_key else []
        self._reached = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See SpanExporter; called in a thread of the SDK's."""
        try:
            self._stub.Export(encode_spans(spans), timeout=TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            if self._reached:
                log.info("spans do not reach the gateway", error=error.code().name)
            self._reached = False
            return SpanExportResult.FAILURE
        self._reached = True
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """See SpanExporter."""
        self._channel.close()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """See SpanExporter: nothing is held back."""
        return True
