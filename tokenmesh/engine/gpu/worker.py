"""vLLM's GPU worker as a decode root runs it: with the token-parallel backend, and ranks here or on other GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from tokenmesh.engine import group as groups
from tokenmesh.engine.consumer import RankReport
from tokenmesh.engine.cpu_kernel import UnsupportedAttentionError
from tokenmesh.engine.gpu.peer import PeerWatch
from tokenmesh.engine.gpu.ranks import DeviceRanks
from tokenmesh.engine.join import JoinRank, joined
from tokenmesh.engine.rank_specs import RankSpecs
from tokenmesh.engine.settings import ConnectorSettings
from tokenmesh.parallel.exchange import PeerLostError


class TokenParallelGpuWorker(RankSpecs, Worker):
    """See the module's docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.use_v2_model_runner:
            raise UnsupportedAttentionError("token parallelism on GPUs needs vLLM's model runner V2")
        register_backend(AttentionBackendEnum.FLASH_ATTN, "tokenmesh.engine.gpu.attention.TokenParallelFlashBackend")
        settings = ConnectorSettings.from_vllm(self.vllm_config)
        self._here = settings.device_ranks > 1
        self._ranks = DeviceRanks(
            settings.ranks,
            settings.root_share if self._here else None,
            self.vllm_config.scheduler_config.max_num_seqs,
        )
        self._group = groups.activate()
        self._group.device = self._ranks
        self._watch: PeerWatch | None = None

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As in vLLM; from here on the ranks follow the block tables."""
        super().initialize_from_config(kv_cache_config)
        tables = self.model_runner.block_tables
        self._ranks.check(max(tables.block_sizes))
        self._ranks.watch(tables)

    def join_rank(self, request: bytes) -> tuple[str, str]:
        """Takes a rank in; `request` is a JoinRank. Returns what `joined` does."""
        return joined(lambda: self._join(msgspec.msgpack.decode(request, type=JoinRank)))

    def _join(self, join: JoinRank) -> str:
        if self._here:
            return self._join_here(join)
        if self._watch is None:
            self._watch = self._group.watch = PeerWatch(self.device, join.transport, join.deadline_s)
        self._watch.drop(join.rank, None)
        self._forget_lost()
        control = self._watch.connect(join.rank, join.epoch, join.shards[self.rank], join.token)
        self._capture_again()
        return f"nccl, {control}"

    def _join_here(self, join: JoinRank) -> str:
        # Its blocks have been here since the start, and its kernels run in every step.
        spans = self._ranks.spans(self.model_runner.kv_cache_config.num_blocks)
        first, stop = spans[join.rank]
        if join.shards or join.blocks != stop - first:
            raise PeerLostError(f"rank {join.rank} has {stop - first} blocks of this GPU, not {join.blocks} elsewhere")
        return "local"

    # Full CUDA graphs hold the exchange with every rank that was there when they were captured.

    def _forget_lost(self) -> None:
        """Takes lost ranks out of the graphs, and ends what they had."""
        watch = self._watch
        if watch is not None and watch.stale:
            torch.cuda.synchronize()
            gone = watch.retire()
            self._capture_again()
            watch.bury(gone)

    def _capture_again(self) -> None:
        assert self._watch is not None
        torch.cuda.synchronize()
        manager = self.model_runner.cudagraph_manager
        if manager is None or not manager.needs_capture():
            return
        # Another thread's call would spoil the capture.
        with self._watch.lock:
            manager.release_graphs()
            self.model_runner.capture_model()

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM, with the ranks that are there by now."""
        self._forget_lost()
        return super().execute_model(*args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM; what comes of it tells which ranks were lost meanwhile."""
        output = super().sample_tokens(*args, **kwargs)
        if self._watch is None or not self._watch.peers:
            return output
        self._watch.stepped()
        if isinstance(output, AsyncModelRunnerOutput):
            return _WatchedOutput(output, self._watch)
        if isinstance(output, ModelRunnerOutput):
            torch.cuda.current_stream().synchronize()
            return _report(output, self._watch)
        return output

    def shutdown(self) -> None:
        """As in vLLM, after letting the ranks go."""
        if self._watch is not None:
            torch.cuda.synchronize()
            if self.model_runner.cudagraph_manager is not None:
                self.model_runner.cudagraph_manager.release_graphs()
            self._watch.close()
        super().shutdown()


class _WatchedOutput(AsyncModelRunnerOutput):
    """A step's output, which waits for its kernels: if a rank was lost under them, it says so."""

    def __init__(self, output: AsyncModelRunnerOutput, watch: PeerWatch) -> None:
        self._output = output
        self._watch = watch

    def get_output(self) -> ModelRunnerOutput:
        """vLLM's hook."""
        return _report(self._output.get_output(), self._watch)


def _report(output: ModelRunnerOutput, watch: PeerWatch) -> ModelRunnerOutput:
    lost = watch.lost()
    if lost:
        connector = output.kv_connector_output or KVConnectorOutput()
        known = connector.kv_connector_worker_meta
        report = RankReport({**lost, **(known.lost if isinstance(known, RankReport) else {})})
        output.kv_connector_output = replace(connector, kv_connector_worker_meta=report)
    return output
