"""Tells the service how many KV blocks its scheduler has left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenmesh.kv.hub import EngineLink
from tokenmesh.kv.messages import EngineCounts, RankCounts

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from tokenmesh.engine.ledger import Ledger


class CountsReporter:
    """Sends EngineCounts when they have changed; called once a step, also after the last request has gone."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self._last: EngineCounts | None = None

    def update(self, manager: KVCacheManager | Ledger) -> None:
        """Reports the pool's state. Cached blocks count as free; vLLM's null block counts as neither."""
        pool = manager.block_pool
        ranks = getattr(manager, "ranks", {})
        counts = EngineCounts(
            blocks_total=pool.num_gpu_blocks - 1,
            blocks_free=pool.get_num_free_blocks(),
            ranks=[
                RankCounts(entry.rank, entry.blocks, entry.free_blocks, entry.context_tokens, len(entry.requests))
                for entry in ranks.values()
            ],
        )
        if counts != self._last:
            self._link.send(counts)
            self._last = counts
