"""Runs a prefill service until it is told to stop."""

from __future__ import annotations

import asyncio

import structlog

from services.prefill.service import PrefillServicer
from tokenmesh.config import MeshConfig
from tokenmesh.engine.host import run_engine
from tokenmesh.heap import freeze_heap
from tokenmesh.lifecycle import RequestState, Stop
from tokenmesh.model_store import resolve_model
from tokenmesh.rpc.admin import AdminServicer
from tokenmesh.rpc.server import RpcServer
from tokenmesh.telemetry import metric_names
from tokenmesh.telemetry.endpoint import serve_metrics, shifted
from tokenmesh.telemetry.status_metrics import StatusCollector
from tokenmesh.v1 import admin_pb2, prefill_pb2, prefill_pb2_grpc

log = structlog.get_logger()


async def serve(mesh: MeshConfig, replica: int, stop: Stop) -> None:
    """Serves until `stop` is set, then drains.

    Raises PortInUseError, ModelNotFoundError.
    """
    config = mesh.prefill_service
    port = config.port + replica
    server = RpcServer(config.host, port)
    servicer = PrefillServicer(config, server.metrics)
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server.server)
    server.add(prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name)
    ready, metrics_port = False, 0

    def describe() -> admin_pb2.GetStatusResponse:
        counts = servicer.engine.counts if ready else None
        running = servicer.requests.count(RequestState.RUNNING)
        return admin_pb2.GetStatusResponse(
            role=admin_pb2.ROLE_PREFILL,
            instance_id=f"prefill-{replica}",
            ready=ready,
            running=running,
            waiting=len(servicer.requests) - running,
            blocks_total=counts.blocks_total if counts else 0,
            blocks_free=counts.blocks_free if counts else 0,
            kv_transport=servicer.kv_transport,
            kv_bytes=servicer.kv_bytes,
            kv_transfers=servicer.kv_transfers,
            kv_seconds=servicer.kv_seconds,
            kv_open=servicer.kv_open,
            metrics_port=metrics_port,
        )

    async def reset() -> bool:
        return bool(await servicer.engine.llm.reset_prefix_cache())

    admin = AdminServicer(server, servicer.requests, describe, reset)
    counters = {metric_names.PREFILL_REQUESTS: lambda: servicer.requests.outcomes}
    server.metrics.add(StatusCollector(admin.status, counters))
    await server.start()
    try:
        model_path = await asyncio.to_thread(resolve_model, mesh.model)
        async with (
            serve_metrics(server.metrics, config.host, shifted(config.metrics_port, replica)) as metrics_port,
            run_engine(mesh, config, model_path, replica, servicer.handle) as engine,
        ):
            servicer.attach(engine)
            freeze_heap()
            ready = stop.started = True
            await server.ready()
            log.info("prefill ready", address=server.address)
            await engine.serve_until(stop)
            servicer.requests.draining = True
            await server.stop(grace=10)
    finally:
        await server.stop(grace=0)
