"""Sampling parameters between the wire and vLLM, in both directions and without loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from tokenmesh.rpc.errors import MeshError, Reason, invalid
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
_NOT_PER_REQUEST = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
_TEXT_ONLY = ("stop", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens")
_CARRIED = tuple(field for field in (*_OPTIONAL, *_FLAGS, *_LISTS, "logit_bias") if field not in _TEXT_ONLY)
"""What a decode root must know."""
_REFUSED = (
    *("extra_args", "logprob_token_ids", "prompt_logprob_token_ids", "prompt_logprob_start", "repetition_detection"),
    *("routed_experts_prompt_start", "thinking_token_budget", "trace_decode_token_ids", "watermarking"),
)
"""What vLLM's server takes and the message does not have: an answer as if it had not been asked for would be wrong."""
_AS_VLLM = SamplingParams()


def bad_params(error: Exception) -> MeshError:
    """vLLM's refusal of parameters as ours: its explanation, and the parameter if it names one."""
    param = getattr(error, "parameter", None)
    # Errors that have a parameter put it, and its value, behind the explanation when they are printed.
    message = error.args[0] if param is not None and error.args else error
    return invalid(Reason.BAD_SAMPLING_PARAMS, str(message), param=str(param or "sampling_params"))


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
        raise bad_params(error) from error


def _structured_to_vllm(message: sampling_pb2.StructuredOutputs) -> StructuredOutputsParams:
    kind = message.WhichOneof("constraint")
    if kind is None:
        raise ValueError("structured_outputs needs a constraint")
    values: dict[str, Any] = {}
    if kind == "choice":
        values["choice"] = list(message.choice.options)
    elif kind == "json_object":
        if not message.json_object:
            raise ValueError("json_object must be true")
        values["json_object"] = True
    else:
        values[next(k for k, v in _CONSTRAINTS.items() if v == kind)] = getattr(message, kind)
    return StructuredOutputsParams(**values)


def from_vllm(params: SamplingParams) -> sampling_pb2.SamplingParams:
    """What a decode root must know of a request; stop strings and text options stay in the gateway.

    Raises:
        MeshError: INVALID_ARGUMENT (BAD_SAMPLING_PARAMS) for a value that vLLM's server takes and the message cannot
            hold, such as a negative token id, and for parameters that it does not have.
    """
    for field in _REFUSED:
        if _asked_for(field, getattr(params, field)):
            raise invalid(Reason.BAD_SAMPLING_PARAMS, f"{field} is not supported by this version", param=field)
    message = sampling_pb2.SamplingParams()
    # One by one, as protobuf does not say which field it refuses.
    for field in _CARRIED:
        with _fitting(field):
            message.MergeFrom(sampling_pb2.SamplingParams(**{field: getattr(params, field)}))
    if params.structured_outputs is not None:
        with _fitting("structured_outputs"):
            _structured_from_vllm(params.structured_outputs, message.structured_outputs)
    return message


def _asked_for(field: str, value: Any) -> bool:
    """Whether a parameter is more than another way to say nothing, which vLLM's endpoints have some of."""
    if field == "extra_args":
        return bool(value)
    if field == "repetition_detection" and value is not None:
        return bool(value.max_pattern_size)
    return value is not False and value != getattr(_AS_VLLM, field)


@contextmanager
def _fitting(field: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise invalid(Reason.BAD_SAMPLING_PARAMS, f"{field} cannot be passed on: {error}", param=field) from error


def _structured_from_vllm(constraint: StructuredOutputsParams, out: sampling_pb2.StructuredOutputs) -> None:
    for option in _NOT_PER_REQUEST:
        if getattr(constraint, option):
            raise invalid(
                Reason.BAD_SAMPLING_PARAMS,
                f"{option} is the engine's to know (structured_outputs_config); vLLM ignores it in a request",
                param="structured_outputs",
            )
    if constraint.choice is not None:
        out.choice.options.extend(constraint.choice)
    elif constraint.json_object:
        out.json_object = True
    else:
        for ours, theirs in _CONSTRAINTS.items():
            value = getattr(constraint, ours)
            if value is not None:
                setattr(out, theirs, json.dumps(value) if isinstance(value, dict) else value)


def tokens_only(params: SamplingParams) -> SamplingParams:
    """Adapts parameters for an engine that yields tokens and arrays of log-probabilities, and no text."""
    params.detokenize = False
    params.flat_logprobs = True
    params.output_kind = RequestOutputKind.DELTA
    return params


def logprobs_to_proto(flat: FlatLogprobs) -> sampling_pb2.Logprobs:
    """Positions of vLLM's flat log-probabilities, in order, the chosen token of each first.

    One that is also among the likeliest is there twice, so that all positions have the same width.
    """
    message = sampling_pb2.Logprobs()
    spans = list(zip(flat.start_indices, flat.end_indices, strict=True))
    width = max((end - start for start, end in spans), default=0)
    for start, end in spans:
        row, rank = list(range(start, end)), flat.ranks[start] if end > start else None
        if rank is not None and len(row) == width - 1:
            # Outputs that vLLM has joined, for a reader who lags behind, name such a token once.
            row.insert(rank, start)
        message.width.append(len(row))
        message.token_ids.extend(flat.token_ids[i] for i in row)
        message.logprobs.extend(flat.logprobs[i] for i in row)
        message.ranks.extend(flat.ranks[i] or 0 for i in row)
    return message
