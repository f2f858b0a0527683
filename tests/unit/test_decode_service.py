"""The decode root's service over an engine that does what a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.logprobs import FlatLogprobs, Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError

from services.decode.root import service as service_module
from services.decode.root.service import DecodeServicer
from tokenmesh.config import DecodeConfig
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.telemetry.metrics import Metrics
from tokenmesh.v1 import decode_pb2

NONE: Any = {"transport": "none"}


def servicer(outputs: Callable[[], AsyncIterator[RequestOutput]]) -> DecodeServicer:
    """One whose engine answers so."""
    handoff: Any = SimpleNamespace(connected=set(), registered=lambda *_: nullcontext())
    made = DecodeServicer(DecodeConfig(kv_transfer=NONE, token_parallel_size=1), "m", [], handoff, Metrics())
    model = SimpleNamespace(get_vocab_size=lambda: 1000, max_model_len=100)
    llm = SimpleNamespace(model_config=model, generate=lambda *_, **__: outputs())
    engine: Any = SimpleNamespace(llm=llm, rouse=lambda: None)
    made.attach(engine)
    return made


async def refusal(service: DecodeServicer) -> MeshError:
    context: Any = None
    request = decode_pb2.GenerateRequest(request_id="r", prompt_token_ids=[1, 2, 3])
    with pytest.raises(MeshError) as caught:
        _ = [response async for response in service.Generate(request, context)]
    assert not len(service.requests)
    return caught.value


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (GracefulHTTPError("enough", 503), grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL),
        (EngineDeadError(), grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_DEAD),
    ],
)
async def test_what_an_engine_refuses_is_told_as_what_it_is(
    error: Exception, code: grpc.StatusCode, reason: Reason
) -> None:
    async def outputs() -> AsyncIterator[RequestOutput]:
        raise error
        yield

    told = await refusal(servicer(outputs))
    assert (told.code, told.reason) == (code, reason)
    assert told.fatal is (reason is Reason.ENGINE_DEAD)


async def test_log_probabilities_that_fit_no_message_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MAX_MESSAGE_BYTES", service_module.ROOM_BYTES + 1000)
    positions = FlatLogprobs()
    for _ in range(200):
        positions.append({5: Logprob(-0.5, 1, "x")})

    async def outputs() -> AsyncIterator[RequestOutput]:
        completion = CompletionOutput(0, "", [7], None, None)
        yield RequestOutput("r", None, [1, 2, 3], positions, [completion], False)

    # A retry would compute the same prompt, to the same end.
    told = await refusal(servicer(outputs))
    assert (told.code, told.metadata["param"]) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt_logprobs")
