"""One request, one trace: through every service that worked for it, whole, and with the right end."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest

from tests.conftest import RunningMesh
from tests.mesh.test_cancel import goes_away, grpc_request, rest_body
from tests.mesh.test_failover import fake_prefill, prompt, refuse
from tests.otlp import Receiver, SeenSpan, Trace
from tokenmesh.telemetry import span_names as names
from tokenmesh.v1 import decode_pb2, decode_pb2_grpc, inference_pb2_grpc, sampling_pb2

GENERATE = "tokenmesh.v1.DecodeService/Generate"
PREFILL = "tokenmesh.v1.PrefillService/Prefill"
CLIENT = "b" * 16


@pytest.fixture(autouse=True)
def _our_own_mesh() -> None:
    """One that was running before sends its spans elsewhere."""
    if "TOKENMESH_TEST_MESH" in os.environ:
        pytest.skip("spans of a mesh that is not the session's own do not arrive here")


def new_trace() -> tuple[str, dict[str, str]]:
    """A trace id, and the headers of a client that has begun it."""
    trace_id = secrets.token_hex(16)
    return trace_id, {"traceparent": f"00-{trace_id}-{CLIENT}-01"}


async def whole(spans: Receiver, trace_id: str, first: str) -> Trace:
    """A trace, once its outermost span has come, which ends last; other services' spans come within a second."""
    await asyncio.to_thread(spans.wait, trace_id, lambda trace: trace.named(first))
    await asyncio.sleep(1.0)
    trace = spans.trace(trace_id)
    assert trace.orphans({CLIENT}) == []
    return trace


def served(trace: Trace, role: str, method: str) -> SeenSpan:
    """The server span of a call to a service."""
    (span,) = [s for s in trace.named(method) if s.role == role and s.kind == 2]
    return span


@asynccontextmanager
async def root_busy(mesh: RunningMesh) -> AsyncIterator[None]:
    """A sequence lives on the root, so that the next one is placed on the worker."""
    async with (
        httpx.AsyncClient(base_url=mesh.rest_url, timeout=30) as client,
        client.stream("POST", "/v1/completions", json=rest_body(mesh)) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        yield


async def test_a_disaggregated_request(mesh: RunningMesh, spans: Receiver) -> None:
    # 1. A long prompt, whose sequence will live on the worker.
    trace_id, headers = new_trace()
    body = rest_body(mesh, prompt(600, seed=91), max_tokens=40, stream=False)
    async with root_busy(mesh), httpx.AsyncClient(base_url=mesh.rest_url, timeout=60) as client:
        answer = await client.post("/v1/completions", json=body, headers=headers)
    assert answer.headers["traceparent"].split("-")[1] == trace_id
    trace = await whole(spans, trace_id, "POST")

    # 2. All four services took part, each called by the one that should.
    assert trace.edges() == {("gateway", "decode-root"), ("decode-root", "prefill"), ("decode-root", "decode-worker")}
    assert not any(span.error for span in trace.spans), [s for s in trace.spans if s.error]

    # 3. The gateway: the request, the sequence in it, and where it was sent.
    http = trace.one("POST")
    assert (http.name, http.parent_id) == ("POST /v1/completions", CLIENT)
    assert http.attributes[names.HTTP_STATUS] == 200
    sequence = trace.one("text_completion")
    assert sequence.parent_id == http.span_id
    assert sequence.attributes[names.GEN_AI_INPUT_TOKENS] == 600
    assert sequence.attributes[names.GEN_AI_OUTPUT_TOKENS] == 40
    assert sequence.attributes[names.GEN_AI_FINISH_REASONS] == ["length"]
    assert sequence.attributes[names.DECISION] == "disaggregated"
    route = trace.one(names.ROUTE)
    assert route.attributes[names.ROOT] == mesh.root_address
    assert route.attributes[names.CANDIDATES] == [mesh.prefill_address]

    # 4. The root: queue, hand-off, first token, decode, one after the other, inside the call.
    call = served(trace, "decode-root", GENERATE)
    queue = next(span for span in trace.named(names.QUEUE) if span.role == "decode-root")
    phases = [queue, *(trace.one(name) for name in (names.REMOTE_PREFILL, names.FIRST_TOKEN, names.DECODE))]
    assert {phase.parent_id for phase in phases} == {call.span_id}
    slack = 5e6
    for before, after in itertools.pairwise(phases):
        assert before.end_ns <= after.start_ns + slack, (before.name, after.name)
    assert call.start_ns - slack <= phases[0].start_ns
    assert phases[-1].end_ns <= call.end_ns + slack

    # 5. Prefill: its queue, its compute, its push, under the call that the attempt made.
    push, compute = trace.one(names.KV_PUSH), trace.one(names.PREFILL_COMPUTE)
    asked = served(trace, "prefill", PREFILL)
    assert push.parent_id == compute.parent_id == asked.span_id
    assert trace.path(push)[-5:] == [names.REMOTE_PREFILL, names.PREFILL_ATTEMPT, PREFILL, PREFILL, names.KV_PUSH]

    # 6. Both ends of the transfer name the same ticket and the same bytes; so does the attempt.
    attempt, receive = trace.one(names.PREFILL_ATTEMPT), trace.one(names.KV_RECEIVE)
    assert (receive.role, receive.attributes[names.RANK]) == ("decode-worker", 1)
    for name in (names.TRANSFER_ID, names.KV_BYTES, names.KV_TRANSPORT):
        assert push.attributes[name] == receive.attributes[name] == attempt.attributes[name], name
    assert attempt.attributes[names.KV_BYTES] > 1e6
    assert attempt.attributes[names.KV_CODEC] == "none"
    assert attempt.attributes[names.KV_EXPOSED_SECONDS] > 0

    # 7. The steps that it shared with others are linked to it.
    decode = trace.one(names.DECODE)
    assert names.STEPS in decode.events
    linked = [span for span in spans.all() if span.name == names.STEPS and decode.span_id in span.links]
    assert linked
    assert linked[0].attributes[names.STEP_RANKS] == [0, 1]
    assert all(seconds > 0 for seconds in linked[0].attributes[names.STEP_ATTENTION_SECONDS])


async def test_a_short_prompt_stays_on_the_root(mesh: RunningMesh, spans: Receiver) -> None:
    # 1. Over gRPC this time.
    trace_id, headers = new_trace()
    request = grpc_request()
    request.sampling_params.max_tokens = 4
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        async for _ in stub.StreamGenerate(request, metadata=tuple(headers.items()), timeout=30):
            pass
    trace = await whole(spans, trace_id, "tokenmesh.v1.InferenceService/StreamGenerate")
    # 2. Nobody else was asked, and the reason is told by root and gateway alike.
    assert trace.edges() == {("gateway", "decode-root")}
    assert not any(span.error for span in trace.spans)
    assert trace.one(names.FIRST_TOKEN).attributes[names.DECISION] == "too_short"
    assert trace.one("text_completion").attributes[names.DECISION] == "too_short"
    assert not trace.named(names.REMOTE_PREFILL)


async def test_a_failed_prefill_is_recomputed(mesh: RunningMesh, spans: Receiver) -> None:
    # 1. The only candidate refuses.
    trace_id, headers = new_trace()
    async with fake_prefill(refuse) as (_, address), grpc.aio.insecure_channel(mesh.root_address) as channel:
        request = decode_pb2.GenerateRequest(
            request_id=f"trace-{trace_id}",
            prompt_token_ids=prompt(300, seed=92),
            sampling_params=sampling_pb2.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True),
            prefill_candidates=[decode_pb2.PrefillCandidate(address=address)],
        )
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        async for _ in stub.Generate(request, metadata=tuple(headers.items()), timeout=60):
            pass
    trace = await whole(spans, trace_id, GENERATE)
    # 2. The attempt has failed, and with it the hand-off; the refusal's reason is there.
    attempt, handoff = trace.one(names.PREFILL_ATTEMPT), trace.one(names.REMOTE_PREFILL)
    assert (attempt.error, attempt.attributes[names.ERROR_TYPE]) == (True, "QUEUE_FULL")
    assert attempt.attributes[names.PREFILL] == address
    assert handoff.error
    # 3. Its ticket was closed without a byte, which the owner calls by its name.
    receive = trace.one(names.KV_RECEIVE)
    assert (receive.error, receive.attributes[names.KV_BYTES]) == (True, 0)
    # 4. The request itself is well, and says what was done instead.
    assert not served(trace, "decode-root", GENERATE).error
    assert not trace.one(names.DECODE).error
    assert trace.one(names.FIRST_TOKEN).attributes[names.DECISION] == "prefill_failed"


async def test_a_client_that_goes_away(mesh: RunningMesh, spans: Receiver) -> None:
    # 1. It reads one chunk and closes.
    trace_id, headers = new_trace()
    async with goes_away(mesh) as gone, httpx.AsyncClient(base_url=mesh.rest_url, timeout=30) as client:
        async with client.stream("POST", "/v1/completions", json=rest_body(mesh), headers=headers) as response:
            lines = response.aiter_lines()
            await anext(lines)
        gone.leave()
    trace = await whole(spans, trace_id, "POST")
    # 2. Every span has ended. None of them failed: the client was free to go.
    assert not any(span.error for span in trace.spans), [s for s in trace.spans if s.error]
    cut = [trace.one("POST"), trace.one("text_completion"), trace.one(names.DECODE), *trace.named(GENERATE)]
    assert len(cut) == 5
    for span in cut:
        assert span.attributes.get(names.OUTCOME) == names.CANCELLED, span.name
    assert served(trace, "decode-root", GENERATE).attributes[names.RPC_STATUS] == "CANCELLED"


@pytest.mark.parametrize("front", ["gateway", "root"])
async def test_a_deadline(mesh: RunningMesh, spans: Receiver, front: str) -> None:
    # 1. A client waits for less long than the answer takes.
    trace_id, headers = new_trace()
    address, method = {
        "gateway": (mesh.grpc_address, "tokenmesh.v1.InferenceService/StreamGenerate"),
        "root": (mesh.root_address, GENERATE),
    }[front]
    async with grpc.aio.insecure_channel(address) as channel:
        # Its clock runs from when it asks; connecting is not the service's time.
        await channel.channel_ready()
        metadata = tuple(headers.items())
        if front == "gateway":
            call = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(
                grpc_request(), metadata=metadata, timeout=1.0
            )
        else:
            request = decode_pb2.GenerateRequest(
                request_id=f"trace-{trace_id}",
                prompt_token_ids=[1, 2, 3],
                sampling_params=sampling_pb2.SamplingParams(temperature=0, max_tokens=500, ignore_eos=True),
            )
            call = decode_pb2_grpc.DecodeServiceStub(channel).Generate(request, metadata=metadata, timeout=1.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.to_thread(mesh.wait_idle)
    trace = await whole(spans, trace_id, method)
    # 2. The service that was asked has not kept its time; what it had asked for was called off.
    asked = next(span for span in trace.named(method) if span.kind == 2)
    assert (asked.error, asked.attributes[names.RPC_STATUS]) == (True, "DEADLINE_EXCEEDED")
    decode = trace.one(names.DECODE)
    assert (decode.error, decode.attributes[names.OUTCOME]) == (False, names.CANCELLED)
