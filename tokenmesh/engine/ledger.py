"""The one ledger of a group's KV blocks: vLLM's KVCacheManager once per rank, behind the face of a single one.

Lives in the scheduler's process and nowhere else. Each rank has a stock manager with its own pool and prefix cache;
only the block ids differ, which carry the rank (`parallel.ids`). A request is bound to a rank while it holds blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokenmesh.parallel.ids import MAX_RANKS, STRIDE, rank_of
from tokenmesh.parallel.placement import Policy, RankView, place

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

MakeManager = Callable[[int], "KVCacheManager"]


@dataclass(eq=False)
class RankBlocks:
    """One rank's blocks and who holds them."""

    rank: int
    manager: KVCacheManager
    blocks: int
    """Blocks that sequences can hold; vLLM's null block is not among them."""
    attached: bool = True
    """False once the rank has gone; requests that still hold its blocks let go of them one by one."""
    requests: dict[str, Request] = field(default_factory=dict)
    """Requests bound to the rank."""

    @property
    def free_blocks(self) -> int:
        """Blocks held by nobody; cached ones count."""
        free: int = self.manager.block_pool.get_num_free_blocks()
        return free

    @property
    def context_tokens(self) -> int:
        """Tokens of the sequences that live here: what a step attends over."""
        return sum(request.num_tokens for request in self.requests.values())


class Ledger:
    """What vLLM's scheduler takes for its KVCacheManager. Method contracts are vLLM's unless they say otherwise.

    A request's first call is `get_computed_blocks`, which places it; the binding lasts until its blocks are freed.
    """

    def __init__(
        self,
        make_manager: MakeManager,
        root: KVCacheManager,
        block_size: int,
        max_model_len: int,
        policy: Policy = "balance",
        reserved: Callable[[int], int] = lambda _: 0,
        on_short: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`make_manager(blocks)` makes a manager for another rank.

        `reserved(rank)`: blocks that prefills under way on a rank still need. `on_short(rank)` is called when a
        running request finds no block on its rank, before the scheduler chooses whom to preempt.

        Raises ValueError if the root has more blocks than ids.
        """
        if root.block_pool.num_gpu_blocks > STRIDE:
            raise ValueError(f"a root has at most {STRIDE} blocks in a group, not {root.block_pool.num_gpu_blocks}")
        self._make_manager = make_manager
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._policy: Policy = policy
        self._reserved = reserved
        self._on_short = on_short
        self._root = RankBlocks(0, root, root.block_pool.num_gpu_blocks - 1)
        self.ranks: dict[int, RankBlocks] = {0: self._root}
        """Attached ranks, the root first."""
        self._bound: dict[str, RankBlocks] = {}
        self.candidate = 0
        """Rank of the request whose admission was tried last."""
        self.block_pool = _Pools(self)
        self.coordinator = _Coordinators(self)
        self.empty_kv_cache_blocks = root.empty_kv_cache_blocks

    # Ranks.

    def attach(self, rank: int, blocks: int) -> None:
        """Adds a rank with `blocks` blocks, all free. Raises ValueError if it is there already or cannot be."""
        if not 0 < rank < MAX_RANKS or rank in self.ranks or not 0 < blocks <= STRIDE:
            raise ValueError(f"rank {rank} with {blocks} blocks cannot be attached")
        # One more, since vLLM sets one aside as its null block.
        manager = self._make_manager(blocks + 1)
        pool = manager.block_pool
        for block in pool.blocks:
            block.block_id += rank * STRIDE - 1
        # Nothing is ever read through it, but it must name the right rank.
        pool.null_block.block_id = rank * STRIDE
        self.ranks[rank] = RankBlocks(rank, manager, blocks)
        self.ranks = dict(sorted(self.ranks.items()))

    def detach(self, rank: int) -> list[Request]:
        """Takes a rank out; returns the requests bound to it, whose blocks the caller must free. Unknown: none."""
        if rank == 0:
            raise ValueError("the root cannot be detached")
        gone = self.ranks.pop(rank, None)
        if gone is None:
            return []
        gone.attached = False
        return list(gone.requests.values())

    def bound_to(self, request_id: str) -> RankBlocks:
        """The rank that a request lives on; the root for one that holds nothing."""
        return self._bound.get(request_id, self._root)

    def is_lost(self, request_id: str) -> bool:
        """Whether a request holds blocks of a rank that has gone."""
        return not self.bound_to(request_id).attached

    # Placing.

    def _place(self, request: Request) -> RankBlocks:
        length = request.num_tokens
        final = min(request.num_prompt_tokens + (request.max_tokens or 0), self._max_model_len)
        final_blocks = -(-max(final, length) // self._block_size)
        now_blocks = -(-length // self._block_size)
        views = []
        for entry in self.ranks.values():
            hit, prefix, _ = entry.manager.get_computed_blocks(request)
            # Cached blocks that nobody holds are counted as free, so only those in use spare a block.
            shared = sum(block.ref_cnt > 0 for block in hit.blocks[0])
            room = entry.free_blocks - self._reserved(entry.rank) - entry.manager.watermark_blocks
            views.append(
                RankView(
                    rank=entry.rank,
                    context_tokens=entry.context_tokens,
                    prefix_tokens=prefix,
                    fits=final_blocks <= entry.blocks,
                    has_room=now_blocks - shared <= room,
                )
            )
        return self.ranks[place(views, length, self._policy, request.request_id)]

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """Places a request that holds nothing, then asks its rank's cache."""
        entry = self._bound.get(request.request_id)
        if entry is None or not entry.manager.get_blocks(request.request_id).blocks[0]:
            self._unbind(request.request_id)
            entry = self._place(request)
            self._bind(request, entry)
        self.candidate = entry.rank
        hit: tuple[KVCacheBlocks, int, int] = entry.manager.get_computed_blocks(request)
        return hit

    def _bind(self, request: Request, entry: RankBlocks) -> None:
        self._bound[request.request_id] = entry
        entry.requests[request.request_id] = request

    def _unbind(self, request_id: str) -> RankBlocks:
        entry = self._bound.pop(request_id, self._root)
        entry.requests.pop(request_id, None)
        return entry

    def allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """Allocates on the request's rank; None if that rank has no room."""
        entry = self._bound.get(request.request_id)
        if entry is None:
            entry = self._place(request)
            self._bind(request, entry)
        blocks = entry.manager.allocate_slots(request, *args, **kwargs)
        if blocks is None:
            if entry.manager.get_blocks(request.request_id).blocks[0]:
                self._on_short(entry.rank)
            else:
                self._unbind(request.request_id)
        return blocks

    def free(self, request: Request) -> None:
        """Frees and unbinds."""
        self._unbind(request.request_id).manager.free(request)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """Unbinds; the blocks go back through `block_pool.free_blocks`, which finds their rank by itself."""
        blocks: list[KVCacheBlock] = self._unbind(request.request_id).manager.pop_blocks_for_free(request)
        return blocks

    # Per request: the manager of its rank answers.

    def cache_blocks(self, request: Request, *args: Any) -> None:
        """As in vLLM."""
        self.bound_to(request.request_id).manager.cache_blocks(request, *args)

    def get_blocks(self, request_id: str) -> KVCacheBlocks:
        """As in vLLM."""
        return self.bound_to(request_id).manager.get_blocks(request_id)

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        """As in vLLM; the ids carry the rank."""
        ids: tuple[list[int], ...] = self.bound_to(request_id).manager.get_block_ids(request_id)
        return ids

    def get_block_ids_for_computed_tokens(self, request_id: str, num_computed_tokens: int) -> tuple[list[int], ...]:
        """As in vLLM."""
        manager = self.bound_to(request_id).manager
        ids: tuple[list[int], ...] = manager.get_block_ids_for_computed_tokens(request_id, num_computed_tokens)
        return ids

    def remove_skipped_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        """As in vLLM."""
        self.bound_to(request_id).manager.remove_skipped_blocks(request_id, *args, **kwargs)

    def estimate_cached_tokens(self, request: Request) -> int:
        """As in vLLM."""
        return int(self.bound_to(request.request_id).manager.estimate_cached_tokens(request))

    def record_blocks_for_zeroing(self, request_id: str, *args: Any) -> None:
        """As in vLLM."""
        self.bound_to(request_id).manager.record_blocks_for_zeroing(request_id, *args)

    def finalize_partial_tail_offloads(self, request: Request) -> list[tuple[int, int, int]]:
        """As in vLLM."""
        tails: list[tuple[int, int, int]] = self.bound_to(request.request_id).manager.finalize_partial_tail_offloads(
            request
        )
        return tails

    # Of all ranks.

    def new_step_starts(self) -> None:
        """As in vLLM."""
        for entry in self.ranks.values():
            entry.manager.new_step_starts()

    @property
    def usage(self) -> float:
        """Share of the group's blocks that is held, 0 to 1."""
        total = sum(entry.blocks for entry in self.ranks.values())
        return 1 - sum(entry.free_blocks for entry in self.ranks.values()) / total

    def reset_prefix_cache(self) -> bool:
        """Empties every rank's cache; False if blocks are held."""
        return all(bool(entry.manager.reset_prefix_cache()) for entry in self.ranks.values())

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Evicts blocks by id."""
        for entry in self.ranks.values():
            mine = {i for i in block_ids if rank_of(i) == entry.rank}
            if not mine:
                continue
            for block in entry.manager.block_pool.blocks:
                if block.block_id in mine and not block.is_null:
                    entry.manager.block_pool._maybe_evict_cached_block(block)

    def take_events(self) -> list[Any]:
        """As in vLLM."""
        return [event for entry in self.ranks.values() for event in entry.manager.take_events()]

    def take_new_block_ids(self) -> list[int]:
        """Blocks to be zeroed by the root's own runner: its own."""
        for entry in self.ranks.values():
            if entry is not self._root:
                entry.manager.take_new_block_ids()
        ids: list[int] = self._root.manager.take_new_block_ids()
        return ids

    def record_prefix_cache_stats(self, request: Request, num_hits: int) -> None:
        """Counted once for the group."""
        self._root.manager.record_prefix_cache_stats(request, num_hits)

    def make_prefix_cache_stats(self) -> Any:
        """As in vLLM."""
        return self._root.manager.make_prefix_cache_stats()

    # Of no rank in particular; for models that this ledger refuses they are empty.

    def truncate_computed_blocks(self, *args: Any, **kwargs: Any) -> KVCacheBlocks:
        """As in vLLM."""
        return self._root.manager.truncate_computed_blocks(*args, **kwargs)

    def take_boundary_state_offloads(self) -> Any:
        """As in vLLM."""
        return self._root.manager.take_boundary_state_offloads()

    def take_kv_cache_block_copies(self) -> Any:
        """As in vLLM."""
        return self._root.manager.take_kv_cache_block_copies()


class _Pools:
    """The part of vLLM's BlockPool that is used from outside a manager."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @property
    def num_gpu_blocks(self) -> int:
        """All blocks and one null block, as vLLM counts them."""
        return sum(entry.blocks for entry in self._ledger.ranks.values()) + 1

    def get_num_free_blocks(self) -> int:
        """Over all ranks."""
        return sum(entry.free_blocks for entry in self._ledger.ranks.values())

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Gives blocks back to the pools that they came from, also to that of a rank that has gone."""
        # vLLM's pool hands blocks of other pools on to them.
        self._ledger.ranks[0].manager.block_pool.free_blocks(ordered_blocks)


class _Coordinators:
    """The part of vLLM's KV cache coordinator that the scheduler asks about one request."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def get_num_blocks_to_allocate(self, request_id: str, **kwargs: Any) -> int:
        """As in vLLM, by the request's rank."""
        manager = self._ledger.bound_to(request_id).manager
        return int(manager.coordinator.get_num_blocks_to_allocate(request_id=request_id, **kwargs))

    @property
    def single_type_managers(self) -> Any:
        """The root's; the other ranks' are alike."""
        return self._ledger.ranks[0].manager.coordinator.single_type_managers
