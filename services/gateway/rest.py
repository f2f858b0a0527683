"""vLLM's OpenAI server, with the mesh behind it and a guard in front."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs, make_arg_parser
from vllm.entrypoints.serve.utils import request_logger
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from services.gateway.engine_client import MeshEngineClient
from services.gateway.keys import Keys
from services.gateway.request_spans import HttpSpan
from tokenmesh.config import ConfigError, GatewayConfig, MeshConfig
from tokenmesh.context import REQUEST_ID, TRACEPARENT, WorkContext, bind

log = structlog.get_logger()

_READ = {field.name for field in fields(BaseFrontendArgs)} | {
    "allow_credentials",
    "allowed_headers",
    "allowed_methods",
    "allowed_origins",
    "disable_fastapi_docs",
    "disable_log_stats",
    "enable_offline_docs",
    "enable_request_id_headers",
    "middleware",
    "root_path",
}
"""Arguments that vLLM's application reads. Others are its launcher's, which is not used here: TLS, keys, sockets."""
MOST_OPEN = 8192
"""Requests that are read, cut into tokens, computed or answered. Sequences are counted besides, once they are tokens; a
burst that comes faster than one thread tokenises would pile up before."""
_OPEN_PATHS = ("/health", "/ping", "/metrics", "/version")


def server_args(mesh: MeshConfig, model_path: str) -> Namespace:
    """vLLM's server arguments. Raises ConfigError for one that would be ignored."""
    config = mesh.gateway
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    values: dict[str, Any] = {
        "model": model_path,
        "served_model_name": [mesh.model_name],
        "host": config.host,
        "port": config.port,
        "tool_call_parser": config.tool_call_parser,
        "enable_auto_tool_choice": config.tool_call_parser is not None,
        "chat_template": config.chat_template,
        "enable_prompt_tokens_details": True,
        "disable_uvicorn_access_log": True,
        "enable_log_requests": mesh.log.prompts,
        # Ours are asked for before; without this, VLLM_API_KEY would add one that only REST wants.
        "api_key": [""],
    }
    for name in config.server_args.keys() - _READ:
        known = "is not read by the gateway" if hasattr(args, name) else "is no argument of vLLM's server"
        raise ConfigError(f"gateway.server_args.{name} {known}")
    vars(args).update(values | config.server_args)
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if config.reasoning_parser is not None:
        args.structured_outputs_config.reasoning_parser = config.reasoning_parser
    return args


async def build(mesh: MeshConfig, model_path: str, client: MeshEngineClient, page: ASGIApp) -> ASGIApp:
    """The application, ready to be served. `page`: what is under /dashboard."""
    args = server_args(mesh, model_path)
    log_prompts(mesh.log.prompts)
    app = build_app(args, ("generate",), client.model_config)
    answer_http_errors(app)
    await init_app_state(client, app.state, args, ("generate",))
    return Guard(app, mesh.gateway, page, lambda: client.draining)


def log_prompts(wanted: bool) -> None:
    """Lets vLLM's log of requests through, or not."""
    # It has prompts at DEBUG, and a logger for nothing else.
    logging.getLogger(request_logger.__name__).setLevel("DEBUG" if wanted else "WARNING")


def answer_http_errors(app: FastAPI) -> None:
    """Gives vLLM's application OpenAI's shape for the errors that it leaves to the framework."""
    # vLLM's handler takes FastAPI's subclass alone; unknown paths, methods and unreadable bodies raise the base class.
    app.add_exception_handler(HTTPException, _http_error)
    # The last step of build_app has assembled the layers already, with a copy of the handlers as they were; without
    # them the first request assembles them anew.
    app.middleware_stack = None


class Guard:
    """Outermost ASGI layer: request id and trace context, API key, body size."""

    def __init__(
        self,
        app: ASGIApp,
        config: GatewayConfig,
        page: ASGIApp | None = None,
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        """`page` looks after its own keys."""
        self._draining = draining
        self._under_way = 0
        self._app = app
        self._page = page
        self._keys = Keys.of_clients(config)
        self._limit = config.max_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._page is not None and (scope["path"] == "/dashboard" or scope["path"].startswith("/dashboard/")):
            await self._page(scope, receive, send)
            return
        headers = Headers(scope=scope)
        work = WorkContext.from_headers({k.lower(): v for k, v in headers.items()})
        # Downstream, vLLM names its request after this header; it must see the id that we made.
        others = [(k, v) for k, v in scope["headers"] if k.lower() != REQUEST_ID.encode()]
        scope = {**scope, "headers": [*others, (REQUEST_ID.encode(), work.request_id.encode())]}
        self._under_way += 1
        try:
            with HttpSpan(scope, work) as span:
                await self._serve(scope, receive, send, headers, span)
        finally:
            self._under_way -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send, headers: Headers, span: HttpSpan) -> None:
        work = span.work

        async def watched() -> Message:
            message = await receive()
            span.received(message)
            return message

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                out[REQUEST_ID] = work.request_id
                out[TRACEPARENT] = work.traceparent
                if self._draining():
                    # Or its client would go on asking here, though others are told of to whoever connects anew.
                    out["connection"] = "close"
            span.sent(message)
            await send(message)

        with bind(work):
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await refusal(scope, receive, reply)
                return
            body = _LimitedBody(watched, self._limit)

            async def checked_reply(message: Message) -> None:
                # An application makes an answer of its own out of whatever stops its reading.
                if not body.exceeded:
                    await reply(message)

            try:
                await self._app(scope, body, checked_reply)
            except _BodyTooLargeError:
                log.debug("body too large", limit=self._limit)
            if body.exceeded:
                await self._too_large()(scope, receive, reply)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        is_open = scope["method"] == "OPTIONS" or scope["path"] in _OPEN_PATHS
        if not is_open and not self._keys.fit(headers.get("authorization", "")):
            return _error(401, "AuthenticationError", "the API key is missing or wrong")
        if self._under_way > MOST_OPEN and not is_open:
            return _error(429, "TooManyRequests", "too many requests at a time")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._limit:
            return self._too_large()
        return None

    def _too_large(self) -> JSONResponse:
        return _error(413, "BadRequestError", f"the body exceeds {self._limit} bytes")


class _BodyTooLargeError(Exception):
    pass


class _LimitedBody:
    """Counts a body that came without a length."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._left = limit

    @property
    def exceeded(self) -> bool:
        """More than the limit has come."""
        return self._left < 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self.exceeded:
            raise _BodyTooLargeError
        return message


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = HTTPStatus(error.status_code).phrase
    response = _error(error.status_code, kind, str(error.detail))
    response.headers.update(error.headers or {})
    return response


def _error(status: int, kind: str, message: str) -> JSONResponse:
    """In the shape of OpenAI's errors, as vLLM's."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)
