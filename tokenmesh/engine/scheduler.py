"""vLLM's scheduler over a ledger with several ranks.

Stock in everything but four things: its KVCacheManager is the Ledger; blocks reserved for prefills under way count per
rank; who is preempted lives on the rank that is short; and when a rank goes, its sequences are preempted and what the
step computed for them is dropped, so that vLLM computes them again elsewhere.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import structlog
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from tokenmesh.engine.consumer import ConsumerScheduler, RankReport
from tokenmesh.engine.ledger import Ledger
from tokenmesh.engine.settings import ConnectorSettings
from tokenmesh.kv.messages import AttachRank, DetachRank, RankDetached
from tokenmesh.parallel.partition import local_blocks

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

log = structlog.get_logger()


class UnsupportedModelError(Exception):
    """This model's KV cache cannot be spread over these ranks; the message says why."""


class _Ranked(Scheduler):
    """What both schedulers below add to vLLM's."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, root_part(vllm_config, kv_cache_config), *args, **kwargs)
        if len(self.kv_cache_config.kv_cache_groups) != 1 or self.has_mamba_layers:
            raise UnsupportedModelError("token parallelism needs a model with one kind of attention cache")
        if self.num_spec_tokens:
            raise UnsupportedModelError("token parallelism does not support speculative decoding yet")
        self.running: list[Request]
        stock: KVCacheManager = self.kv_cache_manager
        self.ledger = Ledger(
            self._make_manager,
            stock,
            self.block_size,
            self.max_model_len,
            policy=self._half.placement,
            reserved=self._reserved_on,
            on_short=self._offer_victim,
        )
        self.kv_cache_manager: Any = self.ledger
        self.connector.bind_kv_cache_manager(self.ledger)

    @property
    def _half(self) -> ConsumerScheduler:
        half = self.connector.scheduler
        assert isinstance(half, ConsumerScheduler)
        return half

    def _make_manager(self, blocks: int) -> KVCacheManager:
        """A manager for another rank, with the root's settings."""
        return KVCacheManager(
            kv_cache_config=dataclasses.replace(self.kv_cache_config, num_blocks=blocks),
            max_model_len=self.max_model_len,
            max_in_flight_tokens=self.vllm_config.max_in_flight_tokens,
            enable_caching=self.cache_config.enable_prefix_caching,
            log_stats=self.log_stats,
            enable_kv_cache_events=self.enable_kv_cache_events,
            scheduler_block_size=self.block_size,
            hash_block_size=self.hash_block_size,
            watermark=self.scheduler_config.watermark,
        )

    # Ranks come and go between steps.

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """As in vLLM, after what the service has told about ranks."""
        for message in self._half.rank_messages():
            if isinstance(message, AttachRank):
                self._attach_rank(message)
            elif isinstance(message, DetachRank) and self._half.rank_epochs.get(message.rank) == message.epoch:
                self._drop_rank(message.rank, message.reason)
        return super().schedule(*args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As in vLLM, less what was computed for sequences of ranks that were lost in the step."""
        connector = model_runner_output.kv_connector_output
        report = connector.kv_connector_worker_meta if connector is not None else None
        if isinstance(report, RankReport):
            for (rank, epoch), reason in report.lost.items():
                if self._half.rank_epochs.get(rank) == epoch:
                    self._drop_rank(rank, reason)
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        return outputs

    def _attach_rank(self, message: AttachRank) -> None:
        self._drop_rank(message.rank, "replaced")
        try:
            self.ledger.attach(message.rank, message.blocks)
        except ValueError as error:
            # An engine must not die of a rank that cannot be.
            log.error("rank not attached", rank=message.rank, error=str(error))  # noqa: TRY400 - it says it all
            self._half.dropped.append((message.rank, message.epoch))
            self._half.tell(RankDetached(message.rank, message.epoch, str(error), 0))
            return
        self._half.rank_epochs[message.rank] = message.epoch
        log.info("rank attached", rank=message.rank, blocks=message.blocks)

    def _drop_rank(self, rank: int, reason: str) -> None:
        """Takes a rank out and puts its sequences back into the queue, to be computed again on others."""
        orphans = self.ledger.detach(rank)
        epoch = self._half.rank_epochs.pop(rank, None)
        if epoch is None:
            return
        self._half.dropped.append((rank, epoch))
        now = time.monotonic()
        running = [request for request in self.running if request in orphans]
        if running:
            self.running = [request for request in self.running if request not in orphans]
        # Last first, so that they wait in the order in which they ran.
        for request in reversed(running):
            self._preempt_request(request, now)
            self.prev_step_scheduled_req_ids.discard(request.request_id)
        for request in orphans:
            self._forget_kv(request)
        log.warning("rank lost", rank=rank, reason=reason, recomputed=len(running))
        self._half.tell(RankDetached(rank, epoch, reason, len(running)))

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = True) -> None:
        """As in vLLM, but what is in flight is never delivered.

        Its rank may be lost in that very step, and by then nobody would know that the request lived there.
        """
        super()._preempt_request(request, timestamp, drop_stale_output=True)

    def _forget_kv(self, request: Request) -> None:
        """Takes a waiting request's blocks away if nobody writes to them any more.

        One whose KV is still awaited keeps them until the hand-off has ended; see _update_waiting_for_remote_kv.
        """
        if request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) and request.num_computed_tokens:
            self._free_request_blocks(request)
            self._inflight_prefills.discard(request)
            request.num_computed_tokens = 0
            if request in self.kv_holding_waiting:
                self.kv_holding_waiting.remove_request(request)
                self.waiting.prepend_request(request)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """As in vLLM, but one whose KV did not come goes back among those that hold no blocks.

        vLLM tries those that hold some first, and none behind the first that it finds no room for. There, a request
        finds the room that it has just given up; here it may be on another rank, or gone with it.
        """
        awaited = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
        ready = bool(super()._handle_blocked_waiting_request(request))
        if ready and awaited and not request.num_computed_tokens:
            # What it still needs is reserved on no rank until it has one.
            self._inflight_prefills.discard(request)
            return False
        return ready

    def _update_waiting_for_remote_kv(self, request: Request) -> None:
        """As in vLLM; KV that arrived on a rank that has gone since counts as failed."""
        if self.ledger.is_lost(request.request_id):
            request.num_computed_tokens = 0
            self.failed_recving_kv_req_ids.add(request.request_id)
        super()._update_waiting_for_remote_kv(request)

    # Room is a matter of one rank.

    def _inflight_prefill_reserved_blocks(self) -> int:
        """As in vLLM, for the rank of the request whose admission is being tried."""
        return self._reserved_on(self.ledger.candidate)

    def _reserved_on(self, rank: int) -> int:
        return sum(
            self._request_remaining_blocks(request)
            for request in self._inflight_prefills
            if self.ledger.bound_to(request.request_id).rank == rank
        )

    def _offer_victim(self, rank: int) -> None:
        """Moves the last request of a rank to where vLLM takes its victims from.

        That one stands at or behind the request that needs a block, so no request is passed over.
        """
        for index in range(len(self.running) - 1, -1, -1):
            if self.ledger.bound_to(self.running[index].request_id).rank == rank:
                self.running.append(self.running.pop(index))
                return


def root_part(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> KVCacheConfig:
    """The blocks that are the root's own, of those that vLLM has allocated; the rest are attached as other ranks'.

    Raises UnsupportedModelError if the longest sequence fits none.
    """
    settings = ConnectorSettings.from_vllm(vllm_config)
    if settings.device_ranks == 1:
        return kv_cache_config
    blocks = local_blocks(kv_cache_config.num_blocks, settings.device_ranks, settings.root_share)
    # vLLM has compared this with all of them together.
    most = max(blocks[0] - 1, *blocks[1:]) * vllm_config.cache_config.block_size
    if most < vllm_config.model_config.max_model_len:
        raise UnsupportedModelError(
            f"max_model_len is {vllm_config.model_config.max_model_len}, and no rank of {settings.device_ranks} on this"
            f" GPU can hold a sequence of more than {most} tokens"
        )
    return dataclasses.replace(kv_cache_config, num_blocks=blocks[0])


class TokenParallelScheduler(_Ranked):
    """For engines that schedule a step after the last one has ended (CPUs)."""


class AsyncTokenParallelScheduler(_Ranked, AsyncScheduler):
    """For engines that schedule ahead (GPUs)."""
