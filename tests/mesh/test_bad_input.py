"""Bad input is refused with the right status, a reason and the offending field; the mesh serves on."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.conftest import RunningMesh
from tests.mesh.test_failover import fake_prefill, generate, prompt, refuse
from tokenmesh.config import GatewayConfig
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    kv_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
    sampling_pb2,
)

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
TOO_LONG = [5] * 5000
"""More tokens than max_model_len."""
NO_TOKEN = 49_152
"""The first id outside the vocabulary."""


@pytest.fixture(autouse=True, scope="module")
def _serves_on(mesh: RunningMesh) -> Iterator[None]:
    """After all refusals a good request is answered as before, over both front ends."""
    yield
    body = {"model": mesh.config.model_name, "prompt": "The sky is", "max_tokens": 2, "temperature": 0}
    rest = httpx.post(f"{mesh.rest_url}{COMPLETIONS}", json=body, timeout=30)
    assert rest.status_code == 200, rest.text
    with grpc.insecure_channel(mesh.grpc_address) as channel:
        whole = inference_pb2.InferenceServiceGenerateRequest(request=_inference())
        reply = inference_pb2_grpc.InferenceServiceStub(channel).Generate(whole, timeout=30)
    assert reply.choices[0].text == rest.json()["choices"][0]["text"]


# REST.


@pytest.fixture
def http(mesh: RunningMesh) -> Iterator[httpx.Client]:
    """A client that does not raise."""
    with httpx.Client(base_url=mesh.rest_url, timeout=30) as client:
        yield client


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """Checks what all errors have in common and returns the error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    assert response.headers["x-request-id"]
    assert "Traceback" not in response.text
    body = response.json()
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert error["message"]
    assert error["code"] == status
    return error


def _schema(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


# id, path, what differs from a good request, status, error type, param.
# vLLM names its own refusals "BadRequestError" and those of its request models "Bad Request", with the path in param.
OWN, MODEL = "BadRequestError", "Bad Request"
REST: list[tuple[str, str, dict[str, Any], int, str, str | None]] = [
    ("prompt too long", COMPLETIONS, {"prompt": TOO_LONG}, 400, OWN, "input_tokens"),
    ("chat too long", CHAT, {"messages": [{"role": "user", "content": "a " * 5000}]}, 400, OWN, "input_tokens"),
    ("prompt fills the model", COMPLETIONS, {"prompt": [5] * 4096}, 400, OWN, "max_tokens"),
    ("more tokens than fit", COMPLETIONS, {"max_tokens": 5000}, 400, OWN, "max_tokens"),
    ("empty text", COMPLETIONS, {"prompt": ""}, 400, OWN, "prompt"),
    ("empty list", COMPLETIONS, {"prompt": []}, 400, OWN, None),
    ("empty list in a list", COMPLETIONS, {"prompt": [[]]}, 400, OWN, None),
    ("no messages", CHAT, {"messages": []}, 400, OWN, None),
    ("unknown model", COMPLETIONS, {"model": "nope"}, 404, "NotFoundError", "model"),
    ("unknown model for chat", CHAT, {"model": "nope"}, 404, "NotFoundError", "model"),
    ("prompt is a number", COMPLETIONS, {"prompt": 5}, 400, MODEL, "body.prompt"),
    ("max_tokens is a word", COMPLETIONS, {"max_tokens": "many"}, 400, MODEL, "body.max_tokens"),
    ("temperature is a word", COMPLETIONS, {"temperature": "hot"}, 400, MODEL, "body.temperature"),
    ("messages is text", CHAT, {"messages": "hello"}, 400, MODEL, "body.messages"),
    ("seed is no int64", COMPLETIONS, {"seed": 2**70}, 400, MODEL, "body.seed"),
    ("token out of vocabulary", COMPLETIONS, {"prompt": [NO_TOKEN]}, 400, OWN, None),
    ("token beyond int32", COMPLETIONS, {"prompt": [2**40]}, 400, OWN, None),
    ("negative token", COMPLETIONS, {"prompt": [-1]}, 400, MODEL, "body.prompt.0"),
    ("negative max_tokens", COMPLETIONS, {"max_tokens": -1}, 400, OWN, "max_tokens"),
    ("negative max_tokens for chat", CHAT, {"max_tokens": -1}, 400, OWN, "max_tokens"),
    ("max_tokens 0", COMPLETIONS, {"max_tokens": 0}, 400, OWN, "max_tokens"),
    ("temperature -1", COMPLETIONS, {"temperature": -1}, 400, OWN, "temperature"),
    ("temperature nan", COMPLETIONS, {"temperature": float("nan")}, 400, OWN, "temperature"),
    ("temperature inf", COMPLETIONS, {"temperature": float("inf")}, 400, OWN, "temperature"),
    ("top_p 3", COMPLETIONS, {"top_p": 3}, 400, OWN, "top_p"),
    ("top_k -5", COMPLETIONS, {"top_k": -5}, 400, OWN, None),
    ("presence_penalty 5", COMPLETIONS, {"presence_penalty": 5}, 400, OWN, None),
    ("n 0", COMPLETIONS, {"n": 0}, 400, OWN, None),
    ("n 100,000", COMPLETIONS, {"n": 100_000}, 400, OWN, None),
    ("logprobs 100", COMPLETIONS, {"logprobs": 100}, 400, OWN, "logprobs"),
    ("top_logprobs alone", CHAT, {"top_logprobs": 3}, 400, OWN, "top_logprobs"),
    ("min_tokens over max_tokens", COMPLETIONS, {"min_tokens": 9}, 400, OWN, None),
    ("bias for no token", COMPLETIONS, {"logit_bias": {"99999": 1}}, 400, OWN, "logit_bias"),
    ("bias for a word", COMPLETIONS, {"logit_bias": {"a": 1}}, 400, OWN, "logit_bias"),
    ("stop at no token", COMPLETIONS, {"stop_token_ids": [99999]}, 400, OWN, "stop_token_ids"),
    ("unknown format", CHAT, {"response_format": {"type": "yaml"}}, 400, MODEL, "body.response_format.type"),
    ("no schema", CHAT, {"response_format": {"type": "json_schema"}}, 400, OWN, "response_format"),
    ("impossible schema", CHAT, {"response_format": _schema({"type": "strange"})}, 400, OWN, None),
    ("schema is no schema", CHAT, {"response_format": _schema({"properties": 3})}, 400, OWN, None),
    ("invalid regex", CHAT, {"structured_outputs": {"regex": "("}}, 400, OWN, None),
    ("invalid grammar", COMPLETIONS, {"structured_outputs": {"grammar": "root ::= ("}}, 400, OWN, None),
    ("no choices", COMPLETIONS, {"structured_outputs": {"choice": []}}, 400, OWN, None),
    (
        "two constraints",
        COMPLETIONS,
        {"structured_outputs": {"choice": ["a"], "regex": "b"}},
        400,
        OWN,
        "structured_outputs",
    ),
    ("half a tool", CHAT, {"tools": [{"type": "function"}]}, 400, MODEL, "body.tools.0.function"),
]


@pytest.mark.parametrize(
    ("path", "change", "status", "kind", "param"), [row[1:] for row in REST], ids=[r[0] for r in REST]
)
def test_rest(
    http: httpx.Client, mesh: RunningMesh, path: str, change: dict[str, Any], status: int, kind: str, param: str | None
) -> None:
    # (1) A request that would be good but for one thing.
    body: dict[str, Any] = {"model": mesh.config.model_name, "max_tokens": 2}
    body |= {"prompt": "The sky is"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
    # Not json=: httpx would refuse to write NaN, and other clients do not.
    content, headers = json.dumps(body | change), {"content-type": "application/json"}
    error = refused(http.post(path, content=content, headers=headers), status)

    # (2) The refusal names that thing.
    assert (error["type"], error["param"]) == (kind, param), error


def test_rest_stream_is_refused_before_it_begins(http: httpx.Client, mesh: RunningMesh) -> None:
    body = {"model": mesh.config.model_name, "prompt": TOO_LONG, "stream": True}
    assert refused(http.post(COMPLETIONS, json=body), 400)["param"] == "input_tokens"


@pytest.mark.parametrize(
    "body",
    [b'{"model": ', b"[1]", b"", b"\xff\xfe\x00", b"[" * 5000],
    ids=["half", "a list", "empty", "binary", "deep"],
)
def test_rest_body_is_no_request(http: httpx.Client, body: bytes) -> None:
    refused(http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}), 400)


def test_rest_content_type(http: httpx.Client) -> None:
    refused(http.post(COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"}), 400)


@pytest.mark.parametrize(("method", "path"), [("GET", COMPLETIONS), ("DELETE", "/v1/models"), ("PUT", CHAT)])
def test_rest_wrong_method(http: httpx.Client, method: str, path: str) -> None:
    response = http.request(method, path)
    assert response.headers["allow"]
    refused(response, 405)


def test_rest_unknown_path(http: httpx.Client) -> None:
    refused(http.get("/v1/nope"), 404)


def test_rest_body_too_large(http: httpx.Client, mesh: RunningMesh) -> None:
    # (1) Announced: refused by its length.
    limit = mesh.config.gateway.max_request_bytes
    headers = {"content-type": "application/json"}
    body = b'{"model": "' + b"x" * limit + b'"}'
    refused(http.post(COMPLETIONS, content=body, headers=headers), 413)

    # (2) Not announced (chunked): refused once the limit is passed.
    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 1 << 20):
            yield body[start : start + (1 << 20)]

    refused(http.post(COMPLETIONS, content=pieces(), headers=headers), 413)


# The guard alone, in front of an application that echoes its body.


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
    from services.gateway.rest import Guard

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


# gRPC.


@dataclass
class Refusal:
    """What a call failed with."""

    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]
    message: str
    seconds: float


def _complete(call: Callable[[], Any]) -> None:
    reply = call()
    if hasattr(reply, "__next__"):
        list(reply)


def refusal(call: Callable[[], Any]) -> Refusal:
    """Makes a call that must fail, streaming or not."""
    start = time.monotonic()
    with pytest.raises(grpc.RpcError) as failure:
        _complete(call)
    error: Any = failure.value
    seconds = time.monotonic() - start
    assert "Traceback" not in error.details()
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    if status is not None:
        (detail,) = status.details
        assert detail.Unpack(info)
        assert info.domain == "tokenmesh"
    return Refusal(error.code(), info.reason, dict(info.metadata), error.details(), seconds)


def _sampling(**change: Any) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(**{"temperature": 0, "max_tokens": 2, **change})


def _inference(
    text: str | None = "The sky is", ids: list[int] | None = None, model: str = "", n: int = 0, **change: Any
) -> inference_pb2.StreamGenerateRequest:
    request = inference_pb2.StreamGenerateRequest(model=model, n=n, sampling_params=_sampling(**change))
    if ids is not None:
        request.prompt.token_ids.CopyFrom(inference_pb2.TokenIds(ids=ids))
    elif text is not None:
        request.prompt.text = text
    return request


def _constraint(**kind: Any) -> dict[str, Any]:
    return {"structured_outputs": sampling_pb2.StructuredOutputs(**kind)}


def _empty_chat() -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(prompt=inference_pb2.Prompt(chat=inference_pb2.Conversation()))


INVALID = grpc.StatusCode.INVALID_ARGUMENT
BAD = Reason.BAD_SAMPLING_PARAMS
# id, request, code, reason, param.
INFERENCE: list[tuple[str, inference_pb2.StreamGenerateRequest, grpc.StatusCode, Reason, str]] = [
    ("no prompt", _inference(text=None), INVALID, Reason.EMPTY_PROMPT, "prompt"),
    ("no messages", _empty_chat(), INVALID, Reason.EMPTY_PROMPT, "prompt"),
    ("empty text", _inference(text=""), INVALID, Reason.EMPTY_PROMPT, "prompt_token_ids"),
    ("no tokens", _inference(ids=[]), INVALID, Reason.EMPTY_PROMPT, "prompt_token_ids"),
    ("too long", _inference(ids=TOO_LONG), INVALID, Reason.PROMPT_TOO_LONG, "prompt_token_ids"),
    ("too long text", _inference(text="a " * 5000), INVALID, Reason.PROMPT_TOO_LONG, "prompt_token_ids"),
    ("no room", _inference(ids=[5] * 10, max_tokens=4090), INVALID, Reason.PROMPT_TOO_LONG, "prompt_token_ids"),
    ("no token", _inference(ids=[5, NO_TOKEN]), INVALID, Reason.TOKEN_OUT_OF_VOCABULARY, "prompt_token_ids"),
    ("model", _inference(model="nope"), grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, "model"),
    ("temperature -1", _inference(temperature=-1), INVALID, BAD, "temperature"),
    ("temperature nan", _inference(temperature=float("nan")), INVALID, BAD, "temperature"),
    ("temperature inf", _inference(temperature=float("inf")), INVALID, BAD, "temperature"),
    ("top_p 3", _inference(top_p=3), INVALID, BAD, "top_p"),
    ("top_k -5", _inference(top_k=-5), INVALID, BAD, "sampling_params"),
    ("max_tokens 0", _inference(max_tokens=0), INVALID, BAD, "max_tokens"),
    ("max_tokens -1", _inference(max_tokens=-1), INVALID, BAD, "max_tokens"),
    ("min_tokens over max_tokens", _inference(min_tokens=9), INVALID, BAD, "sampling_params"),
    ("presence_penalty 5", _inference(presence_penalty=5), INVALID, BAD, "sampling_params"),
    ("logprobs 100", _inference(logprobs=100), INVALID, BAD, "logprobs"),
    ("n 100,000", _inference(n=100_000), INVALID, BAD, "sampling_params"),
    ("empty stop string", _inference(stop=[""]), INVALID, BAD, "sampling_params"),
    ("bias for no token", _inference(logit_bias={99_999: 1.0}), INVALID, BAD, "logit_bias"),
    ("stop at no token", _inference(stop_token_ids=[99_999]), INVALID, BAD, "stop_token_ids"),
    ("only no token", _inference(allowed_token_ids=[99_999]), INVALID, BAD, "allowed_token_ids"),
    ("no constraint", _inference(**_constraint()), INVALID, BAD, "sampling_params"),
    ("schema is no JSON", _inference(**_constraint(json_schema="{")), INVALID, BAD, "sampling_params"),
    ("impossible schema", _inference(**_constraint(json_schema='{"type": "x"}')), INVALID, BAD, "sampling_params"),
    ("invalid regex", _inference(**_constraint(regex="(")), INVALID, BAD, "sampling_params"),
    ("invalid grammar", _inference(**_constraint(grammar="root ::= (")), INVALID, BAD, "sampling_params"),
    ("invalid tag", _inference(**_constraint(structural_tag="x")), INVALID, BAD, "sampling_params"),
]


@pytest.mark.parametrize(
    ("request_", "code", "reason", "param"), [row[1:] for row in INFERENCE], ids=[row[0] for row in INFERENCE]
)
def test_inference(
    mesh: RunningMesh,
    request_: inference_pb2.StreamGenerateRequest,
    code: grpc.StatusCode,
    reason: Reason,
    param: str,
) -> None:
    with grpc.insecure_channel(mesh.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        whole = inference_pb2.InferenceServiceGenerateRequest(request=request_)
        for call in (lambda: stub.Generate(whole, timeout=10), lambda: stub.StreamGenerate(request_, timeout=10)):
            got = refusal(call)
            assert (got.code, got.reason, got.metadata.get("param")) == (code, reason, param), got


@pytest.mark.parametrize("timeout", [-1.0, 0.0, 0.001, 0.05])
def test_inference_deadline(mesh: RunningMesh, timeout: float) -> None:
    # Already over, or too short for a prompt that takes half a second: the client knows at once.
    request = _inference(ids=prompt(300, seed=secrets.randbits(32)), max_tokens=50)
    with grpc.insecure_channel(mesh.grpc_address) as channel:
        grpc.channel_ready_future(channel).result(5)
        got = refusal(lambda: inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request, timeout=timeout))
    assert got.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert got.seconds < max(timeout, 0) + 0.5


async def test_inference_wants_a_key() -> None:
    from services.gateway.inference import InferenceServicer

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


# The decode root, called directly.


def _decode(ids: list[int] | None = None, request_id: str = "direct", **change: Any) -> decode_pb2.GenerateRequest:
    return decode_pb2.GenerateRequest(
        request_id=request_id,
        prompt_token_ids=[5, 6, 7] if ids is None else ids,
        sampling_params=_sampling(**change),
    )


DECODE: list[tuple[str, decode_pb2.GenerateRequest, Reason, str]] = [
    ("stop strings", _decode(stop=["a"]), BAD, "sampling_params.stop"),
    ("no request id", _decode(request_id=""), Reason.BAD_REQUEST, "request_id"),
    ("no tokens", _decode(ids=[]), Reason.EMPTY_PROMPT, "prompt_token_ids"),
    ("too long", _decode(ids=[5] * 4096), Reason.PROMPT_TOO_LONG, "prompt_token_ids"),
    ("no token", _decode(ids=[NO_TOKEN]), Reason.TOKEN_OUT_OF_VOCABULARY, "prompt_token_ids"),
    ("temperature -1", _decode(temperature=-1), BAD, "temperature"),
    ("max_tokens 0", _decode(max_tokens=0), BAD, "max_tokens"),
    ("logprobs 100", _decode(logprobs=100), BAD, "logprobs"),
    ("invalid regex", _decode(**_constraint(regex="(")), BAD, "sampling_params"),
]


@pytest.mark.parametrize(("request_", "reason", "param"), [row[1:] for row in DECODE], ids=[row[0] for row in DECODE])
def test_decode_root(mesh: RunningMesh, request_: decode_pb2.GenerateRequest, reason: Reason, param: str) -> None:
    with grpc.insecure_channel(mesh.root_address) as channel:
        got = refusal(lambda: decode_pb2_grpc.DecodeServiceStub(channel).Generate(request_, timeout=10))
    assert (got.code, got.reason, got.metadata.get("param")) == (INVALID, reason, param), got


@pytest.mark.parametrize("length", [3, 200])
def test_decode_root_refuses_a_live_request_id(mesh: RunningMesh, length: int) -> None:
    with grpc.insecure_channel(mesh.root_address) as channel:
        # (1) A request that lives.
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        ids = prompt(length, seed=secrets.randbits(32))
        live = stub.Generate(_decode(ids, "twice", max_tokens=200, ignore_eos=True), timeout=30)
        next(live)

        # (2) A second one with its id is refused.
        got = refusal(lambda: stub.Generate(_decode(ids, "twice"), timeout=10))
        assert (got.code, got.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.DUPLICATE_REQUEST)

        # (3) The first is not disturbed.
        for _ in range(3):
            assert next(live).token_ids
        live.cancel()


def test_decode_root_second_request_does_not_disturb_the_first_ones_prefill(mesh: RunningMesh) -> None:
    with grpc.insecure_channel(mesh.root_address) as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        for _ in range(3):
            # (1) Both at once, so that the second comes before the engine has asked for the first one's KV.
            request = _decode(prompt(200, seed=secrets.randbits(32)), "twice")
            calls = [stub.Generate(request, timeout=10) for _ in range(2)]
            # (2) One is refused, the other is prefilled remotely as ever.
            decisions = []
            for call in calls:
                try:
                    decisions.append(next(call).prefill_decision)
                    list(call)
                except grpc.RpcError:
                    assert call.code() is grpc.StatusCode.ALREADY_EXISTS
            assert decisions == [sampling_pb2.PREFILL_DECISION_DISAGGREGATED]


def test_decode_root_abort_needs_ids(mesh: RunningMesh) -> None:
    with grpc.insecure_channel(mesh.root_address) as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        got = refusal(lambda: stub.Abort(decode_pb2.AbortRequest(), timeout=5))
        assert (got.code, got.reason, got.metadata["param"]) == (INVALID, Reason.BAD_REQUEST, "request_ids")
        # Unknown ones are ignored.
        stub.Abort(decode_pb2.AbortRequest(request_ids=["nobody"]), timeout=5)


# The prefill service, called directly.


@pytest.fixture(scope="module")
def good(mesh: RunningMesh) -> prefill_pb2.PrefillRequest:
    """A request as the root makes it, for a prompt of 3 blocks; its target is settled."""

    async def catch() -> prefill_pb2.PrefillRequest:
        async with fake_prefill(refuse) as (fake, address):
            await generate(mesh, prompt(300, seed=11), [address])
        return fake.calls[0]

    return asyncio.run(catch())


def _retarget(good: prefill_pb2.PrefillRequest, **change: Any) -> prefill_pb2.PrefillRequest:
    """The same request for a new ticket, with fields of the target replaced."""
    request = prefill_pb2.PrefillRequest()
    request.CopyFrom(good)
    request.target.transfer_id = secrets.token_bytes(16)
    for name, value in change.items():
        field = request.target.DESCRIPTOR.fields_by_name[name]
        request.target.ClearField(name)
        if field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated:
            getattr(request.target, name).CopyFrom(value)
        elif field.is_repeated:
            getattr(request.target, name).extend(value)
        else:
            setattr(request.target, name, value)
    return request


def _prefill(mesh: RunningMesh, request: prefill_pb2.PrefillRequest, timeout: float | None = 10) -> Refusal:
    with grpc.insecure_channel(mesh.prefill_address) as channel:
        return refusal(lambda: prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(request, timeout=timeout))


def test_prefill_needs_a_deadline(mesh: RunningMesh, good: prefill_pb2.PrefillRequest) -> None:
    got = _prefill(mesh, _retarget(good), timeout=None)
    assert (got.code, got.reason, got.metadata["param"]) == (INVALID, Reason.DEADLINE_MISSING, "deadline")


@pytest.mark.parametrize(
    ("ids", "reason"),
    [([], Reason.EMPTY_PROMPT), (TOO_LONG, Reason.PROMPT_TOO_LONG), ([NO_TOKEN], Reason.TOKEN_OUT_OF_VOCABULARY)],
)
def test_prefill_prompt(mesh: RunningMesh, ids: list[int], reason: Reason) -> None:
    got = _prefill(mesh, prefill_pb2.PrefillRequest(request_id="direct", prompt_token_ids=ids))
    assert (got.code, got.reason, got.metadata["param"]) == (INVALID, reason, "prompt_token_ids")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"transfer_id": b"short"}, "target"),
        ({"transfer_id": b"x" * 17}, "target"),
        ({"block_ids": [1, 2]}, "target"),
        ({"block_ids": [1, 2, 3, 4]}, "target"),
        ({"start_token": 3}, "target"),
        ({"start_token": 1024}, "target"),
        ({"codec": kv_pb2.KV_CODEC_UNSPECIFIED}, "target"),
        ({"shards": []}, "shards"),
        ({"shards": [kv_pb2.KvShard(host="127.0.0.1", port=1)] * 2}, "shards"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_prefill_target(
    mesh: RunningMesh, good: prefill_pb2.PrefillRequest, change: dict[str, Any], param: str
) -> None:
    got = _prefill(mesh, _retarget(good, **change))
    assert (got.code, got.reason, got.metadata["param"]) == (INVALID, Reason.BAD_TARGET, param), got


@pytest.mark.parametrize(
    ("field", "value"), [("layers", 29), ("dtype", "float16"), ("block_size", 16), ("packing", "other")]
)
def test_prefill_geometry(mesh: RunningMesh, good: prefill_pb2.PrefillRequest, field: str, value: int | str) -> None:
    # (1) A target of another shape is refused before anything is computed.
    geometry = kv_pb2.BlockGeometry()
    geometry.CopyFrom(good.target.geometry)
    setattr(geometry, field, value)
    got = _prefill(mesh, _retarget(good, geometry=geometry))
    assert (got.code, got.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.GEOMETRY_MISMATCH)
    assert field in got.message

    # (2) So is a connection to such an owner.
    request = prefill_pb2.ConnectOwnerRequest(shards=good.target.shards, geometry=geometry, decode_root_id="direct")
    with grpc.insecure_channel(mesh.prefill_address) as channel:
        got = refusal(lambda: prefill_pb2_grpc.PrefillServiceStub(channel).ConnectOwner(request, timeout=5))
    assert (got.code, got.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.GEOMETRY_MISMATCH)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 1), ("", 0), ("127.0.0.1", 99_999)])
def test_prefill_owner_unreachable(mesh: RunningMesh, good: prefill_pb2.PrefillRequest, host: str, port: int) -> None:
    got = _prefill(mesh, _retarget(good, shards=[kv_pb2.KvShard(host=host, port=port)]))
    assert (got.code, got.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.KV_OWNER_UNREACHABLE)


@pytest.mark.xfail(run=False, reason="leaks blocks for good: a transfer id may be used again before it is released")
def test_prefill_transfer_id_used_again(mesh: RunningMesh, good: prefill_pb2.PrefillRequest) -> None:
    # (1) Calls in quick succession with one ticket, for an owner that is not there.
    request = _retarget(good, shards=[kv_pb2.KvShard(host="127.0.0.1", port=1)])
    assert _prefill(mesh, request).reason == Reason.KV_OWNER_UNREACHABLE
    for _ in range(3):
        got = _prefill(mesh, request)
        assert (got.code, got.reason) == (INVALID, Reason.BAD_TARGET), got

    # (2) Nothing stays behind.
    assert not any(mesh.wait_idle().values())
