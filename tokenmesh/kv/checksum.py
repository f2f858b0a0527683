"""Checksums of payloads, taken while UCX goes on."""

from __future__ import annotations

import asyncio

import numpy as np
import numpy.typing as npt
import xxhash

Buffer = npt.NDArray[np.uint8]

SLICE_BYTES = 512 << 10
"""Between two slices the event loop has a turn. Longer, and UCX's queue of a shared-memory pair (2 MiB) runs dry at the
other end meanwhile: both would wait for each other in turn."""


async def checksum(payload: Buffer, seed: int) -> int:
    """XXH3 of a payload, 64 bits; the same as xxh3_64_intdigest in one go."""
    state = xxhash.xxh3_64(seed=seed)
    for start in range(0, len(payload), SLICE_BYTES):
        if start:
            await asyncio.sleep(0)
        state.update(payload[start : start + SLICE_BYTES].data)
    return state.intdigest()
