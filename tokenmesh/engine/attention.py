"""TokenParallelAttentionBackend: the platform's own attention, with each sequence computed by the rank that owns it.

Registered under the platform's own name, so that vLLM builds it wherever it would have built the original. A step whose
sequences all live on the root takes the original's path.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from tokenmesh.engine.group import active
from tokenmesh.parallel.ids import STRIDE


@dataclasses.dataclass
class TokenParallelMetadata:
    """Metadata of a step in which other ranks take part."""

    local: CPUAttentionMetadata | None
    """The root's own share; None if it has none."""
    local_tokens: torch.Tensor | slice
    """Rows of the batch that are the root's."""
    num_actual_tokens: int


class TokenParallelCpuBackend(CPUAttentionBackend):
    """See the module's docstring."""

    # The original writes new keys and values in an operator of its own; here they go to their owner with the queries.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """vLLM's hook."""
        return TokenParallelCpuImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """vLLM's hook."""
        return TokenParallelCpuBuilder


class TokenParallelCpuBuilder(CPUAttentionMetadataBuilder):
    """Splits a batch by rank, and tells the other ranks what their share is."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata | TokenParallelMetadata:
        """vLLM's hook, once a step."""
        common, group = common_attn_metadata, active()
        table = common.block_table_tensor[: common.num_reqs].numpy()
        seq_lens = common.seq_lens[: common.num_reqs].numpy()
        # The last block is the one that is never vLLM's null block.
        last = np.maximum(-(-seq_lens // self.block_size) - 1, 0)
        owners = table[np.arange(common.num_reqs), last] // STRIDE
        if group is None or not owners.any():
            metadata: CPUAttentionMetadata = super().build(common_prefix_len, common, fast_build)
            return metadata
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].numpy()
        shares, plans, local, local_tokens = [], [], None, slice(0, 0)
        for rank in np.unique(owners):
            rows = np.flatnonzero(owners == rank)
            query_lens, tokens = np.diff(starts)[rows], _token_rows(starts, rows)
            if rank == 0:
                local = super().build(0, _select(common, rows, query_lens, tokens), fast_build)
                local_tokens = tokens
                continue
            shares.append((int(rank), tokens, rows.astype(np.int32)))
            width = int(last[rows].max()) + 1
            plans.append((query_lens, seq_lens[rows], table[rows, :width] % STRIDE))
        group.begin(shares, plans)
        return TokenParallelMetadata(local, local_tokens, common.num_actual_tokens)


class TokenParallelCpuImpl(CPUAttentionBackendImpl):
    """Send to all ranks, attend to one's own, receive from all."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | TokenParallelMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """vLLM's hook. query, output: [tokens, heads, head size]; key, value: [tokens, KV heads, head size]."""
        if attn_metadata is None:
            return output
        if not isinstance(attn_metadata, TokenParallelMetadata):
            self._attend(layer, query, key, value, kv_cache, attn_metadata, output)
            return output
        group = active()
        assert group is not None
        number: int = layer.rank_layer
        start = time.perf_counter_ns()
        group.send(number, query, key, value)
        sent = time.perf_counter_ns()
        local = attn_metadata.local
        if local is not None:
            tokens = attn_metadata.local_tokens
            if isinstance(tokens, slice):
                self._attend(layer, query[tokens], key[tokens], value[tokens], kv_cache, local, output[tokens])
            else:
                own = torch.empty((len(tokens), *output.shape[1:]), dtype=output.dtype)
                self._attend(layer, query[tokens], key[tokens], value[tokens], kv_cache, local, own)
                output[tokens] = own
        done = time.perf_counter_ns()
        longest = group.receive(number, output)
        group.times.add_layer(done - sent, longest, time.perf_counter_ns() - start)
        return output

    def _attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: CPUAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        tokens = metadata.num_actual_tokens
        if self.kv_sharing_target_layer_name is None:
            self.do_kv_cache_update(layer, key[:tokens], value[:tokens], kv_cache, metadata.slot_mapping[:tokens])
        super().forward(layer, query, key, value, kv_cache, metadata, output)


def _token_rows(starts: np.ndarray, rows: np.ndarray) -> torch.Tensor | slice:
    """Token rows of some requests; a slice if they are adjacent, which copies without an index."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(starts[rows[0]]), int(starts[rows[-1] + 1]))
    return torch.from_numpy(np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows]))


def _select(
    common: CommonAttentionMetadata, rows: np.ndarray, query_lens: np.ndarray, tokens: torch.Tensor | slice
) -> CommonAttentionMetadata:
    """The metadata of some of a batch's requests, as if they were the batch."""
    starts = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(query_lens, out=starts[1:])
    index = torch.from_numpy(rows)
    seq_lens = common.seq_lens[index]
    return dataclasses.replace(
        common,
        query_start_loc=torch.from_numpy(starts),
        query_start_loc_cpu=torch.from_numpy(starts),
        seq_lens=seq_lens,
        num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=common.block_table_tensor[index],
        slot_mapping=common.slot_mapping[tokens],
    )
