"""ObserveService, and the collector that other services send their spans to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from services.gateway.keys import Keys
from services.gateway.pulse import Pulse
from services.gateway.router import Router
from tokenmesh.rpc.channel import open_channel
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.rpc.server import Context
from tokenmesh.telemetry.span_store import SpanStore
from tokenmesh.v1 import admin_pb2, admin_pb2_grpc, observe_pb2, observe_pb2_grpc

INTERVAL_S = 1.0
STATUS_TIMEOUT_S = 1.0


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """OTLP's own service. Services of the mesh show an API key, as clients do."""

    def __init__(self, store: SpanStore, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Context[Any, Any]
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """See opentelemetry's trace_service.proto."""
        self._keys.check(context)
        self._store.add(request)
        return trace_service_pb2.ExportTraceServiceResponse()


class Watcher:
    """Snapshots of the mesh. All who watch share one round of questions a second; without any there is none."""

    def __init__(self, router: Router, pulse: Pulse, own: str, grpc_status: Any) -> None:
        """`own`: the gateway's address; `grpc_status`: as for AdminService."""
        self._router = router
        self._pulse = pulse
        self._own = own
        self._status = grpc_status
        self._watchers = 0
        self._latest: observe_pb2.WatchResponse | None = None
        self._new = asyncio.Condition()
        self._asking: asyncio.Task[None] | None = None
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def watch(self) -> AsyncGenerator[observe_pb2.WatchResponse, None]:
        """A snapshot at once and then one a second, until `close`."""
        self._watchers += 1
        try:
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask())
            if self._latest is not None:
                yield self._latest
            while True:
                async with self._new:
                    await self._new.wait()
                if self._latest is None:
                    return
                yield self._latest
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._stop()

    def _stop(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = self._latest = None

    async def _ask(self) -> None:
        while True:
            self._latest = await self.snapshot()
            async with self._new:
                self._new.notify_all()
            await asyncio.sleep(INTERVAL_S)

    async def snapshot(self) -> observe_pb2.WatchResponse:
        """The mesh now."""
        response = observe_pb2.WatchResponse(pulse=self._pulse.describe(), requests=self._pulse.requests())
        response.time.GetCurrentTime()
        response.services.add(address=self._own, status=self._status())
        pools = ((admin_pb2.ROLE_PREFILL, self._router.prefills), (admin_pb2.ROLE_DECODE_ROOT, self._router.roots))
        known = [(role, peer.address, peer.channel) for role, pool in pools for peer in pool.peers]
        views = await asyncio.gather(*(self._view(*each) for each in known))
        workers = {
            peer.address: None
            for view in views
            for peer in view.status.peers
            if peer.role == admin_pb2.ROLE_DECODE_WORKER and peer.address != "local"
        }
        views += await asyncio.gather(
            *(self._view(admin_pb2.ROLE_DECODE_WORKER, address, self._channel(address)) for address in workers)
        )
        response.services.extend(views)
        return response

    async def _view(self, role: admin_pb2.Role, address: str, channel: grpc.aio.Channel) -> observe_pb2.ServiceView:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        try:
            status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=STATUS_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            down = admin_pb2.GetStatusResponse(role=role)
            return observe_pb2.ServiceView(address=address, status=down, error=error.details() or error.code().name)
        return observe_pb2.ServiceView(address=address, status=status)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]

    async def close(self) -> None:
        """Ends every stream, so that nobody who watches holds a shutdown up, and closes the channels."""
        self._stop()
        async with self._new:
            self._new.notify_all()
        for channel in self._channels.values():
            await channel.close()


class ObserveServicer(observe_pb2_grpc.ObserveServiceServicer):
    """See observe.proto."""

    def __init__(self, watcher: Watcher, store: SpanStore, keys: Keys) -> None:
        self._watcher = watcher
        self._store = store
        self._keys = keys

    async def Watch(
        self, request: observe_pb2.WatchRequest, context: Context[Any, Any]
    ) -> AsyncIterator[observe_pb2.WatchResponse]:
        """See observe.proto."""
        self._keys.check(context)
        async with aclosing(self._watcher.watch()) as snapshots:
            async for snapshot in snapshots:
                yield snapshot

    async def GetTrace(
        self, request: observe_pb2.GetTraceRequest, context: Context[Any, Any]
    ) -> observe_pb2.GetTraceResponse:
        """See observe.proto."""
        self._keys.check(context)
        trace = self._store.trace(request.id)
        if trace is None:
            raise MeshError(grpc.StatusCode.NOT_FOUND, Reason.UNKNOWN_REQUEST, f"no spans of {request.id!r} are kept")
        return trace
