"""The ledger's rules one by one: room, watermarks, prefixes, ranks that go, and what vLLM asks of it."""

from __future__ import annotations

import ast
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched import async_scheduler, scheduler

from tests.unit.small_kv import BLOCK, Group, request
from tokenmesh.engine.connector import TokenParallelKVConnector
from tokenmesh.engine.ledger import Ledger
from tokenmesh.parallel.ids import STRIDE


def test_ranks_fill_up_in_turn_and_the_group_is_full_when_all_are() -> None:
    group = Group(4, 4)
    # (1) Two blocks each: both ranks get two requests.
    requests = [group.admitted(str(i), 8, first=100 * i + 1) for i in range(4)]
    assert sorted(map(group.rank, requests)) == [0, 0, 1, 1]
    assert group.free_blocks() == {0: 0, 1: 0}
    assert group.ledger.usage == 1
    # (2) No room anywhere: the fifth waits, bound to nothing.
    late = request("late", list(range(1, 9)))
    assert not group.admit(late)
    assert group.short == []
    # (3) It takes the place of whoever goes.
    group.ledger.free(requests[1])
    assert group.admit(late)
    for req in (late, requests[0], requests[2], requests[3]):
        group.ledger.free(req)
    assert group.free_blocks() == {0: 4, 1: 4}


def test_a_running_request_that_finds_no_block_has_its_rank_called_short() -> None:
    group = Group(6, 4)
    # (1) Two on rank 1, which is full then; the root has a block left.
    here = group.admitted("here", 20)
    there = [group.admitted(name, 8, first=first) for name, first in (("a", 100), ("b", 200))]
    assert [group.rank(req) for req in (here, *there)] == [0, 1, 1]
    assert group.free_blocks() == {0: 1, 1: 0}
    # (2) One of them needs a block: it keeps what it has, and the root's is of no use to it.
    assert not group.grow(there[0])
    assert group.short == [1]
    assert group.rank(there[0]) == 1
    assert group.free_blocks() == {0: 1, 1: 0}
    # (3) Once the other one is preempted there is one.
    group.ledger.free(there[1])
    assert group.grow(there[0])
    assert group.short == [1]
    group.ledger.free(there[0])
    group.ledger.free(here)
    assert group.free_blocks() == {0: 6, 1: 4}


def test_watermark_and_reserved_blocks_are_no_room() -> None:
    # (1) 10 blocks, of which 2 stay free as long as somebody runs; rank 1 is longer, but has the room.
    group = Group(10, 20, watermark=0.2)
    group.admitted("a", 28)
    group.admitted("b", 32, first=100)
    assert group.free_blocks() == {0: 3, 1: 12}
    small = request("small", list(range(200, 208)))
    assert group.admit(small, others_run=True)
    assert group.rank(small) == 1
    # (2) Without the watermark it would have gone to the root.
    group = Group(10, 20)
    group.admitted("a", 28)
    group.admitted("b", 32, first=100)
    small = request("small", list(range(200, 208)))
    assert group.admit(small)
    assert group.rank(small) == 0
    # (3) What prefills under way still need is as good as gone.
    group.ledger.free(small)
    group.reserved[0] = 2
    assert group.admit(small)
    assert group.rank(small) == 1


def test_a_request_that_never_fits_a_rank_is_not_put_there() -> None:
    group = Group(12, 4)
    group.admitted("a", 4)
    # 5 blocks in the end, though 1 now.
    long = request("long", [1, 2, 3, 4], max_tokens=16)
    assert group.admit(long)
    assert group.rank(long) == 0


def test_a_prefix_in_use_spares_its_blocks() -> None:
    group = Group(4, 4)
    # (1) Its prompt is cached on the root, and held: one more block is all that a second one needs. That is there, and
    # counts for more than that rank 1 is empty, whose blocks others are waiting for.
    first = group.admitted("first", 12)
    group.reserved[1] = 4
    second = request("second", [*range(1, 13), 50, 51], max_tokens=2)
    assert group.admit(second)
    assert group.rank(first) == group.rank(second) == 0
    assert group.ledger.get_block_ids("first")[0] == group.ledger.get_block_ids("second")[0][:3]
    assert group.free_blocks() == {0: 0, 1: 4}
    # (2) Both let go of the shared blocks.
    group.ledger.free(first)
    assert group.free_blocks() == {0: 0, 1: 4}
    group.ledger.free(second)
    assert group.free_blocks() == {0: 4, 1: 4}


def test_blocks_popped_now_go_back_later_to_where_they_came_from() -> None:
    group = Group(4, 4)
    here, there = group.admitted("here", 8), group.admitted("there", 8, first=100)
    # (1) Popped: the requests are bound no more, the blocks are still out.
    popped = [group.ledger.pop_blocks_for_free(req) for req in (here, there)]
    assert group.free_blocks() == {0: 2, 1: 2}
    assert not any(entry.requests for entry in group.ledger.ranks.values())
    # (2) Given back in one go, also to a rank that has gone meanwhile.
    gone = group.ledger.ranks[1]
    assert group.ledger.detach(1) == []
    group.ledger.block_pool.free_blocks(block for blocks in popped for block in reversed(blocks))
    assert group.free_blocks() == {0: 4}
    assert gone.free_blocks == 4


def test_a_lost_rank_gives_its_requests_up_and_its_number_can_be_had_again() -> None:
    group = Group(4, 4)
    here, there = group.admitted("here", 8), group.admitted("there", 8, first=100)
    assert group.ledger.detach(1) == [there]
    assert group.ledger.is_lost("there")
    assert not group.ledger.is_lost("here")
    assert group.ledger.detach(1) == []
    # A new rank of that number does not get the old one's requests back, nor its blocks.
    group.ledger.attach(1, 6)
    assert group.ledger.is_lost("there")
    group.ledger.free(there)
    assert group.free_blocks() == {0: 2, 1: 6}
    there.num_computed_tokens = 0
    assert group.admit(there)
    assert group.rank(there) == 1
    group.ledger.free(there)
    group.ledger.free(here)
    assert group.free_blocks() == {0: 4, 1: 6}


def test_evicted_blocks_are_forgotten_on_their_rank_alone() -> None:
    group = Group(4, 4)
    here, there = group.admitted("here", 8), group.admitted("there", 8, first=100)
    ids = group.ledger.get_block_ids("there")[0]
    group.ledger.evict_blocks(set(ids))
    cached = [group.ledger.estimate_cached_tokens(req) for req in (here, there)]
    assert cached == [8, 0]


def test_ranks_that_cannot_be() -> None:
    group = Group(4)
    for rank, blocks in ((0, 4), (-1, 4), (1, 0), (1, STRIDE + 1), (1 << 20, 4)):
        with pytest.raises(ValueError, match="cannot be attached"):
            group.ledger.attach(rank, blocks)
    with pytest.raises(ValueError, match="root"):
        group.ledger.detach(0)
    # Ids of a root that has more blocks would be those of rank 1.
    root: Any = SimpleNamespace(block_pool=SimpleNamespace(num_gpu_blocks=STRIDE + 1))
    with pytest.raises(ValueError, match="at most"):
        Ledger(lambda _: root, root, BLOCK, 64)


def used(owner: str) -> set[str]:
    """Attributes that vLLM's schedulers use of `self.OWNER`, outside of their constructors."""
    found = set()
    for module in (scheduler, async_scheduler):
        functions = [
            function
            for node in ast.parse(inspect.getsource(module)).body
            if isinstance(node, ast.ClassDef)
            for function in node.body
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and function.name != "__init__"
        ]
        for node in (node for function in functions for node in ast.walk(function)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == f"self.{owner}":
                found.add(node.attr)
    return found


def test_the_ledger_has_all_that_vllms_schedulers_ask_for() -> None:
    """An upgrade of vLLM that asks for more fails here and not in a step."""
    ledger = Group(4).ledger
    # (1) Asked only of connectors that we are not.
    assert TokenParallelKVConnector.supports_divergent_local_hybrid_hits.fget(None) is False  # type: ignore[attr-defined]
    asked = used("kv_cache_manager") - {"get_computed_blocks_for_connector"}
    assert {"allocate_slots", "free", "block_pool", "coordinator"} <= asked
    assert {name for name in asked if not hasattr(ledger, name)} == set()
    # (2) The same for its parts.
    pool, coordinator = used("kv_cache_manager.block_pool"), used("kv_cache_manager.coordinator")
    assert "free_blocks" in pool
    assert "get_num_blocks_to_allocate" in coordinator
    assert {name for name in pool if not hasattr(ledger.block_pool, name)} == set()
    assert {name for name in coordinator if not hasattr(ledger.coordinator, name)} == set()
