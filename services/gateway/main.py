"""Runs a gateway until it is told to stop."""

from __future__ import annotations

import asyncio

import structlog
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.exceptions import EngineDeadError

from services.gateway import rest
from services.gateway.dashboard.app import dashboard
from services.gateway.engine_client import MeshEngineClient
from services.gateway.inference import InferenceServicer
from services.gateway.keys import Keys
from services.gateway.observe import Collector, ObserveServicer, Watcher
from services.gateway.pulse import Pulse
from services.gateway.router import Router
from tokenmesh.config import MeshConfig
from tokenmesh.engine.host import engine_args
from tokenmesh.heap import freeze_heap
from tokenmesh.lifecycle import RequestState, RequestTable, Stop
from tokenmesh.logs import setup_inherited_logging
from tokenmesh.model_store import resolve_model
from tokenmesh.rpc.admin import AdminServicer
from tokenmesh.rpc.channel import aging
from tokenmesh.rpc.http import HttpServer, bind
from tokenmesh.rpc.server import RpcServer
from tokenmesh.telemetry import metric_names
from tokenmesh.telemetry.endpoint import exposed
from tokenmesh.telemetry.span_store import SpanStore
from tokenmesh.telemetry.status_metrics import StatusCollector
from tokenmesh.v1 import admin_pb2, inference_pb2, inference_pb2_grpc, observe_pb2, observe_pb2_grpc

log = structlog.get_logger()

MAX_REQUESTS = 4096
CONNECTION_S = 300.0
"""A client's gRPC connection to one gateway of several."""


async def serve(mesh: MeshConfig, replica: int, stop: Stop) -> None:
    """Serves until `stop` is set, then drains.

    Raises PortInUseError, ModelNotFoundError, ConfigError; EngineDeadError if it dies by itself.
    """
    config = mesh.gateway
    listener = bind(config.host, config.port)
    server = RpcServer(config.host, config.grpc_port, aging(CONNECTION_S, config.request_timeout_s + 1), rest.MOST_OPEN)
    requests = RequestTable(MAX_REQUESTS)
    servicer = InferenceServicer(config, mesh.model_name)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.server)
    server.add(inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name)
    async with Router(mesh) as router:

        def describe() -> admin_pb2.GetStatusResponse:
            running = requests.count(RequestState.RUNNING)
            pools = ((admin_pb2.ROLE_DECODE_ROOT, router.roots), (admin_pb2.ROLE_PREFILL, router.prefills))
            return admin_pb2.GetStatusResponse(
                role=admin_pb2.ROLE_GATEWAY,
                instance_id=f"gateway-{replica}",
                ready=bool(router.entry.usable()),
                running=running,
                waiting=len(requests) - running,
                metrics_port=config.port,
                peers=[
                    admin_pb2.Peer(role=role, address=peer.address, ready=peer.up)
                    for role, pool in pools
                    for peer in pool.peers
                ],
            )

        pulse, store, keys = Pulse(), SpanStore(mesh.telemetry.kept_traces), Keys.of_operators(config)
        # On the port that clients use, so it takes an operator's key.
        admin = AdminServicer(server, requests, describe, check=keys.check)
        watcher = Watcher(router, pulse, server.address, admin.status)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(
            Collector(store, Keys.of_clients(config)), server.server
        )
        observe_pb2_grpc.add_ObserveServiceServicer_to_server(ObserveServicer(watcher, store, keys), server.server)
        server.add(observe_pb2.DESCRIPTOR.services_by_name["ObserveService"].full_name)
        counters = {metric_names.GATEWAY_REQUESTS: lambda: requests.outcomes}
        server.metrics.add(StatusCollector(admin.status, counters))
        await server.start()
        try:
            model_path = await asyncio.to_thread(resolve_model, mesh.model)
            # The decode section decides lengths and dtype; no engine is started with it here.
            arguments = engine_args(mesh, mesh.decode_service, model_path, tensor_parallel_size=1)
            vllm_config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
            client = MeshEngineClient(vllm_config, config, mesh.model_name, pulse, router, requests)
            app = await rest.build(mesh, model_path, client, dashboard(watcher, store, keys))
            # Building vLLM's app imports packages that take over the root logger.
            setup_inherited_logging()
            servicer.attach(client)
            freeze_heap()
            stop.started = True
            with exposed(server.metrics):
                async with HttpServer(app, listener, grace=10, lifespan="on"):
                    health = asyncio.create_task(_follow_health(client, server))
                    log.info(
                        "gateway ready", rest=f"{config.host}:{config.port}", grpc=server.address, mode=config.mode
                    )
                    try:
                        await client.serve_until(stop)
                    finally:
                        health.cancel()
                        requests.draining = True
                        await watcher.close()
                        stopping = asyncio.create_task(server.stop(grace=10))
                await stopping
            client.shutdown()
        finally:
            await server.stop(grace=0)


async def _follow_health(client: MeshEngineClient, server: RpcServer) -> None:
    """Health says whether a request could be served now, over gRPC as over REST."""
    told: bool | None = None
    while True:
        try:
            await client.check_health()
            usable = True
        except EngineDeadError:
            usable = False
        if usable is not told:
            await (server.ready() if usable else server.not_ready())
            told = usable
        await asyncio.sleep(0.2)
