"""What a root makes of a worker's answers about a ticket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from services.decode.root import owners
from services.decode.root.owners import WorkerOwner
from tests.unit.fake_service import free_ports
from tokenmesh.rpc.errors import MeshError, Reason, abort, unavailable
from tokenmesh.rpc.server import RpcServer
from tokenmesh.v1 import kv_pb2, worker_pb2, worker_pb2_grpc

TICKET = b"t" * 16


class Worker(worker_pb2_grpc.WorkerServiceServicer):
    """Settles, after it has refused as often as it is told."""

    def __init__(self) -> None:
        self.refusals: list[MeshError] = []
        self.asked = 0

    async def SettleKv(self, request: Any, context: Any) -> worker_pb2.SettleKvResponse:
        assert request.transfer_id == TICKET
        self.asked += 1
        if self.refusals:
            await abort(context, self.refusals.pop())
        return worker_pb2.SettleKvResponse(complete=True, receipt=kv_pb2.KvReceipt(bytes=7))


class Owned:
    """A worker as its root has it."""

    def __init__(self, channel: grpc.aio.Channel, worker: Worker) -> None:
        self.worker = worker
        self.attached = True
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        self.owner = WorkerOwner(stub, "worker", "root", [], lambda: self.attached)


@pytest.fixture
async def owned(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Owned]:
    monkeypatch.setattr(owners, "RETRY_S", 0.01)
    server = RpcServer("127.0.0.1", free_ports(1)[0])
    worker = Worker()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server.server)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Owned(channel, worker)
    await server.stop(0)


async def test_a_ticket_is_settled_by_an_answer_alone(owned: Owned) -> None:
    # 1. Twice the worker cannot be reached, as while a connection is made anew.
    owned.worker.refusals = [unavailable(Reason.INTERNAL, "not now")] * 2
    outcome = await owned.owner.settle(TICKET)
    assert (outcome.complete, outcome.receipt.bytes, owned.worker.asked) == (True, 7, 3)


async def test_a_rank_that_has_left_is_not_waited_for(owned: Owned) -> None:
    owned.attached = False
    owned.worker.refusals = [unavailable(Reason.INTERNAL, "not now")] * 2
    outcome = await owned.owner.settle(TICKET)
    assert not outcome.complete
    assert "does not answer: not now" in outcome.error
    assert owned.worker.asked == 1


async def test_a_worker_that_knows_nothing_of_the_root_has_no_ticket(owned: Owned) -> None:
    refusal = MeshError(grpc.StatusCode.FAILED_PRECONDITION, Reason.NOT_ATTACHED, "not attached")
    owned.worker.refusals = [refusal]
    outcome = await owned.owner.settle(TICKET)
    assert not outcome.complete
    assert owned.worker.asked == 1
