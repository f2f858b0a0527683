"""Runs a decode root until it is told to stop."""

from __future__ import annotations

import asyncio
import time

import structlog

from services.decode.root.group import Group
from services.decode.root.handoff import HandOff
from services.decode.root.service import DecodeServicer
from tokenmesh.config import MeshConfig
from tokenmesh.engine.host import run_engine
from tokenmesh.heap import freeze_heap
from tokenmesh.kv.messages import RankDetached, StepTimes, ToService
from tokenmesh.lifecycle import RequestState, Stop
from tokenmesh.model_store import resolve_model
from tokenmesh.rpc.admin import AdminServicer
from tokenmesh.rpc.server import RpcServer
from tokenmesh.telemetry import metric_names
from tokenmesh.telemetry.endpoint import serve_metrics, shifted
from tokenmesh.telemetry.status_metrics import StatusCollector, decision_name
from tokenmesh.v1 import admin_pb2, decode_pb2, decode_pb2_grpc

log = structlog.get_logger()


async def serve(mesh: MeshConfig, replica: int, stop: Stop) -> None:
    """Serves until `stop` is set, then drains.

    Raises PortInUseError, ModelNotFoundError.
    """
    config = mesh.decode_service
    server = RpcServer(config.host, config.port + replica)
    root_id = f"decode-root-{replica}@{server.address}"
    prefills = mesh.prefill_addresses() if config.prefills is None else config.prefills
    if config.kv_transfer.transport == "none":
        prefills = ()
    group = Group(config, root_id, mesh.worker_addresses(replica))
    handoff = HandOff(config, root_id, group, server.metrics)
    servicer = DecodeServicer(config, mesh.model_name, prefills, handoff, server.metrics)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server.server)
    server.add(decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name)
    ready, metrics_port = False, 0

    def describe() -> admin_pb2.GetStatusResponse:
        counts = servicer.engine.counts if ready else None
        running = servicer.requests.count(RequestState.RUNNING)
        return admin_pb2.GetStatusResponse(
            role=admin_pb2.ROLE_DECODE_ROOT,
            instance_id=f"decode-root-{replica}",
            ready=ready,
            running=running,
            waiting=len(servicer.requests) - running,
            blocks_total=counts.blocks_total if counts else 0,
            blocks_free=counts.blocks_free if counts else 0,
            kv_transport=handoff.transport,
            kv_bytes=handoff.bytes,
            kv_transfers=handoff.transfers,
            kv_seconds=handoff.seconds,
            kv_open=handoff.open,
            counters={**servicer.decisions, **handoff.failures},
            peers=[
                *(
                    admin_pb2.Peer(role=admin_pb2.ROLE_PREFILL, address=a, ready=a in handoff.connected)
                    for a in prefills
                ),
                *(
                    admin_pb2.Peer(role=admin_pb2.ROLE_DECODE_WORKER, address=rank.address, ready=rank.attached)
                    for rank in group.ranks
                ),
            ],
            ranks=group.describe(),
            group=group.stats.describe(counts.ranks) if counts and group.ranks else None,
            metrics_port=metrics_port,
        )

    def handle(message: ToService) -> None:
        if isinstance(message, StepTimes):
            servicer.steps.note(message, time.monotonic())
        elif isinstance(message, RankDetached):
            servicer.steps.lost(message)
        handoff.handle(message)

    async def reset() -> bool:
        if not await servicer.engine.llm.reset_prefix_cache():
            return False
        await group.reset_caches()
        return True

    admin = AdminServicer(server, servicer.requests, describe, reset)
    counters = {
        metric_names.DECODE_REQUESTS: lambda: servicer.requests.outcomes,
        metric_names.DECISIONS: lambda: {decision_name(name): n for name, n in servicer.decisions.items()},
        metric_names.KV_FAILURES: lambda: handoff.failures,
        metric_names.KV_DROPPED: lambda: group.settling.dropped,
    }
    server.metrics.add(StatusCollector(admin.status, counters))
    if group.ranks:
        server.metrics.add(group.stats.exchange)
    await server.start()
    try:
        model_path = await asyncio.to_thread(resolve_model, mesh.model)
        async with (
            serve_metrics(server.metrics, config.host, shifted(config.metrics_port, replica)) as metrics_port,
            run_engine(mesh, config, model_path, replica, handle) as engine,
        ):
            handoff.attach(engine)
            await group.start(engine)
            servicer.attach(engine)
            freeze_heap()
            ready = stop.started = True
            await server.ready()
            log.info("decode root ready", address=server.address, prefills=list(prefills))
            keepers = [asyncio.create_task(handoff.keep_connected(address)) for address in prefills]
            await engine.serve_until(stop)
            servicer.requests.draining = True
            await server.stop(grace=10)
            for keeper in keepers:
                keeper.cancel()
            await handoff.close()
            await group.close()
    finally:
        await server.stop(grace=0)
