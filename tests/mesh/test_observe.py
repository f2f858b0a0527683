"""Looking at a running mesh: the page's data over HTTP, and a request's waterfall in the terminal."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

import httpx
import pytest

from tests.conftest import RunningMesh
from tests.mesh.test_failover import prompt
from tokenmesh.cli import trace


def complete(mesh: RunningMesh, http: httpx.Client) -> str:
    """The id of a request that was prefilled remotely."""
    request_id = f"look-{secrets.token_hex(4)}"
    body = {"model": mesh.config.model_name, "prompt": prompt(400, seed=secrets.randbelow(10**6)), "max_tokens": 8}
    http.post("/v1/completions", json=body, headers={"x-request-id": request_id}).raise_for_status()
    # Spans leave twice a second.
    time.sleep(1.5)
    return request_id


def snapshots(http: httpx.Client, count: int) -> list[dict[str, Any]]:
    """What the page reads, one a second."""
    seen = []
    with http.stream("GET", "/dashboard/api/watch") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                seen.append(json.loads(line.removeprefix("data: ")))
            if len(seen) == count:
                return seen
    raise AssertionError("the stream has ended")


def test_the_page_sees_the_whole_mesh(mesh: RunningMesh, http: httpx.Client) -> None:
    # 1. A request, then what a browser would read.
    assert "/dashboard/static/main.js" in http.get("/dashboard").text
    request_id = complete(mesh, http)
    first, second = snapshots(http, 2)
    assert first["time"] != second["time"]
    # 2. Every service answers; the root tells of both ranks.
    roles = [(view["status"]["role"], view["error"]) for view in second["services"]]
    expected = ("ROLE_GATEWAY", "ROLE_PREFILL", "ROLE_DECODE_ROOT", "ROLE_DECODE_WORKER")
    assert roles == [(role, "") for role in expected]
    assert len(second["services"][2]["status"]["ranks"]) == 2
    # 3. The request is the newest, with its decision and a first token.
    newest = second["requests"][0]
    assert request_id in newest["request_id"]
    assert (newest["outcome"], newest["output_tokens"], newest["prompt_tokens"]) == ("finished", 8, 400)
    assert newest["decision"] == "disaggregated"
    assert float(newest["ttft"].rstrip("s")) > 0
    # 4. Its trace is one click away.
    spans = http.get(f"/dashboard/api/traces/{newest['request_id']}").json()["spans"]
    assert {span["service"] for span in spans} >= {"gateway-0", "prefill-0", "decode-root-0"}


def test_the_terminal_shows_where_the_time_went(
    mesh: RunningMesh, http: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    # 1. By the id that the client knows.
    request_id = complete(mesh, http)
    assert trace.trace(mesh.config, request_id) == 0
    shown = capsys.readouterr().out
    # 2. From the request to the transfer.
    for name in ("POST", "DecodeService/Generate", "remote_prefill", "kv_push", "kv_receive", "decode"):
        assert name in shown
    # 3. An id that nobody knows is refused in one line.
    assert trace.trace(mesh.config, "nobody") == 1
    assert capsys.readouterr().err == "tokenmesh: trace: NOT_FOUND (UNKNOWN_REQUEST): no spans of 'nobody' are kept\n"
