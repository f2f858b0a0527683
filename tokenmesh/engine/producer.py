"""The producer halves of the connector: a prefill engine that pushes KV while it computes.

The scheduler half decides once a step which blocks of which transfer become complete in it; the worker half tells the
mover so, layer by layer, as the forward passes. Blocks that the prefix cache already holds go first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorTransferResults

from tokenmesh.engine.counts import CountsReporter
from tokenmesh.engine.idle import IdleLink
from tokenmesh.engine.settings import ConnectorSettings, SendTo
from tokenmesh.engine.shared_kv import SharedKv, geometry_of
from tokenmesh.kv.hub import EngineLink
from tokenmesh.kv.messages import CancelSend, Commit, Destination, KvSent, OpenSend, Push

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class StepPush(msgspec.Struct, frozen=True):
    """What one step completes of one transfer. Block lists are local ids; places count in the target's list."""

    transfer_id: bytes
    destinations: list[list[Destination]]
    """Per tensor-parallel shard."""
    codec: str
    opening: bool
    """The first push of this transfer."""
    ready: list[int]
    """Blocks that were in the prefix cache before the step."""
    ready_first: int
    computed: list[int]
    """Blocks that this step completes."""
    computed_first: int
    last: bool
    """Nothing comes after this step."""


class ProducerPlan(KVConnectorMetadata):
    """Scheduler half → worker half, once a step."""

    def __init__(self) -> None:
        self.pushes: list[StepPush] = []
        self.released: list[tuple[bytes, str]] = []
        """(transfer id, engine request id) whose blocks wait for the mover."""
        self.cancelled: list[bytes] = []
        self.idle = False
        """The step computes nothing."""


class _Sending:
    """A transfer as the scheduler half follows it."""

    def __init__(self, target: SendTo, prompt_tokens: int) -> None:
        self.target = target
        self.prompt_tokens = prompt_tokens
        self.opened = False
        self.pushed = 0
        """Prompt blocks pushed so far, those before target.start_token included."""
        self.done = False


class ProducerScheduler:
    """Scheduler role of a prefill engine."""

    def __init__(self, settings: ConnectorSettings, block_size: int) -> None:
        self._block_size = block_size
        self._link = EngineLink(settings.hub, "scheduler")
        self._sending: dict[str, _Sending] = {}
        self._plan = ProducerPlan()
        self._counts = CountsReporter(self._link)
        self.kv_cache_manager: KVCacheManager

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """A producer loads nothing."""
        return 0, False

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Starts to follow a request that has a target."""
        params = request.kv_transfer_params or {}
        if SendTo.KEY in params and request.request_id not in self._sending:
            target = msgspec.convert(params[SendTo.KEY], SendTo)
            self._sending[request.request_id] = _Sending(target, request.num_prompt_tokens)

    def plan_step(self, output: SchedulerOutput) -> ProducerPlan:
        """The pushes of this step; hands over what `finished` noted since the last one."""
        for req_id in output.preempted_req_ids or ():
            self._give_up(req_id)
        for new in output.scheduled_new_reqs:
            self._plan_request(new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._plan_request(req_id, computed, output)
        self.report_counts()
        plan, self._plan = self._plan, ProducerPlan()
        plan.idle = output.total_num_scheduled_tokens == 0
        return plan

    def _plan_request(self, req_id: str, computed: int, output: SchedulerOutput) -> None:
        sending = self._sending.get(req_id)
        if sending is None or sending.done:
            return
        target, size = sending.target, self._block_size
        after = computed + output.num_scheduled_tokens[req_id]
        last = after >= sending.prompt_tokens
        start_block = target.start_token // size
        stop = -(-sending.prompt_tokens // size) if last else after // size
        first = max(sending.pushed, start_block)
        ready_stop = min(max(computed // size, first), stop)
        if stop <= first and not last:
            return
        (blocks,) = self.kv_cache_manager.get_block_ids(req_id)
        self._plan.pushes.append(
            StepPush(
                target.transfer_id,
                target.destinations,
                target.codec,
                not sending.opened,
                blocks[first:ready_stop],
                first - start_block,
                blocks[ready_stop:stop],
                ready_stop - start_block,
                last,
            )
        )
        sending.opened, sending.pushed, sending.done = True, stop, last

    def _give_up(self, req_id: str) -> None:
        """Stops the transfer of a request that was preempted: its blocks go to others, perhaps before they are read."""
        sending = self._sending.get(req_id)
        if sending is not None and sending.opened:
            sending.done = True
            self._plan.cancelled.append(sending.target.transfer_id)

    def finished(self, request: Request) -> bool:
        """Whether the request's blocks must outlive it, because the mover reads them."""
        sending = self._sending.pop(request.request_id, None)
        if sending is None or not sending.opened:
            return False
        self._plan.released.append((sending.target.transfer_id, request.request_id))
        if not sending.done:
            self._plan.cancelled.append(sending.target.transfer_id)
        return True

    def report_counts(self) -> None:
        """Tells the service how many blocks are free."""
        self._counts.update(self.kv_cache_manager)

    def close(self) -> None:
        """Closes the link."""
        self._link.close()


class ProducerWorker:
    """Worker role of a prefill engine."""

    def __init__(self, settings: ConnectorSettings, vllm_config: VllmConfig) -> None:
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        self._settings = settings
        self._config = vllm_config
        self._shard = get_tensor_model_parallel_rank()
        self._link = EngineLink(settings.hub, f"worker-{self._shard}")
        self._kv: SharedKv | None = None
        self._news = IdleLink(self._link)
        self._plan = ProducerPlan()
        self._open: set[bytes] = set()
        self._sent: set[bytes] = set()
        self._released: dict[bytes, str] = {}

    @property
    def kv(self) -> SharedKv:
        """The shared cache; exists once vLLM has allocated it."""
        assert self._kv is not None
        return self._kv

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Shares the cache and starts the mover."""
        self._kv = SharedKv(kv_caches, geometry_of(kv_caches, self._config), self._settings, self._shard)

    def begin_step(self, plan: Any) -> None:
        """Opens new transfers and sends what is in the cache already."""
        assert isinstance(plan, ProducerPlan)
        self._plan = plan
        self._news.begin_step(plan.idle)
        for transfer_id in plan.cancelled:
            self.kv.command(CancelSend(transfer_id))
        for transfer_id, req_id in plan.released:
            self._released[transfer_id] = req_id
        for push in plan.pushes:
            if push.opening:
                self._open.add(push.transfer_id)
                self.kv.command(OpenSend(push.transfer_id, push.destinations[self._shard], push.codec))
            if push.ready:
                for layer in range(self.kv.geometry.layers):
                    self.kv.command(Push(push.transfer_id, layer, push.ready_first, push.ready))

    def layer_done(self, layer_name: str) -> None:
        """Sends a layer's new blocks as soon as its attention has written them."""
        layer = self.kv.layers.get(layer_name)
        if layer is None:
            return
        for push in self._plan.pushes:
            if push.computed:
                self.kv.command(Push(push.transfer_id, layer, push.computed_first, push.computed))

    def end_step(self) -> None:
        """Commits the transfers that this step completed."""
        for push in self._plan.pushes:
            if push.last:
                self.kv.command(Commit(push.transfer_id))
        self._plan = ProducerPlan()

    def results(self) -> KVConnectorTransferResults:
        """Requests whose blocks the mover has let go of; each is reported once, and only after its release."""
        for message in self._news.poll():
            if isinstance(message, KvSent) and message.transfer_id in self._open:
                self._sent.add(message.transfer_id)
        ready = self._sent & self._released.keys()
        self._sent -= ready
        self._open -= ready
        return KVConnectorTransferResults(finished_sending={self._released.pop(t) for t in ready})

    def report(self) -> None:
        """A prefill engine has no ranks to report."""

    def close(self) -> None:
        """Ends the mover and closes the link."""
        if self._kv is not None:
            self._kv.close()
        self._link.close()
