"""Clients that go away: what was done for them ends everywhere, within a second."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest

from tests.conftest import RunningMesh
from tests.mesh.test_failover import prompt
from tokenmesh.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

PATIENCE_S = 1.0
"""Nothing may be held any more this long after the client has gone."""
STEP_TOKENS = 256
"""As `tests.conftest.mesh_config` has it."""


@dataclass
class Gone:
    """When the client went."""

    left: float = 0.0

    def leave(self) -> None:
        """The client goes now."""
        self.left = time.monotonic()


def _aborted(mesh: RunningMesh) -> int:
    return mesh.status(mesh.root_address).counters["aborted"]


@asynccontextmanager
async def goes_away(mesh: RunningMesh, patience_s: float = PATIENCE_S) -> AsyncIterator[Gone]:
    """The block makes a client go; after it, everything must be free in time, and the root must call it an abort."""
    aborted = await asyncio.to_thread(_aborted, mesh)
    gone = Gone()
    yield gone
    assert gone.left
    trace: list[tuple[float, dict[str, int]]] = []
    while not trace or (trace[-1][1] and trace[-1][0] < 10):
        held = {name: count for name, count in (await asyncio.to_thread(mesh.held)).items() if count}
        trace.append((round(time.monotonic() - gone.left, 3), held))
        await asyncio.sleep(0.01)
    seconds, held = trace[-1]
    print(f"idle {seconds} s after the client had gone")
    assert seconds <= patience_s, trace
    assert not held, trace
    assert await asyncio.to_thread(_aborted, mesh) > aborted


def rest_body(mesh: RunningMesh, text: str | list[int] = "The sky is", **change: Any) -> dict[str, Any]:
    """A completion that goes on for 17 s if it is let."""
    body: dict[str, Any] = {"model": mesh.config.model_name, "prompt": text, "max_tokens": 500, "ignore_eos": True}
    return body | {"stream": True} | change


def grpc_request(text: str = "The sky is", ids: list[int] | None = None) -> inference_pb2.StreamGenerateRequest:
    """The same for gRPC."""
    request = inference_pb2.StreamGenerateRequest(
        sampling_params=sampling_pb2.SamplingParams(max_tokens=500, ignore_eos=True, temperature=0)
    )
    if ids is None:
        request.prompt.text = text
    else:
        request.prompt.token_ids.CopyFrom(inference_pb2.TokenIds(ids=ids))
    return request


async def greedy(mesh: RunningMesh) -> str:
    """A short answer that never changes."""
    body = {"model": mesh.config.model_name, "prompt": "The sky is", "max_tokens": 4, "temperature": 0}
    async with httpx.AsyncClient(base_url=mesh.rest_url, timeout=30) as client:
        response = (await client.post("/v1/completions", json=body)).raise_for_status()
    text: str = response.json()["choices"][0]["text"]
    return text


async def test_rest_stream_closed_after_the_first_chunk(mesh: RunningMesh) -> None:
    async with (
        goes_away(mesh) as gone,
        httpx.AsyncClient(base_url=mesh.rest_url, timeout=30) as client,
        client.stream("POST", "/v1/completions", json=rest_body(mesh)) as response,
    ):
        # (1) The stream has begun, and the root holds a block for it. Losing the iterator would close the stream.
        assert response.status_code == 200
        lines = response.aiter_lines()
        assert (await anext(lines)).startswith("data: {")
        held = await asyncio.to_thread(mesh.held)
        assert held["root requests"] == 1
        assert held["root blocks"] >= 1
        # (2) Closed, connection and all.
        gone.leave()
        await response.aclose()


async def test_rest_answer_not_waited_for(mesh: RunningMesh) -> None:
    # Not streamed: nothing has been sent when the client goes.
    async with goes_away(mesh) as gone, httpx.AsyncClient(base_url=mesh.rest_url, timeout=30) as client:
        task = asyncio.create_task(client.post("/v1/completions", json=rest_body(mesh, stream=False)))
        await mesh.until(lambda held: held["root blocks"] > 0)
        gone.leave()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_rest_two_choices(mesh: RunningMesh) -> None:
    # Every choice is a sequence of its own on the root.
    async with (
        goes_away(mesh) as gone,
        httpx.AsyncClient(base_url=mesh.rest_url, timeout=30) as client,
        client.stream("POST", "/v1/completions", json=rest_body(mesh, n=2)) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        await mesh.until(lambda held: held["root requests"] == 2)
        gone.leave()
        await response.aclose()


async def test_grpc_call_cancelled_after_the_first_message(mesh: RunningMesh) -> None:
    async with goes_away(mesh) as gone, grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        # (1) The stream has begun.
        call = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(grpc_request())
        assert (await call.read()).token_ids
        assert (await asyncio.to_thread(mesh.held))["root requests"] == 1
        # (2) Cancelled.
        gone.leave()
        assert call.cancel()
        assert await call.code() is grpc.StatusCode.CANCELLED


async def test_grpc_whole_answer_cancelled(mesh: RunningMesh) -> None:
    async with goes_away(mesh) as gone, grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        whole = inference_pb2.InferenceServiceGenerateRequest(request=grpc_request())
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(whole)
        await mesh.until(lambda held: held["root blocks"] > 0)
        gone.leave()
        assert call.cancel()


async def test_grpc_deadline_passes_mid_stream(mesh: RunningMesh) -> None:
    async with goes_away(mesh) as gone, grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        # (1) Some tokens come, then the deadline.
        call = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(grpc_request(), timeout=0.7)
        start, parts = time.monotonic(), []
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for part in call:
                parts.append(part)
        gone.leave()
        assert parts
        assert not parts[-1].HasField("finish_reason")
        # (2) The client hears of it on time.
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - start < 1.2


async def patience(mesh: RunningMesh) -> float:
    """An abort takes effect between steps; where one of the prefill service takes long, it waits for that.

    STEP_TOKENS are one step there: their time is measured, as a prompt's that is answered with one token.
    """
    begun = time.monotonic()
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        request = grpc_request(ids=prompt(STEP_TOKENS, seed=random.getrandbits(32)))
        request.sampling_params.max_tokens = 1
        async for _ in inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request):
            pass
    return max(PATIENCE_S, 0.5 + time.monotonic() - begun)


@pytest.mark.parametrize("front", ["rest", "grpc"])
async def test_client_goes_while_its_prompt_is_prefilled_remotely(mesh: RunningMesh, front: str) -> None:
    # (1) A prompt of 2,000 new tokens takes the prefill service about 3 s.
    ids = prompt(2000, seed=random.getrandbits(32))
    patience_s = await patience(mesh)
    before = await asyncio.to_thread(mesh.status, mesh.root_address)
    async with (
        goes_away(mesh, patience_s) as gone,
        httpx.AsyncClient(base_url=mesh.rest_url, timeout=30) as client,
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
    ):
        call: Any
        if front == "rest":
            call = asyncio.create_task(client.post("/v1/completions", json=rest_body(mesh, ids, stream=False)))
        else:
            call = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(grpc_request(ids=ids))
        # (2) It is there: a request, blocks and a transfer on the prefill service, blocks waiting on the root.
        here = {
            "root requests": 1,
            "root blocks": 16,
            "root transfers": 1,
            "prefill requests": 1,
            "prefill transfers": 1,
        }
        await mesh.until(lambda held: held["prefill blocks"] > 0 and here.items() <= held.items())
        # (3) The client goes. What is left of the prompt must not be computed.
        gone.leave()
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call if front == "rest" else await call.code()
    # (4) Nothing arrived, and the root did not fall back to computing the prompt itself.
    after = await asyncio.to_thread(mesh.status, mesh.root_address)
    assert after.kv_transfers == before.kv_transfers
    assert after.counters["PREFILL_DECISION_PREFILL_FAILED"] == before.counters["PREFILL_DECISION_PREFILL_FAILED"]


async def test_twenty_random_cancels_leave_nothing(mesh: RunningMesh) -> None:
    rng = random.Random(20)
    truth = await greedy(mesh)

    async def one(number: int, ids: list[int], stay: float) -> None:
        """A client that leaves after `stay` seconds, whatever has come by then."""
        if number % 2:
            async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
                call = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(grpc_request(ids=ids))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(stay):
                        async for _ in call:
                            pass
                call.cancel()
            return
        async with httpx.AsyncClient(base_url=mesh.rest_url, timeout=30) as client:
            with contextlib.suppress(TimeoutError):
                async with (
                    asyncio.timeout(stay),
                    client.stream("POST", "/v1/completions", json=rest_body(mesh, ids)) as response,
                ):
                    async for _ in response.aiter_lines():
                        pass

    # (1) Short and long prompts, both fronts, a few at a time, gone at any moment within a second.
    clients = [
        (number, prompt(rng.choice([5, 100, 200, 400]), rng.getrandbits(32)), rng.uniform(0.0, 1.0))
        for number in range(20)
    ]
    before = await asyncio.to_thread(_aborted, mesh)
    for start in range(0, 20, 4):
        await asyncio.gather(*(one(*client) for client in clients[start : start + 4]))

    # (2) Nothing is held, and most of them got as far as the root.
    assert not any((await asyncio.to_thread(mesh.wait_idle)).values())
    assert await asyncio.to_thread(_aborted, mesh) - before >= 10

    # (3) The mesh answers as before.
    assert await greedy(mesh) == truth
