"""Looking at a mesh: snapshots, the collector, the page's data, and who may see them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from services.gateway import observe
from services.gateway.dashboard import app as app_module
from services.gateway.dashboard.app import FILES, Written, dashboard, events
from services.gateway.keys import Keys
from services.gateway.observe import Collector, ObserveServicer, Watcher
from services.gateway.pulse import Pulse
from services.gateway.rest import Guard
from services.gateway.router import Router
from tests.unit.fake_service import STATUS, free_ports, serving
from tests.unit.test_span_store import export
from tokenmesh.config import GatewayConfig, MeshConfig
from tokenmesh.rpc.channel import open_channel
from tokenmesh.rpc.errors import MeshError
from tokenmesh.rpc.server import RpcServer
from tokenmesh.telemetry.span_store import SpanStore
from tokenmesh.v1 import admin_pb2, observe_pb2, observe_pb2_grpc


def test_keys() -> None:
    # 1. Without any key the doors are open; with an admin key, operators need that one.
    both = GatewayConfig(api_keys=("a", "b"), admin_key="root")
    assert Keys.of_clients(GatewayConfig()).fit("")
    assert [Keys.of_clients(both).fit(f"Bearer {key}") for key in ("a", "b", "root", "")] == [True, True, False, False]
    assert [Keys.of_operators(both).fit(f"bearer {key}") for key in ("a", "root")] == [False, True]
    # 2. Without one, clients' keys open all.
    clients = GatewayConfig(api_keys=("a",))
    assert [Keys.of_operators(clients).fit(given) for given in ("Bearer a", "Basic a", "a", "")] == [True] + [False] * 3


def test_the_pulse_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. A clock of our own: first token after 0.2 s, three more at 0.1 s, the last message empty.
    now = 100.0
    monkeypatch.setattr("services.gateway.pulse.time.monotonic", lambda: now)
    pulse = Pulse()
    assert pulse.describe() == observe_pb2.Pulse()
    sequence = pulse.begin("r-1", 40)
    now += 0.2
    pulse.decided(sequence, "disaggregated")
    for _ in range(4):
        pulse.message(sequence, 1)
        now += 0.1
    pulse.message(sequence, 0)
    # 2. While it runs.
    (view,) = pulse.requests()
    assert (view.outcome, view.output_tokens, view.decision) == ("running", 4, "disaggregated")
    assert view.ttft.ToMilliseconds() == 200
    described = pulse.describe()
    assert described.ttft_p50 == pytest.approx(0.2)
    assert described.itl_p50 == pytest.approx(described.itl_p99) == pytest.approx(0.1)
    assert described.tokens_per_second == pytest.approx(4 / 5)
    # 3. Later it is over, and the last seconds were silent.
    pulse.end(sequence, "finished")
    now += 10
    assert pulse.requests()[0].duration.ToMilliseconds() == 600
    assert pulse.describe() == observe_pb2.Pulse(decisions={"disaggregated": 1})


class World:
    """A gateway's eyes over two fake services and one that is down."""

    def __init__(self, config: GatewayConfig, ports: list[int]) -> None:
        prefill, root, worker, _ = (f"127.0.0.1:{port}" for port in ports)
        mesh = MeshConfig(gateway={"prefills": [prefill], "decode_roots": [root]})
        self.router = Router(mesh)
        self.pulse, self.store = Pulse(), SpanStore(10)
        self.asked = 0

        def status() -> admin_pb2.GetStatusResponse:
            self.asked += 1
            return STATUS["gateway"]

        self.watcher = Watcher(self.router, self.pulse, "gateway:9000", status)
        keys = Keys.of_operators(config)
        self.server = RpcServer("127.0.0.1", ports[3])
        servicer = ObserveServicer(self.watcher, self.store, keys)
        observe_pb2_grpc.add_ObserveServiceServicer_to_server(servicer, self.server.server)
        collector = Collector(self.store, Keys.of_clients(config))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, self.server.server)
        self.page = Guard(_never, config, dashboard(self.watcher, self.store, keys))
        self.worker = worker


async def _never(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("not for the OpenAI server")


@pytest.fixture
async def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """Its parameter is the gateway's configuration. The decode worker that the root names is down."""
    monkeypatch.setattr(observe, "INTERVAL_S", 0.05)
    ports = free_ports(4)
    made = World(GatewayConfig(**getattr(request, "param", {})), ports)
    root = admin_pb2.GetStatusResponse()
    root.CopyFrom(STATUS["decode-root"])
    root.peers.add(role=admin_pb2.ROLE_DECODE_WORKER, address=made.worker)
    monkeypatch.setitem(STATUS, "decode-root", root)
    async with serving("prefill", f"127.0.0.1:{ports[0]}"), serving("decode-root", f"127.0.0.1:{ports[1]}"):
        await made.server.start()
        yield made
        await made.server.stop(0)
        await made.watcher.close()
        for pool in (made.router.prefills, made.router.roots):
            for peer in pool.peers:
                await peer.channel.close()


async def test_a_snapshot_has_every_service_and_says_which_is_down(world: World) -> None:
    # 1. Over gRPC: one at once, more as time goes by.
    async with open_channel(world.server.address) as channel:
        stub = observe_pb2_grpc.ObserveServiceStub(channel)
        call = stub.Watch(observe_pb2.WatchRequest(), timeout=10)
        seen = [await call.read() for _ in range(3)]
        # 2. All four, the gateway first; the worker is known from the root, and does not answer.
        roles = [admin_pb2.Role.Name(view.status.role) for view in seen[-1].services]
        assert roles == ["ROLE_GATEWAY", "ROLE_PREFILL", "ROLE_DECODE_ROOT", "ROLE_DECODE_WORKER"]
        assert [bool(view.error) for view in seen[-1].services] == [False, False, False, True]
        assert seen[-1].services[3].address == world.worker
        assert seen[0].time.ToNanoseconds() < seen[-1].time.ToNanoseconds()
        call.cancel()
    # 3. When nobody watches, nobody is asked.
    await asyncio.sleep(0.2)
    asked = world.asked
    await asyncio.sleep(0.2)
    assert world.asked == asked >= 3


async def test_all_watchers_share_one_round_of_questions(world: World) -> None:
    # 1. Three watch at once.
    async def watch() -> int:
        async with aclosing(world.watcher.watch()) as snapshots:
            count = 0
            async for _ in snapshots:
                count += 1
                if count == 4:
                    break
        return count

    assert await asyncio.gather(watch(), watch(), watch()) == [4, 4, 4]
    # 2. No more was asked than one would have.
    assert world.asked <= 6


async def test_who_watches_does_not_hold_a_shutdown_up(world: World) -> None:
    # 1. Somebody watches, and has got a snapshot.
    stream = world.watcher.watch()
    await anext(stream)
    following = asyncio.create_task(anext(stream, None))
    await asyncio.sleep(0)
    # 2. The gateway stops, and the stream ends.
    await world.watcher.close()
    async with asyncio.timeout(2):
        while await following is not None:
            following = asyncio.create_task(anext(stream, None))


async def test_spans_come_in_and_a_trace_goes_out(world: World) -> None:
    async with open_channel(world.server.address) as channel:
        stub = observe_pb2_grpc.ObserveServiceStub(channel)
        # 1. Nothing is known yet.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetTrace(observe_pb2.GetTraceRequest(id="r"))
        error = MeshError.from_rpc(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_REQUEST")
        # 2. A service exports, as any OTLP client would.
        spans = export("prefill-0", 7, (1, 0, "compute", 1, 5), request_id="r")
        await trace_service_pb2_grpc.TraceServiceStub(channel).Export(spans)
        trace = await stub.GetTrace(observe_pb2.GetTraceRequest(id="r"))
        assert [span.name for span in trace.spans] == ["compute"]
    # 3. The page gets the same as JSON.
    async with client(world) as http:
        got = (await http.get("/dashboard/api/traces/r")).json()
        assert [(span["service"], span["name"], span["duration"]) for span in got["spans"]] == [
            ("prefill-0", "compute", "0.004s")
        ]
        assert (await http.get("/dashboard/api/traces/nobody")).status_code == 404


def client(world: World, key: str = "") -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app=world.page)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)


async def test_the_page_streams_snapshots(world: World) -> None:
    # 1. What the page's script reads. httpx's transport gives a body when it is whole, so it is taken at its source.
    async with aclosing(events(world.watcher, Written())) as stream:
        event = await anext(stream)
    # 2. An event with a snapshot in it, with zeros where there is nothing: a script must not miss a key.
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    snapshot = json.loads(event.removeprefix("data: "))
    assert snapshot["pulse"]["tokens_per_second"] == 0
    assert snapshot["services"][2]["status"]["ranks"][1]["context_tokens"] == "2400"


async def test_a_snapshot_is_written_once_for_all_who_watch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = app_module._plain, list[Any]()
    monkeypatch.setattr(app_module, "_plain", lambda message: calls.append(message) or plain(message))
    written = Written()
    for number in (1, 2):
        snapshot = await world.watcher.snapshot()
        assert written(snapshot) is written(snapshot)
        assert json.loads(written(snapshot))["services"]
        assert len(calls) == number


PATHS = ["/dashboard", "/dashboard/", *(f"/dashboard/static/{file.name}" for file in FILES.iterdir())]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("world", [{"admin_key": "root"}], indirect=True)
async def test_the_page_needs_no_key_and_nobody_else(world: World, path: str) -> None:
    # 1. Every file of the page is served as it is.
    async with client(world) as http:
        response = await http.get(path)
    assert response.status_code == 200
    # 2. Nothing in it comes from another host.
    for other in ("https://", "//cdn", "@import"):
        assert other not in response.text
    assert response.text.count("http://") == response.text.count("http://www.w3.org/2000/svg")


@pytest.mark.parametrize("world", [{"admin_key": "root", "api_keys": ("client",)}], indirect=True)
async def test_data_needs_the_operators_key(world: World) -> None:
    # 1. The page's data.
    world.store.add(export("prefill-0", 7, (1, 0, "compute", 1, 5), request_id="r"))
    for key, status in (("", 401), ("client", 401), ("root", 200)):
        async with client(world, key) as http:
            assert (await http.get("/dashboard/api/traces/r")).status_code == status, key
    async with client(world) as http:
        assert (await http.get("/dashboard/api/watch")).status_code == 401
    # 2. The same over gRPC.
    async with open_channel(world.server.address) as channel:
        stub = observe_pb2_grpc.ObserveServiceStub(channel)
        request = observe_pb2.GetTraceRequest(id="r")
        with pytest.raises(grpc.aio.AioRpcError, match="key"):
            await stub.GetTrace(request, metadata=[("authorization", "Bearer client")])
        assert (await stub.GetTrace(request, metadata=[("authorization", "Bearer root")])).spans
        # 3. Spans are taken from those who have a client's key, as the services have.
        collector = trace_service_pb2_grpc.TraceServiceStub(channel)
        spans = export("prefill-0", 8, (1, 0, "compute", 1, 5))
        with pytest.raises(grpc.aio.AioRpcError, match="key"):
            await collector.Export(spans)
        await collector.Export(spans, metadata=[("authorization", "Bearer client")])
    assert len(world.store) == 2
