"""Where spans go: to the gateway, and to what the standard OTEL_* variables name. Set up once per process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog

from tokenmesh import __version__
from tokenmesh.config import MeshConfig, TelemetryConfig
from tokenmesh.rpc.channel import dial
from tokenmesh.telemetry import span_names, tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

log = structlog.get_logger()

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

BATCH_MS = "500"
"""Spans leave at least this often, unless OTEL_BSP_SCHEDULE_DELAY says otherwise: people look at requests just made."""


def wanted(config: TelemetryConfig) -> bool:
    """Whether spans are to be recorded."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return config.traces == "on" or (config.traces == "auto" and _collector_named())


def _collector_named() -> bool:
    exporters = os.environ.get("OTEL_TRACES_EXPORTER", "otlp").split(",")
    return any(os.environ.get(name) for name in _ENDPOINTS) and "otlp" in (name.strip() for name in exporters)


@contextmanager
def recording(mesh: MeshConfig, role: str, replica: int) -> Iterator[None]:
    """Records this process's spans for the length of the block, if that is wanted; at its end the last ones leave."""
    if not wanted(mesh.telemetry):
        yield
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    os.environ.setdefault("OTEL_BSP_SCHEDULE_DELAY", BATCH_MS)
    attributes = {
        "service.instance.id": f"{role}-{replica}",
        "service.version": __version__,
        span_names.SERVICE_ROLE: role,
    }
    if "OTEL_SERVICE_NAME" not in os.environ:
        attributes["service.name"] = f"tokenmesh-{role}"
    # Sampler, limits and batch sizes are the SDK's to read from the environment.
    provider = TracerProvider(resource=Resource.create(attributes))
    if mesh.telemetry.kept_traces:
        provider.add_span_processor(BatchSpanProcessor(_gateway_exporter(mesh)))
    if _collector_named():
        provider.add_span_processor(BatchSpanProcessor(_otlp_exporter()))
    tracing.use(provider.get_tracer("tokenmesh", __version__))
    log.info("spans are recorded", collector=next(filter(None, map(os.environ.get, _ENDPOINTS)), None))
    try:
        yield
    finally:
        tracing.use(None)
        provider.shutdown()


def _gateway_exporter(mesh: MeshConfig) -> SpanExporter:
    from tokenmesh.telemetry.gateway_exporter import GatewayExporter

    gateway = mesh.gateway
    address = mesh.telemetry.gateway or dial(gateway.host, gateway.grpc_port)
    return GatewayExporter(address, next(iter(gateway.api_keys), None))


def _otlp_exporter() -> SpanExporter:
    """The standard exporter for the standard protocol variable; for one that is unknown gRPC's, and a warning."""
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "grpc", "http/protobuf"):
        log.warning("unknown OTLP protocol; grpc is used", protocol=protocol)
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
