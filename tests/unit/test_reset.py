"""AdminService.ResetPrefixCache: nobody's blocks are overwritten, and nobody is kept out for longer than it takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from tests.unit.fake_service import free_ports
from tokenmesh.lifecycle import LiveRequest, RequestTable
from tokenmesh.rpc.admin import AdminServicer
from tokenmesh.rpc.channel import open_channel
from tokenmesh.rpc.errors import MeshError, Reason, invalid
from tokenmesh.rpc.server import RpcServer
from tokenmesh.v1 import admin_pb2, admin_pb2_grpc

EMPTIED = "UNAVAILABLE DRAINING: the prefix cache is being emptied"
DRAINED = "UNAVAILABLE DRAINING: the service is shutting down"


class Cache:
    """A service's requests and its prefix cache, which is emptied as the test says."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.requests = RequestTable(10)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)
        self.resets = 0
        self.resetting = asyncio.Event()
        self.may_end = asyncio.Event()
        self.outcome: bool | Exception = True

    async def reset(self) -> bool:
        self.resets += 1
        self.resetting.set()
        await self.may_end.wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def ask(self, timeout: float = 10) -> asyncio.Task[MeshError | None]:
        """Asks for a reset; its result is what the caller is told."""

        async def asked() -> MeshError | None:
            try:
                await self.admin.ResetPrefixCache(admin_pb2.ResetPrefixCacheRequest(), timeout=timeout)
            except grpc.aio.AioRpcError as error:
                return MeshError.from_rpc(error)
            return None

        return asyncio.create_task(asked())

    def refusal(self) -> str:
        """Why a request that comes now is refused; empty: it is admitted."""
        try:
            with self.requests.admit(LiveRequest("r")):
                return ""
        except MeshError as error:
            return f"{error.code.name} {error.reason.value}: {error.message}"


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    server = RpcServer("127.0.0.1", free_ports(1)[0])
    async with open_channel(server.address) as channel:
        cache = Cache(channel)
        AdminServicer(server, cache.requests, admin_pb2.GetStatusResponse, cache.reset)
        await server.start()
        yield cache
        await server.stop(0)


async def test_a_cache_in_use_is_not_emptied(cache: Cache) -> None:
    # 1. A request lives.
    cache.may_end.set()
    with cache.requests.admit(LiveRequest("live")):
        error = await cache.ask()
        assert error is not None
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.BUSY)
        assert cache.resets == 0
        # Others are not kept out by what was refused.
        assert cache.refusal() == ""
    # 2. It has ended.
    assert await cache.ask() is None
    assert cache.resets == 1


@pytest.mark.parametrize(
    ("outcome", "told"),
    [(True, None), (False, Reason.BUSY), (invalid(Reason.BAD_REQUEST, "no"), Reason.BAD_REQUEST)],
    ids=["done", "blocks in use", "fails"],
)
async def test_nobody_gets_in_while_a_cache_is_emptied(cache: Cache, outcome: bool | Exception, told: object) -> None:
    # 1. A request that came now would find its blocks overwritten.
    cache.outcome = outcome
    asked = cache.ask()
    await cache.resetting.wait()
    assert cache.refusal() == EMPTIED
    # 2. However it ends, the next one gets in.
    cache.may_end.set()
    error = await asked
    assert (error and error.reason) == told
    assert cache.refusal() == ""


async def test_nobody_gets_in_between_the_look_and_the_reset() -> None:
    # 1. As soon as no request was seen, in the same turn of the loop.
    seen: list[bool] = []

    class Table(RequestTable):
        def __len__(self) -> int:
            asyncio.get_running_loop().call_soon(lambda: seen.append(self.paused))
            return super().__len__()

    async def reset() -> bool:
        return True

    server = RpcServer("127.0.0.1", free_ports(1)[0])
    table = Table(10)
    admin = AdminServicer(server, table, admin_pb2.GetStatusResponse, reset)
    context: Any = SimpleNamespace(invocation_metadata=tuple)
    await admin.ResetPrefixCache(admin_pb2.ResetPrefixCacheRequest(), context)
    assert seen == [True]
    # 2. Afterwards they may.
    assert not table.paused


async def test_nobody_gets_in_between_two_that_empty_a_cache(cache: Cache) -> None:
    # 1. Two ask at the same time, and the first is served.
    asked = [cache.ask(), cache.ask()]
    await cache.resetting.wait()
    await asyncio.sleep(0.2)
    cache.resetting.clear()
    kept, cache.may_end = cache.may_end, asyncio.Event()
    kept.set()
    # 2. While the other one is, nobody gets in either.
    await asyncio.wait_for(cache.resetting.wait(), 5)
    assert cache.refusal() == EMPTIED
    cache.may_end.set()
    assert await asyncio.gather(*asked) == [None, None]
    assert cache.refusal() == ""


async def test_a_caller_who_gives_up_lets_nobody_in(cache: Cache) -> None:
    # 1. Nobody waits for the answer any more.
    error = await cache.ask(timeout=0.3)
    assert error is not None
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    # 2. The service is still at it.
    await asyncio.sleep(0.2)
    assert cache.refusal() == EMPTIED
    cache.may_end.set()
    async with asyncio.timeout(5):
        while cache.refusal():  # noqa: ASYNC110 - nobody is told of it
            await asyncio.sleep(0.01)


async def test_emptying_a_cache_does_not_undo_a_drain(cache: Cache) -> None:
    # 1. The drain comes while the cache is being emptied.
    asked = cache.ask()
    await cache.resetting.wait()
    await cache.admin.Drain(admin_pb2.DrainRequest(), timeout=10)
    assert cache.refusal() == DRAINED
    cache.may_end.set()
    assert await asked is None
    assert cache.refusal() == DRAINED
    # 2. Again, drained from the start.
    assert await cache.ask() is None
    assert cache.refusal() == DRAINED
