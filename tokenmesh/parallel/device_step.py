"""What a root tells the host of a rank on another GPU about a step; everything else is on the devices.

Lengths, slots and block tables follow over the exchange, from device to device, so neither host waits for them.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from tokenmesh.parallel.exchange import PeerLostError

_FORMAT = struct.Struct("<IIIIIIII")
STEP_BYTES = _FORMAT.size
_MAGIC = 0x504B5447


class DeviceStep(NamedTuple):
    """One step of one rank."""

    version: int
    """Counts steps from 1; modulo 2^32."""
    rows: int
    """Sequences, padding included."""
    tokens: int
    """Rows of q, k and v per layer, padding included."""
    max_query_len: int
    max_seq_len: int
    """Tokens, at least as many as any sequence has."""
    width: int
    """Columns of the block table."""
    graph: bool
    """Steps of as many rows come again and again, so that it pays to keep a CUDA graph of one."""

    def to_bytes(self) -> bytes:
        """As it is sent."""
        return _FORMAT.pack(_MAGIC, *self)

    @classmethod
    def from_bytes(cls, data: bytes) -> DeviceStep:
        """Raises PeerLostError if it is none: what follows would not be understood either."""
        magic, version, rows, tokens, max_query_len, max_seq_len, width, graph = _FORMAT.unpack(data)
        if magic != _MAGIC:
            raise PeerLostError("what came is no step")
        return cls(version, rows, tokens, max_query_len, max_seq_len, width, bool(graph))
