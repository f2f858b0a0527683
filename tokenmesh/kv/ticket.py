"""What one transfer may write, and what of it has come."""

from __future__ import annotations

import asyncio

import numpy as np

from tokenmesh.kv.codecs import NAMES
from tokenmesh.kv.memory import BlockIds, Heads
from tokenmesh.kv.stopwatch import Stopwatch
from tokenmesh.kv.ucx import UcxEndpoint


class Ticket:
    """Blocks that one transfer may write once."""

    def __init__(self, blocks: list[int], layers: int, heads: int, codec: str) -> None:
        self.blocks = np.array(blocks, dtype=np.int64)
        self.missing = np.ones((layers, len(blocks), heads), dtype=bool)
        """[layers, blocks, KV heads]: what has not come."""
        self.free = self.missing.copy()
        """The same shape: what has neither come nor is being received in place."""
        self.writes: dict[asyncio.Task[None], UcxEndpoint] = {}
        """Receives in place that are under way, and whom they come from."""
        self.codecs = {0, NAMES.index(codec)}
        """Numbers of the encodings that its messages may have."""
        self.bytes = 0
        self.bad = 0
        """Messages that were dropped."""
        self.error = ""
        self.wire = Stopwatch()
        self.transport = ""
        self._parts: dict[tuple[int, int], BlockIds] = {}

    def part(self, first: int, count: int) -> BlockIds:
        """Ids of `count` blocks from the `first`-th on; the same array each time that the same are asked for."""
        known = self._parts.get((first, count))
        if known is None:
            known = self._parts[first, count] = self.blocks[first : first + count]
        return known

    @property
    def complete(self) -> bool:
        """Whether everything is here."""
        return not self.error and not self.missing.any()

    def has(self, heads: Heads) -> bool:
        """Whether these heads of every block are here."""
        return not self.error and not self.missing[:, :, heads.first : heads.first + heads.count].any()
