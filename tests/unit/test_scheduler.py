"""vLLM's scheduler over several ranks: who lives where, who gives way, and what a lost rank costs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm.v1.request import RequestStatus

from tests.unit.small_engine import Engine, token_at, write_model
from tests.unit.small_kv import BLOCK
from tokenmesh.engine.connector import TokenParallelKVConnector
from tokenmesh.engine.consumer import ConsumerPlan
from tokenmesh.kv.messages import DetachRank, EngineCounts, RankDetached, WantKv
from tokenmesh.parallel.ids import split_owner

Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_model`."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=[False, True], ids=["step by step", "ahead"])
def make(request: pytest.FixtureRequest, model: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes an engine with so many blocks on the root."""
    return lambda root, caching=False, window=0: Engine(model, monkeypatch, request.param, root, caching, window)


def test_requests_spread_over_two_ranks_and_finish(make: Make) -> None:
    engine = make(16)
    engine.attach(1, 16)
    # (1) Admitted in one step, two to each rank.
    for name in "abcd":
        engine.add(name, 8)
    engine.step()
    assert [engine.rank(name) for name in "abcd"] == [0, 1, 0, 1]
    # (2) The service is told about both ranks.
    (root, other) = engine.told(EngineCounts)[-1].ranks
    assert (root.rank, root.sequences, other.rank, other.sequences) == (0, 2, 1, 2)
    # (3) All finish.
    engine.run()
    engine.all_is_well()


def test_who_gives_way_lives_on_the_rank_that_is_short(make: Make) -> None:
    engine = make(16)
    engine.attach(1, 4)
    # (1) Two on rank 1, which is full then; the last to come lives on the root.
    for name, tokens in (("root", 20), ("first", 7), ("second", 7), ("last", 6)):
        engine.add(name, tokens)
    engine.step()
    assert {name: engine.rank(name) for name in engine.requests} == {"root": 0, "first": 1, "second": 1, "last": 0}
    # (2) The first one needs a block: only rank 1's later one is ever preempted, though the root's came after it.
    engine.run()
    assert {name: req.num_preemptions for name, req in engine.requests.items()} == {
        "root": 0,
        "first": 0,
        "second": 1,
        "last": 0,
    }
    engine.all_is_well()


def test_a_lost_rank_costs_its_requests_one_step(make: Make) -> None:
    engine = make(32)
    engine.attach(1, 32)
    for name in "abcd":
        engine.add(name, 8)
    # (1) Some steps on both ranks.
    for _ in range(3):
        engine.step()
    there = [name for name in "abcd" if engine.rank(name) == 1]
    assert there == ["b", "d"]
    had = {name: len(engine.tokens[name]) for name in "abcd"}
    gone = engine.ledger.ranks[1]
    # (2) Rank 1 is lost in a step: what that step sampled for its requests is dropped, the others get theirs.
    engine.step(lost={(1, 1): "silent for 2 s"})
    assert {name: len(engine.tokens[name]) - had[name] for name in "abcd"} == {"a": 1, "b": 0, "c": 1, "d": 0}
    assert [engine.requests[name].status for name in there] == [RequestStatus.PREEMPTED] * 2
    assert engine.told(RankDetached) == [RankDetached(1, 1, "silent for 2 s", 2)]
    # (3) The workers are told to let go of it, once.
    plans = [engine.step().kv_connector_metadata for _ in range(3)]
    assert [plan.dropped for plan in plans if isinstance(plan, ConsumerPlan)] == [[(1, 1)], [], []]
    # (4) Those who lived there are computed again, on the root.
    assert [engine.rank(name) for name in there] == [0, 0]
    engine.run()
    engine.all_is_well()
    assert gone.free_blocks == gone.blocks


def test_who_gave_way_on_a_rank_that_is_then_lost_is_given_nothing_from_there(make: Make) -> None:
    engine = make(16)
    engine.attach(1, 4)
    for name, tokens in (("root", 20), ("first", 7), ("second", 7)):
        engine.add(name, tokens)
    engine.step()
    # (1) Preempted for lack of blocks; scheduling ahead, what it had in flight on rank 1 is still to come.
    while engine.schedule() and not engine.requests["second"].num_preemptions:
        engine.finish()
    had = list(engine.tokens["second"])
    # (2) And does not come.
    engine.finish(lost={(1, 1): "dead"})
    assert engine.tokens["second"] == had
    engine.run()
    engine.all_is_well()


def test_a_rank_that_is_reported_lost_late_is_let_alone_if_it_is_a_new_one(make: Make) -> None:
    engine = make(32)
    engine.attach(1, 32)
    for name in "ab":
        engine.add(name, 8)
    engine.step()
    # (1) It joins again under the next epoch: who lived there is computed again.
    engine.attach(1, 16, epoch=2)
    engine.step()
    assert engine.told(RankDetached) == [RankDetached(1, 1, "replaced", 1)]
    # (2) Reports and orders about the old one are nobody's concern any more.
    engine.inbox.append(DetachRank(1, 1, "too late"))
    engine.step(lost={(1, 1): "dead"})
    engine.step()
    assert len(engine.told(RankDetached)) == 1
    assert engine.ledger.ranks[1].blocks == 16
    # (3) An order about the new one is.
    engine.inbox.append(DetachRank(1, 2, "drained"))
    engine.run()
    assert engine.told(RankDetached)[1:] == [RankDetached(1, 2, "drained", engine.told(RankDetached)[1].recomputed)]
    assert list(engine.ledger.ranks) == [0]
    engine.all_is_well()


def fetching(engine: Engine) -> str:
    """Two requests, of which the second one waits for its KV on rank 1; its engine id."""
    engine.attach(1, 32)
    engine.add("here", 8, max_tokens=30)
    engine.step()
    engine.add("there", 8, fetch=True)
    engine.step()
    (want,) = engine.told(WantKv)
    assert split_owner(want.blocks) == (1, [0, 1])
    assert engine.requests["there"].status is RequestStatus.WAITING_FOR_REMOTE_KVS
    return str(want.request_id)


def test_kv_that_arrives_is_decoded_where_it_landed(make: Make) -> None:
    engine = make(32)
    name = fetching(engine)
    engine.step(finished_recving={name})
    engine.step()
    assert engine.rank(name) == 1
    engine.run()
    engine.all_is_well()
    assert len(engine.told(WantKv)) == 1


@pytest.mark.parametrize("ok", [True, False])
def test_kv_that_arrives_on_a_rank_that_has_gone_is_computed_elsewhere(make: Make, ok: bool) -> None:
    engine = make(32)
    name = fetching(engine)
    gone = engine.ledger.ranks[1]
    # (1) The rank is lost; the hand-off may still write, so the blocks stay.
    engine.step(lost={(1, 1): "dead"})
    for _ in range(3):
        engine.step()
    assert gone.free_blocks == gone.blocks - 2
    assert engine.tokens[name] == []
    # (2) The hand-off has ended, well or not: the blocks go, and the root computes the prompt.
    engine.step(finished_recving={name}, failed_recving=set() if ok else {name})
    engine.step()
    engine.step()
    assert gone.free_blocks == gone.blocks
    assert engine.rank(name) == 0
    engine.run()
    engine.all_is_well()
    assert len(engine.told(WantKv)) == 1


def test_who_is_aborted_while_its_kv_is_on_a_lost_rank_leaves_nothing(make: Make) -> None:
    engine = make(32)
    name = fetching(engine)
    gone = engine.ledger.ranks[1]
    engine.step(lost={(1, 1): "dead"})
    engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    engine.step()
    assert gone.free_blocks == gone.blocks - 2
    engine.step(finished_recving={name})
    assert gone.free_blocks == gone.blocks
    engine.run()
    engine.nothing_is_left()


def two_fetches(engine: Engine) -> dict[int, str]:
    """One awaits KV on rank 1; behind it another awaits KV on the root, and holds most blocks there. Names by rank."""
    engine.attach(1, 16)
    engine.add("first", 8)
    engine.step()
    engine.add("unlucky", 48, fetch=True)
    engine.step()
    engine.add("lucky", 40, fetch=True)
    engine.step()
    names = {split_owner(want.blocks)[0]: want.request_id for want in engine.told(WantKv)}
    assert sorted(names) == [0, 1]
    return names


@pytest.mark.parametrize("lost", [True, False], ids=["rank lost", "prefill failed"])
def test_whose_kv_did_not_come_does_not_block_those_whose_kv_did(make: Make, lost: bool) -> None:
    # (1) Two await KV, the first of them on rank 1.
    engine = make(16)
    names = two_fetches(engine)
    # (2) The first one's KV does not come, and rank 1 has no room any more; the other's is there.
    if lost:
        engine.step(lost={(1, 1): "dead"})
    else:
        engine.add("in its place", 56)
    engine.step(finished_recving=set(names.values()), failed_recving={names[1]})
    engine.run()
    # (3) Both get their tokens.
    engine.all_is_well()


def test_whose_kv_came_to_a_lost_rank_while_it_waited_does_not_block_others(make: Make) -> None:
    # (1) KV has come for both, but there is no slot in the batch for them yet; then rank 1 goes.
    engine = make(16)
    names = two_fetches(engine)
    slots, engine.scheduler.max_num_active_reqs = engine.scheduler.max_num_active_reqs, 1
    engine.step(finished_recving=set(names.values()))
    engine.step()
    engine.step(lost={(1, 1): "dead"})
    engine.scheduler.max_num_active_reqs = slots
    # (2) Both get their tokens.
    engine.run()
    engine.all_is_well()


def test_what_lies_before_a_window_is_not_fetched(make: Make) -> None:
    # (1) A model whose layers all have a window; somebody lives in the first blocks of rank 1.
    engine = make(32, window=8)
    engine.attach(1, 16)
    engine.add("first", 8)
    engine.step()
    engine.add("there", 8)
    engine.step()
    assert engine.rank("there") == 1
    theirs = set(engine.ledger.get_block_ids("there")[0])
    # (2) A prompt of five windows is fetched to that rank: only blocks of its own, the last ones.
    engine.add("long", 40, fetch=True)
    engine.step()
    (want,) = engine.told(WantKv)
    assert split_owner(want.blocks)[0] == 1
    assert len(set(want.blocks)) == len(want.blocks) < 10
    assert not theirs & set(want.blocks)
    assert want.start_token + want.num_tokens == 40
    assert want.start_token == 40 - len(want.blocks) * BLOCK
    assert want.cached_tokens == 0
    engine.step(finished_recving={want.request_id})
    engine.run()
    assert engine.tokens["long"] == [token_at(i) for i in range(40, 48)]


def test_what_a_failed_fetch_will_need_is_reserved_nowhere(make: Make) -> None:
    # (1) A prompt's fetch fails. Whoever is placed from then on is told what is reserved.
    engine = make(16)
    engine.add("there", 40, fetch=True)
    engine.step()
    (want,) = engine.told(WantKv)
    reserved, seen = engine.ledger._reserved, list[int]()
    engine.ledger._reserved = lambda rank: seen.append(reserved(rank)) or seen[-1]  # type: ignore[func-returns-value]
    engine.step(finished_recving={want.request_id}, failed_recving={want.request_id})
    engine.step()
    engine.step()
    # (2) It is placed again, and what it needs is not counted against itself.
    assert seen
    assert set(seen) == {0}
    engine.run()
    engine.all_is_well()


def test_the_connector_is_ours(make: Make) -> None:
    engine = make(8)
    assert isinstance(engine.scheduler.connector, TokenParallelKVConnector)
    assert engine.scheduler.kv_cache_manager is engine.ledger
    engine.run()


@pytest.mark.parametrize("seed", range(12))
def test_ranks_come_and_go_while_requests_do(make: Make, seed: int) -> None:
    rng = random.Random(seed)
    engine = make(10, caching=seed % 2 == 1)
    epoch, awaited = 0, set[str]()
    # (1) Small ranks, many requests, a third of which have their KV fetched; something happens in most steps.
    for number in range(120):
        if number < 60 and rng.random() < 0.4:
            engine.add(f"r{number}", rng.randint(1, 16), max_tokens=rng.randint(1, 16), fetch=rng.random() < 0.3)
        if rng.random() < 0.15:
            epoch += 1
            engine.attach(rng.randint(1, 3), rng.randint(2, 10), epoch)
        epochs = [*engine.epochs.items()]
        if epochs and rng.random() < 0.05:
            engine.inbox.append(DetachRank(*rng.choice(epochs), "drained"))
        lost = {rng.choice(epochs): "dead"} if epochs and rng.random() < 0.08 else None
        awaited |= {want.request_id for want in engine.told(WantKv)} - engine.arrived
        arrived = {name for name in sorted(awaited) if rng.random() < 0.3}
        awaited -= arrived
        engine.step(lost, finished_recving=arrived, failed_recving={name for name in arrived if rng.random() < 0.4})
    # (2) In the end all KV comes, everybody has every token, and nothing is left.
    for _ in range(500):
        engine.step(finished_recving={want.request_id for want in engine.told(WantKv)} - engine.arrived)
    assert sum(req.num_preemptions for req in engine.requests.values()) > 0
    engine.all_is_well()
