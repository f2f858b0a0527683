"""vLLM's own KV cache managers and requests, small enough to reason about."""

from __future__ import annotations

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request, RequestStatus

from tokenmesh.engine.ledger import Ledger
from tokenmesh.parallel.ids import split_owner

BLOCK = 4
MAX_LEN = 64

init_none_hash(sha256)
_hasher = get_request_block_hasher(BLOCK, sha256)


def kv_config(blocks: int, window: int = 0) -> KVCacheConfig:
    """One group of one layer; `blocks` without vLLM's null block; `window`: tokens that a token sees, 0: all."""
    shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    spec = SlidingWindowSpec(**shape, sliding_window=window) if window else FullAttentionSpec(**shape)
    return KVCacheConfig(blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)])


def manager(num_blocks: int, watermark: float = 0.0) -> KVCacheManager:
    """As Ledger's `make_manager`: the null block is among the blocks."""
    return KVCacheManager(
        kv_config(num_blocks - 1),
        max_model_len=MAX_LEN,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=True,
        log_stats=True,
        watermark=watermark,
    )


def request(name: str, prompt: list[int], max_tokens: int = 8, extra: dict[str, object] | None = None) -> Request:
    """A request as the engine core makes it."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
    params.update_from_generation_config({}, eos_token_id=0)
    return Request(name, prompt, params, None, arrival_time=0.0, block_hasher=_hasher)


class Group:
    """A ledger, driven as the scheduler drives it."""

    def __init__(self, root: int, *ranks: int, watermark: float = 0.0) -> None:
        self.reserved: dict[int, int] = {}
        self.short: list[int] = []
        self.ledger = Ledger(
            lambda blocks: manager(blocks, watermark),
            manager(root + 1, watermark),
            BLOCK,
            MAX_LEN,
            reserved=lambda rank: self.reserved.get(rank, 0),
            on_short=self.short.append,
        )
        for number, blocks in enumerate(ranks, start=1):
            self.ledger.attach(number, blocks)

    def admit(self, req: Request, others_run: bool = False) -> bool:
        """Places a request and allocates all its tokens; whether it found room."""
        hit, cached, _ = self.ledger.get_computed_blocks(req)
        blocks = self.ledger.allocate_slots(
            req,
            req.num_tokens - cached,
            num_new_computed_tokens=cached,
            new_computed_blocks=hit,
            full_sequence_must_fit=True,
            has_scheduled_reqs=others_run,
        )
        if blocks is None:
            return False
        req.num_computed_tokens = req.num_tokens
        req.status = RequestStatus.RUNNING
        return True

    def admitted(self, name: str, tokens: int, first: int = 1) -> Request:
        req = request(name, list(range(first, first + tokens)))
        assert self.admit(req)
        return req

    def grow(self, req: Request) -> bool:
        """One token more; whether there was a slot for it."""
        if self.ledger.allocate_slots(req, 1) is None:
            return False
        req.append_output_token_ids(1)
        req.num_computed_tokens += 1
        return True

    def rank(self, req: Request) -> int:
        return split_owner(self.ledger.get_block_ids(req.request_id)[0])[0]

    def free_blocks(self) -> dict[int, int]:
        return {rank: entry.free_blocks for rank, entry in self.ledger.ranks.items()}
