"""vLLM's CPU attention for a rank: its own operators on the rank's own blocks, with no engine around them."""

from __future__ import annotations

import numpy as np
import torch
from vllm import _custom_ops as ops

from tokenmesh.parallel.plan import StepPlan
from tokenmesh.parallel.rank import RankSpec
from tokenmesh.parallel.rows import RowViews

_ISAS = ("vec", "vec16", "amx", "neon", "rvv", "vxe", "vsx")
"""How vLLM's CPU kernels pack keys. "vec" and "vec16" are plain C++ and run everywhere."""


class UnsupportedAttentionError(Exception):
    """The rank has no kernel for this model; the message says why."""


class CpuKernel:
    """See `AttentionKernel`."""

    def __init__(self, spec: RankSpec, kv: torch.Tensor) -> None:
        """`kv`: the rank's blocks, [layers, blocks, KV heads, block size, 2 x head size] in the model's dtype.

        Raises UnsupportedAttentionError.
        """
        family, _, isa = spec.packing.partition("/")
        if family != "cpu_attn":
            raise UnsupportedAttentionError(f"blocks are packed as {spec.packing!r}, not for a CPU kernel")
        if isa not in _ISAS or (isa == "amx" and not torch.cpu._is_amx_tile_supported()):
            raise UnsupportedAttentionError(f"this machine has no kernel for blocks packed as {spec.packing!r}")
        self._spec = spec
        self._isa = isa
        shape = spec.shape
        layers, blocks = kv.shape[:2]
        halves = kv.view(layers, blocks, shape.kv_heads, 2 * spec.block_size, shape.head_size).chunk(2, dim=3)
        self._caches = list(zip(halves[0].unbind(), halves[1].unbind(), strict=True))
        windows = {layer.sliding_window for layer in spec.layers}
        # As in vLLM: the schedule may assume a window only if all layers have the same.
        self._window = windows.pop() if len(windows) == 1 else -1
        self._starts = torch.zeros(1, dtype=torch.int32)
        self._seq_lens = self._starts
        self._table = self._starts
        self._slots = self._starts
        self._schedule = self._starts

    def prepare(self, plan: StepPlan) -> None:
        """See `AttentionKernel`."""
        spec, shape = self._spec, self._spec.shape
        starts = np.zeros(len(plan.query_lens) + 1, dtype=np.int32)
        np.cumsum(plan.query_lens, out=starts[1:])
        self._starts = torch.from_numpy(starts)
        self._seq_lens = torch.from_numpy(plan.seq_lens.copy())
        self._table = torch.from_numpy(np.ascontiguousarray(plan.block_table))
        self._slots = torch.from_numpy(slot_mapping(plan, starts, spec.block_size))
        self._schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(plan.query_lens),
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_size,
            seq_lens=self._seq_lens,
            dtype=shape.torch_dtype,
            query_start_loc=self._starts,
            causal=True,
            sliding_window_size=self._window,
            isa=self._isa,
            enable_kv_split=spec.kv_split,
        )

    def attend(self, layer: int, views: RowViews) -> None:
        """See `AttentionKernel`."""
        keys, values = self._caches[layer]
        what = self._spec.layers[layer]
        ops.cpu_attn_reshape_and_cache(views.key, views.value, keys, values, self._slots, self._isa)
        ops.cpu_attention_with_kv_cache(
            query=views.query,
            key_cache=keys,
            value_cache=values,
            output=views.output,
            query_start_loc=self._starts,
            seq_lens=self._seq_lens,
            scale=what.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=what.sliding_window,
            block_table=self._table,
            softcap=what.softcap,
            scheduler_metadata=self._schedule,
            s_aux=None,
        )


def slot_mapping(plan: StepPlan, starts: np.ndarray, block_size: int) -> np.ndarray:
    """Where each token's key and value go: int64 [tokens], block id x block size + place in the block."""
    rows = np.repeat(np.arange(len(plan.query_lens)), plan.query_lens)
    within = np.arange(plan.tokens) - starts[rows]
    positions = (plan.seq_lens - plan.query_lens)[rows] + within
    blocks = plan.block_table[rows, positions // block_size].astype(np.int64)
    slots: np.ndarray = blocks * block_size + positions % block_size
    return slots
