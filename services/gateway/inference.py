"""InferenceService: the same front end for gRPC clients."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import grpc
from jinja2 import TemplateError
from vllm import TextPrompt, TokensPrompt
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers.chat_utils import load_chat_template
from vllm.sampling_params import RequestOutputKind, SamplingParams

from services.gateway.engine_client import MeshEngineClient
from services.gateway.keys import Keys
from tokenmesh.config import GatewayConfig
from tokenmesh.context import current
from tokenmesh.engine.sampling import bad_params, logprobs_to_proto, to_vllm
from tokenmesh.prompts import check_prompt
from tokenmesh.rpc.errors import MeshError, Reason, invalid, unavailable
from tokenmesh.rpc.server import Context
from tokenmesh.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

_FINISH = {
    "stop": sampling_pb2.FINISH_REASON_STOP,
    "length": sampling_pb2.FINISH_REASON_LENGTH,
    "abort": sampling_pb2.FINISH_REASON_ABORT,
    "error": sampling_pb2.FINISH_REASON_ERROR,
    "repetition": sampling_pb2.FINISH_REASON_REPETITION,
}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """See inference.proto."""

    def __init__(self, config: GatewayConfig, model_name: str) -> None:
        self._keys = Keys.of_clients(config)
        self._chat_template = load_chat_template(config.chat_template)
        # As over REST; a mesh file may turn thinking off with it.
        self._template_kwargs: dict[str, Any] = config.server_args.get("default_chat_template_kwargs") or {}
        self._model_name = model_name
        self._client: MeshEngineClient | None = None
        # One: vLLM keeps two copies of a tokenizer that is used by threads, and copies it for each one more.
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")

    def attach(self, client: MeshEngineClient) -> None:
        """Gives the service its front end."""
        self._client = client

    def _admit(self, model: str, context: Context[Any, Any]) -> MeshEngineClient:
        self._keys.check(context)
        if model not in ("", self._model_name):
            raise MeshError(
                grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, f"the model {model!r} is not served", param="model"
            )
        if self._client is None:
            raise unavailable(Reason.DRAINING, "the gateway is still starting")
        return self._client

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context[Any, Any]
    ) -> inference_pb2.ListModelsResponse:
        """See inference.proto."""
        client = self._admit("", context)
        model = inference_pb2.Model(id=self._model_name, max_model_len=client.model_config.max_model_len)
        return inference_pb2.ListModelsResponse(models=[model])

    async def Generate(
        self, request: inference_pb2.InferenceServiceGenerateRequest, context: Context[Any, Any]
    ) -> inference_pb2.InferenceServiceGenerateResponse:
        """See inference.proto."""
        choices: dict[int, inference_pb2.StreamGenerateResponse] = {}
        async for part in self.StreamGenerate(request.request, context):
            if part.index not in choices:
                choices[part.index] = part
                continue
            whole = choices[part.index]
            text = whole.text + part.text
            whole.MergeFrom(part)
            whole.text = text
        return inference_pb2.InferenceServiceGenerateResponse(choices=[choices[i] for i in sorted(choices)])

    async def StreamGenerate(
        self, request: inference_pb2.StreamGenerateRequest, context: Context[Any, Any]
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        """See inference.proto."""
        client = self._admit(request.model, context)
        params = to_vllm(
            request.sampling_params,
            n=request.n or 1,
            output_kind=RequestOutputKind.DELTA,
            flat_logprobs=True,
        )
        # The server has replaced one that no header could carry, as over REST; every response names the one in use.
        work = current()
        assert work is not None
        request_id = work.request_id
        counts: dict[int, int] = {}
        of_prompt: sampling_pb2.Logprobs | None = None
        try:
            client.check_admission(params.n)
            prompt = await self._prompt(client, request.prompt, params)
            # Nothing here takes thinking and answers apart, so a constraint holds from the first token on.
            async with aclosing(client.generate(prompt, params, request_id, reasoning_ended=True)) as outputs:
                async for output in outputs:
                    # The choices have one prompt; vLLM joins their outputs, and keeps the first one's list.
                    if of_prompt is None and output.prompt_logprobs:
                        of_prompt = logprobs_to_proto(output.prompt_logprobs)
                    for completion in output.outputs:
                        first = completion.index not in counts
                        counts[completion.index] = counts.get(completion.index, 0) + len(completion.token_ids)
                        response = _response(request_id, output, completion, counts[completion.index])
                        if first and of_prompt is not None:
                            response.prompt_logprobs.CopyFrom(of_prompt)
                        yield response
        except VLLMClientError as error:
            if isinstance(error.__cause__, MeshError):
                raise error.__cause__ from error
            raise bad_params(error) from error
        except GracefulHTTPError as error:
            if isinstance(error.__cause__, MeshError):
                raise error.__cause__ from error
            code = grpc.StatusCode.RESOURCE_EXHAUSTED if error.http_status == 429 else grpc.StatusCode.UNAVAILABLE
            reason = Reason.QUEUE_FULL if error.http_status == 429 else Reason.NO_DECODE_ROOT
            raise MeshError(code, reason, error.message) from error

    async def _beside(self, call: Callable[..., list[int]], *args: Any, **kwargs: Any) -> list[int]:
        """Calls a tokenizer beside the event loop, which others' streams need."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, functools.partial(call, *args, **kwargs))

    async def _prompt(
        self, client: MeshEngineClient, prompt: inference_pb2.Prompt, params: SamplingParams
    ) -> TokensPrompt | TextPrompt:
        kind = prompt.WhichOneof("prompt")
        tokenizer = client.renderer.tokenizer
        assert tokenizer is not None
        if kind == "token_ids":
            ids = list(prompt.token_ids.ids)
        elif kind == "text":
            _check_length(len(prompt.text), client, "prompt.text")
            ids = await self._beside(tokenizer.encode, prompt.text)
        elif kind == "chat" and prompt.chat.messages:
            _check_length(sum(len(m.content) for m in prompt.chat.messages), client, "prompt.chat")
            messages = [{"role": m.role, "content": m.content} for m in prompt.chat.messages]
            try:
                ids = await self._beside(
                    tokenizer.apply_chat_template,
                    messages,
                    chat_template=self._chat_template,
                    add_generation_prompt=True,
                    return_dict=False,
                    **self._template_kwargs,
                )
            except (TemplateError, ValueError) as error:
                # Templates refuse conversations that their model has not been trained on.
                raise invalid(Reason.BAD_REQUEST, f"chat template: {error}", param="prompt.chat") from error
        else:
            raise invalid(Reason.EMPTY_PROMPT, "a prompt is needed: text, token_ids or chat", param="prompt")
        model = client.model_config
        check_prompt(ids, model.get_vocab_size(), model.max_model_len, room=params.max_tokens or 1)
        return TokensPrompt(prompt_token_ids=ids)


def _check_length(characters: int, client: MeshEngineClient, param: str) -> None:
    """Refuses a text that cannot fit, before it is cut into tokens. Raises MeshError INVALID_ARGUMENT."""
    assert client.renderer.tokenizer is not None
    most = client.model_config.max_model_len * client.renderer.tokenizer.max_chars_per_token
    if characters > most:
        message = f"the prompt has {characters} characters; no more than {most} can fit"
        raise invalid(Reason.PROMPT_TOO_LONG, message, param=param)


def _response(
    request_id: str, output: RequestOutput, completion: CompletionOutput, generated: int
) -> inference_pb2.StreamGenerateResponse:
    response = inference_pb2.StreamGenerateResponse(
        request_id=request_id, index=completion.index, text=completion.text, token_ids=completion.token_ids
    )
    if completion.logprobs is not None:
        response.logprobs.CopyFrom(logprobs_to_proto(completion.logprobs))
    if completion.finish_reason is not None:
        response.finish_reason = _FINISH[completion.finish_reason]
        if isinstance(completion.stop_reason, str):
            response.stop_string = completion.stop_reason
        response.usage.prompt_tokens = len(output.prompt_token_ids or ())
        response.usage.completion_tokens = generated
        response.usage.cached_tokens = output.num_cached_tokens or 0
    return response
