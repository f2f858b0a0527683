"""What the OpenAI SDK does not reach: headers, vLLM's own paths, and when bytes leave."""

from __future__ import annotations

import re
import secrets

import httpx
import openai


def test_tokenize_round_trip(http: httpx.Client, model: str) -> None:
    # (1) Text to tokens.
    text = "Grüße, 世界! The sky is blue."
    tokens = http.post("/tokenize", json={"model": model, "prompt": text}).raise_for_status().json()
    assert tokens["count"] == len(tokens["tokens"]) > 0

    # (2) And back.
    body = {"model": model, "tokens": tokens["tokens"]}
    assert http.post("/detokenize", json=body).raise_for_status().json()["prompt"] == text


def test_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert re.match(r"\d+\.\d+", http.get("/version").raise_for_status().json()["version"])


def test_metrics_count_requests_and_tokens(http: httpx.Client, client: openai.OpenAI, model: str) -> None:
    # (1) Prometheus text.
    def values(name: str) -> float:
        response = http.get("/metrics").raise_for_status()
        assert response.headers["content-type"].startswith("text/plain")
        lines = re.findall(rf"^{name}{{[^}}]*}} (\S+)$", response.text, re.MULTILINE)
        assert lines, name
        return sum(float(value) for value in lines)

    names = ("vllm:request_success_total", "vllm:generation_tokens_total", "vllm:prompt_tokens_total")
    before = {name: values(name) for name in names}

    # (2) It counts a request of 3 + 4 tokens.
    client.completions.create(
        model=model, prompt="The sky is", max_tokens=4, temperature=0, extra_body={"ignore_eos": True}
    )
    grown = {name: values(name) - before[name] for name in names}
    assert grown["vllm:request_success_total"] >= 1
    assert grown["vllm:generation_tokens_total"] >= 4
    assert grown["vllm:prompt_tokens_total"] >= 3


def test_request_id(http: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": "The sky is", "max_tokens": 1}

    # (1) The client's id comes back, and vLLM names its answer after it.
    mine = f"mine-{secrets.token_hex(4)}"
    response = http.post("/v1/completions", json=body, headers={"X-Request-Id": mine}).raise_for_status()
    assert response.headers["x-request-id"] == mine
    assert response.json()["id"] == f"cmpl-{mine}"

    # (2) One that gRPC cannot carry is replaced, and the request served.
    odd = {b"x-request-id": "café".encode()}
    response = http.post("/v1/completions", json=body, headers=odd).raise_for_status()
    assert response.json()["id"] == f"cmpl-{response.headers['x-request-id']}"

    # (3) Without one each request gets its own, also one that is refused.
    made = [http.post("/v1/completions", json=body).headers["x-request-id"] for _ in range(2)]
    made.append(http.post("/v1/completions", json={}).headers["x-request-id"])
    assert all(made)
    assert len(set(made)) == 3


def test_trace_context(http: httpx.Client) -> None:
    # (1) The client's trace goes on.
    trace = secrets.token_hex(16)
    sent = f"00-{trace}-{secrets.token_hex(8)}-01"
    got = http.get("/v1/models", headers={"traceparent": sent}).headers["traceparent"]
    assert got.split("-")[1] == trace

    # (2) A malformed or missing one is replaced.
    for headers in ({"traceparent": f"00-{'0' * 32}-{'1' * 16}-01"}, {"traceparent": "x"}, {}):
        fresh = http.get("/v1/models", headers=headers).headers["traceparent"]
        assert re.fullmatch(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", fresh), fresh


def test_response_bodies_are_not_held_back(http: httpx.Client) -> None:
    # Headers and body are two writes. With Nagle's algorithm on, the second waits for the client's delayed
    # acknowledgement: 40 ms on every answer.
    # (1) A connection acknowledges at once while it is new, so it is used for a while first.
    for _ in range(20):
        http.get("/v1/models")
    times = sorted(http.get("/v1/models").elapsed.total_seconds() for _ in range(9))
    # (2) The median is what counts: a busy machine may hold up some of them.
    assert times[4] < 0.03, times
