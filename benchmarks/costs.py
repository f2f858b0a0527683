"""What a mover does beside moving bytes, each alone: checksums, the copy of scattered blocks, handling messages."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import median
from benchmarks.movers import CHUNK_BYTES, Layout, mover_pair, scattered
from tokenmesh.kv.geometry import BlockGeometry, LayerSpan
from tokenmesh.kv.memory import KvMemory
from tokenmesh.kv.wire import Header, Kind

NBYTES = 64 << 20
BLOCK_BYTES = 512 << 10
TINY = Layout("tiny", 256, 4096, [0], [0])
"""A message has next to nothing in it."""


@dataclass(frozen=True)
class Costs:
    """Of one core; medians."""

    checksum_cached: float
    """Bytes per second, of bytes that were just written by the same core, as a receiver finds them."""
    checksum: float
    """Bytes per second, from memory."""
    copy: float
    """Bytes per second, of staged bytes into scattered blocks."""
    message: float
    """Seconds per message of 4 KiB, sent one after the other: Python at both ends, and UCX."""


def _rate(nbytes: int, work: Callable[[], object], repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return nbytes / median(times)


def _in_process() -> tuple[float, float, float]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {1})
    try:
        blocks = NBYTES // BLOCK_BYTES
        staged, data = np.ones(NBYTES, dtype=np.uint8), np.zeros(NBYTES * 2, dtype=np.uint8)
        memory = KvMemory(data, BlockGeometry(1, 1, 1, 1, "uint8", BLOCK_BYTES, "bench"), [LayerSpan(0, BLOCK_BYTES)])
        ids = np.array(scattered(blocks, 3), dtype=np.int64)
        header, chunk = Header(Kind.DATA, bytes(16)), staged[:CHUNK_BYTES]
        return (
            _rate(CHUNK_BYTES, lambda: header.sealed(chunk)),
            _rate(NBYTES, lambda: header.sealed(staged)),
            _rate(NBYTES, lambda: memory.scatter(range(1), ids, memory.all_heads, staged)),
        )
    finally:
        os.sched_setaffinity(0, before)


async def costs(transport: str = "shm") -> Costs:
    """Measures them."""
    rates = await asyncio.to_thread(_in_process)
    # As many messages as layers: none is large enough for two of them.
    async with mover_pair(TINY, transport, chunk_bytes=TINY.block_bytes) as pair:
        await pair.measure(TINY, 2)
        goodput = await pair.measure(TINY, 8)
    return Costs(*rates, TINY.block_bytes / goodput.streamed)
