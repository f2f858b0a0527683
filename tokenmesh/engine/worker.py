"""vLLM's CPU worker as a decode root runs it: with the token-parallel backend, and ranks that come and go.

The service calls the methods here through vLLM's `collective_rpc`, which runs them between steps.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import torch
from vllm import envs
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from tokenmesh.engine import group as groups
from tokenmesh.engine.cpu_kernel import CpuKernel, UnsupportedAttentionError
from tokenmesh.engine.join import JoinRank
from tokenmesh.engine.shared_kv import packing
from tokenmesh.parallel.exchange import Exchange
from tokenmesh.parallel.local_exchange import LocalExchange
from tokenmesh.parallel.peer import RankPeer
from tokenmesh.parallel.rank import LayerSpec, RankProtocol, RankSpec
from tokenmesh.parallel.rows import HeadShape


class TokenParallelCpuWorker(CPUWorker):
    """See the module's docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        register_backend(AttentionBackendEnum.CPU_ATTN, "tokenmesh.engine.attention.TokenParallelCpuBackend")
        self._group = groups.activate()
        self._ucx: Any = None

    def rank_spec(self) -> dict[str, Any]:
        """What a rank must know of this shard, as builtins of RankSpec. Raises UnsupportedAttentionError."""
        config = self.vllm_config
        context = config.compilation_config.static_forward_context
        groups_of_layers = self.model_runner.kv_cache_config.kv_cache_groups
        names = self._group.layer_names
        model = config.model_config
        if len(groups_of_layers) != 1 or set(names) != set(groups_of_layers[0].layer_names):
            raise UnsupportedAttentionError(
                "layers that share a KV cache, or several kinds of cache, are not supported"
            )
        impls = [context[name].impl for name in names]
        for what in ("alibi_slopes", "sinks", "kv_sharing_target_layer_name"):
            if any(getattr(impl, what, None) is not None for impl in impls):
                raise UnsupportedAttentionError(f"attention with {what} is not supported")
        if config.cache_config.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
            raise UnsupportedAttentionError(f"a KV cache in {config.cache_config.cache_dtype} is not supported")
        spec = RankSpec(
            shape=HeadShape(
                heads=impls[0].num_heads,
                kv_heads=impls[0].num_kv_heads,
                head_size=impls[0].head_size,
                dtype=str(model.dtype).removeprefix("torch."),
            ),
            layers=[LayerSpec(i.scale, i.sliding_window, float(i.logits_soft_cap)) for i in impls],
            block_size=config.cache_config.block_size,
            packing=packing(config),
            max_seqs=config.scheduler_config.max_num_seqs,
            max_tokens=config.scheduler_config.max_num_batched_tokens,
            max_blocks=-(-model.max_model_len // config.cache_config.block_size),
            kv_split=bool(envs.VLLM_CPU_ATTN_SPLIT_KV),
        )
        if any(
            (i.num_heads, i.num_kv_heads, i.head_size) != (spec.shape.heads, spec.shape.kv_heads, spec.shape.head_size)
            for i in impls
        ):
            raise UnsupportedAttentionError("layers with different heads are not supported")
        builtins: dict[str, Any] = msgspec.to_builtins(spec)
        return builtins

    def join_rank(self, request: bytes) -> str:
        """Connects a rank to this shard; `request` is a JoinRank. Returns the transport. Raises PeerLostError."""
        join = msgspec.msgpack.decode(request, type=JoinRank)
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
        """As in vLLM, timed as above."""
        start = time.perf_counter_ns()
        output = super().sample_tokens(*args, **kwargs)
        if self._group.shared:
            self._group.times.add_sampling(time.perf_counter_ns() - start)
        return output

    def shutdown(self) -> None:
        """As in vLLM, after letting the ranks go."""
        self._group.close()
        if self._ucx is not None:
            self._ucx.close()
        super().shutdown()
