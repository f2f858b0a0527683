"""The OpenAI SDK, unmodified, against the gateway."""

from __future__ import annotations

import json
import math
import secrets
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.conftest import RunningMesh

CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
LONG = [1000 + i for i in range(300)]
"""Two whole blocks of 128 tokens and a part; more than remote_prefill_min_tokens."""

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "population": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "London"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_chat(client: openai.OpenAI, model: str) -> None:
    # (1) The greedy answer of this model is known.
    answer = client.chat.completions.create(model=model, messages=CAPITAL, max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "The capital of France is Paris."
    assert choice.finish_reason == "stop"

    # (2) Usage adds up.
    assert answer.model == model
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_responses(client: openai.OpenAI, model: str) -> None:
    ask: dict[str, Any] = {"model": model, "input": CAPITAL[0]["content"], "max_output_tokens": 12, "temperature": 0}
    # (1) The same answer as a chat's, and its usage.
    answer = client.responses.create(**ask)
    assert (answer.status, answer.output_text) == ("completed", "The capital of France is Paris.")
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (8, answer.usage.input_tokens + 8)
    # (2) Streamed.
    events = list(client.responses.create(**ask, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text
    assert events[-1].type == "response.completed"
    # (3) What does not fit is refused as elsewhere.
    with pytest.raises(openai.BadRequestError):
        client.responses.create(**{**ask, "max_output_tokens": -1})


def test_completion(client: openai.OpenAI, model: str) -> None:
    # (1) Two prompts in one request give two answers in order, each the answer to its prompt alone.
    prompts = ["Once upon", "The sky is"]
    together = client.completions.create(model=model, prompt=prompts, max_tokens=3, temperature=0)
    assert [choice.index for choice in together.choices] == [0, 1]
    for prompt, choice in zip(prompts, together.choices, strict=True):
        alone = client.completions.create(model=model, prompt=prompt, max_tokens=3, temperature=0)
        assert choice.text == alone.choices[0].text
        assert choice.text
        assert choice.finish_reason == "length"

    # (2) Usage counts both.
    assert together.usage is not None
    assert together.usage.completion_tokens == 6


def test_chat_stream_equals_the_whole_answer(client: openai.OpenAI, model: str) -> None:
    # (1) The same greedy request, whole and streamed.
    whole = client.chat.completions.create(model=model, messages=CAPITAL, max_tokens=6, temperature=0)
    stream = client.chat.completions.create(
        model=model,
        messages=CAPITAL,
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)

    # (2) The pieces make the whole; tokens come one by one, not in one lump.
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in pieces) >= 4
    assert chunks[0].choices[0].delta.role == "assistant"

    # (3) One finish reason, in the last chunk that has a choice.
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length"
    assert not any(reasons[:-1])

    # (4) The last chunk has the usage of the whole and no choice; all chunks share one id.
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 6
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_completion_stream_equals_the_whole_answer(client: openai.OpenAI, model: str) -> None:
    # (1) The same greedy request, whole and streamed.
    whole = client.completions.create(model=model, prompt="The sky is", max_tokens=6, temperature=0)
    stream = client.completions.create(
        model=model,
        prompt="The sky is",
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)

    # (2) The pieces make the whole; the last chunk has the usage.
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) >= 4
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens == 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 6


def test_chat_logprobs(client: openai.OpenAI, model: str) -> None:
    # (1) Greedy, with two alternatives a token.
    answer = client.chat.completions.create(
        model=model, messages=CAPITAL, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 4

    # (2) Each chosen token is the likeliest, numbers are log-probabilities, and the tokens spell the answer.
    for position in logprobs.content:
        assert len(position.top_logprobs) == 2
        assert all(math.isfinite(top.logprob) and top.logprob <= 0 for top in position.top_logprobs)
        first, second = position.top_logprobs
        assert (position.token, position.logprob) == (first.token, first.logprob)
        assert first.logprob >= second.logprob
        assert sum(math.exp(top.logprob) for top in position.top_logprobs) <= 1 + 1e-5
    assert "".join(position.token for position in logprobs.content) == answer.choices[0].message.content


def test_streamed_logprobs_equal_the_whole_ones(client: openai.OpenAI, model: str) -> None:
    # (1) Whole.
    whole = client.completions.create(model=model, prompt="The sky is", max_tokens=4, temperature=0, logprobs=1)
    expected = whole.choices[0].logprobs
    assert expected is not None

    # (2) Streamed, the same tokens with the same numbers.
    stream = client.completions.create(
        model=model, prompt="The sky is", max_tokens=4, temperature=0, logprobs=1, stream=True
    )
    parts = [chunk.choices[0].logprobs for chunk in stream if chunk.choices]
    assert [token for part in parts if part for token in part.tokens or ()] == expected.tokens
    values = [value for part in parts if part for value in part.token_logprobs or ()]
    assert values == pytest.approx(expected.token_logprobs, abs=1e-4)


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI, model: str) -> None:
    # (1) The prompt comes back before the answer.
    answer = client.completions.create(
        model=model, prompt="The sky is blue", max_tokens=2, temperature=0, logprobs=1, echo=True
    )
    (choice,) = answer.choices
    assert choice.text.startswith("The sky is blue")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.tokens[:4] == ["The", " sky", " is", " blue"]
    assert len(choice.logprobs.tokens) == 6

    # (2) The first token has no probability, all others have one.
    first, *others = choice.logprobs.token_logprobs
    assert first is None
    assert all(value is not None and math.isfinite(value) and value <= 0 for value in others)

    # (3) Offsets point at the tokens in the text.
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset or (), strict=True):
        assert choice.text[offset : offset + len(token)] == token


def test_echo_of_one_token_has_no_probability(client: openai.OpenAI, model: str) -> None:
    # (1) Nothing stands before the only token of the prompt, so nothing predicts it.
    answer = client.completions.create(model=model, prompt=[2050], max_tokens=1, temperature=0, logprobs=1, echo=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    first, second = logprobs.token_logprobs or ()

    # (2) The generated one has its own.
    assert first is None
    assert second is not None
    assert second <= 0


def test_two_choices(client: openai.OpenAI, model: str) -> None:
    # (1) Two different answers to one seeded request.
    def ask() -> ChatCompletion:
        return client.chat.completions.create(model=model, messages=CAPITAL, max_tokens=8, temperature=0.8, seed=5, n=2)

    answer = ask()
    assert [choice.index for choice in answer.choices] == [0, 1]
    texts = [choice.message.content for choice in answer.choices]
    assert all(texts)
    assert texts[0] != texts[1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16

    # (2) The seed fixes both.
    assert [choice.message.content for choice in ask().choices] == texts


def test_seed(client: openai.OpenAI, model: str) -> None:
    # (1) At temperature 1, one seed gives one text.
    def ask(seed: int) -> str:
        answer = client.completions.create(model=model, prompt="Once upon", max_tokens=8, temperature=1, seed=seed)
        return answer.choices[0].text

    assert ask(7) == ask(7)

    # (2) Other seeds give others.
    assert len({ask(seed) for seed in (7, 8, 9)}) > 1


def test_seed_of_a_prompt_that_the_root_computes_in_two_steps(client: openai.OpenAI, model: str) -> None:
    # (1) Log-probabilities of the prompt keep it on the root, whose steps are shorter than it.
    def ask() -> str:
        extra = {"prompt_logprobs": 1}
        answer = client.completions.create(
            model=model, prompt=LONG, max_tokens=8, temperature=1, seed=5, extra_body=extra
        )
        assert len((answer.choices[0].model_extra or {})["prompt_logprobs"]) == len(LONG)
        return answer.choices[0].text

    # (2) Nothing is drawn for its first part, on which an engine on CPUs would have died.
    assert ask() == ask()


def test_stop_string(client: openai.OpenAI, model: str) -> None:
    # (1) Without it the text is known to contain it.
    answer = client.chat.completions.create(
        model=model, messages=CAPITAL, max_tokens=12, temperature=0, stop=["France"]
    )
    (choice,) = answer.choices
    assert choice.message.content == "The capital of "
    assert choice.finish_reason == "stop"
    assert choice.model_extra is not None
    assert choice.model_extra["stop_reason"] == "France"

    # (2) Streamed, no part of it slips out, also when it spans two tokens.
    stream = client.chat.completions.create(
        model=model, messages=CAPITAL, max_tokens=12, temperature=0, stop=["al of"], stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "The capit"
    assert chunks[-1].finish_reason == "stop"


def test_json_schema(client: openai.OpenAI, model: str) -> None:
    # (1) The answer follows the schema, though this model would not by itself.
    answer = client.chat.completions.create(
        model=model,
        messages=CAPITAL,
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content or ""), CITY)


def test_tool_call_round_trip(client: openai.OpenAI, model: str) -> None:
    # (1) The named tool is called with arguments that fit its schema.
    messages: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
    asked = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=96,
        temperature=0,
    )
    message = asked.choices[0].message
    assert message.tool_calls is not None, message
    (call,) = message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])

    # (2) With the tool's result the conversation goes on.
    messages += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "21 degrees, sunny"},
    ]
    told = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=[WEATHER],
        max_tokens=8,
        temperature=0,
    )
    assert told.choices[0].message.content
    assert told.usage is not None
    assert asked.usage is not None
    assert told.usage.prompt_tokens > asked.usage.prompt_tokens


def test_logit_bias_forces_a_token(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model,
        prompt="The sky is",
        max_tokens=3,
        temperature=0,
        logit_bias={"2050": 100},
        extra_body={"return_token_ids": True},
    )
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["token_ids"] == [2050] * 3


def test_penalties_stop_repetition(client: openai.OpenAI, model: str) -> None:
    # (1) Left alone the model repeats itself.
    def ask(**penalties: Any) -> list[int]:
        extra = {"return_token_ids": True, **penalties}
        answer = client.completions.create(
            model=model, prompt="red red red red red red", max_tokens=8, temperature=0, extra_body=extra
        )
        ids: list[int] = (answer.choices[0].model_extra or {})["token_ids"]
        return ids

    plain = ask()
    assert len(set(plain)) == 1

    # (2) Each penalty reaches the sampler.
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 1.8}):
        assert len(set(ask(**penalty))) > len(set(plain)), penalty


def test_long_prompt_is_disaggregated_and_then_cached(mesh: RunningMesh, client: openai.OpenAI, model: str) -> None:
    # (1) A salt of its own makes the prompt new to every cache.
    salt = secrets.token_hex(8)

    def ask() -> tuple[str, int]:
        answer = client.completions.create(
            model=model, prompt=LONG, max_tokens=2, temperature=0, extra_body={"cache_salt": salt}
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(LONG)
        details = answer.usage.prompt_tokens_details
        return answer.choices[0].text, (details.cached_tokens if details else None) or 0

    before = mesh.status(mesh.root_address)
    text, cached = ask()
    after = mesh.status(mesh.root_address)

    # (2) The prefill service computed it, and its KV moved: 3 blocks of 30 layers.
    name = "PREFILL_DECISION_DISAGGREGATED"
    assert after.counters[name] - before.counters[name] >= 1
    assert after.kv_transfers - before.kv_transfers >= 1
    assert after.kv_bytes - before.kv_bytes >= 3 * 30 * 3 * 128 * 2 * 64 * 4
    assert cached == 0

    # (3) Once more: the root's own cache has its whole blocks, and the answer is the same.
    again, cached = ask()
    assert again == text
    assert cached == 256
    name = "PREFILL_DECISION_PREFIX_CACHED"
    assert mesh.status(mesh.root_address).counters[name] - before.counters[name] >= 1


def test_models(client: openai.OpenAI, mesh: RunningMesh, model: str) -> None:
    (listed,) = client.models.list().data
    assert listed.id == model
    assert (listed.model_extra or {})["max_model_len"] == mesh.config.max_model_len
