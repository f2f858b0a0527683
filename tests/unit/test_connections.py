"""How long connections of clients last."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from tests.unit.fake_service import free_ports
from tokenmesh.rpc.channel import aging
from tokenmesh.rpc.http import DEAF_S, bind
from tokenmesh.rpc.server import RpcServer
from tokenmesh.v1 import admin_pb2, admin_pb2_grpc, decode_pb2, decode_pb2_grpc


class Peers(admin_pb2_grpc.AdminServiceServicer, decode_pb2_grpc.DecodeServiceServicer):
    """Notes which connection each call came over."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    async def GetStatus(self, request: Any, context: Any) -> admin_pb2.GetStatusResponse:
        self.seen.add(context.peer())
        return admin_pb2.GetStatusResponse()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.GenerateResponse]:
        for token in range(20):
            yield decode_pb2.GenerateResponse(token_ids=[token])
            await asyncio.sleep(0.05)


async def test_grpc_connections_are_made_anew_and_no_call_is_lost() -> None:
    peers = Peers()
    server = RpcServer("127.0.0.1", free_ports(1)[0], aging(0.2, 5))
    admin_pb2_grpc.add_AdminServiceServicer_to_server(peers, server.server)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(peers, server.server)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:

        async def stream() -> list[int]:
            call = decode_pb2_grpc.DecodeServiceStub(channel).Generate(decode_pb2.GenerateRequest())
            return [token async for response in call for token in response.token_ids]

        # 1. A stream that is longer than a connection's life comes to its end.
        streaming = asyncio.create_task(stream())
        # 2. Calls meanwhile go over one connection after the other, and none fails.
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=5)
            await asyncio.sleep(0.01)
        assert await streaming == list(range(20))
        assert len(peers.seen) > 2
    await server.stop(0)


async def test_more_calls_than_a_server_may_have_are_refused_at_once() -> None:
    server = RpcServer("127.0.0.1", free_ports(1)[0], most_calls=2)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(Peers(), server.server)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        streams = [stub.Generate(decode_pb2.GenerateRequest()) for _ in range(3)]
        for stream in streams[:2]:
            assert (await stream.read()).token_ids == [0]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await streams[2].read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await server.stop(0)


def test_a_client_that_takes_nothing_is_not_kept_for_ever() -> None:
    # The kernel ends it; what is accepted has the limit from the listener.
    listener = bind("127.0.0.1", 0)
    assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == DEAF_S * 1000
    listener.listen()
    with socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == DEAF_S * 1000
    listener.close()
