"""AdminService, the same for every service: each brings a function that describes it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from tokenmesh import __version__
from tokenmesh.lifecycle import RequestTable
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.rpc.server import Context, RpcServer
from tokenmesh.tasks import to_the_end
from tokenmesh.v1 import admin_pb2, admin_pb2_grpc


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """See admin.proto."""

    def __init__(
        self,
        server: RpcServer,
        requests: RequestTable,
        describe: Callable[[], admin_pb2.GetStatusResponse],
        reset_prefix_cache: Callable[[], Awaitable[bool]] | None = None,
        leave: Callable[[float], Awaitable[int]] | None = None,
        check: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """`describe` fills in everything but version, uptime and outcomes. Adds itself to `server`.

        `leave(seconds)` is what a drain means beyond refusing new requests; it returns how much work remains.
        `check` is given the context of each call, and raises MeshError for callers who may not.
        """
        self._check = check
        self._leave = leave
        self._server = server
        self._requests = requests
        self._describe = describe
        self._reset = reset_prefix_cache
        self._resetting = asyncio.Lock()
        self._started = time.monotonic()
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, server.server)
        server.add(admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name)

    async def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: Context[Any, Any]
    ) -> admin_pb2.GetStatusResponse:
        """See admin.proto."""
        self._check(context)
        return self.status()

    def status(self) -> admin_pb2.GetStatusResponse:
        """What GetStatus answers; not ready from the moment of a drain."""
        status = self._describe()
        status.draining = status.draining or self._requests.draining
        status.ready = status.ready and not status.draining
        status.version = __version__
        status.uptime_seconds = time.monotonic() - self._started
        for name, count in self._requests.outcomes.items():
            status.counters[name] = count
        return status

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context[Any, Any]) -> admin_pb2.DrainResponse:
        """See admin.proto."""
        self._check(context)
        self._requests.draining = True
        await self._server.drain()
        remaining = context.time_remaining()
        deadline = time.monotonic() + (remaining - 0.5 if remaining is not None else 30.0)
        if self._leave is not None:
            return admin_pb2.DrainResponse(remaining=await self._leave(deadline - time.monotonic()))
        while len(self._requests) and time.monotonic() < deadline:  # noqa: ASYNC110 - a drain is rare and slow
            await asyncio.sleep(0.05)
        return admin_pb2.DrainResponse(remaining=len(self._requests))

    async def ResetPrefixCache(
        self, request: admin_pb2.ResetPrefixCacheRequest, context: Context[Any, Any]
    ) -> admin_pb2.ResetPrefixCacheResponse:
        """See admin.proto."""
        self._check(context)
        # One after the other: the end of the first would let requests in while the second is at work.
        async with self._resetting:
            idle = not len(self._requests)
            # In the same turn, so that none comes in between.
            self._requests.paused = idle
            # A caller who gives up does not end it: workers may be at it already.
            if not idle or not await to_the_end(self._reset_alone()):
                raise MeshError(grpc.StatusCode.FAILED_PRECONDITION, Reason.BUSY, "blocks are still in use")
        return admin_pb2.ResetPrefixCacheResponse()

    async def _reset_alone(self) -> bool:
        """Resets while no request is let in: one that came meanwhile would find its blocks overwritten."""
        try:
            return self._reset is None or await self._reset()
        finally:
            self._requests.paused = False
