"""The local link between a service and its engine processes and movers: one ZeroMQ router on a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.asyncio

from tokenmesh.kv.messages import ToEngine, ToMover, ToService, encode, to_engine, to_service


class LinkHub:
    """The service's end. Routes messages to `scheduler`, `worker-SHARD` and `mover-SHARD`, and hears from them.

    Used as an async context; the socket's folder goes with it.
    """

    def __init__(self, handle: Callable[[ToService], None]) -> None:
        """`handle` is called in the event loop for every message, in order, and must not block."""
        self._handle = handle
        self._folder = Path(tempfile.mkdtemp(prefix="tokenmesh-"))
        self.address = f"ipc://{self._folder}/hub"
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._reader: asyncio.Task[None] | None = None
        self._outbox: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._writer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> LinkHub:
        self._router.bind(self.address)
        self._reader = asyncio.create_task(self._read())
        self._writer = asyncio.create_task(self._write())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._reader, self._writer):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _read(self) -> None:
        while True:
            _, data = await self._router.recv_multipart()
            self._handle(to_service(data))

    async def _write(self) -> None:
        while True:
            peer, data = await self._outbox.get()
            await self._router.send_multipart([peer.encode(), data])

    def send(self, peer: str, message: ToMover | ToEngine) -> None:
        """Queues a message; one to a peer that is gone is dropped by ZeroMQ."""
        self._outbox.put_nowait((peer, encode(message)))


class EngineLink:
    """The end of a scheduler or engine worker: synchronous, never blocks a step."""

    def __init__(self, address: str, name: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(address)

    def send(self, message: ToService) -> None:
        """Sends without waiting."""
        self._socket.send(encode(message), zmq.NOBLOCK)

    def poll(self, wait_s: float = 0.0) -> list[ToEngine]:
        """Everything that has arrived; waits up to `wait_s` for a first message."""
        messages: list[ToEngine] = []
        if wait_s:
            self._socket.poll(int(wait_s * 1000))
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(to_engine(self._socket.recv(zmq.NOBLOCK)))
        return messages

    def close(self) -> None:
        """Closes the link."""
        self._context.destroy(linger=0)
