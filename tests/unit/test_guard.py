"""What stands in front of the gateway's two front ends: keys, sizes, request ids, and one shape for errors."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from vllm.entrypoints.launchers.app import build_app

from services.gateway import rest
from services.gateway.inference import InferenceServicer
from services.gateway.rest import Guard, answer_http_errors, server_args
from tests.refusals import refused
from tokenmesh.config import ConfigError, GatewayConfig, MeshConfig
from tokenmesh.context import REQUEST_ID
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.v1 import inference_pb2

COMPLETIONS = "/v1/completions"


async def _echo(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def _swallow(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """Like FastAPI: whatever goes wrong while the body is read becomes a 400 of its own."""
    try:
        await _echo(scope, receive, send)
    except Exception:  # noqa: BLE001 - this is the point
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def _guarded(config: GatewayConfig, app: Any = _echo) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=Guard(app, config))  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://guarded")


async def test_guard_wants_a_key() -> None:
    async with _guarded(GatewayConfig(api_keys=("k", "other"))) as client:
        # (1) Without, with a wrong one, with the wrong scheme.
        for value in (None, "Bearer wrong", "Basic k", "k", "Bearer", "Bearer k2", "Bearer \u00fc"):
            headers = {} if value is None else {b"authorization": value.encode("latin-1")}
            error = refused(await client.post(COMPLETIONS, json={}, headers=headers), 401)
            assert error["type"] == "AuthenticationError"

        # (2) With any of the keys; the scheme's case does not matter.
        for value in ("Bearer k", "bearer k", "Bearer other"):
            response = await client.post(COMPLETIONS, content=b"body", headers={"authorization": value})
            assert (response.status_code, response.content) == (200, b"body")

        # (3) What probes and scrapers ask for is open; so are a browser's preflights.
        for path in ("/health", "/metrics", "/version"):
            assert (await client.get(path)).status_code == 200
        assert (await client.options(COMPLETIONS)).status_code == 200
        refused(await client.get("/v1/models"), 401)


@pytest.mark.parametrize("given", ["café", "x" * 300])
async def test_guard_replaces_a_request_id_that_cannot_be_passed_on(given: str) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(value.decode() for name, value in scope["headers"] if name == REQUEST_ID.encode())
        await _echo(scope, receive, send)

    # (1) The application and the client are told the same id, which is not the given one.
    async with _guarded(GatewayConfig(), app) as client:
        response = await client.get("/", headers={REQUEST_ID.encode(): given.encode("latin-1")})
    assert seen == [response.headers[REQUEST_ID]]
    assert seen[0].isascii()
    assert seen[0] != given


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/nope", b"", 404),
        ("GET", COMPLETIONS, b"", 405),
        ("POST", COMPLETIONS, b"\xff\xfe\x00", 400),
        ("POST", COMPLETIONS, b"[" * 5000, 400),
    ],
    ids=["unknown path", "wrong method", "binary", "deep"],
)
async def test_errors_of_the_framework_have_openais_shape(method: str, path: str, body: bytes, status: int) -> None:
    # (1) vLLM's application, with no engine behind it.
    app = build_app(server_args(MeshConfig(), "unused"), ("generate",), None)
    answer_http_errors(app)
    async with _guarded(GatewayConfig(), app) as client:
        response = await client.request(method, path, content=body, headers={"content-type": "application/json"})

    # (2) What never reaches a handler of vLLM's is answered in the same shape.
    refused(response, status)
    assert response.headers.get("allow") == ("POST" if status == 405 else None)


async def test_a_key_in_vllms_environment_guards_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # (1) Keys are the mesh file's: for REST, gRPC and the dashboard alike. vLLM reads one for REST alone.
    monkeypatch.setenv("VLLM_API_KEY", "inherited")
    app = build_app(server_args(MeshConfig(), "unused"), ("generate",), None)
    answer_http_errors(app)
    async with _guarded(GatewayConfig(), app) as client:
        # (2) So this is not refused for the lack of it, but for what it is.
        refused(await client.post("/v1/completions", content=b"{"), 400)


async def test_a_burst_is_refused_where_it_would_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "MOST_OPEN", 2)
    goes_on = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await goes_on.wait()
        await _echo(scope, receive, send)

    async with _guarded(GatewayConfig(), slow) as client:
        # (1) Two are under way; the third is told at once, and health is still answered.
        first = [asyncio.create_task(client.post(COMPLETIONS, content=b"x")) for _ in range(2)]
        await asyncio.sleep(0.01)
        refused(await client.post(COMPLETIONS, content=b"x"), 429)
        health = asyncio.create_task(client.get("/health"))
        await asyncio.sleep(0.01)
        goes_on.set()
        assert [(await each).status_code for each in (*first, health)] == [200] * 3
        # (2) When they have ended there is room again.
        assert (await client.post(COMPLETIONS, content=b"x")).status_code == 200


async def test_a_gateway_that_drains_lets_go_of_its_connections() -> None:
    draining = False
    guard: Any = Guard(_echo, GatewayConfig(), None, lambda: draining)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=guard), base_url="http://guarded") as client:
        assert "connection" not in (await client.post(COMPLETIONS)).headers
        draining = True
        assert (await client.post(COMPLETIONS)).headers["connection"] == "close"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ssl_certfile", "is not read by the gateway"),
        ("reasoning_parser", "is not read by the gateway"),
        ("api_key", "is not read by the gateway"),
        ("max_model_len", "is not read by the gateway"),
        ("allowed_orgins", "is no argument of vLLM's server"),
    ],
)
def test_an_argument_that_would_be_ignored_is_refused(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"gateway\.server_args\.{name} {why}"):
        server_args(MeshConfig(gateway={"server_args": {name: "x"}}), "unused")


def test_arguments_of_vllms_application_are_taken(tmp_path: Path) -> None:
    # (1) They win over the gateway's own.
    plugin = tmp_path / "mine.py"
    plugin.write_text("import sys\nsys.modules['a_tool_parser_was_read'] = sys\n")
    own = {"allowed_origins": ["https://a"], "chat_template": "t", "tool_parser_plugin": str(plugin)}
    args = server_args(MeshConfig(gateway={"server_args": own}), "m")
    assert (args.allowed_origins, args.chat_template, args.model) == (["https://a"], "t", "m")
    # (2) A plugin is read, as vLLM's launcher would.
    assert sys.modules.pop("a_tool_parser_was_read") is sys


async def test_guard_without_keys_lets_all_in() -> None:
    async with _guarded(GatewayConfig()) as client:
        assert (await client.post(COMPLETIONS, content=b"body")).content == b"body"


@pytest.mark.parametrize("app", [_echo, _swallow])
async def test_guard_limits_bodies(app: Any) -> None:
    async def pieces(count: int) -> Any:
        for _ in range(count):
            yield b"x" * 512

    async with _guarded(GatewayConfig(max_request_bytes=1024), app) as client:
        # (1) Up to the limit, announced or not.
        assert (await client.post("/", content=b"x" * 1024)).status_code == 200
        assert (await client.post("/", content=pieces(2))).status_code == 200

        # (2) Beyond it, announced or not, whatever the application makes of it.
        refused(await client.post("/", content=b"x" * 1025), 413)
        refused(await client.post("/", content=pieces(3)), 413)


async def test_inference_wants_a_key() -> None:
    class Context:
        def __init__(self, *metadata: tuple[str, str]) -> None:
            self._metadata = metadata

        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return self._metadata

    async def failure(*metadata: tuple[str, str]) -> MeshError:
        servicer = InferenceServicer(GatewayConfig(api_keys=("k", "other")), "model")
        with pytest.raises(MeshError) as error:
            await servicer.ListModels(inference_pb2.ListModelsRequest(), Context(*metadata))  # type: ignore[arg-type]
        return error.value

    # (1) Without a key or with a wrong one.
    for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "k"),), (("x", "Bearer k"),)):
        error = await failure(*metadata)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.BAD_API_KEY)

    # (2) With any of the keys the call gets past the check, to a gateway that has not started.
    for key in ("k", "other"):
        assert (await failure(("authorization", f"Bearer {key}"))).reason is Reason.DRAINING
