"""What the layers of a step must know of a batch that is spread over ranks, and who is told of it beforehand."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata, FlashAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from tokenmesh.engine.gpu import kernels
from tokenmesh.engine.gpu.peer import GpuPeer
from tokenmesh.engine.gpu.ranks import DeviceRanks
from tokenmesh.engine.gpu.rows import PackedRows, SplitRows
from tokenmesh.engine.group import RankGroup, active
from tokenmesh.parallel.ids import STRIDE


@dataclasses.dataclass
class DecodeMetadata:
    """A batch of one token per sequence."""

    root: FlashAttentionMetadata
    """Over the whole batch; rows of others have no keys there, and nothing to write."""
    others: list[FlashAttentionMetadata]
    """Of ranks 1, 2, ... on this GPU, over their places; none if they have their own."""
    announced: bool
    """Ranks on other GPUs know of the batch."""
    rows: torch.Tensor
    """int32 [R, rows]: row of the batch at each place; -1: none."""
    slots: torch.Tensor
    """int64 [N, rows]: where each rank writes the new key and value of the row at a place; the root has all places."""
    packed: PackedRows


@dataclasses.dataclass
class MixedMetadata:
    """A batch in which some sequences have several tokens, and some live on other ranks."""

    shares: list[tuple[int, torch.Tensor | slice, FlashAttentionMetadata]]
    """(rank, rows of the batch's tokens, the rank's metadata over them) of the root and ranks on its GPU."""
    elsewhere: list[tuple[GpuPeer, torch.Tensor | slice]]
    """(rank, rows of the batch's tokens) of ranks on other GPUs that are there."""


Metadata: TypeAlias = FlashAttentionMetadata | DecodeMetadata | MixedMetadata


class TokenParallelFlashBuilder(FlashAttentionMetadataBuilder):
    """Splits a batch by rank."""

    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """vLLM's hook. Full graphs for decode batches only; others are split by sizes that a graph cannot change."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._group = rank_group()
        self._ranks = device_ranks()
        # One per rank, since each keeps its kernel's schedule at an address of its own.
        self._others = [
            FlashAttentionMetadataBuilder(kv_cache_spec, layer_names, vllm_config, device)
            for _ in range(1, self._ranks.here)
        ]
        self._captured = frozenset(vllm_config.compilation_config.cudagraph_capture_sizes or ())
        self._max_rows = vllm_config.scheduler_config.max_num_seqs
        self._packed = PackedRows(
            self._ranks.ranks - 1,
            self._max_rows,
            self.num_heads_q,
            self.num_heads_kv,
            self.headdim,
            vllm_config.model_config.dtype,
            device,
        )
        self._split: SplitRows | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        """vLLM's hook, once a step and once per capture."""
        common = common_attn_metadata
        if common.max_query_len == 1 and common.num_reqs <= self._max_rows:
            return self._build_decode(common, fast_build)
        owners = self._ranks.owners(common.req_idx, common.num_reqs)
        if not owners.any():
            metadata: Metadata = super().build(common_prefix_len, common, fast_build)
            return metadata
        return self._build_mixed(common, owners, fast_build)

    def _build_decode(self, common: CommonAttentionMetadata, fast_build: bool) -> DecodeMetadata:
        count = common.num_reqs
        assert common.num_actual_tokens == count, (common.num_actual_tokens, count)
        split = self._split
        if split is None:
            width = common.block_table_tensor.shape[1]
            split = SplitRows(self._ranks.ranks, self._max_rows, width, self.block_size, self.device)
            self._split = split
        kernels.split(common.block_table_tensor, common.seq_lens, common.slot_mapping, split)

        def share(rank: int, starts: torch.Tensor) -> CommonAttentionMetadata:
            return dataclasses.replace(
                common,
                query_start_loc=starts,
                seq_lens=split.seq_lens[rank, :count],
                block_table_tensor=split.tables[rank, :count],
                slot_mapping=split.slots[rank, :count],
            )

        root = super().build(0, share(0, common.query_start_loc), fast_build)
        others = [
            builder.build(0, share(rank, split.starts[rank - 1, : count + 1]), fast_build)
            for rank, builder in enumerate(self._others, 1)
        ]
        announced = self._announce(split, count, common.max_seq_len)
        return DecodeMetadata(root, others, announced, split.rows[:, :count], split.slots[:, :count], self._packed)

    def _announce(self, split: SplitRows, count: int, max_seq_len: int) -> bool:
        """Tells every rank on another GPU of a decode batch, whether it has rows or not: graphs count on all."""
        watch = self._group.watch
        if watch is None or self._ranks.dummy:
            return False
        step = (count, count, 1, max_seq_len, split.width, self.use_full_cuda_graph and count in self._captured)
        for rank in watch.peers:
            watch.announce(
                rank,
                step,
                split.seq_lens[rank, :count],
                split.slots[rank, :count],
                split.starts[rank - 1, : count + 1],
                split.tables[rank, :count],
            )
        return True

    def _build_mixed(self, common: CommonAttentionMetadata, owners: np.ndarray, fast_build: bool) -> MixedMetadata:
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].numpy()
        shares, elsewhere = [], []
        watch = self._group.watch
        for rank in map(int, np.unique(owners)):
            rows = np.flatnonzero(owners == rank)
            part, tokens = self._select(common, starts, rows, rank)
            if rank == 0 or self._others:
                build = super().build if rank == 0 else self._others[rank - 1].build
                shares.append((rank, tokens, build(0, part, fast_build)))
            elif watch is not None and rank in watch.peers:
                table = part.block_table_tensor
                watch.announce(
                    rank,
                    (
                        part.num_reqs,
                        part.num_actual_tokens,
                        part.max_query_len,
                        part.max_seq_len,
                        table.shape[1],
                        False,
                    ),
                    part.seq_lens,
                    part.slot_mapping,
                    part.query_start_loc,
                    table,
                )
                elsewhere.append((watch.peers[rank], tokens))
        return MixedMetadata(shares, elsewhere)

    def _select(
        self, common: CommonAttentionMetadata, starts: np.ndarray, rows: np.ndarray, rank: int
    ) -> tuple[CommonAttentionMetadata, torch.Tensor | slice]:
        """(the metadata of one rank's requests as if they were the batch, its rows of the batch's tokens)."""
        query_lens = np.diff(starts)[rows]
        own_starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=own_starts[1:])
        tokens: torch.Tensor | slice
        if rows[-1] - rows[0] + 1 == len(rows):
            tokens = slice(int(starts[rows[0]]), int(starts[rows[-1] + 1]))
        else:
            tokens = self._upload(
                np.concatenate([np.arange(starts[row], starts[row + 1], dtype=np.int64) for row in rows])
            )
        index = self._upload(rows)
        bound = common.seq_lens_cpu_upper_bound
        longest = common.max_seq_len if bound is None else int(bound[torch.from_numpy(rows)].max())
        part = dataclasses.replace(
            common,
            query_start_loc=self._upload(own_starts),
            query_start_loc_cpu=torch.from_numpy(own_starts),
            seq_lens=common.seq_lens[index],
            seq_lens_cpu_upper_bound=None,
            num_reqs=len(rows),
            num_actual_tokens=int(own_starts[-1]),
            max_query_len=int(query_lens.max()),
            max_seq_len=longest,
            block_table_tensor=common.block_table_tensor[index] & (STRIDE - 1),
            # Never padding: that lies behind the tokens of all requests.
            slot_mapping=common.slot_mapping[tokens] - rank * STRIDE * self.block_size,
            is_prefilling=None,
            positions=None,
            req_idx=None,
        )
        return part, tokens

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        """To the device, without waiting for it."""
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)


def rank_group() -> RankGroup:
    """This process's group."""
    group = active()
    assert group is not None
    return group


def device_ranks() -> DeviceRanks:
    """Who owns what, on this process's GPU."""
    ranks = rank_group().device
    assert ranks is not None
    return ranks
