"""Runs a decode worker until it is told to stop."""

from __future__ import annotations

import structlog

from services.decode.worker.processes import ShardProcesses
from services.decode.worker.service import WorkerServicer
from tokenmesh.config import MeshConfig
from tokenmesh.heap import freeze_heap
from tokenmesh.kv.hub import LinkHub
from tokenmesh.kv.messages import ToService
from tokenmesh.lifecycle import RequestTable, Stop
from tokenmesh.rpc.admin import AdminServicer
from tokenmesh.rpc.server import RpcServer
from tokenmesh.telemetry import metric_names
from tokenmesh.telemetry.endpoint import serve_metrics, shifted
from tokenmesh.telemetry.status_metrics import StatusCollector
from tokenmesh.v1 import admin_pb2, worker_pb2, worker_pb2_grpc

log = structlog.get_logger()

DRAIN_S = 10.0


async def serve(mesh: MeshConfig, replica: int, stop: Stop) -> None:
    """Serves until `stop` is set, then leaves its group.

    Raises PortInUseError, ConfigError.
    """
    config = mesh.decode_worker
    server = RpcServer(config.host, config.port + replica)
    servicer = WorkerServicer(config)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server.server)
    server.add(worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name)
    ready, metrics_port = False, 0

    def describe() -> admin_pb2.GetStatusResponse:
        at = servicer.attached
        return admin_pb2.GetStatusResponse(
            role=admin_pb2.ROLE_DECODE_WORKER,
            instance_id=f"decode-worker-{replica}",
            ready=ready and not servicer.draining,
            blocks_total=at.blocks if at is not None else 0,
            # Who holds blocks only the root's ledger knows.
            blocks_free=at.blocks if at is not None else 0,
            kv_transport=servicer.kv_transport,
            kv_bytes=at.received_bytes if at is not None else 0,
            kv_open=len(at.tickets) if at is not None else 0,
            metrics_port=metrics_port,
        )

    # Requests are the root's; the table only knows whether we take work.
    admin = AdminServicer(server, RequestTable(1), describe, leave=servicer.leave)
    server.metrics.add(StatusCollector(admin.status, {metric_names.KV_DROPPED: lambda: servicer.settling.dropped}))
    shards: ShardProcesses | None = None

    def route(message: ToService) -> None:
        if shards is None or not shards.note(message):
            servicer.handle(message)

    await server.start()
    try:
        async with (
            serve_metrics(server.metrics, config.host, shifted(config.metrics_port, replica)) as metrics_port,
            LinkHub(route) as hub,
        ):
            shards = ShardProcesses(config, mesh.decode_service.group, replica, hub)
            try:
                await shards.ensure(mesh.decode_service.tensor_parallel_size)
                servicer.attach(shards)
                freeze_heap()
                ready = stop.started = True
                await server.ready()
                log.info("decode worker ready", address=server.address)
                await stop.wait()
                await server.not_ready()
                await servicer.leave(DRAIN_S)
                await server.stop(grace=1)
            finally:
                await shards.stop()
    finally:
        await server.stop(grace=0)
