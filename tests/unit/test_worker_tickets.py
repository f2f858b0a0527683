"""A decode worker with a root attached: tickets, zeroed blocks, draining, and a root that goes away."""

from __future__ import annotations

import asyncio

import pytest

from services.decode.worker import service
from services.decode.worker.service import WorkerServicer
from tests.unit.test_worker_service import ROOM, TICKET, Worker, refused
from tokenmesh.config import DecodeWorkerConfig
from tokenmesh.kv.messages import NOT_OPEN, CloseShard, Expect, OpenShard, Settle, ShardClosed, Sync, Synced, ZeroShard
from tokenmesh.rpc.errors import Reason
from tokenmesh.v1 import kv_pb2

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
async def worker() -> Worker:
    """With a root that has two shards."""
    worker = Worker()
    await worker.attach()
    return worker


async def test_a_ticket_is_opened_and_settled_on_every_shard(worker: Worker) -> None:
    # (1) Opened.
    await worker.call("ExpectKv", decode_root_id="root", transfer_id=TICKET, block_ids=[3, 1, ROOM - 1])
    assert worker.shards.told(Expect) == [(f"mover-{n}", Expect(TICKET, [3, 1, ROOM - 1])) for n in (0, 1)]
    assert (await worker.call("GetStats")).kv_open == 1
    # (2) Settled: what came is the sum over the shards.
    reply = await worker.call("SettleKv", decode_root_id="root", transfer_id=TICKET)
    assert worker.shards.told(Settle) == [(f"mover-{n}", Settle(TICKET)) for n in (0, 1)]
    assert reply.complete
    assert (reply.receipt.bytes, reply.receipt.block_layers, reply.receipt.transport) == (200, 4, "tcp")
    stats = await worker.call("GetStats")
    assert (stats.kv_open, stats.kv_received_bytes) == (0, 200)
    # (3) Repeated, it is answered again.
    await worker.call("SettleKv", decode_root_id="root", transfer_id=TICKET)
    # (4) One that did not come whole says why.
    worker.shards.arrived = False
    reply = await worker.call("SettleKv", decode_root_id="root", transfer_id=TICKET)
    assert not reply.complete
    assert "did not arrive" in reply.error
    await worker.nothing_is_left()


async def test_a_ticket_says_how_payloads_may_be_encoded(worker: Worker) -> None:
    ticket = {"decode_root_id": "root", "transfer_id": TICKET, "block_ids": [1]}
    await worker.call("ExpectKv", **ticket, codec=kv_pb2.KV_CODEC_FP8)
    assert worker.shards.told(Expect)[-1][1] == Expect(TICKET, [1], "fp8")
    await worker.call("SettleKv", decode_root_id="root", transfer_id=TICKET)
    # One that this worker does not know is refused, and opens nothing.
    await refused(worker.call("ExpectKv", **ticket, codec=99), "INVALID_ARGUMENT", Reason.BAD_TARGET)
    await worker.nothing_is_left()


async def test_a_mover_that_does_not_answer(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmesh.kv.settling.SILENT_S", 0.05)
    worker.shards.silent = {Settle}
    reply = await worker.call("SettleKv", decode_root_id="root", transfer_id=TICKET)
    assert (reply.complete, reply.error) == (False, "a mover does not answer")
    await worker.nothing_is_left()


async def test_a_ticket_that_a_mover_does_not_open(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmesh.kv.settling.SETTLE_TIMEOUT_S", 0.05)
    ticket = {"decode_root_id": "root", "transfer_id": TICKET}
    # (1) Nobody is told to write under it.
    worker.shards.silent = {Sync}
    call = worker.call("ExpectKv", **ticket, block_ids=[1])
    await refused(call, "UNAVAILABLE", Reason.KV_OWNER_UNREACHABLE)
    # (2) It may be open nevertheless, and counts until it is settled.
    await refused(worker.call("ResetCache", decode_root_id="root"), "FAILED_PRECONDITION", Reason.BUSY)
    await worker.call("SettleKv", **ticket)
    await worker.call("ResetCache", decode_root_id="root")
    await worker.nothing_is_left()


async def test_a_ticket_is_open_once_every_mover_has_said_so(worker: Worker) -> None:
    # (1) Asked after the ticket was sent: a mover takes one after the other.
    worker.shards.silent = {Sync}
    expecting = asyncio.create_task(
        worker.call("ExpectKv", decode_root_id="root", transfer_id=TICKET, block_ids=[3, 1])
    )
    await worker.shards.asked.wait()
    asked = [(peer, message) for peer, message in worker.shards.sent if isinstance(message, Expect | Sync)]
    orders = (Expect(TICKET, [3, 1]), Sync(TICKET))
    assert asked == [(f"mover-{n}", order) for n in (0, 1) for order in orders]
    # (2) One mover is not enough, and what the other says of another ticket is about that one.
    worker.servicer.settling.note(Synced(TICKET, 0))
    worker.servicer.settling.note(Synced(b"o" * 16, 1))
    await asyncio.sleep(0.05)
    assert not expecting.done()
    # (3) The other one too.
    worker.servicer.settling.note(Synced(TICKET, 1))
    await expecting
    await worker.nothing_is_left()


@pytest.mark.parametrize(
    ("transfer_id", "blocks"), [(b"", [1]), (TICKET[:-1], [1]), (TICKET + b"t", [1]), (TICKET, [1, ROOM])], ids=str
)
async def test_a_ticket_that_is_none(worker: Worker, transfer_id: bytes, blocks: list[int]) -> None:
    call = worker.call("ExpectKv", decode_root_id="root", transfer_id=transfer_id, block_ids=blocks)
    await refused(call, "INVALID_ARGUMENT", Reason.BAD_TARGET)
    assert worker.shards.told(Expect) == []
    assert (await worker.call("GetStats")).kv_open == 0
    await worker.nothing_is_left()


async def test_only_the_root_that_is_attached_may_do_anything(worker: Worker) -> None:
    async def all_refused(root: str) -> None:
        ticket = {"decode_root_id": root, "transfer_id": TICKET}
        await refused(worker.call("ExpectKv", **ticket), "FAILED_PRECONDITION", Reason.NOT_ATTACHED)
        await refused(worker.call("SettleKv", **ticket), "FAILED_PRECONDITION", Reason.NOT_ATTACHED)
        await refused(worker.call("ResetCache", decode_root_id=root), "FAILED_PRECONDITION", Reason.NOT_ATTACHED)

    # (1) Another one; and nobody, once the root has left.
    await all_refused("other")
    await worker.call("Detach", decode_root_id="root")
    await all_refused("root")
    await all_refused("")
    assert {type(message) for _, message in worker.shards.sent} == {OpenShard, CloseShard}
    await worker.nothing_is_left()


async def test_blocks_are_zeroed_between_steps_only(worker: Worker) -> None:
    # (1) Every shard is asked.
    await worker.call("ResetCache", decode_root_id="root")
    assert [peer for peer, _ in worker.shards.told(ZeroShard)] == ["shard-0", "shard-1"]
    # (2) Not while a step is under way.
    worker.shards.in_step = True
    await refused(worker.call("ResetCache", decode_root_id="root"), "FAILED_PRECONDITION", Reason.BUSY)
    worker.shards.in_step = False
    # (3) Nor while somebody may write: the shards are not even asked.
    await worker.call("ExpectKv", decode_root_id="root", transfer_id=TICKET, block_ids=[1])
    asked = len(worker.shards.told(ZeroShard))
    await refused(worker.call("ResetCache", decode_root_id="root"), "FAILED_PRECONDITION", Reason.BUSY)
    assert len(worker.shards.told(ZeroShard)) == asked
    # (4) Then again.
    await worker.call("SettleKv", decode_root_id="root", transfer_id=TICKET)
    await worker.call("ResetCache", decode_root_id="root")
    await worker.nothing_is_left()


async def test_a_shard_that_does_not_zero_is_busy(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "ZERO_TIMEOUT_S", 0.05)
    worker.shards.silent = {ZeroShard}
    await refused(worker.call("ResetCache", decode_root_id="root"), "FAILED_PRECONDITION", Reason.BUSY)
    # Once it answers again, so does the service.
    worker.shards.silent = set()
    await worker.call("ResetCache", decode_root_id="root")
    await worker.nothing_is_left()


async def test_drain_waits_for_the_root_to_leave(worker: Worker) -> None:
    # (1) It waits, and says meanwhile that it wants to go.
    drain = asyncio.create_task(worker.call("Drain"))
    await asyncio.sleep(0)
    assert (await worker.call("GetStats")).draining
    assert not drain.done()
    # (2) Nobody else gets in, the same root neither.
    for root in ("root", "other"):
        await refused(worker.attach(root), "UNAVAILABLE", Reason.DRAINING)
    # (3) The root lets it go.
    await worker.call("Detach", decode_root_id="root")
    assert not (await drain).attached
    # (4) Again: at once.
    assert not (await worker.call("Drain")).attached
    await worker.nothing_is_left()


async def test_drain_ends_at_the_deadline(worker: Worker) -> None:
    worker.context.time_remaining = lambda: 0.6
    assert (await worker.call("Drain")).attached
    await worker.nothing_is_left()


@pytest.mark.parametrize("shards", [(0,), (1,), (0, 1)])
async def test_a_root_that_goes_away_frees_the_rank(worker: Worker, shards: tuple[int, ...]) -> None:
    # (1) One shard notices, or all do.
    for shard in shards:
        worker.shards.is_open[shard] = False
        worker.servicer.handle(ShardClosed(shard, "root gone: reset"))
    assert await worker.servicer.alone(5)
    # (2) All of them are closed, and the next root gets in.
    await worker.closed()
    assert len(worker.shards.told(CloseShard)) == 2
    await worker.attach("next")
    assert worker.servicer.attached is not None
    await worker.nothing_is_left()


async def test_an_answer_that_crossed_with_a_report_does_not_close_what_came_next(worker: Worker) -> None:
    # (1) The root leaves by itself and by Detach: a shard's own report is taken for the answer, ...
    worker.shards.silent = {CloseShard}
    detach = asyncio.create_task(worker.call("Detach", decode_root_id="root"))
    await worker.shards.asked.wait()
    for shard in (0, 1):
        worker.servicer.handle(ShardClosed(shard, "root gone: reset"))
    await detach
    worker.shards.silent = set()
    # (2) ... and the answer itself comes when the next root is there. It is nobody's any more.
    await worker.attach("next")
    for shard in (0, 1):
        worker.servicer.handle(ShardClosed(shard, NOT_OPEN))
    async with worker.servicer._changing:
        pass
    await asyncio.sleep(0)
    assert worker.servicer.attached is not None
    assert worker.servicer.attached.root_id == "next"
    await worker.nothing_is_left()


async def test_a_worker_that_still_starts_is_unavailable() -> None:
    worker = Worker()
    worker.servicer = WorkerServicer(DecodeWorkerConfig())
    await refused(worker.attach(), "UNAVAILABLE", Reason.DRAINING)
