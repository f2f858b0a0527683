"""The root's group over a worker that only says what workers would say: who is attached, given up, and tried again."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from services.decode.root import group as group_module
from services.decode.root.group import LONGEST_RETRY_S, RETRY_S, SILENCES, Group
from tests.unit.fake_service import free_ports
from tokenmesh.config import DecodeConfig, GroupConfig
from tokenmesh.engine.join import JoinRank
from tokenmesh.kv.messages import AttachRank, DetachRank, EngineCounts, RankDetached
from tokenmesh.parallel.rank import LayerSpec, RankSpec
from tokenmesh.parallel.rows import HeadShape
from tokenmesh.rpc.errors import Reason, unavailable
from tokenmesh.rpc.server import RpcServer
from tokenmesh.v1 import admin_pb2, kv_pb2, worker_pb2, worker_pb2_grpc

SPEC = RankSpec(HeadShape(2, 1, 64, "float32"), [LayerSpec(0.1)], 32, "cpu_attn/vec", 4, 64, 8)
BLOCKS = 7
WAIT_S = 10.0
"""For what should happen at once; far less than what would happen of itself."""

pytestmark = pytest.mark.timeout(60)


class Worker(worker_pb2_grpc.WorkerServiceServicer):
    """Of rank 1. Answers, unless it was told otherwise."""

    def __init__(self) -> None:
        self.told: list[str] = []
        """Calls, less those that only look."""
        self.root = ""
        self.left = asyncio.Event()
        self.draining = False
        self.looks: Iterator[str] = itertools.repeat("answers")
        """How the next looks at it go: it answers, refuses or hangs."""
        self.looked = 0
        self.answered = 0.0
        """When a look was last answered."""

    async def Attach(self, request: Any, context: Any) -> worker_pb2.AttachResponse:
        self.told.append("Attach")
        if self.draining:
            raise unavailable(Reason.DRAINING, "the worker is going away")
        self.root = request.decode_root_id
        shard = kv_pb2.KvShard(host="127.0.0.1", port=1)
        return worker_pb2.AttachResponse(
            blocks=BLOCKS, shards=[worker_pb2.RankShard(kv=shard, exchange=shard)], token=b"t"
        )

    async def Detach(self, request: Any, context: Any) -> worker_pb2.DetachResponse:
        self.told.append("Detach")
        if request.decode_root_id == self.root:
            self.root = ""
            self.left.set()
        return worker_pb2.DetachResponse()

    async def GetStats(self, request: Any, context: Any) -> worker_pb2.GetStatsResponse:
        self.looked += 1
        match next(self.looks):
            case "refuses":
                raise unavailable(Reason.KV_OWNER_UNREACHABLE, "nobody is there")
            case "hangs":
                await asyncio.Event().wait()
        self.answered = time.monotonic()
        return worker_pb2.GetStatsResponse(decode_root_id=self.root, draining=self.draining)


class Root:
    """A group of two, with an engine that only listens."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self.told: list[Any] = []
        """What the scheduler heard."""
        self.joins: list[JoinRank] = []
        self.join_fails: str | Exception = ""
        """What the engine worker says against a rank, or vLLM raises."""
        self.group = Group(
            DecodeConfig(token_parallel_size=2, group=GroupConfig(timeout_s=timeout_s)), "root", [address]
        )
        self.engine: Any = SimpleNamespace(
            shards=1,
            movers={},
            device_blocks=[],
            counts=EngineCounts(0, 0),
            hub=SimpleNamespace(send=self._send),
            llm=SimpleNamespace(collective_rpc=self._call),
        )

    def _send(self, peer: str, message: Any) -> None:
        assert peer == "scheduler"
        self.told.append(message)

    async def _call(self, method: str, args: tuple[bytes, ...] = ()) -> list[Any]:
        if method == "rank_spec":
            return [msgspec.to_builtins(SPEC)]
        self.joins.append(msgspec.msgpack.decode(args[0], type=JoinRank))
        if isinstance(self.join_fails, Exception):
            raise self.join_fails
        return [("", self.join_fails) if self.join_fails else ("tcp", "")]

    @property
    def rank(self) -> admin_pb2.RankStatus:
        return self.group.describe()[1]

    async def attached(self) -> int:
        """Waits until rank 1 is, and returns its epoch."""
        await until(lambda: self.rank.attached)
        return self.joins[-1].epoch

    async def given_up(self) -> DetachRank:
        """Waits until the scheduler is told to let rank 1 go."""
        await until(lambda: isinstance(self.told[-1], DetachRank))
        found: DetachRank = self.told[-1]
        return found


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - a keeper tells nobody how far it is
            await asyncio.sleep(0.005)


@asynccontextmanager
async def running(timeout_s: float = 60.0, draining: bool = False) -> AsyncIterator[tuple[Root, Worker]]:
    """Both, started; nothing is attached after it."""
    server, worker = RpcServer("127.0.0.1", free_ports(1)[0]), Worker()
    worker.draining = draining
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server.server)
    await server.start()
    root = Root(server.address, timeout_s)
    try:
        await root.group.start(root.engine)
        yield root, worker
    finally:
        await root.group.close()
        await server.stop(grace=0)
    assert worker.root == ""


class Pauses:
    """asyncio as a keeper sees it, but its pauses are noted and take no time."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        self.taken.append(seconds)
        await asyncio.sleep(0.001)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    pauses = Pauses()
    monkeypatch.setattr(group_module, "asyncio", pauses)
    return pauses


@pytest.fixture(autouse=True)
def watched_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "WATCH_S", 0.02)


async def test_a_rank_is_attached_and_let_go_with_its_group() -> None:
    async with running() as (root, worker):
        # 1. The scheduler hears of it once the engine is connected.
        epoch = await root.attached()
        assert root.told == [AttachRank(1, epoch, BLOCKS)]
        assert (root.joins[0].shards, root.joins[0].token) == ([("127.0.0.1", 1)], b"t")
        assert (root.rank.blocks_total, root.rank.exchange_transport, root.rank.error) == (BLOCKS, "tcp", "")
        # 2. It stays as long as it answers.
        looked = worker.looked
        await until(lambda: worker.looked > looked + 5)
        assert worker.told == ["Attach"]
        assert len(root.told) == 1
    # 3. Its worker is free again.
    assert worker.told == ["Attach", "Detach"]


async def test_a_rank_that_drains_is_let_go_long_before_its_time_is_out() -> None:
    async with running() as (root, worker):
        epoch = await root.attached()
        owner = root.group.owner(1)
        # 1. Its worker says that it wants to go, and waits for that.
        worker.draining = True
        await asyncio.wait_for(worker.left.wait(), WAIT_S)
        # 2. The scheduler was told first, and nothing is written there any more.
        assert root.told[1:] == [DetachRank(1, epoch, "drained")]
        assert root.rank.error == "drained"
        assert owner is not None
        assert root.group.owner(1) is None
        assert not root.group.owns(owner)
        # 3. It is asked again, and says why not; the engine is left alone.
        await until(lambda: root.rank.error == "DRAINING: the worker is going away")
        assert len(root.joins) == 1


async def test_a_worker_that_was_started_anew_is_given_up() -> None:
    async with running() as (root, worker):
        epoch = await root.attached()
        # 1. It knows of no root.
        worker.root = ""
        assert await root.given_up() == DetachRank(1, epoch, "the worker has left the group")
        # 2. It is attached again, as another.
        await until(lambda: len(root.joins) == 2)
        assert await root.attached() > epoch


async def test_a_silent_worker_is_given_up_when_its_time_is_out_and_no_sooner() -> None:
    async with running(timeout_s=1.0) as (root, worker):
        epoch = await root.attached()
        await until(lambda: worker.looked)
        # 1. From now on it is silent, at many looks in a second.
        worker.looks = itertools.repeat("refuses")
        assert await root.given_up() == DetachRank(1, epoch, "nobody is there")
        # 2. The last thing that was heard of it is that old.
        assert time.monotonic() - worker.answered >= 1.0


async def test_a_worker_is_given_up_for_silences_in_a_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "STATS_TIMEOUT_S", 1.0)
    async with running(timeout_s=0.001) as (root, worker):
        await root.attached()
        await until(lambda: worker.looked)
        # 1. A busy worker misses looks now and then; later it hangs.
        worker.looked = 0
        almost = [*["refuses"] * (SILENCES - 1), "answers"]
        worker.looks = iter([*almost, *almost, *["hangs"] * SILENCES])
        await root.given_up()
        # 2. Nobody waited for an answer for longer than a look may take.
        assert worker.looked == 2 * len(almost) + SILENCES


@pytest.mark.parametrize(
    ("fails", "error"),
    [
        ("Traceback:\nno route to the rank\n", "no route to the rank"),
        (RuntimeError("the engine is dead"), "the engine is dead"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=["no pair", "vLLM", "without a word"],
)
async def test_joins_that_fail_are_tried_again_ever_more_rarely(
    pauses: Pauses, fails: str | Exception, error: str
) -> None:
    async with running() as (root, worker):
        # 1. The engine stands still while it tries to connect.
        root.join_fails = fails
        await until(lambda: len(pauses.taken) > 7)
        assert pauses.taken[:7] == [2, 4, 8, 16, LONGEST_RETRY_S, LONGEST_RETRY_S, LONGEST_RETRY_S]
        # 2. The status says why, nobody is sent there, and the worker's memory was freed each time.
        assert root.rank.error == f"RANK_UNREACHABLE: {error}"
        assert root.group.owner(1) is None
        assert root.told == []
        assert worker.told[:6] == ["Attach", "Detach"] * 3
        # 3. It works at last. A rank that is lost later is tried soon.
        root.join_fails = ""
        epoch = await root.attached()
        taken = len(pauses.taken)
        root.group.handle(RankDetached(1, epoch, "lost", 0))
        await until(lambda: len(pauses.taken) > taken)
        assert pauses.taken[taken] == RETRY_S


async def test_a_rank_that_is_lost_again_and_again_is_tried_ever_more_rarely(
    pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as (root, _):

        async def lose(times: int) -> list[float]:
            taken = len(pauses.taken)
            for number in range(1, times + 1):
                epoch = await root.attached()
                root.group.handle(RankDetached(1, epoch, "lost", 0))
                await until(lambda wanted=taken + number: len(pauses.taken) >= wanted)
            return pauses.taken[taken:]

        # 1. It connects, and then takes no rows: each time the engine stands still until it is given up.
        assert await lose(6) == [1, 2, 4, 8, 16, LONGEST_RETRY_S]
        # 2. One that was there for a while is tried at once.
        monkeypatch.setattr(group_module, "STEADY_S", 0.0)
        assert await lose(1) == [RETRY_S]


async def test_a_worker_that_refuses_is_asked_again_soon(pauses: Pauses) -> None:
    async with running(draining=True) as (root, worker):
        await until(lambda: len(pauses.taken) > 3)
        # Asking costs the engine nothing, and there is nothing to let go.
        assert set(pauses.taken) == {RETRY_S}
        assert set(worker.told) == {"Attach"}
        assert root.joins == []
        assert root.rank.error == "DRAINING: the worker is going away"


async def test_what_is_said_of_an_earlier_attachment_does_not_end_this_one(pauses: Pauses) -> None:
    async with running() as (root, worker):
        # 1. The scheduler loses the rank.
        first = await root.attached()
        owner = root.group.owner(1)
        assert owner is not None
        root.group.handle(RankDetached(1, first, "lost", 2))
        assert (root.rank.attached, root.rank.error) == (False, "lost")
        assert not root.group.owns(owner)
        # 2. It is back, as another owner; its worker was told to forget the old one.
        second = await root.attached()
        assert second > first
        assert worker.told == ["Attach", "Detach", "Attach"]
        assert root.told == [AttachRank(1, first, BLOCKS), AttachRank(1, second, BLOCKS)]
        assert not root.group.owns(owner)
        # 3. Something late is counted, and changes nothing.
        root.group.handle(RankDetached(1, first, "late", 3))
        looked = worker.looked
        await until(lambda: worker.looked > looked + 3)
        assert (root.rank.attached, root.rank.error) == (True, "")
        assert len(root.joins) == 2
        assert (root.group.stats.detached, root.group.stats.recomputed) == (2, 5)
