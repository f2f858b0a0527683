"""A decode worker's service over shards that only say what shards would say: who may attach, and what is freed when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
import msgspec
import pytest

from services.decode.worker import service
from services.decode.worker.service import WorkerServicer
from tokenmesh.config import ConfigError, DecodeWorkerConfig
from tokenmesh.kv.geometry import BlockGeometry
from tokenmesh.kv.messages import (
    NOT_OPEN,
    CloseShard,
    Expect,
    MoverReady,
    OpenShard,
    Settle,
    Settled,
    ShardClosed,
    ShardOpen,
    ShardState,
    ShardZeroed,
    Sync,
    Synced,
    ToService,
    ZeroShard,
)
from tokenmesh.parallel.rank import RankSpec
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.v1 import worker_pb2

LAYERS, BLOCK_BYTES = 2, 2 * 1 * 32 * 64 * 4
GEOMETRY = BlockGeometry(LAYERS, 1, 64, 32, "float32", BLOCK_BYTES, "cpu_attn/vec")
ROOM = 10
"""Blocks that fit."""
TICKET = b"t" * 16

pytestmark = pytest.mark.timeout(30)


class FakeShards:
    """ShardProcesses without processes: answers at once, unless it was told otherwise."""

    def __init__(self, handle: Callable[[ToService], None]) -> None:
        self.numbers = range(0)
        self.hub: Any = self
        self.sent: list[tuple[str, Any]] = []
        self.silent: set[type] = set()
        self.asked = asyncio.Event()
        """Set once something was asked that is not answered."""
        self.open_error = ""
        self.in_step = False
        self.arrived = True
        self.is_open: dict[int, bool] = {}
        self.restarts = 0
        self._handle = handle

    async def ensure(self, count: int) -> None:
        self.numbers = range(count)

    async def restart(self) -> None:
        self.restarts += 1
        self.is_open.clear()

    def send(self, peer: str, message: Any) -> None:
        """The hub's; answers come as messages do, later."""
        self.sent.append((peer, message))
        if type(message) in self.silent:
            self.asked.set()
        else:
            for answer in self._answers(int(peer.rpartition("-")[2]), message):
                asyncio.get_running_loop().call_soon(self._handle, answer)

    def _answers(self, shard: int, message: Any) -> list[Any]:
        match message:
            case OpenShard():
                self.is_open[shard] = not self.open_error
                port = 0 if self.open_error else 7000 + shard
                return [MoverReady(shard, "kv", 8000 + shard, GEOMETRY), ShardOpen(shard, port, self.open_error)]
            case CloseShard():
                was, self.is_open[shard] = self.is_open.get(shard, False), False
                return [ShardClosed(shard, "detached" if was else NOT_OPEN)]
            case ZeroShard():
                return [ShardZeroed(shard, not self.in_step)]
            case Sync(transfer_id):
                return [Synced(transfer_id, shard)]
            case Settle(transfer_id):
                error = "" if self.arrived else "1 of 2 block layers did not arrive"
                return [Settled(transfer_id, shard, self.arrived, error, 100, 2, 0.5, "tcp", 0)]
            case _:
                return []

    def told(self, kind: type) -> list[tuple[str, Any]]:
        return [(peer, message) for peer, message in self.sent if isinstance(message, kind)]


class Worker:
    """The servicer, called as gRPC would."""

    def __init__(self) -> None:
        self.servicer = WorkerServicer(DecodeWorkerConfig(kv_cache_memory_bytes=ROOM * BLOCK_BYTES * LAYERS + 1))
        self.shards = FakeShards(self.servicer.handle)
        self.servicer.attach(self.shards)  # type: ignore[arg-type]
        self.context: Any = SimpleNamespace(time_remaining=lambda: 5.0)

    async def call(self, method: str, **fields: Any) -> Any:
        request = {
            "Detach": worker_pb2.DetachRequest,
            "Drain": worker_pb2.WorkerServiceDrainRequest,
            "GetStats": worker_pb2.GetStatsRequest,
            "ResetCache": worker_pb2.ResetCacheRequest,
            "ExpectKv": worker_pb2.ExpectKvRequest,
            "SettleKv": worker_pb2.SettleKvRequest,
        }[method](**fields)
        return await getattr(self.servicer, method)(request, self.context)

    async def attach(self, root: str = "root", shards: int = 2, **changes: Any) -> worker_pb2.AttachResponse:
        return await self.servicer.Attach(attach_request(root, shards, **changes), self.context)

    async def closed(self) -> None:
        """Waits until whatever is being closed is."""
        await self.servicer._close("test")

    async def nothing_is_left(self) -> None:
        await self.closed()
        assert self.servicer.attached is None
        assert not any(self.shards.is_open.values())
        assert not self.servicer._waiting
        assert await self.call("GetStats") == worker_pb2.GetStatsResponse(draining=self.servicer.draining)


def attach_request(root: str, shards: int, **changes: Any) -> worker_pb2.AttachRequest:
    """A request that is right but for what is changed: fields of the request, of `attention_` or of `geometry_`."""
    request = worker_pb2.AttachRequest(
        decode_root_id=root,
        geometry=GEOMETRY.to_proto(),
        rank=1,
        shards=shards,
        attention=worker_pb2.Attention(
            heads=2,
            dtype="float32",
            layers=[worker_pb2.LayerAttention(scale=0.1, sliding_window=-1) for _ in range(LAYERS)],
            max_seqs=4,
            max_tokens=64,
            max_blocks=8,
        ),
    )
    for name, value in changes.items():
        section, _, field = name.partition("_")
        if section in ("attention", "geometry"):
            setattr(getattr(request, section), field, value)
        else:
            setattr(request, name, value)
    return request


@pytest.fixture
def worker() -> Worker:
    return Worker()


async def refused(call: Any, code: str, reason: Reason) -> MeshError:
    with pytest.raises(MeshError) as error:
        await call
    assert (error.value.code, error.value.reason) == (grpc.StatusCode[code], reason)
    return error.value


async def test_a_root_attaches_and_leaves(worker: Worker) -> None:
    # (1) As many blocks as fit, since it asked for no number; listeners of both kinds in shard order.
    reply = await worker.attach()
    assert reply.blocks == ROOM
    assert [(s.kv.host, s.kv.port, s.exchange.host, s.exchange.port) for s in reply.shards] == [
        ("kv", 8000, "127.0.0.1", 7000),
        ("kv", 8001, "127.0.0.1", 7001),
    ]
    # (2) Every shard was told the same: the model, the number of blocks, and what the root will show.
    orders = worker.shards.told(OpenShard)
    assert [peer for peer, _ in orders] == ["shard-0", "shard-1"]
    for _, order in orders:
        assert (order.blocks, order.token, order.geometry) == (ROOM, reply.token, GEOMETRY)
        spec = msgspec.msgpack.decode(order.spec, type=RankSpec)
        assert (spec.shape.heads, spec.shape.kv_heads, spec.max_tokens, spec.block_bytes) == (2, 1, 64, BLOCK_BYTES)
    assert len(reply.token) == 16
    # (3) Stats name it, with what its shards report.
    worker.servicer.handle(ShardState(0, "posix", 7, 1234, 0.25))
    stats = await worker.call("GetStats")
    assert (stats.decode_root_id, stats.rank, stats.blocks) == ("root", 1, ROOM)
    assert stats.kv_bytes == 2 * ROOM * BLOCK_BYTES * LAYERS
    assert (stats.steps, stats.context_tokens, stats.exchange_transport) == (7, 1234, "posix")
    # (4) Somebody else's Detach changes nothing; its own frees everything, and may be repeated.
    await worker.call("Detach", decode_root_id="other")
    assert worker.servicer.attached is not None
    await worker.call("Detach", decode_root_id="root")
    await worker.call("Detach", decode_root_id="root")
    assert len(worker.shards.told(CloseShard)) == 2
    await worker.nothing_is_left()


async def test_a_rank_has_one_root_at_a_time(worker: Worker) -> None:
    first = await worker.attach(blocks=4)
    assert first.blocks == 4
    # (1) Another root is refused and disturbs nothing.
    error = await refused(worker.attach("other"), "FAILED_PRECONDITION", Reason.ALREADY_ATTACHED)
    assert "root" in error.message
    assert worker.shards.told(CloseShard) == []
    # (2) The same one may attach again: what it had is closed first, tickets included, and the token is a new one.
    await worker.call("ExpectKv", decode_root_id="root", transfer_id=TICKET, block_ids=[1])
    second = await worker.attach(blocks=6)
    assert second.token != first.token
    kinds = [type(message) for _, message in worker.shards.sent]
    assert kinds == [OpenShard] * 2 + [Expect, Sync] * 2 + [CloseShard] * 2 + [OpenShard] * 2
    stats = await worker.call("GetStats")
    assert (stats.blocks, stats.kv_open) == (6, 0)
    # (3) Once it has left, the other one gets in.
    await worker.call("Detach", decode_root_id="root")
    await worker.attach("other", shards=1)
    assert worker.servicer.attached is not None
    assert worker.servicer.attached.root_id == "other"
    await worker.nothing_is_left()


async def test_a_root_that_is_silent_gives_way(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.decode.worker.service.LEASE_S", 1.0)
    await worker.attach(blocks=4)
    # (1) While it asks how its rank is, no other gets in.
    for _ in range(6):
        await asyncio.sleep(0.2)
        await worker.call("GetStats")
        await refused(worker.attach("other"), "FAILED_PRECONDITION", Reason.ALREADY_ATTACHED)
    # (2) Its machine has gone, which nothing tells of.
    await asyncio.sleep(1.1)
    await worker.attach("other", blocks=2)
    assert worker.servicer.attached is not None
    assert (worker.servicer.attached.root_id, worker.servicer.attached.blocks) == ("other", 2)
    await worker.nothing_is_left()


async def test_two_roots_at_the_same_moment(worker: Worker) -> None:
    results = await asyncio.gather(worker.attach("a"), worker.attach("b"), return_exceptions=True)
    assert isinstance(results[0], worker_pb2.AttachResponse)
    assert isinstance(results[1], MeshError)
    assert results[1].reason is Reason.ALREADY_ATTACHED
    await worker.nothing_is_left()


async def test_more_than_there_is(worker: Worker) -> None:
    error = await refused(worker.attach(blocks=ROOM + 1), "RESOURCE_EXHAUSTED", Reason.NOT_ENOUGH_MEMORY)
    assert f"{ROOM + 1} blocks wanted, {ROOM} fit" in error.message
    # A single block that is larger than all of it.
    big = 1 << 20
    changes = {"geometry_block_size": big, "geometry_block_bytes": 2 * big * 64 * 4}
    await refused(worker.attach(**changes), "RESOURCE_EXHAUSTED", Reason.NOT_ENOUGH_MEMORY)
    assert worker.shards.told(OpenShard) == []
    assert (await worker.attach(blocks=ROOM)).blocks == ROOM
    await worker.nothing_is_left()


@pytest.mark.parametrize(
    "changes",
    [
        {"decode_root_id": ""},
        {"rank": 0},
        {"shards": 0},
        {"shards": 65},
        {"attention_heads": 0},
        {"attention_max_seqs": 0},
        {"attention_max_tokens": 0},
        {"attention_max_blocks": 0},
        {"attention_dtype": "int8"},
        {"attention_dtype": "float16"},
        {"geometry_layers": 0},
        {"geometry_layers": 3},
        {"geometry_kv_heads": 0},
        {"geometry_kv_heads": 3},
        {"geometry_head_size": 0},
        {"geometry_head_size": 32},
        {"geometry_block_size": 0},
        {"geometry_block_bytes": 0},
        {"geometry_block_bytes": BLOCK_BYTES + 1},
    ],
    ids=str,
)
async def test_a_model_that_makes_no_sense(worker: Worker, changes: dict[str, Any]) -> None:
    await refused(worker.attach(**changes), "INVALID_ARGUMENT", Reason.BAD_REQUEST)
    assert worker.shards.sent == []
    await worker.nothing_is_left()


async def test_a_shard_that_has_no_kernel(worker: Worker) -> None:
    worker.shards.open_error = "this machine has no kernel for it"
    error = await refused(worker.attach(), "INVALID_ARGUMENT", Reason.UNSUPPORTED_ATTENTION)
    assert "no kernel" in error.message
    await worker.nothing_is_left()


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (ConfigError("names no cores for shard 1"), "INVALID_ARGUMENT", Reason.BAD_REQUEST),
        (TimeoutError(), "UNAVAILABLE", Reason.KV_OWNER_UNREACHABLE),
        (OSError("no memory"), "UNAVAILABLE", Reason.KV_OWNER_UNREACHABLE),
    ],
)
async def test_shards_that_do_not_start(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, reason: Reason
) -> None:
    async def fail(_count: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(worker.shards, "ensure", fail)
        await refused(worker.attach(), code, reason)
    # The worker is as free as before.
    await worker.attach()
    await worker.nothing_is_left()


async def test_a_shard_that_does_not_open_or_close(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "OPEN_TIMEOUT_S", 0.05)
    monkeypatch.setattr(service, "CLOSE_TIMEOUT_S", 0.05)
    # (1) Neither: the caller is told to try again, and the shards are started anew.
    worker.shards.silent = {OpenShard, CloseShard}
    await refused(worker.attach(), "UNAVAILABLE", Reason.KV_OWNER_UNREACHABLE)
    assert worker.shards.restarts == 1
    # (2) The new ones are fine.
    worker.shards.silent = set()
    await worker.attach()
    # (3) They stop answering: Detach frees the rank nevertheless.
    worker.shards.silent = {CloseShard}
    await worker.call("Detach", decode_root_id="root")
    assert worker.shards.restarts == 2
    worker.shards.silent = set()
    await worker.nothing_is_left()


async def test_an_attach_that_is_cancelled_holds_nothing(worker: Worker) -> None:
    worker.shards.silent = {OpenShard}
    task = asyncio.create_task(worker.attach())
    await worker.shards.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(worker.shards.told(CloseShard)) == 2
    await worker.nothing_is_left()


async def test_a_detach_that_is_cut_short_closes_nobody_elses_shards(worker: Worker) -> None:
    # 1. Shards take their time to close, and the root's patience ends before.
    await worker.attach()
    worker.shards.silent.add(CloseShard)
    detaching = asyncio.create_task(worker.call("Detach", decode_root_id="root"))
    await worker.shards.asked.wait()
    detaching.cancel()
    worker.shards.silent.clear()
    # 2. The root attaches again. That waits for the shards, whose late answers say nothing about it.
    again = asyncio.create_task(worker.attach())
    await asyncio.sleep(0.05)
    assert not again.done()
    for shard in range(2):
        worker.shards.is_open[shard] = False
        worker.servicer.handle(ShardClosed(shard, "detached"))
    await again
    await asyncio.sleep(0.05)
    # 3. It stays attached.
    assert worker.servicer.attached is not None
    assert worker.shards.is_open == {0: True, 1: True}
    assert worker.shards.restarts == 0
    await worker.call("Detach", decode_root_id="root")
    await worker.nothing_is_left()
