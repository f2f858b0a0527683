"""The hand-off of a decode root: what became of a prompt's KV is told once, and only when nobody can write it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from services.decode.root import handoff as handoff_module
from services.decode.root.handoff import HandOff, Prompt
from tests.unit.fake_service import free_ports
from tokenmesh.config import DecodeConfig
from tokenmesh.context import WorkContext
from tokenmesh.kv.geometry import BlockGeometry
from tokenmesh.kv.messages import DropKv, KvArrived, WantKv
from tokenmesh.kv.settling import Outcome
from tokenmesh.parallel.ids import STRIDE
from tokenmesh.rpc.errors import Reason
from tokenmesh.rpc.server import RpcServer
from tokenmesh.telemetry.metrics import Metrics
from tokenmesh.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc

GEOMETRY = BlockGeometry(1, 1, 64, 128, "float32", 65536, "hnd")
BLOCKS = [STRIDE + 10, STRIDE + 11]


class Owner:
    """Of rank 1's blocks. Notes what it is asked."""

    def __init__(self, told: list[Any], name: str, settles: asyncio.Event | None = None) -> None:
        self.shards = [kv_pb2.KvShard(host="127.0.0.1", port=1)]
        self._told = told
        self._name = name
        self._settles = settles

    async def expect(self, transfer_id: bytes, blocks: list[int], codec: str) -> None:
        self._told.append((self._name, "expects", blocks))

    async def settle(self, transfer_id: bytes) -> Outcome:
        if self._settles is not None:
            await self._settles.wait()
        self._told.append((self._name, "settled"))
        return Outcome(True, "", kv_pb2.KvReceipt(bytes=1))


class Group:
    """Of one other rank, which may come back as another owner."""

    def __init__(self, owner: Owner) -> None:
        self.current = owner

    def owner(self, rank: int) -> Any:
        return self.current

    def owns(self, owner: Any) -> bool:
        return owner is self.current


class Prefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Does what the test says."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.fails = False

    async def Prefill(self, request: Any, context: Any) -> prefill_pb2.PrefillResponse:
        self.called.set()
        await self.may_answer.wait()
        if self.fails:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no")
        return prefill_pb2.PrefillResponse(receipt=kv_pb2.KvReceipt(bytes=1))


@asynccontextmanager
async def serving(count: int = 1) -> AsyncIterator[list[tuple[str, Prefill]]]:
    servers, found = [], []
    for port in free_ports(count):
        server, prefill = RpcServer("127.0.0.1", port), Prefill()
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(prefill, server.server)
        await server.start()
        servers.append(server)
        found.append((server.address, prefill))
    try:
        yield found
    finally:
        for server in servers:
            await server.stop(grace=0)


class Root:
    """A hand-off with an engine that only listens."""

    def __init__(self, *addresses: str, settles: asyncio.Event | None = None, timeout_s: float = 60.0) -> None:
        self.told: list[Any] = []
        self._heard = asyncio.Event()
        self.group: Any = Group(Owner(self.told, "owner", settles))
        config = DecodeConfig(kv_transfer={"timeout_s": timeout_s})
        self.handoff = HandOff(config, "root", self.group, Metrics())
        mover = SimpleNamespace(geometry=GEOMETRY, host="127.0.0.1", port=1)
        hub = SimpleNamespace(send=self._send)
        engine: Any = SimpleNamespace(shards=1, hub=hub, movers={0: mover})
        self.handoff.attach(engine)
        work = WorkContext.from_headers({}, "r")
        self.prompt = Prompt("r", list(range(200)), addresses, work)

    def _send(self, peer: str, message: Any) -> None:
        self.told.append((peer, message))
        self._heard.set()

    def want(self) -> None:
        self._heard.clear()
        self.handoff.handle(WantKv("r-0", "r", 0, 200, BLOCKS))

    async def heard(self) -> None:
        """Until the engine has been told."""
        await asyncio.wait_for(self._heard.wait(), 5)

    @property
    def arrivals(self) -> list[Any]:
        return [entry for entry in self.told if isinstance(entry[1], KvArrived)]


@pytest.fixture
def anyhow() -> KvArrived:
    return KvArrived("r-0", False)


async def test_a_prompt_given_up_before_anything_began_is_told_too(anyhow: KvArrived) -> None:
    # 1. The scheduler's two messages are read in one turn of the loop.
    root = Root("127.0.0.1:1")
    with root.handoff.registered("r", root.prompt):
        root.want()
        root.handoff.handle(DropKv("r-0"))
        # 2. The blocks would never be freed if the workers did not hear of it.
        await root.heard()
    assert root.told == [("worker-0", anyhow)]
    assert root.handoff.open == 0
    assert not root.handoff.failures


async def test_a_prompt_given_up_while_its_ticket_is_being_closed_waits_for_that(anyhow: KvArrived) -> None:
    settles = asyncio.Event()
    async with serving() as [(address, prefill)]:
        root = Root(address, settles=settles)
        with root.handoff.registered("r", root.prompt):
            # 1. The call has failed, and the owner takes its time to close the ticket.
            root.want()
            await prefill.called.wait()
            prefill.fails = True
            prefill.may_answer.set()
            await asyncio.sleep(0.2)
            # 2. The client gives up.
            root.handoff.handle(DropKv("r-0"))
            await asyncio.sleep(0.2)
            assert root.arrivals == []
            # 3. The engine hears of it once nothing can be written any more.
            settles.set()
            await root.heard()
        assert root.told[-2:] == [("owner", "settled"), ("worker-0", anyhow)]
        # 4. Whose KV nobody wants any more has not failed.
        assert not root.handoff.failures
        await root.handoff.close()


async def test_a_rank_that_is_back_is_another_owner(anyhow: KvArrived) -> None:
    async with serving(2) as [(first, slow), (second, other)]:
        root = Root(first, second)
        other.may_answer.set()
        with root.handoff.registered("r", root.prompt):
            # 1. The rank goes and comes back while the first service computes: its ids are other sequences' now.
            root.want()
            await slow.called.wait()
            root.group.current = Owner(root.told, "the next owner")
            slow.fails = True
            slow.may_answer.set()
            await root.heard()
        # 2. No other service is sent there, by whatever name.
        assert not other.called.is_set()
        assert not [entry for entry in root.told if entry[0] == "the next owner"]
        assert root.arrivals == [("worker-0", anyhow)]
        assert root.prompt.failed
        # 3. Both are counted: the service, whose abort names no reason of ours, and the rank.
        assert root.handoff.failures == {Reason.INTERNAL.value: 1, Reason.KV_OWNER_UNREACHABLE.value: 1}
        await root.handoff.close()


async def test_a_service_that_never_answers_is_given_up_in_time(anyhow: KvArrived) -> None:
    settles = asyncio.Event()
    async with serving(2) as [(first, _), (second, other)]:
        root = Root(first, second, settles=settles, timeout_s=0.3)
        other.may_answer.set()
        with root.handoff.registered("r", root.prompt):
            # 1. The first service takes all the time that there is, and the owner some more to close the ticket.
            root.want()
            await asyncio.sleep(0.6)
            assert root.arrivals == []
            settles.set()
            await root.heard()
        # 2. One ticket, closed before the engine hears of it; for another service there is no time left.
        assert root.told == [("owner", "expects", [10, 11]), ("owner", "settled"), ("worker-0", anyhow)]
        assert not other.called.is_set()
        assert root.prompt.failed
        # 3. Counted for the call, and for the prompt that is out of time.
        assert root.handoff.failures == {Reason.DEADLINE_EXCEEDED.value: 2}
        await root.handoff.close()


async def test_a_service_that_was_just_unreachable_is_tried_last(monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than any test takes.
    monkeypatch.setattr(handoff_module, "RETRY_AFTER_S", 60.0)
    async with serving(2) as [(first, broken), (second, other)]:
        root = Root(first, second)

        async def prompt(*failing: Prefill) -> list[Prefill]:
            """Returns who was asked."""
            for prefill in (broken, other):
                prefill.called.clear()
                prefill.may_answer.set()
                prefill.fails = prefill in failing
            root.want()
            await root.heard()
            assert root.arrivals[-1] == ("worker-0", KvArrived("r-0", True))
            return [prefill for prefill in (broken, other) if prefill.called.is_set()]

        with root.handoff.registered("r", root.prompt):
            # 1. Prompts go to the first of their candidates; it is unreachable, and the second takes over.
            assert await prompt(broken) == [broken, other]
            # 2. The next prompt does not wait for it, whether or not it is back.
            assert await prompt() == [other]
            # 3. Last is not never: the second goes too, so that the first is asked after it.
            assert await prompt(other) == [broken, other]
            # 4. Some time later it is as good as any.
            monkeypatch.setattr(handoff_module, "RETRY_AFTER_S", 0.0)
            assert await prompt() == [broken]
        assert root.handoff.failures == {Reason.INTERNAL.value: 2}
        await root.handoff.close()


async def test_a_prompt_that_services_may_die_of_is_not_shown_to_all() -> None:
    async with serving(3) as found:
        root = Root(*(address for address, _ in found))
        for _, prefill in found:
            prefill.fails = True
            prefill.may_answer.set()
        with root.handoff.registered("r", root.prompt):
            root.want()
            await root.heard()
        # The root computes it.
        assert root.arrivals == [("worker-0", KvArrived("r-0", False))]
        assert [prefill.called.is_set() for _, prefill in found] == [True, True, False]
        await root.handoff.close()


def test_many_pairs_are_looked_at_more_rarely() -> None:
    # 50 prefill services and 4 owners: 200 calls a round, of every root.
    for pairs, seconds in ((1, 2.0), (40, 2.0), (200, 10.0)):
        pauses = {handoff_module.look_pause(pairs) for _ in range(100)}
        assert len(pauses) > 50
        assert 0.8 * seconds <= min(pauses) <= max(pauses) <= 1.2 * seconds


async def test_what_arrived_is_told_as_such() -> None:
    async with serving() as [(address, prefill)]:
        root = Root(address)
        prefill.may_answer.set()
        with root.handoff.registered("r", root.prompt):
            root.want()
            await root.heard()
        assert root.told == [
            ("owner", "expects", [10, 11]),
            ("owner", "settled"),
            ("worker-0", KvArrived("r-0", True)),
        ]
        assert not root.prompt.failed
        assert root.prompt.receipt is not None
        assert not root.handoff.failures
        await root.handoff.close()
