"""What an engine worker of a decode root tells of its attention, whatever it runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from vllm import envs

from tokenmesh.engine.cpu_kernel import UnsupportedAttentionError
from tokenmesh.engine.group import RankGroup
from tokenmesh.engine.shared_kv import packing
from tokenmesh.parallel.rank import LayerSpec, RankSpec
from tokenmesh.parallel.rows import HeadShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class RankSpecs:
    """Mixed into vLLM's workers."""

    vllm_config: VllmConfig
    model_runner: Any
    _group: RankGroup

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
            layers=[LayerSpec(i.scale, _window(i.sliding_window), float(i.logits_soft_cap)) for i in impls],
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


def _window(window: int | tuple[int, int]) -> int:
    """Tokens that a token sees, itself included; GPU kernels take how many to its left and right."""
    if isinstance(window, int):
        return window
    left, _ = window
    return left + 1 if left >= 0 else -1
