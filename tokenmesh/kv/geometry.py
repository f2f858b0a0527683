"""The shape of KV blocks, as both ends of a transfer must agree on it."""

from __future__ import annotations

import msgspec

from tokenmesh.v1 import kv_pb2


class GeometryMismatchError(Exception):
    """Two caches cannot exchange blocks; the message names the first difference."""


class BlockGeometry(msgspec.Struct, frozen=True):
    """Shape of one shard's KV blocks. Sizes in elements or tokens unless the name says bytes."""

    layers: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: str
    block_bytes: int
    """Bytes of one block of one layer, keys and values together."""
    packing: str
    """Order inside a block; kernels of different instruction sets pack keys differently."""

    def check_equal(self, other: BlockGeometry) -> None:
        """Raises GeometryMismatchError unless blocks can be copied byte by byte."""
        for field in self.__struct_fields__:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise GeometryMismatchError(f"KV geometry differs in {field}: {mine!r} here, {theirs!r} at the owner")

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
