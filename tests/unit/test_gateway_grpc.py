"""The gRPC front over a decode root that only says what roots would say: prompts, ids, log-probabilities."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
from vllm.config import VllmConfig

from tests.unit.small_gateway import TOKENS, ask, gateway
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2


async def test_a_text_that_cannot_fit_is_not_cut_into_tokens(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(vllm_config) as running:
        tokenizer = running.client.renderer.tokenizer
        assert tokenizer is not None
        most = 4096 * tokenizer.max_chars_per_token
        for name in ("encode", "apply_chat_template"):
            monkeypatch.setattr(tokenizer, name, None)
        message = inference_pb2.ChatMessage(role="user", content="a" * (most + 1))
        for prompt, param in (
            (inference_pb2.Prompt(text="a" * (most + 1)), "prompt.text"),
            (inference_pb2.Prompt(chat=inference_pb2.Conversation(messages=[message])), "prompt.chat"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(running.channel, prompt)
            error = MeshError.from_rpc(caught.value)
            assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.PROMPT_TOO_LONG)
            assert error.metadata == {"param": param}


async def test_chats_have_what_the_mesh_file_says_of_templates(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs = {"enable_thinking": False}
    async with gateway(vllm_config, server_args={"default_chat_template_kwargs": kwargs}) as running:
        seen = list[dict[str, Any]]()
        tokenizer: Any = running.client.renderer.tokenizer
        monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_, **given: seen.append(given) or [1, 2])
        message = inference_pb2.ChatMessage(role="user", content="Hello")
        await ask(running.channel, inference_pb2.Prompt(chat=inference_pb2.Conversation(messages=[message])))
    assert [given["enable_thinking"] for given in seen] == [False]


async def test_others_streams_go_on_while_a_text_is_cut_into_tokens(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(vllm_config) as running:
        tokenizer = running.client.renderer.tokenizer
        may_end = threading.Event()

        def encode(_text: str) -> list[int]:
            assert may_end.wait(10)
            return [1, 2, 3]

        monkeypatch.setattr(tokenizer, "encode", encode)
        slow = asyncio.create_task(ask(running.channel, inference_pb2.Prompt(text="slow")))
        await asyncio.wait_for(ask(running.channel, TOKENS), 5)
        assert not slow.done()
        may_end.set()
        await slow


async def test_ids_are_the_clients_in_both_kinds_of_calls(vllm_config: VllmConfig) -> None:
    async with gateway(vllm_config) as running:
        stub = inference_pb2_grpc.InferenceServiceStub(running.channel)
        params = sampling_pb2.SamplingParams(max_tokens=2, ignore_eos=True)

        async def both(given: str, metadata: Any) -> set[str]:
            request = inference_pb2.StreamGenerateRequest(prompt=TOKENS, sampling_params=params, request_id=given)
            whole = inference_pb2.InferenceServiceGenerateRequest(request=request)
            reply = await stub.Generate(whole, metadata=metadata)
            parts = [part async for part in stub.StreamGenerate(request, metadata=metadata)]
            return {part.request_id for part in [*reply.choices, *parts]}

        # 1. As in the message, else as in the metadata.
        assert await both("mine", ()) == {"mine"}
        assert await both("", (("x-request-id", "theirs"),)) == {"theirs"}
        # 2. Roots know sequences by them.
        named = [request.request_id.rpartition("-")[0] for request in running.root.requests]
        assert named == ["mine", "mine", "theirs", "theirs"]
        # 3. One that no header could carry is replaced.
        assert "no\nid" not in await both("no\nid", ())


async def test_log_probabilities_of_the_prompt_reach_grpc_clients(vllm_config: VllmConfig) -> None:
    async with gateway(vllm_config) as running:
        running.root.prompt_logprobs = sampling_pb2.Logprobs(
            width=[0, 2, 2], token_ids=[2, 2, 3, 9], logprobs=[-0.5, -0.5, -2.0, -0.25], ranks=[1, 1, 4, 1]
        )
        params = sampling_pb2.SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=1)
        stub = inference_pb2_grpc.InferenceServiceStub(running.channel)
        # Once for each choice, however their tokens come together.
        running.root.endless = [5, 5, 5]
        params.temperature = 1.0
        for n in (1, 2, 5):
            request = inference_pb2.StreamGenerateRequest(prompt=TOKENS, sampling_params=params, n=n)
            reply = await stub.Generate(inference_pb2.InferenceServiceGenerateRequest(request=request))
            assert [choice.prompt_logprobs for choice in reply.choices] == [running.root.prompt_logprobs] * n
