"""The consumer halves of the connector: a decode root that has its prompts prefilled elsewhere.

The scheduler half asks the service for a prompt's KV once vLLM has reserved its blocks. The service talks to prefill
services, settles the transfer, and tells every worker half, which tells vLLM. Each request asks at most once: after a
failure or a preemption vLLM computes it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)

from tokenmesh.engine.counts import CountsReporter
from tokenmesh.engine.device_order import InDeviceOrder
from tokenmesh.engine.discards import put_aside_discards
from tokenmesh.engine.group import active
from tokenmesh.engine.idle import IdleLink
from tokenmesh.engine.settings import ConnectorSettings, FetchFrom
from tokenmesh.engine.shared_kv import SharedKv, geometry_of
from tokenmesh.kv.hub import EngineLink
from tokenmesh.kv.messages import AttachRank, DetachRank, DropKv, KvArrived, RankDetached, ToScheduler, WantKv

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class ConsumerPlan(KVConnectorMetadata):
    """Scheduler half → worker half; what has arrived the service tells the workers itself."""

    def __init__(
        self,
        idle: bool = False,
        dropped: list[tuple[int, int]] | None = None,
        wanted: list[WantKv] | None = None,
    ) -> None:
        self.idle = idle
        """The step computes nothing."""
        self.dropped = dropped or []
        """(rank, epoch) that the scheduler has taken out of the group."""
        self.wanted = wanted or []
        """Prompts to be asked for when the device has done the steps before this one."""


class RankReport(KVConnectorWorkerMetadata):
    """Worker half → scheduler, with a step's output: ranks that were lost in it."""

    def __init__(self, lost: dict[tuple[int, int], str]) -> None:
        self.lost = lost
        """(rank, epoch) → why."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> RankReport:
        """One report of all tensor-parallel workers: what one of them lost is lost."""
        assert isinstance(other, RankReport)
        return RankReport({**other.lost, **self.lost})


class ConsumerScheduler:
    """Scheduler role of a decode root."""

    def __init__(self, settings: ConnectorSettings, block_size: int) -> None:
        self._block_size = block_size
        self._min_tokens = settings.remote_prefill_min_tokens
        self._link = EngineLink(settings.hub, "scheduler")
        self._asked: set[str] = set()
        self._counts = CountsReporter(self._link)
        self.kv_cache_manager: KVCacheManager
        self.placement = settings.placement
        self.rank_epochs: dict[int, int] = {}
        """Epoch of each attached rank; kept by the scheduler."""
        self.dropped: list[tuple[int, int]] = []
        """Ranks that the workers must let go of, from the next step on."""
        self._behind_device = settings.device
        self._wanted: list[WantKv] = []

    def rank_messages(self) -> list[ToScheduler]:
        """What the service has told about ranks since last asked."""
        return [m for m in self._link.poll() if isinstance(m, AttachRank | DetachRank)]

    def tell(self, message: RankDetached) -> None:
        """Tells the service."""
        self._link.send(message)

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """All missing prompt tokens, to be loaded asynchronously; or none. No side effects: vLLM may ask repeatedly."""
        params = request.kv_transfer_params or {}
        missing = request.num_prompt_tokens - num_computed_tokens
        # The last token is recomputed here in any case, so one missing token is nothing to fetch.
        if (
            FetchFrom.KEY not in params
            or request.request_id in self._asked
            or request.num_tokens > request.num_prompt_tokens
            or missing < max(self._min_tokens, 2)
        ):
            return 0, False
        return missing, True

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Asks the service for the KV that vLLM has just reserved blocks for."""
        if num_external_tokens == 0 or request.request_id in self._asked:
            return
        self._asked.add(request.request_id)
        (block_ids,) = blocks.get_block_ids()
        cached = start = request.num_prompt_tokens - num_external_tokens
        first, stop = start // self._block_size, -(-request.num_prompt_tokens // self._block_size)
        # Where every layer has a window, those before it have no blocks, but vLLM's null block, which is somebody's.
        while blocks.blocks[0][first].is_null:
            first += 1
            start = first * self._block_size
        key = (request.kv_transfer_params or {})[FetchFrom.KEY]
        missing = request.num_prompt_tokens - start
        want = WantKv(request.request_id, key, start, missing, block_ids[first:stop], cached)
        if self._behind_device:
            # Their last owner may have ended in a step that a GPU still computes, and that still writes to them.
            self._wanted.append(want)
        else:
            self._link.send(want)

    def plan_step(self, output: SchedulerOutput) -> ConsumerPlan:
        """Hardly a plan; the step is an occasion to report block counts."""
        self.report_counts()
        dropped, self.dropped = self.dropped, []
        wanted, self._wanted = self._wanted, []
        return ConsumerPlan(output.total_num_scheduled_tokens == 0, dropped, wanted)

    def finished(self, request: Request) -> bool:
        """Drops a request that ends while its KV is awaited; vLLM holds its blocks until KvArrived."""
        if request.request_id in self._asked:
            self._asked.discard(request.request_id)
            self._link.send(DropKv(request.request_id))
        return False

    def report_counts(self) -> None:
        """Tells the service how many blocks are free."""
        self._counts.update(self.kv_cache_manager)

    def close(self) -> None:
        """Closes the link."""
        self._link.close()


class ConsumerWorker:
    """Worker role of a decode root."""

    def __init__(self, settings: ConnectorSettings, vllm_config: VllmConfig) -> None:
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            put_aside_discards()
        self._settings = settings
        self._config = vllm_config
        self._shard = get_tensor_model_parallel_rank()
        self._link = EngineLink(settings.hub, f"worker-{self._shard}")
        self._kv: SharedKv | None = None
        self._order: InDeviceOrder | None = None
        self._news = IdleLink(self._link)

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Shares the cache and starts the mover, if anything is ever to be moved."""
        if self._settings.transport != "none":
            self._kv = SharedKv(kv_caches, geometry_of(kv_caches, self._config), self._settings, self._shard)
        if self._settings.device and self._shard == 0:
            # A link of its own, since it is used from a thread of its own.
            self._order = InDeviceOrder(EngineLink(self._settings.hub, "wants").send)
        group = active()
        if group is not None:
            group.number_layers(list(kv_caches), self._config.compilation_config.static_forward_context)

    def begin_step(self, plan: Any) -> None:
        """Notes whether there is anything to compute."""
        assert isinstance(plan, ConsumerPlan)
        self._news.begin_step(plan.idle)
        if self._order is not None:
            for want in plan.wanted:
                self._order.send(want)
        group = active()
        if group is not None:
            for rank, epoch in plan.dropped:
                group.drop(rank, epoch)

    def layer_done(self, layer_name: str) -> None:
        """Nothing to save."""

    def end_step(self) -> None:
        """Nothing to commit."""

    def results(self) -> KVConnectorTransferResults:
        """Requests whose KV is in place or lost. The service sends each exactly once; vLLM dies of repeats."""
        results = KVConnectorTransferResults()
        for message in self._news.poll():
            if isinstance(message, KvArrived):
                results.finished_recving.add(message.request_id)
                if not message.ok:
                    results.failed_recving.add(message.request_id)
        return results

    def report(self) -> RankReport | None:
        """Ranks lost in the step; also tells the service how long steps take."""
        group = active()
        if group is None:
            return None
        times = group.times.take()
        if times is not None:
            self._link.send(times)
        lost = group.take_lost()
        return RankReport(lost) if lost else None

    def close(self) -> None:
        """Ends the mover and closes the link."""
        if self._order is not None:
            self._order.close()
        if self._kv is not None:
            self._kv.close()
        self._link.close()
