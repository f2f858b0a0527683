"""The gateway's polls: who goes, comes back or drains is noticed by them alone."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from services.decode.root.service import DecodeServicer
from services.gateway import router as router_module
from services.gateway.router import Router
from services.prefill.service import PrefillServicer
from tests.unit.fake_service import free_ports
from tests.unit.test_router import PROMPT, SHORT, pick
from tokenmesh.config import DecodeConfig, MeshConfig, PrefillConfig
from tokenmesh.kv.messages import EngineCounts
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.rpc.server import RpcServer
from tokenmesh.telemetry.metrics import Metrics
from tokenmesh.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2_grpc


class FakeRoot(decode_pb2_grpc.DecodeServiceServicer):
    """Has five sequences."""

    async def GetLoad(self, request: Any, context: Any) -> decode_pb2.GetLoadResponse:
        return decode_pb2.GetLoadResponse(running=2, waiting=3, model="m")


async def start_root(port: int) -> RpcServer:
    server = RpcServer("127.0.0.1", port)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(FakeRoot(), server.server)
    await server.start()
    return server


async def test_a_root_that_goes_and_comes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "POLL_S", 0.02)
    (port,) = free_ports(1)
    router = Router(MeshConfig(gateway={"decode_roots": (f"127.0.0.1:{port}",), "prefills": ()}))
    (peer,) = router.roots.peers

    async def until(up: bool) -> None:
        async with asyncio.timeout(10):
            while peer.up is not up:  # noqa: ASYNC110 - what is tested is that polls alone notice
                await asyncio.sleep(0.01)

    # 1. Nobody is there at first.
    assert not peer.up
    server = await start_root(port)
    async with router:
        # 2. A poll finds it, and its load.
        await until(up=True)
        assert (peer.load, peer.details.model) == (5, "m")  # type: ignore[attr-defined]
        # 3. It goes; requests are refused.
        await server.stop(0)
        await until(up=False)
        with pytest.raises(MeshError):
            pick(router, SHORT)
        # 4. It comes back, on the same address; nobody has to be told.
        server = await start_root(port)
        await until(up=True)
        assert pick(router, SHORT) == peer.address
    await server.stop(0)
    # 5. Closed: no poll is left.
    assert all(task.done() for task in router._polls)


async def test_services_that_drain_are_sent_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "POLL_S", 0.02)
    root_port, prefill_port = free_ports(2)
    addresses = {"decode_roots": (f"127.0.0.1:{root_port}",), "prefills": (f"127.0.0.1:{prefill_port}",)}
    router = Router(MeshConfig(gateway=addresses, decode_service={"remote_prefill_min_tokens": 4}))
    # 1. A root and a prefill service, real but for their engines.
    model = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096))
    engine: Any = SimpleNamespace(counts=EngineCounts(10, 10), block_size=16, llm=model)
    handoff: Any = SimpleNamespace(bytes=0, transfers=0, seconds=0.0, transport="")
    root = DecodeServicer(DecodeConfig(token_parallel_size=1), "m", [], handoff, Metrics())
    prefill = PrefillServicer(PrefillConfig(), Metrics())
    async with AsyncExitStack() as stack:
        for servicer, port in ((root, root_port), (prefill, prefill_port)):
            servicer.attach(engine)
            server = RpcServer("127.0.0.1", port)
            if servicer is root:
                decode_pb2_grpc.add_DecodeServiceServicer_to_server(root, server.server)
            else:
                prefill_pb2_grpc.add_PrefillServiceServicer_to_server(prefill, server.server)
            await server.start()
            stack.push_async_callback(server.stop, 0)
        await stack.enter_async_context(router)

        async def until(up: list[bool]) -> None:
            async with asyncio.timeout(10):
                while [peer.up for pool in (router.roots, router.prefills) for peer in pool.peers] != up:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

        await until([True, True])
        # 2. A pause, as while the prefix cache is emptied, is over before anybody could be sent elsewhere.
        root.requests.paused = prefill.requests.paused = True
        await asyncio.sleep(0.1)
        with router.route(PROMPT, "", set()) as route:
            assert route.candidates == list(addresses["prefills"])
        root.requests.paused = prefill.requests.paused = False
        # 3. The prefill service drains: the root computes prompts, though it answers as before.
        prefill.requests.draining = True
        await until([True, False])
        with router.route(PROMPT, "", set()) as route:
            assert route.candidates == []
        # 4. The root drains too.
        root.requests.draining = True
        await until([False, False])
        with pytest.raises(MeshError) as refused:
            pick(router, SHORT)
        assert refused.value.reason is Reason.NO_DECODE_ROOT
