"""Which blocks a prefill engine pushes in which step, and when it lets go of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tokenmesh.engine.producer import ProducerPlan, ProducerScheduler, StepPush
from tokenmesh.engine.settings import ConnectorSettings, SendTo
from tokenmesh.kv.messages import Destination, EngineCounts, ToService

BLOCK = 128
TICKET = b"t" * 16


class FakeManager:
    """As much of KVCacheManager as the plan looks at."""

    def __init__(self) -> None:
        self.block_pool = SimpleNamespace(num_gpu_blocks=65, get_num_free_blocks=lambda: 60)
        self.tables: dict[str, list[int]] = {}

    def get_block_ids(self, req_id: str) -> tuple[list[int]]:
        return (self.tables[req_id],)


class Engine:
    """A scheduler half driven by hand, one request, blocks 100, 101, ..."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prompt: int, start_token: int = 0) -> None:
        self.sent: list[ToService] = []
        link = SimpleNamespace(send=self.sent.append, close=lambda: None)
        monkeypatch.setattr("tokenmesh.engine.producer.EngineLink", lambda *_: link)
        self.scheduler = ProducerScheduler(ConnectorSettings("", "h", 0, "auto", 1, 1, [0]), BLOCK)
        self.manager = FakeManager()
        self.scheduler.kv_cache_manager = self.manager  # type: ignore[assignment]
        blocks = -(-prompt // BLOCK)
        self.manager.tables["r"] = list(range(100, 100 + blocks))
        target = SendTo(TICKET, [[Destination("h", 1)]], start_token, blocks - start_token // BLOCK)
        params = {SendTo.KEY: msgspec.to_builtins(target)}
        self.request: Any = SimpleNamespace(request_id="r", num_prompt_tokens=prompt, kv_transfer_params=params)
        self.scheduler.allocated(self.request, None, 0)  # type: ignore[arg-type]
        self._new = True

    def step(self, computed: int, scheduled: int, preempted: bool = False) -> ProducerPlan:
        new = [SimpleNamespace(req_id="r", num_computed_tokens=computed)] if self._new and scheduled else []
        old = scheduled and not self._new
        output: Any = SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=["r"] if old else [], num_computed_tokens=[computed] if old else []
            ),
            num_scheduled_tokens={"r": scheduled} if scheduled else {},
            total_num_scheduled_tokens=scheduled,
            preempted_req_ids={"r"} if preempted else None,
        )
        self._new = self._new and not scheduled
        return self.scheduler.plan_step(output)

    def push(self, computed: int, scheduled: int) -> StepPush:
        (push,) = self.step(computed, scheduled).pushes
        return push


def test_a_prompt_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    push = Engine(monkeypatch, prompt=300).push(0, 300)
    assert (push.ready, push.computed, push.computed_first) == ([], [100, 101, 102], 0)
    assert push.opening
    assert push.last


def test_chunks_push_only_whole_blocks_until_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, prompt=600)
    # (1) 200 tokens complete one block; the half-filled second one waits.
    first = engine.push(0, 200)
    assert (first.computed, first.computed_first, first.opening, first.last) == ([100], 0, True, False)
    # (2) A chunk that completes no block opens nothing and pushes nothing.
    assert engine.step(200, 50).pushes == []
    # (3) The next one goes on where the first stopped; its finished blocks are not sent again.
    second = engine.push(250, 150)
    assert (second.ready, second.computed, second.computed_first) == ([], [101, 102], 1)
    assert not second.opening
    # (4) The last chunk sends the tail, partly filled.
    last = engine.push(400, 200)
    assert last.computed == [103, 104]
    assert last.computed_first == 3
    assert last.last


def test_cached_blocks_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    push = Engine(monkeypatch, prompt=600).push(384, 216)
    assert (push.ready, push.ready_first) == ([100, 101, 102], 0)
    assert (push.computed, push.computed_first) == ([103, 104], 3)


def test_blocks_that_the_owner_has_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    # The owner holds 256 tokens, this cache 384: block 2 is ready, 3 and 4 are computed, places count from 0 there.
    push = Engine(monkeypatch, prompt=600, start_token=256).push(384, 216)
    assert (push.ready, push.ready_first) == ([102], 0)
    assert (push.computed, push.computed_first) == ([103, 104], 1)


def test_block_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    for prompt, blocks in ((1, 1), (127, 1), (128, 1), (129, 2), (256, 2)):
        push = Engine(monkeypatch, prompt).push(0, prompt)
        assert len(push.computed) == blocks
        assert push.last


def test_a_finished_prefill_keeps_its_blocks_until_the_mover_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, prompt=300)
    engine.step(0, 300)
    # (1) vLLM is asked to hold the blocks, and the worker half is told whose they are.
    assert engine.scheduler.finished(engine.request)
    plan = engine.step(0, 0)
    assert plan.released == [(TICKET, "r")]
    assert plan.cancelled == []
    assert plan.idle
    # (2) Once only.
    assert engine.step(0, 0).released == []
    assert not engine.scheduler.finished(engine.request)


def test_an_abort_in_the_middle_cancels_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, prompt=600)
    engine.step(0, 200)
    assert engine.scheduler.finished(engine.request)
    plan = engine.step(0, 0)
    assert plan.cancelled == [TICKET]
    assert plan.released == [(TICKET, "r")]


def test_an_abort_before_anything_was_sent_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, prompt=600)
    assert not engine.scheduler.finished(engine.request)
    assert engine.step(0, 0).released == []


def test_block_counts_are_reported_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, prompt=300)
    engine.step(0, 300)
    engine.step(0, 0)
    assert engine.sent == [EngineCounts(blocks_total=64, blocks_free=60)]
    engine.manager.block_pool.get_num_free_blocks = lambda: 64
    engine.scheduler.report_counts()
    assert engine.sent[-1] == EngineCounts(blocks_total=64, blocks_free=64)


def test_a_preempted_prompt_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, prompt=600)
    # (1) Its first chunk is under way when its blocks are given to somebody else.
    assert engine.push(0, 256).opening
    assert engine.step(0, 0, preempted=True).cancelled == [TICKET]
    # (2) It computes on, but nothing more is sent, and its blocks are freed when the mover has let go of them.
    assert engine.step(0, 600).pushes == []
    assert engine.scheduler.finished(engine.request)
    plan = engine.step(0, 0)
    assert (plan.released, plan.cancelled) == ([(TICKET, "r")], [])


def test_a_prompt_preempted_before_it_began_is_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, prompt=300)
    assert engine.step(0, 0, preempted=True).cancelled == []
    assert engine.push(0, 300).last
