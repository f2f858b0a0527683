"""Sampling parameters and log-probabilities over the wire: what vLLM's front end asked for is what a root computes."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.logprobs import FlatLogprobs, Logprob, append_logprobs_for_next_position
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

from services.gateway.mesh_core import _logprobs, _prompt_logprobs
from tokenmesh.engine.sampling import from_vllm, logprobs_to_proto, to_vllm, tokens_only
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.v1 import sampling_pb2

GATEWAY_ONLY = {"stop", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"}
"""What text needs and tokens do not; a root never sees it."""

FIELDS: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.2,
    "repetition_penalty": 1.1,
    "seed": 42,
    "max_tokens": 100,
    "min_tokens": 3,
    "stop_token_ids": [7, 2],
    "stop": ["a", "b"],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "logprobs": 0,
    "prompt_logprobs": 0,
    "logit_bias": {5: -1.5, 9: 100.0},
    "allowed_token_ids": [1, 2, 3],
    "bad_words": ["x", "y"],
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "structured_outputs": sampling_pb2.StructuredOutputs(regex="a+"),
}
"""A value other than the default for every field of the message."""

ENGINE_ONLY = {
    # Set by the front end or by a root for itself.
    *("n", "flat_logprobs", "detokenize", "output_kind", "stream_interval", "skip_clone", "output_text_buffer_length"),
    "skip_reading_prefix_cache",
    # Not carried by this version.
    *("extra_args", "logprob_token_ids", "prompt_logprob_token_ids", "prompt_logprob_start", "repetition_detection"),
    *("routed_experts_prompt_start", "thinking_token_budget", "trace_decode_token_ids", "watermarking"),
}
"""Fields of vLLM's that the message does not have."""


def message_of(**fields: Any) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(**fields)


def carried(params: SamplingParams) -> SamplingParams:
    """What a root makes of what the gateway sends it, as bytes."""
    return to_vllm(sampling_pb2.SamplingParams.FromString(from_vllm(params).SerializeToString()))


def test_the_table_above_has_every_field_of_the_message() -> None:
    # 1. A new field in sampling.proto must be added to the table, and so passes through the tests below.
    assert set(FIELDS) == set(sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_reaches_vllm_and_the_root(field: str) -> None:
    # 1. A client sets one field; vLLM sees a value that is not its default.
    message = message_of(**{field: FIELDS[field]})
    params = to_vllm(message)
    assert getattr(params, field) != getattr(to_vllm(message_of()), field)
    # 2. The gateway sends it on, unless it is its own business.
    sent = {descriptor.name: value for descriptor, value in from_vllm(params).ListFields()}
    assert (field in sent) == (field not in GATEWAY_ONLY)
    # 3. Unchanged.
    if field in sent:
        assert sent[field] == getattr(message, field)


def test_fields_of_vllm_that_are_not_carried_are_known() -> None:
    # 1. A new version of vLLM may bring new fields: each must be carried or be left out on purpose.
    public = {field for field in SamplingParams.__struct_fields__ if not field.startswith("_")}
    assert public - set(FIELDS) == ENGINE_ONLY


def doubles(low: float, high: float, **bounds: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **bounds)


TOKEN = st.integers(0, 2**32 - 1)
TOKENS = st.lists(TOKEN, max_size=5)
WORDS = st.lists(st.text(min_size=1, max_size=8), max_size=3)
COUNTS = st.none() | st.integers(-1, 2**31 - 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.just(0.0) | doubles(0.01, 2),
    top_p=doubles(0, 1, exclude_min=True),
    top_k=st.integers(-1, 2**31 - 1),
    min_p=doubles(0, 1),
    presence_penalty=doubles(-2, 2),
    frequency_penalty=doubles(-2, 2),
    repetition_penalty=doubles(0, 1e300, exclude_min=True),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    max_tokens=st.none() | st.integers(1000, 2**31 - 1),
    min_tokens=st.integers(0, 1000),
    stop_token_ids=st.none() | TOKENS,
    ignore_eos=st.booleans(),
    logprobs=COUNTS,
    prompt_logprobs=COUNTS,
    logit_bias=st.none() | st.dictionaries(TOKEN, st.floats(allow_nan=False), min_size=1, max_size=4),
    allowed_token_ids=st.none() | TOKENS.filter(bool),
    bad_words=st.none() | WORDS,
)


@settings(max_examples=300, deadline=None)
@given(PARAMS)
def test_parameters_arrive_as_they_were(params: SamplingParams) -> None:
    # 1. Over the wire and back: every field is equal, and doubles to the last bit.
    assert carried(params) == params
    assert carried(params).top_p.hex() == params.top_p.hex()


def test_absent_fields_take_vllms_defaults_except_max_tokens() -> None:
    # 1. Nothing is set; vLLM would stop after 16 tokens, a mesh goes on to the model's length.
    assert to_vllm(message_of()) == SamplingParams(max_tokens=None)


@pytest.mark.parametrize("field", ["temperature", "top_k", "min_p", "presence_penalty", "seed", "logprobs"])
def test_a_zero_that_was_set_is_not_absent(field: str) -> None:
    # 1. Zero may mean something other than the default.
    assert getattr(to_vllm(message_of(**{field: 0})), field) == 0


def test_a_root_asks_its_engine_for_tokens_only() -> None:
    # 1. No text, arrays instead of objects, and only what is new.
    params = tokens_only(to_vllm(message_of(), n=3))
    assert (params.detokenize, params.flat_logprobs, params.output_kind) == (False, True, RequestOutputKind.DELTA)
    # 2. What the caller gave besides the message is kept.
    assert params.n == 3


SCHEMA = {"type": "object", "properties": {"naïve": {"type": "integer"}}}


@pytest.mark.parametrize(
    "kind",
    [
        {"json": json.dumps(SCHEMA)},
        {"json_object": True},
        {"regex": r"\d+ é"},
        {"choice": ["yes", "no", ""]},
        {"grammar": 'root ::= "a"'},
        {"structural_tag": '{"type": "structural_tag"}'},
    ],
    ids=lambda kind: next(iter(kind)),
)
def test_each_kind_of_constraint_arrives(kind: dict[str, Any]) -> None:
    # 1. One constraint.
    params = SamplingParams(max_tokens=None, structured_outputs=StructuredOutputsParams(**kind))
    # 2. It arrives whole.
    assert carried(params) == params


@pytest.mark.parametrize(
    "option", [{"disable_any_whitespace": True}, {"disable_additional_properties": True}, {"whitespace_pattern": " "}]
)
def test_options_that_an_engine_would_ignore_are_refused(option: dict[str, Any]) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True, **option))
    with pytest.raises(MeshError, match=next(iter(option))) as caught:
        from_vllm(params)
    assert caught.value.metadata == {"param": "structured_outputs"}


def test_every_kind_of_the_message_is_known() -> None:
    # 1. A new constraint in sampling.proto must be added to the test above.
    kinds = {field.name for field in sampling_pb2.StructuredOutputs.DESCRIPTOR.oneofs_by_name["constraint"].fields}
    assert kinds == {"json_schema", "json_object", "regex", "choice", "grammar", "structural_tag"}


def test_a_schema_given_as_a_mapping_arrives_as_its_text() -> None:
    # 1. vLLM's server hands over mappings.
    params = carried(SamplingParams(structured_outputs=StructuredOutputsParams(json=SCHEMA)))
    # 2. A root gets JSON text of the same content, which vLLM takes as well.
    assert params.structured_outputs is not None
    assert isinstance(params.structured_outputs.json, str)
    assert json.loads(params.structured_outputs.json) == SCHEMA


def bad(param: str, **fields: Any) -> Any:
    return pytest.param(fields, param, id=str(fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        bad("temperature", temperature=-1),
        bad("temperature", temperature=float("nan")),
        bad("top_p", top_p=0),
        bad("max_tokens", max_tokens=0),
        bad("logprobs", logprobs=-2),
        # vLLM does not say which.
        bad("sampling_params", top_k=-2),
        bad("sampling_params", presence_penalty=3),
        bad("sampling_params", repetition_penalty=0),
        bad("sampling_params", stop=[""]),
        bad("sampling_params", structured_outputs=sampling_pb2.StructuredOutputs()),
    ],
)
def test_a_bad_value_is_refused_with_vllms_words(fields: dict[str, Any], param: str) -> None:
    # 1. A client asks for what cannot be.
    with pytest.raises(MeshError) as caught:
        to_vllm(message_of(**fields))
    # 2. It learns that it is to blame, for what, and why.
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.BAD_SAMPLING_PARAMS)
    assert error.metadata == {"param": param}
    assert error.message
    # 3. The parameter is not said twice.
    assert "(parameter=" not in error.message


def test_json_object_must_be_true() -> None:
    # 1. sampling.proto says so.
    with pytest.raises(MeshError):
        to_vllm(message_of(structured_outputs=sampling_pb2.StructuredOutputs(json_object=False)))


@pytest.mark.parametrize(
    "fields",
    [
        *({"stop_token_ids": [-1]}, {"top_k": 2**31}, {"bad_words": ["\ud800"]}, {"logit_bias": {-1: 1.0}}),
        {"structured_outputs": StructuredOutputsParams(choice=["\ud800"])},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_the_wire_cannot_hold_is_the_clients_fault(fields: dict[str, Any]) -> None:
    # 1. vLLM's REST server takes it, protobuf does not.
    with pytest.raises(MeshError) as caught:
        from_vllm(SamplingParams(**fields))
    # 2. The refusal names the field.
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [caught.value.metadata] == [{"param": field} for field in fields]


def flat(*rows: dict[int, Logprob] | None) -> FlatLogprobs:
    result = FlatLogprobs()
    result.extend(rows)
    return result


def row(chosen: int, rank: int) -> dict[int, Logprob]:
    """A chosen token with its rank, and the two likeliest."""
    return {chosen: Logprob(-float(np.float32(0.1)), rank), 1: Logprob(-0.5, 1), 2: Logprob(float("-inf"), 2)}


def test_positions_of_any_width_are_cut_right() -> None:
    # 1. A position without a distribution, then two of different widths.
    message = logprobs_to_proto(flat(None, row(9, 7), {5: Logprob(-1.5, None)}))
    # 2. The arrays are parallel, and `width` cuts them; a rank that is not known is 0.
    assert list(message.width) == [0, 3, 1]
    assert list(message.token_ids) == [9, 1, 2, 5]
    assert list(message.logprobs) == [-float(np.float32(0.1)), -0.5, float("-inf"), -1.5]
    assert list(message.ranks) == [7, 1, 2, 0]


def test_a_slice_of_a_longer_answer_starts_at_its_own_beginning() -> None:
    # 1. A delta holds the last position of three only.
    message = logprobs_to_proto(flat(row(7, 3), row(8, 4), row(9, 5))[-1:])
    assert (list(message.width), list(message.token_ids), list(message.ranks)) == ([3], [9, 1, 2], [5, 1, 2])


def step(chosen: int, rank: int, likeliest: list[int]) -> RequestOutput:
    """An engine's output of one token, with log-probabilities as vLLM's output processor notes them."""
    found: FlatLogprobs = FlatLogprobs()
    ids = [chosen, *likeliest]
    append_logprobs_for_next_position(found, ids, [-float(i) for i in ids], [""] * len(ids), rank, len(likeliest))
    completion = CompletionOutput(0, "", [chosen], None, found)
    return RequestOutput("r", None, [1], None, [completion], finished=False)


def test_positions_that_were_joined_for_a_reader_who_lags_are_as_wide_as_others() -> None:
    # 1. Tokens within and beyond the two likeliest, as messages of one each and joined into one.
    steps = [(9, 7, [1, 2]), (1, 1, [1, 2]), (2, 2, [1, 2]), (8, 4, [1, 2]), (3, 1, [3, 5])]
    joined, *others = [step(*one) for one in steps]
    for other in others:
        joined.add(other, aggregate=True)
    assert isinstance(joined.outputs[0].logprobs, FlatLogprobs)
    message = logprobs_to_proto(joined.outputs[0].logprobs)
    alone = [logprobs_to_proto(step(*one).outputs[0].logprobs) for one in steps]
    # 2. The same, position by position.
    assert list(message.width) == [3] * 5
    assert list(message.token_ids) == [token for one in alone for token in one.token_ids]
    assert list(message.logprobs) == [value for one in alone for value in one.logprobs]
    # 3. The gateway gets five rows.
    assert _logprobs(message).logprob_token_ids.tolist() == [[chosen, *likeliest] for chosen, _, likeliest in steps]


def test_a_joined_position_of_the_chosen_token_alone() -> None:
    # 1. logprobs: 0, and 1 where the likeliest is chosen.
    for likeliest in ([], [4]):
        joined = step(4, 1, likeliest)
        joined.add(step(4, 1, likeliest), aggregate=True)
        rows = _logprobs(logprobs_to_proto(joined.outputs[0].logprobs)).logprob_token_ids.tolist()
        assert rows == [[4, *likeliest]] * 2


def test_the_gateway_gets_a_samples_arrays_back() -> None:
    # 1. Two positions, the chosen token of each first.
    lists = _logprobs(logprobs_to_proto(flat(row(9, 7), row(8, 4))))
    # 2. Rows as vLLM's engine core has them, to the last bit, and the chosen tokens' ranks.
    assert lists.logprob_token_ids.tolist() == [[9, 1, 2], [8, 1, 2]]
    assert lists.logprobs.dtype == np.float32
    assert lists.logprobs.tolist() == [[-float(np.float32(0.1)), -0.5, float("-inf")]] * 2
    assert lists.sampled_token_ranks.tolist() == [7, 4]


def test_the_gateway_gets_a_prompts_arrays_back() -> None:
    # 1. The first prompt token has no distribution, and so no row.
    tensors = _prompt_logprobs(logprobs_to_proto(flat(None, row(9, 7), row(8, 4))))
    assert tensors.logprob_token_ids.tolist() == [[9, 1, 2], [8, 1, 2]]
    assert tensors.logprobs.tolist() == [[-float(np.float32(0.1)), -0.5, float("-inf")]] * 2
    assert tensors.selected_token_ranks.tolist() == [7, 4]


def test_a_prompt_of_one_token_has_no_rows() -> None:
    # 1. Its only position has no distribution.
    assert _prompt_logprobs(logprobs_to_proto(flat(None))).logprobs.shape[0] == 0


def test_a_last_message_without_tokens_has_no_rows() -> None:
    # 1. vLLM's answer to an abort has no new tokens, and an empty list of log-probabilities.
    assert _logprobs(logprobs_to_proto(flat())).logprobs.shape[0] == 0


@pytest.mark.parametrize(
    "given",
    [
        {"logprob_token_ids": [5], "logprobs": 1},
        {"extra_args": {"anything": 1}},
        {"repetition_detection": RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=1, min_count=3)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_the_message_does_not_have_is_refused(given: dict[str, Any]) -> None:
    # 1. vLLM's server takes it; a root would answer as if it had not been asked.
    field = next(iter(given))
    with pytest.raises(MeshError, match=field) as caught:
        from_vllm(SamplingParams(**given))
    # 2. The client is told which it is.
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.metadata["param"] == field


def test_what_vllms_endpoints_make_of_a_plain_request_is_passed_on() -> None:
    chat = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "hi"}])
    completion = CompletionRequest(model="m", prompt="hi")
    responses = ResponsesRequest(model="m", input="hi")
    off = SamplingParams(
        repetition_detection=RepetitionDetectionParams(max_pattern_size=0), extra_args={}, watermarking=False
    )
    for params in (*(request.to_sampling_params(100, {}) for request in (chat, completion, responses)), off):
        assert from_vllm(params).HasField("temperature")
