"""A shard's KV memory on a GPU, as the mover sees it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import xxhash

from tokenmesh.kv.device.ipc import map_share
from tokenmesh.kv.device.passes import Places, Tally, digest, gather, scatter
from tokenmesh.kv.geometry import BlockGeometry, LayerSpan
from tokenmesh.kv.memory import BlockIds, Cells, Heads, Run
from tokenmesh.kv.shares import DeviceShare

_TALLIES = 64
"""Checksums under way at most: those of every staging buffer, and of what is received in place."""


class DeviceKvMemory:
    """KV storage of an engine worker, mapped from another process; see `KvMemory`, whose face it has.

    Payloads are tensors, uint8 [n]. Kernels and copies of this process follow each other on one stream; those that a
    payload depends on are waited for with its checksum, and those that write blocks by `landed`.
    """

    sends_in_place: ClassVar[bool] = False
    """UCX cannot hand on to an owner what is itself mapped from another process (it would copy through the host, at
    0.6 GB/s), so blocks leave from staging memory, which is this process's own."""

    overlaps: ClassVar[bool] = True

    direct: ClassVar[frozenset[str]] = frozenset(("cuda_ipc", "cuda_copy"))
    """See `KvMemory`. With get_zcopy the receiver's process copies; `quiesce` waits for what it has begun."""

    joins: ClassVar[int] = 1 << 30

    def __init__(self, data: torch.Tensor, geometry: BlockGeometry, spans: Sequence[LayerSpan]) -> None:
        """`data`: uint8 [nbytes], the whole storage; one span per layer, in model order."""
        self.geometry = geometry
        self.all_heads = Heads(0, geometry.kv_heads)
        self._device = data.device
        self._cells = Cells(geometry, spans)
        size = self._cells.nbytes
        first, *_ = starts = [span.offset for span in spans]
        assert all((start - first) % size == 0 for start in starts)
        whole = data[first % size :]
        self._all = whole[: len(whole) // size * size].view(torch.int64).view(-1, size // 8)
        """As words of 8 bytes, which torch copies faster than single ones. [cells, words]"""
        self._starts = [start // size for start in starts]
        self._bases = torch.tensor(self._starts, dtype=torch.int64, device=self._device)
        """Numbers of the layers' first cells."""
        self._known: WeakKeyDictionary[Run, torch.Tensor] = WeakKeyDictionary()
        """Numbers of cells, on the device: to send them there takes waiting for it."""
        self._launched = _Launched()
        self._tallies: asyncio.Queue[Tally] = asyncio.Queue()
        for _ in range(_TALLIES):
            self._tallies.put_nowait(Tally(self._device))
        self._unread = Tally(self._device)
        """Of launches whose digest nobody asks for."""
        if data.is_cuda:
            self._compile()

    @classmethod
    def map(cls, given: DeviceShare, geometry: BlockGeometry, spans: Sequence[LayerSpan]) -> DeviceKvMemory:
        """Maps what an engine worker shares. Raises DeviceIpcError."""
        return cls(map_share(given), geometry, spans)

    def _compile(self) -> None:
        """Compiles the kernels, which takes a second each; else the first messages would."""
        cells = torch.zeros(2, self._cells.nbytes // 8, dtype=torch.int64, device=self._device)
        one = torch.zeros(1, dtype=torch.int64, device=self._device)
        out, tally = torch.zeros(self._cells.nbytes, dtype=torch.uint8, device=self._device), Tally(self._device)
        for launch in (gather, scatter):
            launch(Places(cells, one, range(1), one), out, tally)
        digest(out, tally)

    def nbytes(self, blocks: int, heads: Heads) -> int:
        """See `KvMemory`."""
        return blocks * heads.count * self.geometry.head_bytes

    def buffers(self, count: int, nbytes: int) -> list[torch.Tensor]:
        """See `KvMemory`. Parts of one allocation: opening an allocation costs its reader 15 ms, once."""
        return list(torch.zeros(count, nbytes, dtype=torch.uint8, device=self._device))

    def view(self, layer: int, blocks: BlockIds, heads: Heads) -> torch.Tensor | None:
        """See `KvMemory`."""
        run = self._cells.of(layer, blocks, heads)
        if not run.adjacent:
            return None
        cells = self._all[self._starts[layer] :][run.span]
        return cells.view(-1).view(torch.uint8)

    def _places(self, layers: range, blocks: BlockIds, heads: Heads) -> Places:
        """Raises IndexError."""
        run = self._cells.of(layers.start, blocks, heads)
        for layer in layers:
            run.check(len(self._all) - self._starts[layer], layer)
        ids = self._known.get(run)
        if ids is None:
            ids = self._known[run] = torch.from_numpy(run.ids).to(self._device)
        return Places(self._all, self._bases, layers, ids)

    def gather(self, layers: range, blocks: BlockIds, heads: Heads, out: torch.Tensor) -> torch.Tensor:
        """See `KvMemory`."""
        part = out[: len(layers) * self.nbytes(len(blocks), heads)]
        gather(self._places(layers, blocks, heads), part, self._unread)
        return part

    def scatter(self, layers: range, blocks: BlockIds, heads: Heads, data: torch.Tensor) -> None:
        """See `KvMemory`."""
        scatter(self._places(layers, blocks, heads), data, self._unread)

    async def gather_checked(
        self, layers: range, blocks: BlockIds, heads: Heads, out: torch.Tensor, seed: int
    ) -> tuple[torch.Tensor, int]:
        """See `KvMemory`. In one pass over the blocks."""
        places, part = self._places(layers, blocks, heads), out[: len(layers) * self.nbytes(len(blocks), heads)]
        return part, await self._tallied(lambda tally: gather(places, part, tally), seed)

    async def checksum(self, payload: torch.Tensor, seed: int) -> int:
        """See `KvMemory`. Returns when everything launched before is done."""
        return await self._tallied(lambda tally: digest(payload, tally), seed)

    async def _tallied(self, launch: Callable[[Tally], None], seed: int) -> int:
        tally = await self._tallies.get()
        try:
            launch(tally)
            await self.landed()
            return xxhash.xxh3_64_intdigest(tally.answer.numpy().tobytes(), seed=seed)
        finally:
            # One that was given up is written once more, before whatever its next user launches.
            self._tallies.put_nowait(tally)

    async def landed(self) -> None:
        """See `BlockMemory`."""
        if self._device.type == "cuda":
            await self._launched.done()

    def quiesce(self) -> None:
        """See `KvMemory`. A copy that UCX has given to the device goes on when its request is cancelled."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Launched:
    """Tells coroutines when the device has done what was launched before they asked.

    One looks for all, at the oldest alone, since the stream ends in order: were each to poll, every step of every
    message would wait for all of them to have looked.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Any, asyncio.Future[None]]] = deque()
        self._events: list[Any] = []
        """Of no use at present; to make one takes five times as long as to record it."""

    def done(self) -> asyncio.Future[None]:
        """Of what is on the current stream now."""
        loop = asyncio.get_running_loop()
        event = self._events.pop() if self._events else torch.cuda.Event()
        event.record()
        future: asyncio.Future[None] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._look, loop)
        self._waiting.append((event, future))
        return future

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting and self._waiting[0][0].query():
            event, future = self._waiting.popleft()
            self._events.append(event)
            if not future.done():
                future.set_result(None)
        if self._waiting:
            loop.call_soon(self._look, loop)
