"""TokenParallelFlashBackend: FlashAttention, with each sequence computed on the blocks of the rank that owns it.

Ranks share the root's GPU (`ranks`), or have their own (`peer`). A batch of one token per sequence is split on the
device, at fixed addresses, and runs in full CUDA graphs: per layer the rows of other ranks are packed, each rank
attends beside the root, on a stream of its own or on its own GPU, and their attention is unpacked. A batch with a
prefill chunk in it is split on the host, which knows owners and lengths without asking the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from tokenmesh.engine.gpu import kernels
from tokenmesh.engine.gpu.metadata import (
    DecodeMetadata,
    Metadata,
    MixedMetadata,
    TokenParallelFlashBuilder,
    device_ranks,
    rank_group,
)
from tokenmesh.engine.gpu.peer import GpuPeer
from tokenmesh.parallel.exchange import PeerLostError


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
        watch = self._group.watch
        if metadata.others:
            self._decode_here(layer, query, key, value, kv_cache, metadata, output)
        else:
            kernels.pack(query, key, value, metadata.rows, packed)
            # What a graph holds is announced when it is replayed. Before the first rank has come, there is no watch.
            told = watch is not None and (metadata.announced or torch.cuda.is_current_stream_capturing())
            peers = watch.peers if watch is not None and told else {}
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
        firsts = tuple(first for first, _ in spans)
        kernels.place(query, key, value, metadata.rows, metadata.slots, firsts, kv_cache, packed)
        attend = super().forward
        main = torch.cuda.current_stream()
        streams = self._streams
        streams.forked.record(main)
        for index, other in enumerate(metadata.others):
            side = streams.streams[index]
            side.wait_event(streams.forked)
            with torch.cuda.stream(side):
                blocks = kv_cache[slice(*spans[index + 1])]
                # Keys and values are in their blocks by now: none are read here.
                attend(layer, packed.query[index, :count], key, value, blocks, other, packed.output[index, :count])
                streams.done[index].record(side)
        # The root's blocks come first, so they need not be cut out.
        attend(layer, query, key, value, kv_cache, metadata.root, output)
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
