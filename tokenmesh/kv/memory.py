"""A shard's KV memory as the mover sees it: bytes, addressed by layer, block and head."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmesh.kv import checksum as host
from tokenmesh.kv.geometry import BlockGeometry, LayerSpan
from tokenmesh.kv.shares import HostShare

Buffer = npt.NDArray[np.uint8]
BlockIds = npt.NDArray[np.int64]
_KNOWN_RUNS = 64
STAGED_BYTES = 512 << 10
"""Smaller payloads are staged at both ends, which costs little while they fit into a core's cache. UCX must send by
rendezvous what is received in place: parts of an eager message may be taken in even when its endpoint is closed."""
Payload: TypeAlias = Any
"""Flat bytes, [n]: of numpy in host memory, of torch on a device. Both know len(), slices, and UCX both."""


@dataclass(frozen=True)
class Heads:
    """Adjacent heads of a shard, the same in every block."""

    first: int
    count: int


class Run:
    """Numbers of cells."""

    def __init__(self, ids: BlockIds) -> None:
        self.ids = ids
        self.first, self.last = (int(ids.min()), int(ids.max())) if len(ids) else (0, -1)
        self.adjacent = self.last - self.first == len(ids) - 1 and bool((np.diff(ids) == 1).all())
        """They lie next to each other, in this order."""

    @property
    def span(self) -> slice:
        """The cells, if adjacent."""
        return slice(self.first, self.last + 1)

    def check(self, cells: int, layer: int) -> None:
        """Raises IndexError unless a layer of so many cells has them all."""
        if self.first < 0 or self.last >= cells:
            raise IndexError(f"no such block in layer {layer}")


class Cells:
    """What KV memory is made of: one head of one block each, or the whole block where the packing mixes heads."""

    def __init__(self, geometry: BlockGeometry, spans: Sequence[LayerSpan]) -> None:
        """One span per layer, in model order."""
        assert len(spans) == geometry.layers
        self._per_block = geometry.kv_heads if geometry.by_head else 1
        self.nbytes = geometry.block_bytes // self._per_block
        """Of a cell."""
        assert all(span.stride % self.nbytes == 0 for span in spans)
        self.strides = [span.stride // self.nbytes for span in spans]
        """Per layer, cells from one block to the next."""
        self._known: OrderedDict[tuple[int, int, Heads], tuple[BlockIds, Run]] = OrderedDict()

    def of(self, layer: int, blocks: BlockIds, heads: Heads) -> Run:
        """The cells of these blocks' heads in a layer. An array that was here before is not looked at again."""
        stride = self.strides[layer]
        key = id(blocks), stride, heads
        known = self._known.get(key)
        if known is None:
            ids = blocks * stride
            if self._per_block > 1:
                ids = (ids[:, None] + np.arange(heads.first, heads.first + heads.count)).reshape(-1)
            # With the array, or another might be given its id.
            known = self._known[key] = blocks, Run(ids)
            if len(self._known) > _KNOWN_RUNS:
                self._known.popitem(last=False)
        return known[1]


class BlockMemory(Protocol):
    """KV memory, wherever it lies."""

    geometry: BlockGeometry
    all_heads: Heads
    sends_in_place: ClassVar[bool]
    """Whether payloads may leave from where the blocks are."""
    overlaps: ClassVar[bool]
    """Whether copies and checksums go on by themselves, so that the next may be begun before one is done."""
    direct: ClassVar[frozenset[str]]
    """Transports, besides those of host memory, with which a payload may be received into blocks: nothing writes them
    after the endpoint is closed and `quiesce` has returned."""

    joins: ClassVar[int]
    """Bytes up to which layers that have piled up leave in one message, where a message costs more than a copy."""

    def nbytes(self, blocks: int, heads: Heads) -> int:
        """Bytes of so many blocks' heads in a layer."""

    def buffers(self, count: int, nbytes: int) -> list[Payload]:
        """Staging memory beside the blocks, `count` times [nbytes]."""

    def view(self, layer: int, blocks: BlockIds, heads: Heads) -> Payload | None:
        """The bytes of these heads in place, if they lie next to each other in this order; else None."""

    def gather(self, layers: range, blocks: BlockIds, heads: Heads, out: Payload) -> Payload:
        """Copies heads of blocks into `out` back to back, [layers, blocks, heads, ...]; returns the part filled.

        Raises IndexError.
        """

    def scatter(self, layers: range, blocks: BlockIds, heads: Heads, data: Payload) -> None:
        """Copies back-to-back heads of blocks from `data` into their places. Raises IndexError."""

    async def gather_checked(
        self, layers: range, blocks: BlockIds, heads: Heads, out: Payload, seed: int
    ) -> tuple[Payload, int]:
        """What `gather` gives, and its `checksum`. Raises IndexError."""

    async def checksum(self, payload: Payload, seed: int) -> int:
        """64 bits over a payload, once what it is made of has been copied; the same at both ends of a link."""

    async def landed(self) -> None:
        """Returns when what was scattered is in its place."""

    def quiesce(self) -> None:
        """Returns when nothing of a payload writes into blocks any more whose endpoint is closed."""


class KvMemory:
    """KV storage of an engine worker in host memory, mapped from the file descriptor that backs it; a `BlockMemory`.

    The engine writes it and the mover reads it (prefill), or the other way round (decode); who may touch which block
    is decided by tickets and the scheduler, never here. numpy moves any number of cells in one call.
    """

    sends_in_place: ClassVar[bool] = True
    overlaps: ClassVar[bool] = False
    direct: ClassVar[frozenset[str]] = frozenset()
    joins: ClassVar[int] = STAGED_BYTES

    def __init__(self, data: Buffer, geometry: BlockGeometry, spans: Sequence[LayerSpan]) -> None:
        """`data`: flat bytes of the whole storage, shape [nbytes]; one span per layer, in model order."""
        assert data.ndim == 1
        self.geometry = geometry
        self.all_heads = Heads(0, geometry.kv_heads)
        self._cells = Cells(geometry, spans)
        size = self._cells.nbytes
        self._cell: Any = np.dtype((np.void, size))
        self._layers: list[npt.NDArray[np.void]] = []
        for span in spans:
            count = (data.size - span.offset) // size
            self._layers.append(data[span.offset : span.offset + count * size].view(self._cell))

    @classmethod
    def map(cls, given: HostShare, geometry: BlockGeometry, spans: Sequence[LayerSpan]) -> KvMemory:
        """Maps what an engine worker shares, and closes its file descriptor."""
        mapped = mmap.mmap(given.fd, given.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(given.fd)
        return cls(np.frombuffer(mapped, dtype=np.uint8), geometry, spans)

    def nbytes(self, blocks: int, heads: Heads) -> int:
        """See `BlockMemory`."""
        return blocks * heads.count * self.geometry.head_bytes

    def buffers(self, count: int, nbytes: int) -> list[Buffer]:
        """See `BlockMemory`."""
        return [np.zeros(nbytes, dtype=np.uint8) for _ in range(count)]

    def view(self, layer: int, blocks: BlockIds, heads: Heads) -> Buffer | None:
        """See `BlockMemory`."""
        run = self._cells.of(layer, blocks, heads)
        return self._layers[layer][run.span].view(np.uint8) if run.adjacent else None

    def gather(self, layers: range, blocks: BlockIds, heads: Heads, out: Buffer) -> Buffer:
        """See `BlockMemory`."""
        size = self.nbytes(len(blocks), heads)
        for layer, part in zip(layers, _parts(out, size), strict=False):
            run = self._cells.of(layer, blocks, heads)
            run.check(len(self._layers[layer]), layer)
            # Checked above: in its checking mode, numpy copies twice.
            np.take(self._layers[layer], run.ids, out=part.view(self._cell), mode="clip")
        return out[: len(layers) * size]

    def scatter(self, layers: range, blocks: BlockIds, heads: Heads, data: Buffer) -> None:
        """See `BlockMemory`."""
        for layer, part in zip(layers, _parts(data, self.nbytes(len(blocks), heads)), strict=True):
            self._layers[layer][self._cells.of(layer, blocks, heads).ids] = part.view(self._cell)

    async def gather_checked(
        self, layers: range, blocks: BlockIds, heads: Heads, out: Buffer, seed: int
    ) -> tuple[Buffer, int]:
        """See `BlockMemory`."""
        part = self.gather(layers, blocks, heads, out)
        return part, await self.checksum(part, seed)

    async def checksum(self, payload: Buffer, seed: int) -> int:
        """See `BlockMemory`."""
        return await host.checksum(payload, seed)

    async def landed(self) -> None:
        """See `BlockMemory`. It was copied at once."""

    def quiesce(self) -> None:
        """See `BlockMemory`. UCX has let go of a buffer once its endpoint is closed."""


def _parts(data: Buffer, nbytes: int) -> Iterator[Buffer]:
    """`data` cut into adjacent parts."""
    return (data[start : start + nbytes] for start in range(0, len(data), nbytes))
