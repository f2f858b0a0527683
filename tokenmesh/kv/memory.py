"""A shard's KV memory as the mover sees it: bytes, addressed by layer, block and head."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenmesh.kv.geometry import BlockGeometry, LayerSpan

Buffer = npt.NDArray[np.uint8]
BlockIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Heads:
    """Adjacent heads of a shard, the same in every block."""

    first: int
    count: int


class KvMemory:
    """KV storage of an engine worker, mapped from the file descriptor that backs it.

    The engine writes it and the mover reads it (prefill), or the other way round (decode); who may touch which block
    is decided by tickets and the scheduler, never here. It is made of cells, one head of one block each (or the whole
    block, where the packing mixes heads); numpy moves any number of them in one call.
    """

    def __init__(self, data: Buffer, geometry: BlockGeometry, spans: Sequence[LayerSpan]) -> None:
        """`data`: flat bytes of the whole storage, shape [nbytes]; one span per layer, in model order."""
        assert data.ndim == 1
        assert len(spans) == geometry.layers
        self.geometry = geometry
        self.all_heads = Heads(0, geometry.kv_heads)
        self._cells_per_block = geometry.kv_heads if geometry.by_head else 1
        self._cell_bytes = geometry.block_bytes // self._cells_per_block
        self._cell: Any = np.dtype((np.void, self._cell_bytes))
        assert all(span.stride % self._cell_bytes == 0 for span in spans)
        self._strides = [span.stride // self._cell_bytes for span in spans]
        self._layers: list[npt.NDArray[np.void]] = []
        for span in spans:
            count = (data.size - span.offset) // self._cell_bytes
            self._layers.append(data[span.offset : span.offset + count * self._cell_bytes].view(self._cell))

    @classmethod
    def map(cls, fd: int, nbytes: int, geometry: BlockGeometry, spans: Sequence[LayerSpan]) -> KvMemory:
        """Maps `nbytes` of an inherited file descriptor, shared with the engine worker, and closes it."""
        mapped = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)
        return cls(np.frombuffer(mapped, dtype=np.uint8), geometry, spans)

    def nbytes(self, blocks: int, heads: Heads) -> int:
        """Bytes of so many blocks' heads."""
        return blocks * heads.count * self.geometry.head_bytes

    def _ids(self, layer: int, blocks: BlockIds, heads: Heads) -> BlockIds:
        first = blocks * self._strides[layer]
        if self._cells_per_block == 1:
            return first
        return (first[:, None] + np.arange(heads.first, heads.first + heads.count)).reshape(-1)

    def view(self, layer: int, blocks: BlockIds, heads: Heads) -> Buffer | None:
        """The bytes of these heads in place, if they lie next to each other in this order; else None."""
        ids = self._ids(layer, blocks, heads)
        if ids[-1] - ids[0] != len(ids) - 1 or not (np.diff(ids) == 1).all():
            return None
        return self._layers[layer][ids[0] : ids[-1] + 1].view(np.uint8)

    def gather(self, layer: int, blocks: BlockIds, heads: Heads, out: Buffer) -> Buffer:
        """Copies heads of blocks into `out` back to back, [blocks, heads, ...]; returns the part filled.

        Raises IndexError.
        """
        ids = self._ids(layer, blocks, heads)
        if ids.min() < 0 or ids.max() >= len(self._layers[layer]):
            raise IndexError(f"no such block in layer {layer}")
        part = out[: len(ids) * self._cell_bytes]
        # Checked above: in its checking mode, numpy copies twice.
        np.take(self._layers[layer], ids, out=part.view(self._cell), mode="clip")
        return part

    def scatter(self, layer: int, blocks: BlockIds, heads: Heads, data: Buffer) -> None:
        """Copies back-to-back heads of blocks from `data` into their places. Raises IndexError."""
        self._layers[layer][self._ids(layer, blocks, heads)] = data.view(self._cell)
