"""vLLM's CPU worker as a decode root runs it: with the token-parallel backend, and ranks that come and go.

The service calls the methods here through vLLM's `collective_rpc`, which runs them between steps.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from tokenmesh.engine import group as groups
from tokenmesh.engine.cpu_kernel import CpuKernel
from tokenmesh.engine.join import JoinRank, joined
from tokenmesh.engine.rank_specs import RankSpecs
from tokenmesh.parallel.exchange import Exchange
from tokenmesh.parallel.local_exchange import LocalExchange
from tokenmesh.parallel.peer import RankPeer
from tokenmesh.parallel.rank import RankProtocol, RankSpec


class TokenParallelCpuWorker(RankSpecs, CPUWorker):
    """See the module's docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        register_backend(AttentionBackendEnum.CPU_ATTN, "tokenmesh.engine.attention.TokenParallelCpuBackend")
        self._group = groups.activate()
        self._ucx: Any = None

    def join_rank(self, request: bytes) -> tuple[str, str]:
        """Connects a rank to this shard; `request` is a JoinRank. Returns what `joined` does."""
        return joined(lambda: self._join(msgspec.msgpack.decode(request, type=JoinRank)))

    def _join(self, join: JoinRank) -> str:
        spec = msgspec.convert(self.rank_spec(), RankSpec)
        exchange, transport = self._connect(join, spec)
        self._group.attach(join.rank, join.epoch, RankPeer(join.rank, exchange, spec))
        return transport

    def _connect(self, join: JoinRank, spec: RankSpec) -> tuple[Exchange, str]:
        if not join.shards:
            shape = spec.shape
            kv = torch.zeros(
                (len(spec.layers), join.blocks, shape.kv_heads, spec.block_size, 2 * shape.head_size),
                dtype=shape.torch_dtype,
            )
            return LocalExchange(RankProtocol(spec, join.blocks, CpuKernel(spec, kv))), "local"
        if self._ucx is None:
            from tokenmesh.parallel.ucx_exchange import UcxLoop

            self._ucx = UcxLoop(join.transport)
        host, port = join.shards[self.rank]
        pair = self._ucx.connect(host, port, join.token, join.deadline_s)
        return pair, pair.transport

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM, timed if other ranks take part."""
        start = time.perf_counter_ns()
        self._group.shared = False
        output = super().execute_model(*args, **kwargs)
        if self._group.shared:
            self._group.times.add_step(time.perf_counter_ns() - start)
        return output

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM, timed as above. The scheduler drops what lost ranks had a part in; so must the runner."""
        start = time.perf_counter_ns()
        if not self._group.shared:
            return super().sample_tokens(*args, **kwargs)
        runner: Any = self.model_runner
        # Of several shards one may have lost a rank that others have not: what they keep must be the same.
        alone = self.parallel_config.tensor_parallel_size == 1
        lost = self._group.unanswered() if alone else []
        runner.discard_request_mask.np[lost] = True
        names = {runner.input_batch.req_ids[place] for place in lost}
        owed = {name: count for name, count in runner.num_prompt_logprobs.items() if name in names}
        output = super().sample_tokens(*args, **kwargs)
        # Those of a prompt that has come to its end are taken for delivered.
        runner.num_prompt_logprobs.update(owed)
        self._group.times.add_sampling(time.perf_counter_ns() - start)
        return output

    def shutdown(self) -> None:
        """As in vLLM, after letting the ranks go."""
        self._group.close()
        if self._ucx is not None:
            self._ucx.close()
        super().shutdown()
