"""vLLM's front end over a decode root that only says what roots would say: refusals, and what reaches the root."""

from __future__ import annotations

import asyncio
import itertools
import time
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from services.gateway import mesh_core
from services.gateway.mesh_core import _check_text_only
from tests.unit.small_gateway import CHAT, PROMPT, TOKENS, ask, gateway, read, serving_root
from tokenmesh.config import MeshConfig
from tokenmesh.engine.host import engine_args
from tokenmesh.lifecycle import LiveRequest
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.v1 import decode_pb2


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("DEADLINE_EXCEEDED", Reason.DEADLINE_EXCEEDED),
        ("INTERNAL", Reason.INTERNAL),
        ("RESOURCE_EXHAUSTED", Reason.QUEUE_FULL),
        ("UNAVAILABLE", Reason.ENGINE_DEAD),
    ],
)
async def test_a_refusal_reaches_grpc_clients_as_it_is(vllm_config: VllmConfig, code: str, reason: Reason) -> None:
    async with gateway(vllm_config) as (root, _, channel, _):
        # 1. A code that clients do not retry must not become one that they do.
        root.refusal = MeshError(grpc.StatusCode[code], reason, "why")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, TOKENS)
    assert (caught.value.code().name, caught.value.details()) == (code, "why")
    assert MeshError.from_rpc(caught.value).reason is reason


async def test_a_root_that_goes_in_the_middle_is_told_as_the_lack_of_one(vllm_config: VllmConfig) -> None:
    async with gateway(vllm_config) as (root, _, channel, _):
        root.endless = itertools.repeat(5)
        asking = asyncio.create_task(ask(channel, TOKENS, max_tokens=2000))
        async with asyncio.timeout(5):
            while not root.requests:  # noqa: ASYNC110 - the call has arrived
                await asyncio.sleep(0.01)
        # 1. Its process ends, as it were.
        await root.server.stop(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asking
    # 2. What was streamed cannot be taken back, so it is the client who may try again.
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert MeshError.from_rpc(caught.value).reason is Reason.NO_DECODE_ROOT


@pytest.mark.parametrize(
    ("code", "reason", "elsewhere"),
    [
        ("UNAVAILABLE", Reason.DRAINING, True),
        ("RESOURCE_EXHAUSTED", Reason.QUEUE_FULL, True),
        ("INTERNAL", Reason.INTERNAL, False),
    ],
)
async def test_a_root_that_cannot_serve_is_not_the_last_word(
    vllm_config: VllmConfig, code: str, reason: Reason, elsewhere: bool
) -> None:
    async with serving_root() as second, gateway(vllm_config, second) as (first, _, channel, _):
        first.refusal = MeshError(grpc.StatusCode[code], reason, "why")
        if elsewhere:
            # 1. The client never hears of a root that is going or full; each is asked once.
            await ask(channel, TOKENS)
            assert (len(first.requests), len(second.requests)) == (1, 1)
            # 2. As the same request.
            assert first.requests[0].request_id == second.requests[0].request_id
        else:
            # 3. A fault may be the request's own: it is not carried from root to root.
            with pytest.raises(grpc.aio.AioRpcError, match="why"):
                await ask(channel, TOKENS)
            assert (len(first.requests), len(second.requests)) == (1, 0)


async def test_a_priority_may_be_a_time_in_milliseconds(vllm_config: VllmConfig) -> None:
    async with gateway(vllm_config) as (root, client, _, _):
        await read(client.generate(PROMPT, SamplingParams(max_tokens=2), "soon", priority=1_800_000_000_000))
    assert [request.priority for request in root.requests] == [1_800_000_000_000]


async def test_vllms_gauges_of_load_are_the_meshs(vllm_config: VllmConfig) -> None:
    async with gateway(vllm_config) as (root, client, _, _):
        root.load = decode_pb2.GetLoadResponse(blocks_total=100, blocks_free=75)
        root.endless = itertools.repeat(5)
        stream = client.generate(PROMPT, SamplingParams(max_tokens=2000), "long")
        await anext(stream)
        entry = client._router.entry
        async with asyncio.timeout(5):
            while not entry.kv_usage():  # noqa: ASYNC110 - polls alone notice
                await asyncio.sleep(0.01)
        # 1. What autoscalers and routers read, of a gateway as of an engine.
        shown = {
            sample.name: sample.value
            for family in REGISTRY.collect()
            if family.name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
            for sample in family.samples
        }
        assert shown == {
            "vllm:num_requests_running": 1,
            "vllm:num_requests_waiting": 0,
            "vllm:kv_cache_usage_perc": 0.25,
        }
        await client.abort("long")
        await stream.aclose()


@pytest.mark.parametrize(
    ("code", "reason", "asked"),
    [
        # 1. It may be the request that roots die of: not all of them.
        ("UNAVAILABLE", Reason.ENGINE_DEAD, 2),
        # 2. As gRPC says of a connection that broke, and of a message that is too large.
        ("UNAVAILABLE", None, 2),
        ("RESOURCE_EXHAUSTED", None, 1),
        # 3. Roots that are full are all asked.
        ("RESOURCE_EXHAUSTED", Reason.QUEUE_FULL, 4),
    ],
)
async def test_a_request_is_not_carried_from_root_to_root_for_ever(
    vllm_config: VllmConfig, code: str, reason: Reason | None, asked: int
) -> None:
    async with (
        serving_root() as second,
        serving_root() as third,
        serving_root() as fourth,
        gateway(vllm_config, second, third, fourth) as (first, _, channel, _),
    ):
        roots = (first, second, third, fourth)
        for root in roots:
            root.refusal = MeshError(grpc.StatusCode[code], reason or Reason.INTERNAL, "why")
        with pytest.raises(grpc.aio.AioRpcError, match="why"):
            await ask(channel, TOKENS)
    assert sum(len(root.requests) for root in roots) == asked


async def test_what_a_client_has_read_of_is_not_begun_anew_elsewhere(vllm_config: VllmConfig) -> None:
    async with serving_root() as second, gateway(vllm_config, second) as (first, client, _, requests):
        first.endless = itertools.repeat(5)
        # 1. The client has a token when the root's process ends, as it were.
        stream = client.generate(PROMPT, SamplingParams(max_tokens=2000), "cut")
        await anext(stream)
        await first.server.stop(0)
        # 2. Another root would begin again, and perhaps sample something else: only the client can.
        with pytest.raises(GracefulHTTPError) as caught:
            await asyncio.wait_for(read(stream), 5)
        assert caught.value.http_status == 503
        assert (len(first.requests), len(second.requests)) == (1, 0)
        assert requests.outcomes == {"failed": 1}


async def test_a_request_that_lives_too_long_is_ended_everywhere(vllm_config: VllmConfig) -> None:
    async with serving_root() as second, gateway(vllm_config, second, request_timeout_s=0.3) as running:
        running.root.endless = itertools.repeat(5)
        # 1. 504 over REST, ...
        stream = running.client.generate(PROMPT, SamplingParams(max_tokens=2000), "long")
        with pytest.raises(GracefulHTTPError) as told:
            await asyncio.wait_for(read(stream), 5)
        assert told.value.http_status == 504
        # 2. ... and over gRPC its like, long before the client's own deadline.
        begun = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(running.channel, TOKENS, max_tokens=2000)
        assert time.monotonic() - begun < 5
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert MeshError.from_rpc(caught.value).reason is Reason.DEADLINE_EXCEEDED
        # 3. Nothing of them goes on, and no other root begins.
        async with asyncio.timeout(5):
            while running.root.serving:  # noqa: ASYNC110 - the root notices by itself
                await asyncio.sleep(0.01)
        assert not len(running.requests)
        assert not second.requests


async def test_a_request_that_goes_from_root_to_root_lives_no_longer(vllm_config: VllmConfig) -> None:
    # 1. The first root keeps it for a while before it refuses, the second one for as long as it may.
    async with serving_root() as second, gateway(vllm_config, second, request_timeout_s=1.0) as running:
        running.root.refusal = MeshError(grpc.StatusCode.UNAVAILABLE, Reason.DRAINING, "as told")
        running.root.before = 0.7
        second.before = 5.0
        begun = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(running.channel, TOKENS)
        # 2. Together they had what one would have had.
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(second.requests) == 1
        assert time.monotonic() - begun < 1.5


async def test_who_is_not_let_in_is_told_before_a_stream_begins(vllm_config: VllmConfig) -> None:
    async with gateway(vllm_config) as running:
        # 1. More choices than the gateway takes now; more than it ever takes are not for a queue to refuse.
        running.client.check_admission(10)
        with running.requests.admit(LiveRequest("live")), pytest.raises(GracefulHTTPError) as told:
            running.client.check_admission(10)
        assert told.value.http_status == 429
        running.client.check_admission(11)
        await running.client.check_health()
        # 2. A gateway that drains is not healthy: nobody should send it anything.
        running.requests.draining = True
        with pytest.raises(GracefulHTTPError) as told:
            running.client.check_admission()
        assert told.value.http_status == 503
        with pytest.raises(EngineDeadError):
            await running.client.check_health()
        # 3. gRPC clients hear the reason.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(running.channel, TOKENS)
        assert MeshError.from_rpc(caught.value).reason is Reason.DRAINING
        assert not running.root.requests


async def test_a_gateway_that_reads_no_outputs_is_not_healthy(vllm_config: VllmConfig) -> None:
    async with gateway(vllm_config) as running:
        await ask(running.channel, TOKENS)
        await running.client.check_health()
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, stop.set)
        await asyncio.wait_for(running.client.serve_until(stop), 5)
        # 1. What hands outputs to requests has ended, for a fault in what it calls.
        handler = running.client.output_handler
        assert handler is not None
        handler.cancel()
        await asyncio.wait([handler])
        with pytest.raises(EngineDeadError):
            await running.client.check_health()
        # 2. Requests are refused with the reason, and wait for nothing.
        with pytest.raises(GracefulHTTPError) as told:
            running.client.check_admission()
        assert told.value.http_status == 503
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(running.channel, TOKENS)
        assert MeshError.from_rpc(caught.value).reason is Reason.ENGINE_DEAD
        # 3. The service ends, so that it is started anew.
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(running.client.serve_until(asyncio.Event()), 5)


async def test_a_chat_goes_through_the_template_that_is_configured(vllm_config: VllmConfig) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    async with gateway(vllm_config, chat_template=template) as (root, client, channel, _):
        await ask(channel, CHAT)
        assert list(root.requests[0].prompt_token_ids) == client.renderer.tokenizer.encode("Hello there")


async def test_a_chat_that_the_template_refuses_is_the_clients_fault(vllm_config: VllmConfig) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    async with gateway(vllm_config, chat_template=template) as (root, _, channel, _):
        with pytest.raises(grpc.aio.AioRpcError, match="roles must alternate") as caught:
            await ask(channel, CHAT)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not root.requests


async def test_a_refused_request_of_several_choices_leaves_nothing(vllm_config: VllmConfig) -> None:
    async with gateway(vllm_config) as (root, client, _, _):
        root.refusal = MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL, "full")
        for number in range(3):
            with pytest.raises(GracefulHTTPError):
                async for _ in client.generate(PROMPT, SamplingParams(n=2, max_tokens=2), f"r-{number}"):
                    pass
        # 1. Neither sequences nor what holds them together.
        assert not client.output_processor.request_states
        assert not client.output_processor.parent_requests


async def test_choices_of_one_request_are_sent_one_by_one(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, turn, written = mesh_core._message, 0, list[int]()
    monkeypatch.setattr(mesh_core, "_message", lambda *of: written.append(turn) or message(*of))

    async def others() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async with gateway(vllm_config) as (root, client, _, _):
        ticking = asyncio.create_task(others())
        await read(client.generate(PROMPT, SamplingParams(max_tokens=2, n=6), "many"))
        ticking.cancel()
    # Each has its prompt to send, which takes time if it is long: whoever else has something to do comes in between.
    assert len(root.requests) == 6
    assert len(set(written)) == 6


async def test_a_stop_string_is_an_answer_and_no_abort(vllm_config: VllmConfig) -> None:
    async with gateway(vllm_config) as (root, client, _, requests):
        tokens = client.renderer.tokenizer.encode(" one two three")
        root.endless = itertools.cycle(tokens)
        # 1. The gateway finds the stop string, and cancels what the root would go on with.
        params = SamplingParams(max_tokens=500, stop=["three"], output_kind=RequestOutputKind.FINAL_ONLY)
        outputs = [output async for output in client.generate(PROMPT, params, "stops")]
        assert outputs[-1].outputs[0].finish_reason == "stop"
        # 2. A client that goes is another matter.
        stream = client.generate(PROMPT, SamplingParams(max_tokens=500), "leaves")
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(5):
            while len(requests):  # noqa: ASYNC110 - tasks end by themselves
                await asyncio.sleep(0.01)
        assert requests.outcomes == {"finished": 1, "aborted": 1}


async def test_what_a_root_must_know_of_thinking_reaches_it(vllm_config: VllmConfig) -> None:
    async with gateway(vllm_config) as (root, client, _, _):
        # 1. vLLM's chat endpoint says so of a request if there is a reasoning parser, and not otherwise.
        told = {"chat_template_kwargs": {"enable_thinking": False}}
        for number, extra in enumerate(({}, {"reasoning_ended": True, "reasoning_parser_kwargs": told})):
            async for _ in client.generate(PROMPT, SamplingParams(max_tokens=1), f"r-{number}", **extra):
                pass
        plain, thinking = root.requests
    assert not plain.HasField("reasoning_ended")
    assert not plain.HasField("reasoning_parser_kwargs")
    assert thinking.reasoning_ended
    assert thinking.reasoning_parser_kwargs["chat_template_kwargs"]["enable_thinking"] is False


def test_the_root_parses_thinking_as_the_gateway_does() -> None:
    mesh = MeshConfig(gateway={"reasoning_parser": "qwen3"})
    assert engine_args(mesh, mesh.decode_service, "m").reasoning_parser == "qwen3"
    # 1. A prefill service samples nothing that is served.
    assert engine_args(mesh, mesh.prefill_service, "m").reasoning_parser == ""


@pytest.mark.parametrize("more", ["mm_features", "prompt_embeds", "lora_request"])
def test_a_prompt_of_more_than_tokens_is_refused(more: str) -> None:
    request: Any = SimpleNamespace(mm_features=None, prompt_embeds=None, lora_request=None)
    _check_text_only(request)
    setattr(request, more, ["something"])
    with pytest.raises(MeshError, match="not supported") as caught:
        _check_text_only(request)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
