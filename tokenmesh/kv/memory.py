"""A shard's KV memory as the mover sees it: bytes, addressed by layer and block."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tokenmesh.kv.geometry import BlockGeometry, LayerSpan

Buffer = npt.NDArray[np.uint8]


class KvMemory:
    """KV storage of an engine worker, mapped from the file descriptor that backs it.

    The engine writes it and the mover reads it (prefill), or the other way round (decode); who may touch which block
    is decided by tickets and the scheduler, never here.
    """

    def __init__(self, data: Buffer, geometry: BlockGeometry, spans: Sequence[LayerSpan]) -> None:
        """`data`: flat bytes of the whole storage, shape [nbytes]; one span per layer, in model order."""
        assert data.ndim == 1
        assert len(spans) == geometry.layers
        self.geometry = geometry
        self._data = data
        self._spans = spans
        self._packed = all(span.stride == geometry.block_bytes for span in spans)

    @classmethod
    def map(cls, fd: int, nbytes: int, geometry: BlockGeometry, spans: Sequence[LayerSpan]) -> KvMemory:
        """Maps `nbytes` of an inherited file descriptor, shared with the engine worker, and closes it."""
        mapped = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)
        return cls(np.frombuffer(mapped, dtype=np.uint8), geometry, spans)

    def _run(self, layer: int, block: int, count: int) -> Buffer:
        start = self._spans[layer].offset + block * self._spans[layer].stride
        return self._data[start : start + count * self.geometry.block_bytes]

    def runs(self, layer: int, blocks: Sequence[int]) -> Iterator[tuple[int, int, Buffer]]:
        """Splits block ids into runs that are contiguous in memory.

        Yields (place of the first block in `blocks`, number of blocks, bytes of the run as a view).
        """
        first = 0
        for i in range(1, len(blocks) + 1):
            if i == len(blocks) or not self._packed or blocks[i] != blocks[i - 1] + 1:
                yield first, i - first, self._run(layer, blocks[first], i - first)
                first = i

    def contiguous(self, layer: int, blocks: Sequence[int]) -> Buffer | None:
        """The bytes of these blocks in place, if they lie back to back in memory; else None."""
        if len(blocks) > 1 and not (self._packed and (np.diff(blocks) == 1).all()):
            return None
        return self._run(layer, blocks[0], len(blocks)) if blocks else None

    def gather(self, layer: int, blocks: Sequence[int], out: Buffer) -> Buffer:
        """Copies blocks into `out` back to back; returns the part filled."""
        size = self.geometry.block_bytes
        for place, count, run in self.runs(layer, blocks):
            out[place * size : (place + count) * size] = run
        return out[: len(blocks) * size]

    def scatter(self, layer: int, blocks: Sequence[int], data: Buffer) -> None:
        """Copies back-to-back blocks from `data` into their places."""
        size = self.geometry.block_bytes
        for place, count, run in self.runs(layer, blocks):
            run[:] = data[place * size : (place + count) * size]
