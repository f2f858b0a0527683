"""InferenceService through the generated stubs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.conftest import RunningMesh
from tokenmesh.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

SKY = inference_pb2.Prompt(text="The sky is")
CAPITAL = inference_pb2.Prompt(
    chat=inference_pb2.Conversation(
        messages=[inference_pb2.ChatMessage(role="user", content="What is the capital of France?")]
    )
)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def channel(mesh: RunningMesh) -> Iterator[grpc.Channel]:
    """A channel to the gateway."""
    with grpc.insecure_channel(mesh.grpc_address) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel) -> inference_pb2_grpc.InferenceServiceStub:
    """The service under test."""
    return inference_pb2_grpc.InferenceServiceStub(channel)


def request(
    prompt: inference_pb2.Prompt, n: int = 0, model: str = "", request_id: str = "", **params: Any
) -> inference_pb2.StreamGenerateRequest:
    """A greedy request for 5 tokens, unless `params` say otherwise."""
    sampling = sampling_pb2.SamplingParams(**{"temperature": 0, "max_tokens": 5, **params})
    return inference_pb2.StreamGenerateRequest(
        model=model, prompt=prompt, n=n, request_id=request_id, sampling_params=sampling
    )


def generate(
    stub: inference_pb2_grpc.InferenceServiceStub, *args: Any, **kwargs: Any
) -> Sequence[inference_pb2.StreamGenerateResponse]:
    """Calls Generate with `request(...)`; returns the choices."""
    whole = inference_pb2.InferenceServiceGenerateRequest(request=request(*args, **kwargs))
    choices: Sequence[inference_pb2.StreamGenerateResponse] = stub.Generate(whole, timeout=60).choices
    return choices


def test_generate_from_text(stub: inference_pb2_grpc.InferenceServiceStub, mesh: RunningMesh) -> None:
    # (1) One choice with text, tokens and usage; the served model's name is accepted.
    (choice,) = generate(stub, SKY, model=mesh.config.model_name, request_id="text-1")
    assert choice.request_id == "text-1"
    assert choice.index == 0
    assert choice.text
    assert len(choice.token_ids) == 5
    assert choice.finish_reason == sampling_pb2.FINISH_REASON_LENGTH
    assert (choice.usage.prompt_tokens, choice.usage.completion_tokens) == (3, 5)
    assert not choice.HasField("logprobs")
    assert not choice.HasField("stop_string")

    # (2) Without a request id the gateway makes one.
    assert generate(stub, SKY)[0].request_id


def test_token_ids_are_the_text(stub: inference_pb2_grpc.InferenceServiceStub, mesh: RunningMesh) -> None:
    # (1) The prompt's tokens, from the gateway's tokenizer.
    body = {"model": mesh.config.model_name, "prompt": SKY.text}
    ids = httpx.post(f"{mesh.rest_url}/tokenize", json=body).raise_for_status().json()["tokens"]

    # (2) Tokens or text: the same answer.
    prompt = inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=ids))
    assert generate(stub, prompt)[0].token_ids == generate(stub, SKY)[0].token_ids


def test_generate_from_chat(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    # The chat template was applied: the answer is the assistant's, and ends by itself.
    (choice,) = generate(stub, CAPITAL, max_tokens=12)
    assert choice.text == "The capital of France is Paris."
    assert choice.finish_reason == sampling_pb2.FINISH_REASON_STOP
    assert not choice.HasField("stop_string")


def test_stream_equals_generate(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    # (1) Whole.
    (whole,) = generate(stub, SKY, logprobs=1)

    # (2) The same, streamed.
    parts = list(stub.StreamGenerate(request(SKY, logprobs=1), timeout=60))
    assert len(parts) >= 4
    assert "".join(part.text for part in parts) == whole.text
    assert [i for part in parts for i in part.token_ids] == list(whole.token_ids)
    assert [i for part in parts for i in part.logprobs.token_ids] == list(whole.logprobs.token_ids)

    # (3) Finish reason and usage come once, at the end.
    assert not any(part.HasField("finish_reason") or part.HasField("usage") for part in parts[:-1])
    assert parts[-1].finish_reason == whole.finish_reason
    assert parts[-1].usage.completion_tokens == 5


def test_two_choices(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    # (1) Both choices, streamed under their index.
    params: dict[str, Any] = {"n": 2, "temperature": 0.9, "seed": 5, "max_tokens": 6, "ignore_eos": True}
    texts, tokens, finished = ["", ""], [0, 0], [0, 0]
    for part in stub.StreamGenerate(request(SKY, **params), timeout=60):
        texts[part.index] += part.text
        tokens[part.index] += len(part.token_ids)
        finished[part.index] += part.HasField("finish_reason")
    assert tokens == [6, 6]
    assert finished == [1, 1]
    assert texts[0] != texts[1]

    # (2) Whole: the same choices, in order.
    choices = generate(stub, SKY, **params)
    assert [choice.index for choice in choices] == [0, 1]
    assert [choice.text for choice in choices] == texts
    assert [choice.usage.completion_tokens for choice in choices] == [6, 6]


def test_logprobs_are_parallel_arrays(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    # (1) Two alternatives a token: one row a token, and arrays that the widths cut up exactly.
    (choice,) = generate(stub, SKY, logprobs=2)
    logprobs = choice.logprobs
    assert len(logprobs.width) == len(choice.token_ids) == 5
    total = sum(logprobs.width)
    assert len(logprobs.token_ids) == len(logprobs.logprobs) == len(logprobs.ranks) == total
    assert all(math.isfinite(value) and value <= 0 for value in logprobs.logprobs)

    # (2) The chosen token comes first, and greedy means that it is the likeliest.
    start = 0
    for token, width in zip(choice.token_ids, logprobs.width, strict=True):
        assert width >= 2
        assert logprobs.token_ids[start] == token
        assert logprobs.ranks[start] == 1
        assert logprobs.logprobs[start] == max(logprobs.logprobs[start : start + width])
        start += width


def test_stop_string(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    # (1) The text ends before it, and the match is named.
    (choice,) = generate(stub, CAPITAL, max_tokens=12, stop=["Paris", "France"])
    assert choice.text == "The capital of "
    assert choice.finish_reason == sampling_pb2.FINISH_REASON_STOP
    assert choice.stop_string == "France"

    # (2) It stays in the text if asked for.
    (choice,) = generate(stub, CAPITAL, max_tokens=12, stop=["France"], include_stop_str_in_output=True)
    assert choice.text == "The capital of France"


def test_json_schema(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    constraint = sampling_pb2.StructuredOutputs(json_schema=json.dumps(PERSON))
    (choice,) = generate(stub, CAPITAL, max_tokens=48, structured_outputs=constraint)
    assert choice.finish_reason == sampling_pb2.FINISH_REASON_STOP
    jsonschema.validate(json.loads(choice.text), PERSON)


def test_regex_and_choice(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    # (1) A pattern.
    (choice,) = generate(stub, SKY, structured_outputs=sampling_pb2.StructuredOutputs(regex="[0-9]{2}"))
    assert len(choice.text) == 2
    assert choice.text.isdigit()

    # (2) A closed list.
    options = sampling_pb2.StructuredOutputs.Choice(options=["green", "violet"])
    (choice,) = generate(stub, SKY, structured_outputs=sampling_pb2.StructuredOutputs(choice=options))
    assert choice.text in options.options


def test_tokens_equal_rest(stub: inference_pb2_grpc.InferenceServiceStub, mesh: RunningMesh) -> None:
    # (1) Text.
    def rest(path: str, **body: Any) -> dict[str, Any]:
        body |= {"model": mesh.config.model_name, "temperature": 0, "max_tokens": 8, "return_token_ids": True}
        response = httpx.post(f"{mesh.rest_url}/v1/{path}", json=body, timeout=60).raise_for_status()
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    (choice,) = generate(stub, SKY, max_tokens=8)
    other = rest("completions", prompt=SKY.text)
    assert (list(choice.token_ids), choice.text) == (other["token_ids"], other["text"])

    # (2) A conversation.
    (choice,) = generate(stub, CAPITAL, max_tokens=8)
    other = rest("chat/completions", messages=[{"role": "user", "content": CAPITAL.chat.messages[0].content}])
    assert (list(choice.token_ids), choice.text) == (other["token_ids"], other["message"]["content"])


def test_list_models(stub: inference_pb2_grpc.InferenceServiceStub, mesh: RunningMesh) -> None:
    (model,) = stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5).models
    assert model.id == mesh.config.model_name
    assert model.max_model_len == mesh.config.max_model_len


def test_reflection_describes_the_service(channel: grpc.Channel) -> None:
    # (1) The services are listed.
    database = ProtoReflectionDescriptorDatabase(channel)
    services = set(database.get_services())
    assert {"tokenmesh.v1.InferenceService", "tokenmesh.v1.AdminService", "grpc.health.v1.Health"} <= services

    # (2) And described well enough to call them.
    service = DescriptorPool(database).FindServiceByName("tokenmesh.v1.InferenceService")
    assert {method.name for method in service.methods} == {"StreamGenerate", "Generate", "ListModels"}


def test_health_is_serving(channel: grpc.Channel) -> None:
    # (1) The whole and the service.
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", "tokenmesh.v1.InferenceService"):
        reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING

    # (2) What is not there has no health.
    with pytest.raises(grpc.RpcError) as error:
        stub.Check(health_pb2.HealthCheckRequest(service="tokenmesh.v1.DecodeService"), timeout=5)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
