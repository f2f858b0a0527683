"""Sampling parameters between the wire and vLLM, in both directions and without loss."""

from __future__ import annotations

import json
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from tokenmesh.rpc.errors import Reason, invalid
from tokenmesh.v1 import sampling_pb2

_OPTIONAL = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
_FLAGS = ("ignore_eos", "include_stop_str_in_output")
_LISTS = ("stop_token_ids", "stop", "allowed_token_ids", "bad_words")
_CONSTRAINTS = {"json": "json_schema", "regex": "regex", "grammar": "grammar", "structural_tag": "structural_tag"}


def to_vllm(message: sampling_pb2.SamplingParams, **extra: Any) -> SamplingParams:
    """As vLLM's type; absent fields take vLLM's defaults, except max_tokens, which stays open.

    Raises:
        MeshError: INVALID_ARGUMENT (BAD_SAMPLING_PARAMS) with vLLM's own explanation.
    """
    values: dict[str, Any] = {"max_tokens": None, **extra}
    values.update({f: getattr(message, f) for f in _OPTIONAL if message.HasField(f)})
    values.update({f: True for f in _FLAGS if getattr(message, f)})
    values.update({f: list(getattr(message, f)) for f in _LISTS if getattr(message, f)})
    if message.logit_bias:
        values["logit_bias"] = dict(message.logit_bias)
    try:
        if message.HasField("structured_outputs"):
            values["structured_outputs"] = _structured_to_vllm(message.structured_outputs)
        return SamplingParams(**values)
    except (VLLMClientError, ValueError, TypeError) as error:
        param = getattr(error, "parameter", None) or "sampling_params"
        raise invalid(Reason.BAD_SAMPLING_PARAMS, str(error), param=str(param)) from error


def _structured_to_vllm(message: sampling_pb2.StructuredOutputs) -> StructuredOutputsParams:
    kind = message.WhichOneof("constraint")
    if kind is None:
        raise ValueError("structured_outputs needs a constraint")
    values: dict[str, Any] = {
        "disable_any_whitespace": message.disable_any_whitespace,
        "disable_additional_properties": message.disable_additional_properties,
    }
    if message.HasField("whitespace_pattern"):
        values["whitespace_pattern"] = message.whitespace_pattern
    if kind == "choice":
        values["choice"] = list(message.choice.options)
    elif kind == "json_object":
        values["json_object"] = True
    else:
        values[next(k for k, v in _CONSTRAINTS.items() if v == kind)] = getattr(message, kind)
    return StructuredOutputsParams(**values)


def from_vllm(params: SamplingParams) -> sampling_pb2.SamplingParams:
    """What a decode root must know of a request; stop strings and text options stay in the gateway."""
    message = sampling_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids or (),
        allowed_token_ids=params.allowed_token_ids or (),
        bad_words=params.bad_words or (),
        logit_bias=params.logit_bias or {},
    )
    for field in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
        if getattr(params, field) is not None:
            setattr(message, field, getattr(params, field))
    constraint = params.structured_outputs
    if constraint is not None:
        out = message.structured_outputs
        out.disable_any_whitespace = constraint.disable_any_whitespace
        out.disable_additional_properties = constraint.disable_additional_properties
        if constraint.whitespace_pattern is not None:
            out.whitespace_pattern = constraint.whitespace_pattern
        if constraint.choice is not None:
            out.choice.options.extend(constraint.choice)
        elif constraint.json_object:
            out.json_object = True
        else:
            for ours, theirs in _CONSTRAINTS.items():
                value = getattr(constraint, ours)
                if value is not None:
                    setattr(out, theirs, json.dumps(value) if isinstance(value, dict) else value)
    return message


def tokens_only(params: SamplingParams) -> SamplingParams:
    """Adapts parameters for an engine that yields tokens and arrays of log-probabilities, and no text."""
    params.detokenize = False
    params.flat_logprobs = True
    params.output_kind = RequestOutputKind.DELTA
    return params


def logprobs_to_proto(flat: FlatLogprobs) -> sampling_pb2.Logprobs:
    """Positions of vLLM's flat log-probabilities, in order, the chosen token of each first."""
    message = sampling_pb2.Logprobs()
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        message.width.append(end - start)
        message.token_ids.extend(flat.token_ids[start:end])
        message.logprobs.extend(flat.logprobs[start:end])
        message.ranks.extend(rank or 0 for rank in flat.ranks[start:end])
    return message
