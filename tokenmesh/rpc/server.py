"""The gRPC server that every service runs: health, reflection, request context, and errors as rich statuses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tokenmesh.context import WorkContext, adopt, bind
from tokenmesh.rpc.calls import ServedCall
from tokenmesh.rpc.channel import SERVER_OPTIONS, join
from tokenmesh.rpc.errors import MeshError, Reason, abort
from tokenmesh.telemetry import metric_names
from tokenmesh.telemetry.metrics import Metrics

log = structlog.get_logger()

Context = grpc.aio.ServicerContext


class PortInUseError(Exception):
    """The address cannot be bound; the message is one line fit for an operator."""


class _Interceptor(grpc.aio.ServerInterceptor):
    """Binds the request's context and turns exceptions into statuses: ours as they are, others into INTERNAL."""

    def __init__(self, metrics: Metrics) -> None:
        self._seconds = metrics.histogram(metric_names.RPC_SECONDS)

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """gRPC's hook: wraps the two kinds of methods that our services have."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        headers = {k: v for k, v in handler_call_details.invocation_metadata or () if isinstance(v, str)}
        codecs = (handler.request_deserializer, handler.response_serializer)

        def served(request: Any, context: Any) -> ServedCall:
            work = WorkContext.from_headers(headers, _request_id(request))
            return ServedCall(method.lstrip("/"), work, context, self._seconds)

        async def unary(request: Any, context: Any) -> Any:
            call = served(request, context)
            with bind(call.work):
                try:
                    with call:
                        return await handler.unary_unary(request, context)
                except Exception as error:  # noqa: BLE001 - the last resort before the wire
                    await _fail(context, method, error)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            call = served(request, context)
            # Each RPC runs in a task of its own; a dropped generator could not undo a binding.
            adopt(call.work)
            try:
                with call:
                    async for response in handler.unary_stream(request, context):
                        yield response
            except Exception as error:  # noqa: BLE001 - the last resort before the wire
                await _fail(context, method, error)

        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(stream, *codecs)
        return grpc.unary_unary_rpc_method_handler(unary, *codecs)


def _request_id(request: Any) -> str:
    """As the client gave it; a unary call holds the request of its streaming twin."""
    return getattr(request, "request_id", "") or getattr(getattr(request, "request", None), "request_id", "")


async def _fail(context: Context[Any, Any], method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, MeshError):
        log.info("call refused", method=method, reason=error.reason.value, error=error.message)
        await abort(context, error)
    log.error("call failed", method=method, exc_info=error)
    await abort(context, MeshError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, "internal error"))


LIVE = "live"
"""A health service's name, SERVING from the start until a drain: for liveness where readiness depends on others."""


class RpcServer:
    """One listener with health and reflection. Starts NOT_SERVING; `ready()` once the service can work."""

    def __init__(
        self, host: str, port: int, options: Sequence[tuple[str, int]] = (), most_calls: int | None = None
    ) -> None:
        """`options`: of gRPC's, besides those that all servers have. `most_calls`: more are refused at once."""
        self.address = join(host, port)
        self._drained = False
        self.metrics = Metrics()
        """Of the whole service, whose calls are the first of them."""
        self.server = grpc.aio.server(
            interceptors=[_Interceptor(self.metrics)],
            options=[*SERVER_OPTIONS, *options],
            maximum_concurrent_rpcs=most_calls,
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        self._names = [health.SERVICE_NAME, reflection.SERVICE_NAME]

    def add(self, name: str) -> None:
        """Names a service for health and reflection; its servicer is added to `server` with the generated function."""
        self._names.append(name)

    async def start(self) -> None:
        """Binds and serves. Raises PortInUseError."""
        reflection.enable_server_reflection(self._names, self.server)
        try:
            self.server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise PortInUseError(f"cannot listen on {self.address}: the port is in use or not ours") from error
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        await self.server.start()

    async def ready(self) -> None:
        """Turns health to SERVING, unless the service has been drained."""
        if not self._drained:
            await self._set(health_pb2.HealthCheckResponse.SERVING)

    async def not_ready(self) -> None:
        """Turns health to NOT_SERVING; running calls go on."""
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def drain(self) -> None:
        """Turns health to NOT_SERVING for good, liveness included: nothing but a new start takes work again."""
        self._drained = True
        await self.not_ready()
        await self._health.set(LIVE, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _set(self, status: Any) -> None:
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace: float) -> None:
        """Refuses new calls, waits up to `grace` seconds for running ones, then cancels them."""
        await self._health.enter_graceful_shutdown()
        with contextlib.suppress(asyncio.CancelledError):
            await self.server.stop(grace)
