"""Bad requests to the prefill service are refused before anything is computed, and leave nothing behind."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor

from tests.conftest import RunningMesh
from tests.mesh.test_failover import fake_prefill, generate, prompt, refuse
from tests.refusals import INVALID, NO_TOKEN, TOO_LONG, Refusal, refusal
from tokenmesh.rpc.errors import Reason
from tokenmesh.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc

pytestmark = pytest.mark.usefixtures("serves_on")


@pytest.fixture(scope="module")
def good(mesh: RunningMesh) -> prefill_pb2.PrefillRequest:
    """A request as the root makes it, for a prompt of 3 blocks; its target is settled."""

    async def catch() -> prefill_pb2.PrefillRequest:
        async with fake_prefill(refuse) as (fake, address):
            await generate(mesh, prompt(300, seed=11), [address])
        return fake.calls[0]

    return asyncio.run(catch())


def _retarget(good: prefill_pb2.PrefillRequest, **change: Any) -> prefill_pb2.PrefillRequest:
    """The same request for a new ticket, with fields of the target replaced."""
    request = prefill_pb2.PrefillRequest()
    request.CopyFrom(good)
    request.target.transfer_id = secrets.token_bytes(16)
    for name, value in change.items():
        field = request.target.DESCRIPTOR.fields_by_name[name]
        request.target.ClearField(name)
        if field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated:
            getattr(request.target, name).CopyFrom(value)
        elif field.is_repeated:
            getattr(request.target, name).extend(value)
        else:
            setattr(request.target, name, value)
    return request


def _prefill(mesh: RunningMesh, request: prefill_pb2.PrefillRequest, timeout: float | None = 10) -> Refusal:
    with grpc.insecure_channel(mesh.prefill_address) as channel:
        return refusal(lambda: prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(request, timeout=timeout))


def test_prefill_needs_a_deadline(mesh: RunningMesh, good: prefill_pb2.PrefillRequest) -> None:
    got = _prefill(mesh, _retarget(good), timeout=None)
    assert (got.code, got.reason, got.metadata["param"]) == (INVALID, Reason.DEADLINE_MISSING, "deadline")


@pytest.mark.parametrize(
    ("ids", "reason"),
    [([], Reason.EMPTY_PROMPT), (TOO_LONG, Reason.PROMPT_TOO_LONG), ([NO_TOKEN], Reason.TOKEN_OUT_OF_VOCABULARY)],
)
def test_prefill_prompt(mesh: RunningMesh, ids: list[int], reason: Reason) -> None:
    got = _prefill(mesh, prefill_pb2.PrefillRequest(request_id="direct", prompt_token_ids=ids))
    assert (got.code, got.reason, got.metadata["param"]) == (INVALID, reason, "prompt_token_ids")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"transfer_id": b"short"}, "target"),
        ({"transfer_id": b"x" * 17}, "target"),
        ({"block_ids": [1, 2]}, "target"),
        ({"block_ids": [1, 2, 3, 4]}, "target"),
        ({"start_token": 3}, "target"),
        ({"start_token": 1024}, "target"),
        ({"codec": kv_pb2.KV_CODEC_UNSPECIFIED}, "target"),
        ({"shards": []}, "shards"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_prefill_target(
    mesh: RunningMesh, good: prefill_pb2.PrefillRequest, change: dict[str, Any], param: str
) -> None:
    got = _prefill(mesh, _retarget(good, **change))
    assert (got.code, got.reason, got.metadata["param"]) == (INVALID, Reason.BAD_TARGET, param), got


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", 29), ("dtype", "float16"), ("block_size", 16), ("packing", "other"), ("weights", "0")],
)
def test_prefill_geometry(mesh: RunningMesh, good: prefill_pb2.PrefillRequest, field: str, value: int | str) -> None:
    # (1) A target of another shape is refused before anything is computed.
    geometry = kv_pb2.BlockGeometry()
    geometry.CopyFrom(good.target.geometry)
    setattr(geometry, field, value)
    got = _prefill(mesh, _retarget(good, geometry=geometry))
    assert (got.code, got.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.GEOMETRY_MISMATCH)
    assert field in got.message

    # (2) So is a connection to such an owner.
    request = prefill_pb2.ConnectOwnerRequest(shards=good.target.shards, geometry=geometry)
    with grpc.insecure_channel(mesh.prefill_address) as channel:
        got = refusal(lambda: prefill_pb2_grpc.PrefillServiceStub(channel).ConnectOwner(request, timeout=5))
    assert (got.code, got.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.GEOMETRY_MISMATCH)


def test_prefill_shards_that_heads_do_not_divide_over(mesh: RunningMesh, good: prefill_pb2.PrefillRequest) -> None:
    got = _prefill(mesh, _retarget(good, shards=[kv_pb2.KvShard(host="127.0.0.1", port=1)] * 2))
    assert (got.code, got.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.GEOMETRY_MISMATCH)
    assert "3 KV heads do not divide over 2 shards" in got.message


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 1), ("", 0), ("127.0.0.1", 99_999)])
def test_prefill_owner_unreachable(mesh: RunningMesh, good: prefill_pb2.PrefillRequest, host: str, port: int) -> None:
    got = _prefill(mesh, _retarget(good, shards=[kv_pb2.KvShard(host=host, port=port)]))
    assert (got.code, got.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.KV_OWNER_UNREACHABLE)


def test_prefill_transfer_id_used_again(mesh: RunningMesh, good: prefill_pb2.PrefillRequest) -> None:
    # (1) Calls in quick succession with one ticket, for an owner that is not there.
    request = _retarget(good, shards=[kv_pb2.KvShard(host="127.0.0.1", port=1)])
    assert _prefill(mesh, request).reason == Reason.KV_OWNER_UNREACHABLE
    for _ in range(3):
        got = _prefill(mesh, request)
        assert (got.code, got.reason) == (INVALID, Reason.BAD_TARGET), got

    # (2) Nothing stays behind.
    assert not any(mesh.wait_idle().values())

    # (3) Not then either: a ticket is good for one transfer.
    assert _prefill(mesh, request).reason == Reason.BAD_TARGET
