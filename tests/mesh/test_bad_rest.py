"""Bad input over REST is refused with the right status, a message and the offending field; the mesh serves on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import RunningMesh
from tests.refusals import NO_TOKEN, TOO_LONG, refused

pytestmark = pytest.mark.usefixtures("serves_on")

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


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
    ("stop at a negative token", COMPLETIONS, {"stop_token_ids": [-1]}, 400, OWN, "stop_token_ids"),
    ("top_k beyond int32", COMPLETIONS, {"top_k": 2**40}, 400, OWN, "top_k"),
    ("priority beyond int64", COMPLETIONS, {"priority": 2**70}, 400, MODEL, "body.priority"),
    ("salt is no Unicode", COMPLETIONS, {"cache_salt": "\ud800"}, 400, MODEL, "body.cache_salt"),
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
