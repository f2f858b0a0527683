"""HTTP listeners inside a service's event loop."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn

from tokenmesh.rpc.server import PortInUseError

DEAF_S = 120
"""A client that takes nothing of an answer for this long is gone, though its machine says that it lives."""


def bind(host: str, port: int) -> socket.socket:
    """A socket for `HttpServer`; port 0 picks a free one. Raises PortInUseError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle off on what it accepts; otherwise every answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # What is accepted has it from the listener; nothing above TCP would ever notice.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAF_S * 1000)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise PortInUseError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


class HttpServer:
    """Serves an ASGI application for the length of the context."""

    def __init__(self, app: Any, listener: socket.socket, grace: float = 1.0, lifespan: str = "off") -> None:
        """Waits up to `grace` seconds for running requests when it ends. Takes the listener over."""
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, timeout_graceful_shutdown=int(grace), lifespan=lifespan
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> HttpServer:
        # Not `serve`, which takes the process's signals: those are the service's.
        self._serving = asyncio.create_task(self._server._serve([self._listener]))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._listener.close()
