"""TokenParallelKVConnector: the seam where vLLM's scheduler and workers meet the mesh's KV hand-off.

vLLM makes one object with the scheduler role in the engine-core process and one with the worker role in each worker
process. Each delegates to a half that knows one role of one side:

    producer (prefill)          consumer (decode root)
    ProducerScheduler           ConsumerScheduler
    ProducerWorker              ConsumerWorker
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.platforms import current_platform

from tokenmesh.cpus import stand_back
from tokenmesh.engine.consumer import ConsumerScheduler, ConsumerWorker
from tokenmesh.engine.producer import ProducerScheduler, ProducerWorker
from tokenmesh.engine.settings import ConnectorSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class TokenParallelKVConnector(KVConnectorBase_V1):
    """See the module's docstring; method contracts are vLLM's."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = ConnectorSettings.from_vllm(vllm_config)
        block_size = vllm_config.cache_config.block_size
        self._scheduler: ProducerScheduler | ConsumerScheduler | None = None
        self._worker: ProducerWorker | ConsumerWorker | None = None
        self._spins = False
        """Whether this is the thread that spins until a step's end, and has not made way yet for those who compute."""
        producer = self._kv_transfer_config.is_kv_producer
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = (ProducerScheduler if producer else ConsumerScheduler)(settings, block_size)
            self._spins = current_platform.is_cpu()
        else:
            self._worker = (ProducerWorker if producer else ConsumerWorker)(settings, vllm_config)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """vLLM's hook. On GPUs heads must lie apart, to be moved one by one; on CPUs they always do."""
        return None if current_platform.is_cpu() else "HND"

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """vLLM's hook. A full graph would replay a prefill step without telling of its layers."""
        return ConnectorSettings.from_extra_config(extra_config).layerwise

    @property
    def scheduler(self) -> ProducerScheduler | ConsumerScheduler:
        """The scheduler half; only in the engine-core process."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def worker(self) -> ProducerWorker | ConsumerWorker:
        """The worker half; only in worker processes."""
        assert self._worker is not None
        return self._worker

    @property
    def requires_kv_delivery(self) -> bool:
        """False: the transfer of a prompt that is preempted is given up, and the owner recomputes."""
        return False

    # Scheduler side.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """vLLM's hook; gives the scheduler half its view of blocks."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler.kv_cache_manager = kv_cache_manager

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """vLLM's hook."""
        return self.scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """vLLM's hook."""
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """vLLM's hook."""
        if self._spins:
            # Not sooner: the process's other threads, which pass tokens on, inherit from this one when they start.
            stand_back(os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ""))
            self._spins = False
        return self.scheduler.plan_step(scheduler_output)

    def get_kv_connector_stats(self) -> None:
        """vLLM's hook. The scheduler calls it after it has freed what a step finished: the moment to count blocks."""
        if self._scheduler is not None:
            self._scheduler.report_counts()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """vLLM's hook."""
        return self.scheduler.finished(request), None

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM's hook."""
        self.worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """vLLM's hook; runs before the forward, start_load_kv may run after it."""
        super().bind_connector_metadata(connector_metadata)
        self.worker.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing: loads are asynchronous and started by the scheduler half."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request is scheduled only after all its layers have arrived."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """vLLM's hook."""
        self.worker.layer_done(layer_name)

    def wait_for_save(self) -> None:
        """vLLM's hook; never waits, since the mover keeps reading shared memory after the step."""
        self.worker.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """vLLM's hook."""
        return self.worker.results()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """vLLM's hook."""
        return self.worker.report()

    def shutdown(self) -> None:
        """vLLM's hook."""
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()
