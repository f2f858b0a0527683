"""Bad input over gRPC, to the gateway and to a decode root, is refused with code, reason and field."""

from __future__ import annotations

import secrets
from typing import Any

import grpc
import pytest

from tests.conftest import RunningMesh
from tests.mesh.test_failover import prompt
from tests.refusals import BAD, INVALID, NO_TOKEN, TOO_LONG, constraint, inference, refusal, sampling
from tokenmesh.rpc.errors import Reason
from tokenmesh.v1 import decode_pb2, decode_pb2_grpc, inference_pb2, inference_pb2_grpc, sampling_pb2

pytestmark = pytest.mark.usefixtures("serves_on")


def _empty_chat() -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(prompt=inference_pb2.Prompt(chat=inference_pb2.Conversation()))


# id, request, code, reason, param.
INFERENCE: list[tuple[str, inference_pb2.StreamGenerateRequest, grpc.StatusCode, Reason, str]] = [
    ("no prompt", inference(text=None), INVALID, Reason.EMPTY_PROMPT, "prompt"),
    ("no messages", _empty_chat(), INVALID, Reason.EMPTY_PROMPT, "prompt"),
    ("empty text", inference(text=""), INVALID, Reason.EMPTY_PROMPT, "prompt_token_ids"),
    ("no tokens", inference(ids=[]), INVALID, Reason.EMPTY_PROMPT, "prompt_token_ids"),
    ("too long", inference(ids=TOO_LONG), INVALID, Reason.PROMPT_TOO_LONG, "prompt_token_ids"),
    ("too long text", inference(text="a " * 5000), INVALID, Reason.PROMPT_TOO_LONG, "prompt_token_ids"),
    ("no room", inference(ids=[5] * 10, max_tokens=4090), INVALID, Reason.PROMPT_TOO_LONG, "prompt_token_ids"),
    ("no token", inference(ids=[5, NO_TOKEN]), INVALID, Reason.TOKEN_OUT_OF_VOCABULARY, "prompt_token_ids"),
    ("model", inference(model="nope"), grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, "model"),
    ("temperature -1", inference(temperature=-1), INVALID, BAD, "temperature"),
    ("temperature nan", inference(temperature=float("nan")), INVALID, BAD, "temperature"),
    ("temperature inf", inference(temperature=float("inf")), INVALID, BAD, "temperature"),
    ("top_p 3", inference(top_p=3), INVALID, BAD, "top_p"),
    ("top_k -5", inference(top_k=-5), INVALID, BAD, "sampling_params"),
    ("max_tokens 0", inference(max_tokens=0), INVALID, BAD, "max_tokens"),
    ("max_tokens -1", inference(max_tokens=-1), INVALID, BAD, "max_tokens"),
    ("min_tokens over max_tokens", inference(min_tokens=9), INVALID, BAD, "sampling_params"),
    ("presence_penalty 5", inference(presence_penalty=5), INVALID, BAD, "sampling_params"),
    ("logprobs 100", inference(logprobs=100), INVALID, BAD, "logprobs"),
    ("n 100,000", inference(n=100_000), INVALID, BAD, "sampling_params"),
    ("empty stop string", inference(stop=[""]), INVALID, BAD, "sampling_params"),
    ("bias for no token", inference(logit_bias={99_999: 1.0}), INVALID, BAD, "logit_bias"),
    ("stop at no token", inference(stop_token_ids=[99_999]), INVALID, BAD, "stop_token_ids"),
    ("only no token", inference(allowed_token_ids=[99_999]), INVALID, BAD, "allowed_token_ids"),
    ("no constraint", inference(**constraint()), INVALID, BAD, "sampling_params"),
    ("no JSON object", inference(**constraint(json_object=False)), INVALID, BAD, "sampling_params"),
    ("schema is no JSON", inference(**constraint(json_schema="{")), INVALID, BAD, "sampling_params"),
    ("impossible schema", inference(**constraint(json_schema='{"type": "x"}')), INVALID, BAD, "sampling_params"),
    ("invalid regex", inference(**constraint(regex="(")), INVALID, BAD, "sampling_params"),
    ("invalid grammar", inference(**constraint(grammar="root ::= (")), INVALID, BAD, "sampling_params"),
    ("invalid tag", inference(**constraint(structural_tag="x")), INVALID, BAD, "sampling_params"),
]


@pytest.mark.parametrize(
    ("request_", "code", "reason", "param"), [row[1:] for row in INFERENCE], ids=[row[0] for row in INFERENCE]
)
def test_inference(
    mesh: RunningMesh,
    request_: inference_pb2.StreamGenerateRequest,
    code: grpc.StatusCode,
    reason: Reason,
    param: str,
) -> None:
    with grpc.insecure_channel(mesh.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        whole = inference_pb2.InferenceServiceGenerateRequest(request=request_)
        for call in (lambda: stub.Generate(whole, timeout=10), lambda: stub.StreamGenerate(request_, timeout=10)):
            got = refusal(call)
            assert (got.code, got.reason, got.metadata.get("param")) == (code, reason, param), got


@pytest.mark.parametrize("timeout", [-1.0, 0.0, 0.001, 0.05])
def test_inference_deadline(mesh: RunningMesh, timeout: float) -> None:
    # Already over, or too short for a prompt that takes half a second: the client knows at once.
    request = inference(ids=prompt(300, seed=secrets.randbits(32)), max_tokens=50)
    with grpc.insecure_channel(mesh.grpc_address) as channel:
        grpc.channel_ready_future(channel).result(5)
        got = refusal(lambda: inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request, timeout=timeout))
    assert got.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert got.seconds < max(timeout, 0) + 0.5


# The decode root, called directly.


def _decode(ids: list[int] | None = None, request_id: str = "direct", **change: Any) -> decode_pb2.GenerateRequest:
    return decode_pb2.GenerateRequest(
        request_id=request_id,
        prompt_token_ids=[5, 6, 7] if ids is None else ids,
        sampling_params=sampling(**change),
    )


DECODE: list[tuple[str, decode_pb2.GenerateRequest, Reason, str]] = [
    ("stop strings", _decode(stop=["a"]), BAD, "sampling_params.stop"),
    ("no request id", _decode(request_id=""), Reason.BAD_REQUEST, "request_id"),
    ("no tokens", _decode(ids=[]), Reason.EMPTY_PROMPT, "prompt_token_ids"),
    ("too long", _decode(ids=[5] * 4096), Reason.PROMPT_TOO_LONG, "prompt_token_ids"),
    ("no token", _decode(ids=[NO_TOKEN]), Reason.TOKEN_OUT_OF_VOCABULARY, "prompt_token_ids"),
    ("temperature -1", _decode(temperature=-1), BAD, "temperature"),
    ("max_tokens 0", _decode(max_tokens=0), BAD, "max_tokens"),
    ("logprobs 100", _decode(logprobs=100), BAD, "logprobs"),
    ("invalid regex", _decode(**constraint(regex="(")), BAD, "sampling_params"),
]


@pytest.mark.parametrize(("request_", "reason", "param"), [row[1:] for row in DECODE], ids=[row[0] for row in DECODE])
def test_decode_root(mesh: RunningMesh, request_: decode_pb2.GenerateRequest, reason: Reason, param: str) -> None:
    with grpc.insecure_channel(mesh.root_address) as channel:
        got = refusal(lambda: decode_pb2_grpc.DecodeServiceStub(channel).Generate(request_, timeout=10))
    assert (got.code, got.reason, got.metadata.get("param")) == (INVALID, reason, param), got


@pytest.mark.parametrize("length", [3, 200])
def test_decode_root_refuses_a_live_request_id(mesh: RunningMesh, length: int) -> None:
    with grpc.insecure_channel(mesh.root_address) as channel:
        # (1) A request that lives.
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        ids = prompt(length, seed=secrets.randbits(32))
        name = f"twice-{length}"
        live = stub.Generate(_decode(ids, name, max_tokens=200, ignore_eos=True), timeout=30)
        next(live)

        # (2) A second one with its id is refused.
        got = refusal(lambda: stub.Generate(_decode(ids, name), timeout=10))
        assert (got.code, got.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.DUPLICATE_REQUEST)

        # (3) The first is not disturbed.
        for _ in range(3):
            assert next(live).token_ids
        live.cancel()


def test_decode_root_second_request_does_not_disturb_the_first_ones_prefill(mesh: RunningMesh) -> None:
    with grpc.insecure_channel(mesh.root_address) as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        for number in range(3):
            # (1) Both at once, so that the second comes before the engine has asked for the first one's KV.
            request = _decode(prompt(200, seed=secrets.randbits(32)), f"both-{number}")
            calls = [stub.Generate(request, timeout=10) for _ in range(2)]
            # (2) One is refused, the other is prefilled remotely as ever.
            decisions = []
            for call in calls:
                try:
                    decisions.append(next(call).prefill_decision)
                    list(call)
                except grpc.RpcError:
                    assert call.code() is grpc.StatusCode.ALREADY_EXISTS
            assert decisions == [sampling_pb2.PREFILL_DECISION_DISAGGREGATED]


def test_decode_root_abort_needs_ids(mesh: RunningMesh) -> None:
    with grpc.insecure_channel(mesh.root_address) as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        got = refusal(lambda: stub.Abort(decode_pb2.AbortRequest(), timeout=5))
        assert (got.code, got.reason, got.metadata["param"]) == (INVALID, Reason.BAD_REQUEST, "request_ids")
        # Unknown ones are ignored.
        stub.Abort(decode_pb2.AbortRequest(request_ids=["nobody"]), timeout=5)
