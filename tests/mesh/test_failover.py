"""Prefill services that lie, refuse, stall or die: the tokens stay right, and the reason is recorded."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from tests.conftest import RunningMesh, free_port
from tokenmesh.rpc.errors import MeshError, Reason, unavailable
from tokenmesh.rpc.server import RpcServer
from tokenmesh.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, prefill_pb2, prefill_pb2_grpc, sampling_pb2

Behaviour = Callable[[prefill_pb2.PrefillRequest], Any]


class FakePrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Answers Prefill as a test wants."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self.calls: list[prefill_pb2.PrefillRequest] = []
        self.called = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> prefill_pb2.PrefillResponse:
        self.calls.append(request)
        self.called.set()
        try:
            answer = self._behaviour(request)
            return await answer if asyncio.iscoroutine(answer) else answer
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@asynccontextmanager
async def fake_prefill(behaviour: Behaviour) -> AsyncIterator[tuple[FakePrefill, str]]:
    """(fake, its address), serving."""
    server = RpcServer("127.0.0.1", free_port())
    fake = FakePrefill(behaviour)
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(fake, server.server)
    await server.start()
    try:
        yield fake, server.address
    finally:
        await server.stop(grace=0)


def refuse(_: prefill_pb2.PrefillRequest) -> prefill_pb2.PrefillResponse:
    raise MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL, "full")


def drain(_: prefill_pb2.PrefillRequest) -> prefill_pb2.PrefillResponse:
    raise unavailable(Reason.DRAINING, "leaving")


def crash(_: prefill_pb2.PrefillRequest) -> prefill_pb2.PrefillResponse:
    raise RuntimeError("a bug")


def lie(request: prefill_pb2.PrefillRequest) -> prefill_pb2.PrefillResponse:
    """Claims to have sent everything and sends nothing."""
    return prefill_pb2.PrefillResponse(first_token_id=1, receipt=kv_pb2.KvReceipt(bytes=10**9, block_layers=10**6))


async def stall(_: prefill_pb2.PrefillRequest) -> prefill_pb2.PrefillResponse:
    await asyncio.Event().wait()
    raise AssertionError


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(length)]


async def generate(
    mesh: RunningMesh, ids: list[int], candidates: list[str], local: bool = False
) -> tuple[list[int], int]:
    """(tokens, prefill decision), straight from the decode root."""
    request = decode_pb2.GenerateRequest(
        request_id=f"failover-{random.random()}",
        prompt_token_ids=ids,
        sampling_params=sampling_pb2.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
        prefill_candidates=[decode_pb2.PrefillCandidate(address=a) for a in candidates],
        local_reason=sampling_pb2.PREFILL_DECISION_DECODE_ONLY if local else None,
        cache_salt=str(random.random()),
    )
    tokens: list[int] = []
    decision = 0
    async with grpc.aio.insecure_channel(mesh.root_address) as channel:
        async for response in decode_pb2_grpc.DecodeServiceStub(channel).Generate(request, timeout=60):
            tokens += response.token_ids
            if response.HasField("prefill_decision"):
                decision = response.prefill_decision
    return tokens, decision


@pytest.mark.parametrize("behaviour", [refuse, drain, crash, lie], ids=lambda b: b.__name__)
async def test_the_next_candidate_takes_over(mesh: RunningMesh, behaviour: Behaviour) -> None:
    ids = prompt(300, seed=1)
    truth, decision = await generate(mesh, ids, [], local=True)
    assert decision == sampling_pb2.PREFILL_DECISION_DECODE_ONLY
    async with fake_prefill(behaviour) as (fake, address):
        # (1) The bad one is asked first, the good one saves the day.
        tokens, decision = await generate(mesh, ids, [address, mesh.prefill_address])
        assert (len(fake.calls), decision) == (1, sampling_pb2.PREFILL_DECISION_DISAGGREGATED)
        assert tokens == truth
        # (2) Alone, the bad one costs a recompute, and the reason is recorded.
        tokens, decision = await generate(mesh, ids, [address])
        assert decision == sampling_pb2.PREFILL_DECISION_PREFILL_FAILED
        assert tokens == truth


async def test_an_address_where_nobody_listens(mesh: RunningMesh) -> None:
    ids = prompt(300, seed=2)
    truth, _ = await generate(mesh, ids, [], local=True)
    tokens, decision = await generate(mesh, ids, [f"127.0.0.1:{free_port()}"])
    assert decision == sampling_pb2.PREFILL_DECISION_PREFILL_FAILED
    assert tokens == truth


async def test_every_attempt_has_a_ticket_of_its_own(mesh: RunningMesh) -> None:
    async with fake_prefill(lie) as (fake, address):
        await generate(mesh, prompt(300, seed=3), [address, address])
    tickets = [call.target.transfer_id for call in fake.calls]
    assert len(tickets) == 2
    assert tickets[0] != tickets[1]
    assert fake.calls[0].target.block_ids == fake.calls[1].target.block_ids


async def test_cancelling_while_a_prefill_stalls(mesh: RunningMesh) -> None:
    async with fake_prefill(stall) as (fake, address):
        # (1) The root waits for a prefill that never ends.
        task = asyncio.create_task(generate(mesh, prompt(300, seed=4), [address]))
        await asyncio.wait_for(fake.called.wait(), 10)
        await mesh.until(lambda held: held["root blocks"] == 3)
        # (2) The client goes away; so does the call, and the blocks are free again.
        task.cancel()
        await asyncio.wait_for(fake.cancelled.wait(), 1)
        assert not any((await asyncio.to_thread(mesh.wait_idle, 1.0)).values())


async def test_a_stolen_target_writes_nothing(mesh: RunningMesh) -> None:
    # A target that was settled is handed to the real prefill service, as a delayed sender would use it.
    stolen: list[prefill_pb2.PrefillRequest] = []
    async with fake_prefill(lambda request: stolen.append(request) or lie(request)) as (_, address):
        await generate(mesh, prompt(300, seed=5), [address])
    # (1) Somebody else's blocks, computed and verified, now may be the same ones.
    ids = prompt(300, seed=6)
    truth, _ = await generate(mesh, ids, [], local=True)
    victim = asyncio.create_task(generate(mesh, ids, [mesh.prefill_address]))
    # (2) The late write is refused by the owner.
    async with grpc.aio.insecure_channel(mesh.prefill_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(stolen[0], timeout=30)
    assert MeshError.from_rpc(failure.value).reason is Reason.KV_OWNER_UNREACHABLE
    # (3) And nobody's tokens changed.
    assert (await victim)[0] == truth
