"""vLLM's GPU worker as a decode root runs it: with the token-parallel backend, and ranks on its own GPU."""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_worker import Worker

from tokenmesh.engine import group as groups
from tokenmesh.engine.cpu_kernel import UnsupportedAttentionError
from tokenmesh.engine.gpu_ranks import DeviceRanks
from tokenmesh.engine.join import JoinRank
from tokenmesh.engine.rank_specs import RankSpecs
from tokenmesh.engine.settings import ConnectorSettings
from tokenmesh.parallel.exchange import PeerLostError


class TokenParallelGpuWorker(RankSpecs, Worker):
    """See the module's docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.use_v2_model_runner:
            raise UnsupportedAttentionError("token parallelism on GPUs needs vLLM's model runner V2")
        register_backend(AttentionBackendEnum.FLASH_ATTN, "tokenmesh.engine.gpu_attention.TokenParallelFlashBackend")
        settings = ConnectorSettings.from_vllm(self.vllm_config)
        self._ranks = DeviceRanks(
            settings.device_ranks, settings.root_share, self.vllm_config.scheduler_config.max_num_seqs
        )
        self._group = groups.activate()
        self._group.device = self._ranks

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As in vLLM; from here on the ranks follow the block tables."""
        super().initialize_from_config(kv_cache_config)
        tables = self.model_runner.block_tables
        self._ranks.check(max(tables.block_sizes))
        self._ranks.watch(tables)

    def join_rank(self, request: bytes) -> str:
        """Takes note of a rank; `request` is a JoinRank. Returns the transport. Raises PeerLostError.

        Its blocks have been here since the start, and its kernels run in every step.
        """
        join = msgspec.msgpack.decode(request, type=JoinRank)
        spans = self._ranks.spans(self.model_runner.kv_cache_config.num_blocks)
        first, stop = spans[join.rank]
        if join.shards or join.blocks != stop - first:
            raise PeerLostError(f"rank {join.rank} has {stop - first} blocks of this GPU, not {join.blocks} elsewhere")
        return "local"
