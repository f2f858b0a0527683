"""The live page at ``/dashboard``: static files, and ObserveService's answers as JSON.

The page itself is open, as it says nothing; its data needs the operators' key.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from services.gateway.keys import Keys
from services.gateway.observe import Watcher
from tokenmesh.telemetry.span_store import SpanStore

FILES = Path(__file__).parent / "static"

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def dashboard(watcher: Watcher, store: SpanStore, keys: Keys) -> Starlette:
    """The application, for paths that begin with /dashboard."""
    written = Written()

    def refused(request: Request) -> Response | None:
        if keys.fit(request.headers.get("authorization", "")):
            return None
        return JSONResponse({"error": "the key is missing or wrong"}, 401)

    async def page(request: Request) -> Response:
        return FileResponse(FILES / "index.html", headers=_HEADERS)

    async def watch(request: Request) -> Response:
        return refused(request) or StreamingResponse(
            events(watcher, written), media_type="text/event-stream", headers=_HEADERS | {"X-Accel-Buffering": "no"}
        )

    async def trace(request: Request) -> Response:
        found = store.trace(request.path_params["id"])
        missing = JSONResponse({"error": "no spans of this request are kept"}, 404)
        return refused(request) or (missing if found is None else JSONResponse(_plain(found), headers=_HEADERS))

    return Starlette(
        routes=[
            Route("/dashboard", page),
            Route("/dashboard/", page),
            Route("/dashboard/api/watch", watch),
            Route("/dashboard/api/traces/{id:path}", trace),
            Mount("/dashboard/static", StaticFiles(directory=FILES)),
        ]
    )


class Written:
    """The last snapshot as JSON, the same for all who watch: of a large mesh it takes 30 ms, and no token moves."""

    def __init__(self) -> None:
        self._of: Message | None = None
        self._text = ""

    def __call__(self, snapshot: Message) -> str:
        if self._of is not snapshot:
            self._of, self._text = snapshot, json.dumps(_plain(snapshot))
        return self._text


async def events(watcher: Watcher, written: Written) -> AsyncGenerator[str, None]:
    """Snapshots as server-sent events."""
    async with aclosing(watcher.watch()) as snapshots:
        async for snapshot in snapshots:
            yield f"data: {written(snapshot)}\n\n"


def _plain(message: Message) -> object:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
