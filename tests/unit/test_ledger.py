"""The ledger over vLLM's real managers: whatever happens, every block has one owner, and all come back."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from tests.unit.small_kv import BLOCK, MAX_LEN, Group, request
from tokenmesh.engine.ledger import RankBlocks
from tokenmesh.parallel.ids import STRIDE, rank_of


class Lives(RuleBasedStateMachine):
    """Requests come, grow, are preempted and end while ranks come and go."""

    ROOT = 10
    SIZES: ClassVar[list[int]] = [4, 7, 12]

    def __init__(self) -> None:
        super().__init__()
        self.group = Group(self.ROOT)
        self.ledger = self.group.ledger
        self.count = 0
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.lost: list[Request] = []
        """Hold blocks of a rank that has gone, as a request does whose KV is still awaited."""
        self.deferred: list[list[KVCacheBlock]] = []
        self.entries = {0: self.ledger.ranks[0]}
        self.gone: list[RankBlocks] = []

    @rule(seed=st.integers(0, 2), length=st.integers(1, 24), max_tokens=st.integers(1, 30))
    def arrive(self, seed: int, length: int, max_tokens: int) -> None:
        # Few different prompts, so that prefixes are shared.
        self.count += 1
        self.waiting.append(request(str(self.count), [seed + 1] * 8 + list(range(length)), max_tokens))
        self.admit()

    @precondition(lambda self: self.waiting)
    @rule()
    def admit(self) -> None:
        req = self.waiting[0]
        if self.group.admit(req):
            self.running.append(self.waiting.pop(0))
            return
        # One that found no room is bound to nothing.
        assert all(req.request_id not in entry.requests for entry in self.ledger.ranks.values())

    @precondition(lambda self: self.waiting)
    @rule()
    def look_without_admitting(self) -> None:
        self.ledger.get_computed_blocks(self.waiting[0])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        req = data.draw(st.sampled_from(self.running))
        if req.num_tokens >= MAX_LEN:
            return
        rank, told = self.group.rank(req), len(self.group.short)
        room = self.ledger.ranks[rank].free_blocks > 0 or req.num_tokens % BLOCK > 0
        assert self.group.grow(req) == room
        # Only a request that runs and finds no block has its rank called short.
        assert self.group.short[told:] == ([] if room else [rank])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), preempted=st.booleans(), later=st.booleans())
    def leave(self, data: st.DataObject, preempted: bool, later: bool) -> None:
        req = data.draw(st.sampled_from(self.running))
        self.running.remove(req)
        if later:
            # As vLLM does while a step may still write to the blocks.
            self.deferred.append(self.ledger.pop_blocks_for_free(req))
        else:
            self.ledger.free(req)
        if preempted:
            self.wait_again(req)

    def wait_again(self, req: Request) -> None:
        req.num_computed_tokens = 0
        req.status = RequestStatus.PREEMPTED
        self.waiting.insert(0, req)

    @precondition(lambda self: self.waiting)
    @rule()
    def abort_waiting(self) -> None:
        self.ledger.free(self.waiting.pop())

    @precondition(lambda self: self.deferred)
    @rule()
    def step_ends(self) -> None:
        self.ledger.block_pool.free_blocks(reversed(self.deferred.pop(0)))

    @precondition(lambda self: len(self.ledger.ranks) < 4)
    @rule(rank=st.integers(1, 3), size=st.sampled_from(SIZES))
    def attach(self, rank: int, size: int) -> None:
        if rank in self.ledger.ranks:
            with pytest.raises(ValueError, match="cannot be attached"):
                self.ledger.attach(rank, size)
            return
        self.ledger.attach(rank, size)
        self.entries[rank] = self.ledger.ranks[rank]

    @precondition(lambda self: len(self.ledger.ranks) > 1)
    @rule(rank=st.integers(1, 3), late=st.booleans())
    def detach(self, rank: int, late: bool) -> None:
        there = {req.request_id for req in self.running if self.ledger.bound_to(req.request_id).rank == rank}
        orphans = self.ledger.detach(rank)
        # Whoever lives there is given up; so is who was only looked at.
        assert there <= {req.request_id for req in orphans}
        if entry := self.entries.pop(rank, None):
            self.gone.append(entry)
        for req in [req for req in self.running if req.request_id in there]:
            assert self.ledger.is_lost(req.request_id)
            self.running.remove(req)
            if late:
                self.lost.append(req)
            else:
                self.ledger.free(req)
                self.wait_again(req)

    @precondition(lambda self: self.lost)
    @rule()
    def hand_off_ends(self) -> None:
        req = self.lost.pop()
        assert self.ledger.is_lost(req.request_id)
        self.ledger.free(req)
        self.wait_again(req)

    @rule()
    def reset_cache(self) -> None:
        idle = all(entry.free_blocks == entry.blocks for entry in self.ledger.ranks.values())
        assert self.ledger.reset_prefix_cache() == idle
        if idle and self.waiting:
            assert self.ledger.get_computed_blocks(self.waiting[0])[1] == 0

    @invariant()
    def a_request_lives_on_one_rank(self) -> None:
        for req in self.running:
            rank = self.group.rank(req)
            entry = self.ledger.bound_to(req.request_id)
            assert entry.rank == rank
            assert entry is self.ledger.ranks[rank]
            ids = self.ledger.get_block_ids(req.request_id)[0]
            assert len(ids) == len(set(ids)) == -(-req.num_computed_tokens // BLOCK)
            assert all(0 <= i - rank * STRIDE < entry.blocks + (rank == 0) for i in ids)
            homes = [e.rank for e in self.entries.values() if req.request_id in e.requests]
            assert homes == [rank]
        for req in self.lost:
            assert self.ledger.is_lost(req.request_id)

    @invariant()
    def blocks_have_one_owner_or_share_a_prefix(self) -> None:
        holders: dict[int, list[tuple[KVCacheBlock, str]]] = {}
        tables = [(r.request_id, self.ledger.get_blocks(r.request_id).blocks[0]) for r in (*self.running, *self.lost)]
        for name, blocks in [*tables, *((f"freed {n}", blocks) for n, blocks in enumerate(self.deferred))]:
            for block in blocks:
                holders.setdefault(id(block), []).append((block, name))
        # (1) A block is held as often as somebody names it, and by several only if it is cached.
        for held in holders.values():
            block = held[0][0]
            assert block.ref_cnt == len(held)
            assert len(held) == 1 or block.block_hash is not None
        # (2) Per rank, also one that has gone, what is held and what is free is all there is.
        for entry in (*self.entries.values(), *self.gone):
            mine = {b.block_id for held in holders.values() for b, _ in held if b.pool is entry.manager.block_pool}
            assert {rank_of(i) for i in mine} <= {entry.rank}
            assert entry.free_blocks + len(mine) == entry.blocks
        # (3) The group is the sum of its ranks.
        ranks = self.ledger.ranks.values()
        assert self.ledger.block_pool.get_num_free_blocks() == sum(entry.free_blocks for entry in ranks)
        total = self.ledger.block_pool.num_gpu_blocks - 1
        assert total == sum(entry.blocks for entry in ranks)
        assert self.ledger.usage == pytest.approx(1 - self.ledger.block_pool.get_num_free_blocks() / total)

    def teardown(self) -> None:
        for req in (*self.running, *self.waiting, *self.lost):
            self.ledger.free(req)
        for blocks in self.deferred:
            self.ledger.block_pool.free_blocks(reversed(blocks))
        for entry in (*self.entries.values(), *self.gone):
            assert entry.free_blocks == entry.blocks
            assert not entry.requests
        assert self.ledger.usage == 0
        assert self.ledger.reset_prefix_cache()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
