"""What the tests of bad input share: requests with one fault, and what a refusal looks like."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tokenmesh.rpc.errors import Reason
from tokenmesh.v1 import inference_pb2, sampling_pb2

TOO_LONG = [5] * 5000
"""More tokens than max_model_len."""
NO_TOKEN = 49_152
"""The first id outside the vocabulary."""
INVALID = grpc.StatusCode.INVALID_ARGUMENT
BAD = Reason.BAD_SAMPLING_PARAMS


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """Checks what all errors over REST have in common and returns the error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    assert response.headers["x-request-id"]
    assert "Traceback" not in response.text
    body = response.json()
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert error["message"]
    assert error["code"] == status
    return error


@dataclass
class Refusal:
    """What a call failed with."""

    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]
    message: str
    seconds: float


def _complete(call: Callable[[], Any]) -> None:
    reply = call()
    if hasattr(reply, "__next__"):
        list(reply)


def refusal(call: Callable[[], Any]) -> Refusal:
    """Makes a call that must fail, streaming or not."""
    start = time.monotonic()
    with pytest.raises(grpc.RpcError) as failure:
        _complete(call)
    error: Any = failure.value
    seconds = time.monotonic() - start
    assert "Traceback" not in error.details()
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    if status is not None:
        (detail,) = status.details
        assert detail.Unpack(info)
        assert info.domain == "tokenmesh"
    return Refusal(error.code(), info.reason, dict(info.metadata), error.details(), seconds)


def sampling(**change: Any) -> sampling_pb2.SamplingParams:
    """Good parameters but for the change."""
    return sampling_pb2.SamplingParams(**{"temperature": 0, "max_tokens": 2, **change})


def constraint(**kind: Any) -> dict[str, Any]:
    """The change that adds a constraint."""
    return {"structured_outputs": sampling_pb2.StructuredOutputs(**kind)}


def inference(
    text: str | None = "The sky is", ids: list[int] | None = None, model: str = "", n: int = 0, **change: Any
) -> inference_pb2.StreamGenerateRequest:
    """A good request but for the change."""
    request = inference_pb2.StreamGenerateRequest(model=model, n=n, sampling_params=sampling(**change))
    if ids is not None:
        request.prompt.token_ids.CopyFrom(inference_pb2.TokenIds(ids=ids))
    elif text is not None:
        request.prompt.text = text
    return request
