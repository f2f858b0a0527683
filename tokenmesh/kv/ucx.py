"""UCX for one event loop: endpoints whose sends and receives are futures, and progress that sleeps when idle.

Built on ucxx's core binding. Its asyncio layer waits by yielding, which spins a core for as long as any receive is
pending, and a server always has receives pending. Here requests are looked at when UCX has made progress, and the loop
sleeps on UCX's event descriptor in between; only while bulk data is moving does it poll, since waking up costs more
than the wait.

UCX reads its environment on import: set it first (see `transports`), then import this module.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import structlog
from ucxx._lib import libucxx as core
from ucxx._lib.arr import Array

from tokenmesh.kv import transports
from tokenmesh.kv.memory import Payload

log = structlog.get_logger()

SPIN_S = 0.0005
"""How long to poll on after the last progress while bulk requests are open."""

_HELLO_BYTES = 8


class UcxError(Exception):
    """A peer is unreachable, gone, or the request was cancelled."""


class TooLongError(UcxError):
    """A message is longer than the buffer it was to be received in."""


class UcxEndpoint:
    """A connected peer. Messages on one channel arrive in the order in which they were submitted."""

    def __init__(self, worker: UcxWorker, endpoint: Any, send_base: int, recv_base: int) -> None:
        self._worker = worker
        self._endpoint = endpoint
        self._send_base = send_base
        self._recv_base = recv_base
        self.transport = transports.of_endpoint(endpoint.handle)
        """What carries bulk data, e.g. "sysv,posix"."""

    def send(self, buffer: Payload, channel: int, bulk: bool = False) -> asyncio.Future[None]:
        """Submits a send now; the future is done when the buffer may be reused. Fails with UcxError."""
        if self._endpoint is None:
            return self._worker.refused("the endpoint is closed")
        return self._worker.submit(self._endpoint.tag_send, buffer, self._send_base | channel, bulk, receive=False)

    def recv(self, buffer: Payload, channel: int, bulk: bool = False) -> asyncio.Future[None]:
        """Submits a receive now; the future is done when the buffer is filled.

        Fails with UcxError, TooLongError if the message does not fit. A shorter one fills the buffer's beginning.
        """
        if self._endpoint is None:
            return self._worker.refused("the endpoint is closed")
        return self._worker.submit(self._endpoint.tag_recv, buffer, self._recv_base | channel, bulk, receive=True)

    def close(self) -> None:
        """Closes at once: open requests fail, and UCX no longer touches their buffers. Idempotent."""
        if self._endpoint is not None:
            self._endpoint.close_blocking(period=10**9, max_attempts=1)
            self._endpoint = None
            self._worker.progress()


class UcxWorker:
    """One UCX context and worker, driven by the running event loop."""

    def __init__(self) -> None:
        features = (core.Feature.TAG, core.Feature.STREAM, core.Feature.WAKEUP)
        self._context = core.UCXContext({}, features)
        self._worker = core.UCXWorker(self._context)
        self._worker.init_blocking_progress_mode()
        self._loop = asyncio.get_running_loop()
        self._open: dict[Any, tuple[asyncio.Future[None], Payload, bool]] = {}
        self._bulk = 0
        self._last_progress = 0.0
        self._scheduled = False
        self._listeners: list[Any] = []
        self._accepting: set[asyncio.Task[None]] = set()
        self._loop.add_reader(self._worker.epoll_file_descriptor, self._wake)
        self._wake()

    # Progress.

    def _wake(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """One round: progress, completions, and then either another round or sleep until UCX has an event."""
        self._scheduled = False
        moved = self.progress()
        spinning = self._bulk and time.monotonic() - self._last_progress < SPIN_S
        if spinning and not moved:
            # Somebody may be computing on this very core, the prompt whose KV this is for one.
            os.sched_yield()
        # arm() refuses while events are pending; then there is more to progress.
        if spinning or not self._worker.arm():
            self._wake()

    def progress(self) -> bool:
        """Lets UCX work and resolves the futures of finished requests. Returns whether there was anything to do."""
        moved = bool(self._worker.progress_once())
        if moved:
            self._worker.progress()
            self._last_progress = time.monotonic()
        finished = [request for request in self._open if request.completed]
        for request in finished:
            future, _, bulk = self._open.pop(request)
            self._bulk -= bulk
            if future.done():
                continue
            try:
                request.check_error()
            except Exception as error:  # noqa: BLE001 - ucxx raises one of forty classes; callers need to know two
                kind = TooLongError if "Truncated" in type(error).__name__ else UcxError
                future.set_exception(kind(f"{type(error).__name__}: {error}"))
            else:
                future.set_result(None)
        return moved

    def refused(self, why: str) -> asyncio.Future[None]:
        """A request that is not made, as a future that has failed."""
        future: asyncio.Future[None] = self._loop.create_future()
        future.set_exception(UcxError(why))
        return future

    def submit(
        self, verb: Callable[..., Any], buffer: Payload, tag: int, bulk: bool, receive: bool
    ) -> asyncio.Future[None]:
        """Starts a tagged request and keeps its buffer alive until it ends."""
        future: asyncio.Future[None] = self._loop.create_future()
        try:
            arguments = (Array(buffer), core.UCXXTag(tag), *((core.UCXXTagMaskFull,) if receive else ()))
            request = verb(*arguments)
        except Exception as error:  # noqa: BLE001 - as above
            future.set_exception(UcxError(f"{type(error).__name__}: {error}"))
            return future
        self._track(request, future, buffer, bulk)
        return future

    def _track(self, request: Any, future: asyncio.Future[None], buffer: Payload, bulk: bool) -> None:
        self._open[request] = (future, buffer, bulk)
        self._bulk += bulk
        if bulk:
            self._last_progress = time.monotonic()
        self._wake()

    # Connections.

    def listen(self, port: int, serve: Callable[[UcxEndpoint], Awaitable[None]]) -> int:
        """Accepts peers; each is served by one task. Returns the port, chosen by UCX if 0 was given."""

        def accept(endpoint: Any) -> None:
            # UCX calls this in the middle of its progress, where nothing may be submitted.
            self._loop.call_soon(start, endpoint)

        def start(endpoint: Any) -> None:
            task = asyncio.ensure_future(self._accept(endpoint, serve))
            self._accepting.add(task)
            task.add_done_callback(self._accepting.discard)

        listener = core.UCXListener.create(self._worker, port, accept, deliver_endpoint=True)
        self._listeners.append(listener)
        return int(listener.port)

    async def _accept(self, raw: Any, serve: Callable[[UcxEndpoint], Awaitable[None]]) -> None:
        try:
            endpoint = await asyncio.wait_for(self._greet(raw), timeout=5)
        except (UcxError, TimeoutError) as error:
            log.warning("ucx peer did not complete its handshake", error=str(error))
            return
        try:
            await serve(endpoint)
        finally:
            endpoint.close()

    async def connect(self, host: str, port: int, timeout: float = 5.0) -> UcxEndpoint:
        """Connects to a listener. Raises UcxError."""
        try:
            # Nothing may come between the two: UCX loops for ever in a send on an endpoint that has failed to connect.
            greeting = self._greet(core.UCXEndpoint.create(self._worker, host, port, True))
            return await asyncio.wait_for(greeting, timeout)
        except TimeoutError as error:
            raise UcxError(f"no answer from {host}:{port} within {timeout:g} s") from error
        except UcxError:
            raise
        except Exception as error:
            raise UcxError(f"{host}:{port}: {type(error).__name__}: {error}") from error

    def _greet(self, raw: Any) -> Awaitable[UcxEndpoint]:
        """Tells the peer which tags reach us, and learns which reach it. Sends before it returns.

        Tags are matched per worker, not per endpoint, so each side draws a random base for what it receives.
        """
        mine = secrets.randbits(55) << 8
        hello = np.frombuffer(bytearray(mine.to_bytes(_HELLO_BYTES, "little")), dtype=np.uint8)
        answer = np.zeros(_HELLO_BYTES, dtype=np.uint8)
        futures = []
        for verb, buffer in ((raw.stream_send, hello), (raw.stream_recv, answer)):
            future: asyncio.Future[None] = self._loop.create_future()
            self._track(verb(Array(buffer)), future, buffer, bulk=False)
            futures.append(future)

        async def greeted() -> UcxEndpoint:
            await asyncio.gather(*futures)
            return UcxEndpoint(self, raw, int.from_bytes(answer.tobytes(), "little"), mine)

        return greeted()

    def close(self) -> None:
        """Stops listening and driving; open requests are dropped."""
        self._listeners.clear()
        for task in self._accepting:
            task.cancel()
        self._loop.remove_reader(self._worker.epoll_file_descriptor)
