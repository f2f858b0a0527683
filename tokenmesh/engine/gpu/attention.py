"""TokenParallelFlashBackend: FlashAttention, with each sequence computed on the blocks of the rank that owns it.

Ranks share the root's GPU (`ranks`), or have their own (`peer`). A batch of one token per sequence is split on the
device, at fixed addresses, and runs in full CUDA graphs: per layer the rows of other ranks are packed, each rank
attends beside the root, on a stream of its own or on its own GPU, and their attention is unpacked. A batch with a
prefill chunk in it is split on the host, which knows owners and lengths without asking the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from tokenmesh.engine.gpu import kernels
from tokenmesh.engine.gpu.peer import GpuPeer
from tokenmesh.engine.gpu.ranks import DeviceRanks
from tokenmesh.engine.gpu.rows import PackedRows, SplitRows
from tokenmesh.engine.group import RankGroup, active
from tokenmesh.parallel.exchange import PeerLostError
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
    packed: PackedRows


@dataclasses.dataclass
class MixedMetadata:
    """A batch in which some sequences have several tokens, and some live on other ranks."""

    shares: list[tuple[int, torch.Tensor | slice, FlashAttentionMetadata]]
    """(rank, rows of the batch's tokens, the rank's metadata over them) of the root and ranks on its GPU."""
    elsewhere: list[tuple[GpuPeer, torch.Tensor | slice]]
    """(rank, rows of the batch's tokens) of ranks on other GPUs that are there."""


Metadata: TypeAlias = FlashAttentionMetadata | DecodeMetadata | MixedMetadata


class TokenParallelFlashBackend(FlashAttentionBackend):
    """See the module's docstring."""

    # New keys and values go to their owner together with the queries.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """vLLM's hook."""
        return TokenParallelFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """vLLM's hook."""
        return TokenParallelFlashBuilder


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
        return DecodeMetadata(
            root, others, self._announce(split, count, common.max_seq_len), split.rows[:, :count], self._packed
        )

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


class TokenParallelFlashImpl(FlashAttentionImpl):
    """Packs for all ranks, attends on all of them at once, unpacks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group = rank_group()
        self._ranks = device_ranks()
        self._streams = _Streams.of(self._ranks.here - 1)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """vLLM's hook. query, output: [tokens, heads, head size]; key, value: [tokens, KV heads, head size]."""
        if attn_metadata is None:
            return output.fill_(0)
        if isinstance(attn_metadata, DecodeMetadata):
            self._decode(layer, query, key, value, kv_cache, attn_metadata, output)
        elif isinstance(attn_metadata, MixedMetadata):
            self._mixed(layer, query, key, value, kv_cache, attn_metadata, output)
        else:
            self._attend(layer, query, key, value, kv_cache, attn_metadata, output)
        return output

    def _decode(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: DecodeMetadata,
        output: torch.Tensor,
    ) -> None:
        packed, count = metadata.packed, metadata.rows.shape[1]
        kernels.pack(query, key, value, metadata.rows, packed)
        watch = self._group.watch
        if watch is None:
            self._decode_here(layer, query, key, value, kv_cache, metadata, output)
        else:
            # What a graph holds is announced when it is replayed.
            peers = watch.peers if metadata.announced or torch.cuda.is_current_stream_capturing() else {}
            # Sent before the root attends, whose kernel leaves no room on the GPU for any other beside it.
            for rank, peer in peers.items():
                self._with(peer, peer.pair.send, packed.packed[rank - 1, :count])
            self._attend(layer, query, key, value, kv_cache, metadata.root, output)
            for rank, peer in peers.items():
                self._with(peer, peer.pair.receive, packed.output[rank - 1, :count])
        kernels.unpack(metadata.rows, packed, output)

    def _decode_here(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: DecodeMetadata,
        output: torch.Tensor,
    ) -> None:
        """Ranks on this GPU attend on streams of their own, beside the root."""
        packed, count = metadata.packed, metadata.rows.shape[1]
        spans = self._ranks.spans(kv_cache.shape[0])
        main = torch.cuda.current_stream()
        streams = self._streams
        streams.forked.record(main)
        for index, other in enumerate(metadata.others):
            side = streams.streams[index]
            side.wait_event(streams.forked)
            with torch.cuda.stream(side):
                self._attend(
                    layer,
                    packed.query[index, :count],
                    packed.key[index, :count],
                    packed.value[index, :count],
                    kv_cache[slice(*spans[index + 1])],
                    other,
                    packed.output[index, :count],
                )
                streams.done[index].record(side)
        # The root's blocks come first, so they need not be cut out.
        self._attend(layer, query, key, value, kv_cache, metadata.root, output)
        for done in streams.done:
            main.wait_event(done)

    def _mixed(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: MixedMetadata,
        output: torch.Tensor,
    ) -> None:
        for peer, tokens in metadata.elsewhere:
            self._with(peer, peer.pair.send, torch.cat((query[tokens], key[tokens], value[tokens]), dim=1))
        spans = self._ranks.spans(kv_cache.shape[0])
        for rank, tokens, share in metadata.shares:
            blocks = kv_cache[slice(*spans[rank])]
            target = output[tokens]
            self._attend(layer, query[tokens], key[tokens], value[tokens], blocks, share, target)
            if not isinstance(tokens, slice):
                output[tokens] = target
        for peer, tokens in metadata.elsewhere:
            answer = torch.empty_like(output[tokens])
            self._with(peer, peer.pair.receive, answer)
            output[tokens] = answer

    def _with(self, peer: GpuPeer, verb: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Has a rank on another GPU send or receive; rows of one that is lost are rubbish, and dropped later."""
        watch = self._group.watch
        assert watch is not None
        try:
            verb(*tensors)
        except PeerLostError as error:
            watch.lose(peer, str(error))

    def _attend(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: FlashAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        self.do_kv_cache_update(layer, key, value, kv_cache, metadata.slot_mapping)
        super().forward(layer, query, key, value, kv_cache, metadata, output)


class _Streams:
    """A stream per rank other than the root, and the events of fork and join; shared by all layers."""

    _made: _Streams | None = None

    def __init__(self, others: int) -> None:
        self.streams = [torch.cuda.Stream() for _ in range(others)]
        self.forked = torch.cuda.Event()
        self.done = [torch.cuda.Event() for _ in range(others)]

    @classmethod
    def of(cls, others: int) -> _Streams:
        """This process's."""
        if cls._made is None or len(cls._made.streams) != others:
            cls._made = cls(others)
        return cls._made


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
