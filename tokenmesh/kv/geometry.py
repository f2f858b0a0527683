"""The shape of KV blocks, as both ends of a transfer must agree on it."""

from __future__ import annotations

import msgspec

from tokenmesh.v1 import kv_pb2

HND = "hnd"
"""Packing on GPUs: [kv heads, tokens, keys and values], row by row."""


class GeometryMismatchError(Exception):
    """Two caches cannot exchange blocks; the message names the first difference."""


class BlockGeometry(msgspec.Struct, frozen=True):
    """Shape of one shard's KV blocks: [kv heads, all keys, then all values] on CPUs, as `HND` says on GPUs.

    Sizes in elements or tokens unless the name says bytes.
    """

    layers: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: str
    block_bytes: int
    """Bytes of one block of one layer, keys and values together."""
    packing: str
    """Order inside a block; kernels of different instruction sets pack keys differently."""
    weights: str = ""
    """Digest of what computes the blocks; empty: unknown, or not to be compared."""

    @property
    def by_head(self) -> bool:
        """Whether a head's part of a block is contiguous, so that heads can be moved one by one."""
        return self.packing.startswith("cpu_attn/") or self.packing == HND

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one block."""
        return self.block_bytes // self.kv_heads

    def check_reaches(self, owner: BlockGeometry, bridged: bool = False) -> None:
        """Raises GeometryMismatchError unless heads of our blocks can be copied byte by byte into the owner's.

        `bridged`: element by element, as their types may differ.
        """
        if owner.kv_heads < 1 or owner.block_bytes % owner.kv_heads:
            raise GeometryMismatchError(f"{owner.kv_heads} KV heads do not fit a block of {owner.block_bytes} bytes")
        types = () if bridged else ("dtype", "head_bytes")
        for field in ("layers", "head_size", "block_size", *types, "packing"):
            mine, theirs = getattr(self, field), getattr(owner, field)
            if mine != theirs:
                hint = ""
                if field == "block_size" and self.packing != HND and self.by_head:
                    hint = "; keys lie transposed inside a block, so blocks can be neither cut nor joined"
                raise GeometryMismatchError(
                    f"KV geometry differs in {field}: {mine!r} here, {theirs!r} at the owner{hint}"
                )
        if self.weights and owner.weights and self.weights != owner.weights:
            raise GeometryMismatchError(
                f"the weights are others: {self.weights} here, {owner.weights} at the owner, which can set"
                " decode_service.kv_transfer.same_weights to false"
            )

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def to_proto(self) -> kv_pb2.BlockGeometry:
        """The same, for the wire."""
        return kv_pb2.BlockGeometry(**msgspec.structs.asdict(self))

    @classmethod
    def from_proto(cls, message: kv_pb2.BlockGeometry) -> BlockGeometry:
        """The same, off the wire."""
        return cls(**{field: getattr(message, field) for field in cls.__struct_fields__})


class LayerSpan(msgspec.Struct, frozen=True):
    """Where one layer's blocks lie in a shard's KV memory, in bytes."""

    offset: int
    stride: int
    """Distance between the starts of adjacent blocks; equal to block_bytes where blocks are contiguous."""
