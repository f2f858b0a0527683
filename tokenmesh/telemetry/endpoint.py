"""``/metrics`` of a service: its own, and those that vLLM and Python keep in the process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from prometheus_client import REGISTRY, disable_created_metrics, make_asgi_app

from tokenmesh.rpc.http import HttpServer, bind
from tokenmesh.telemetry.metrics import Metrics


def shifted(port: int, replica: int) -> int:
    """The port of a replica; 0 stays 0: a free one."""
    return port and port + replica


@contextmanager
def exposed(metrics: Metrics) -> Iterator[None]:
    """Shows a service's metrics wherever this process shows Python's and vLLM's, until the block ends."""
    # A series beside every other one, which nobody has asked for.
    disable_created_metrics()
    REGISTRY.register(metrics)
    try:
        yield
    finally:
        REGISTRY.unregister(metrics)


@asynccontextmanager
async def serve_metrics(metrics: Metrics, host: str, port: int) -> AsyncIterator[int]:
    """Serves for the length of the context; port 0 picks a free one. Gives the port. Raises PortInUseError."""
    listener = bind(host, port)
    with exposed(metrics):
        async with HttpServer(make_asgi_app(REGISTRY), listener):
            yield int(listener.getsockname()[1])
