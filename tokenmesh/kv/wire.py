"""The bytes on a UCX endpoint: a fixed header, and for DATA a payload right behind it.

Every message names its transfer, so an endpoint carries any number of transfers interleaved. Two digests tell what
went wrong. The header's own: without it nobody knows what follows, so the endpoint must be closed. The checksum over
header and payload: one that is wrong fails its transfer and nothing else.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

Buffer = npt.NDArray[np.uint8]

_LAYOUT = struct.Struct("<IBBHH16sIIIHHIQQ")
HEADER_BYTES = _LAYOUT.size
_MAGIC = 0x544B4D35

PROBE_ID = bytes(16)
"""The transfer id of messages that measure a pair; no ticket."""

LARGEST_PAYLOAD = 256 << 20
"""No sender may be configured to send more in a message."""

STALL_S = 30.0
"""A payload that has not followed its header by then never will, and one that nobody has taken will not be taken."""

HEADER_CHANNEL = 1
PAYLOAD_CHANNEL = 2


class WireError(Exception):
    """Bytes that are no message of ours: the endpoint is out of step and must be closed."""


class Kind(enum.IntEnum):
    """What a message is."""

    DATA = 1
    """`heads` heads from `head` on, of `blocks` blocks from the `first`-th of the target's list on, in `layers` layers
    from `layer` on: layer by layer, in each block by block."""
    COMMIT = 2
    """Everything of these heads was sent; `first` counts the DATA messages."""
    RECEIPT = 4
    """The owner's answer to COMMIT; `first` is 1 if everything of these heads arrived, else 0."""


@dataclass(frozen=True, slots=True)
class Header:
    """One message. Payload length in bytes, as it travels; heads count in the owner's shard, and 0 of them are all.

    `codec` is the number of the codec that the payload is encoded with, 0 for none.
    """

    kind: Kind
    transfer_id: bytes
    sequence: int = 0
    layer: int = 0
    first: int = 0
    blocks: int = 0
    length: int = 0
    checksum: int = 0
    head: int = 0
    heads: int = 0
    codec: int = 0
    layers: int = 1

    def _pack(self, checksum: int, own: int = 0) -> bytes:
        return _LAYOUT.pack(
            _MAGIC,
            self.kind,
            self.codec,
            self.layer,
            self.layers,
            self.transfer_id,
            self.sequence,
            self.first,
            self.blocks,
            self.head,
            self.heads,
            own,
            self.length,
            checksum,
        )

    def sealed(self, payload: Buffer | None = None) -> Header:
        """This header with the checksum over itself and the payload."""
        return replace(self, checksum=self._digest(payload))

    def intact(self, payload: Buffer | None = None) -> bool:
        """Whether header and payload are what was sealed."""
        return self.checksum == self._digest(payload)

    @property
    def seed(self) -> int:
        """Of the payload's checksum: so that a payload cannot be moved under another header."""
        return xxhash.xxh3_64_intdigest(self._pack(0))

    def _digest(self, payload: Buffer | None) -> int:
        return self.seed if payload is None else xxhash.xxh3_64_intdigest(payload.data, seed=self.seed)

    def to_buffer(self) -> Buffer:
        """The bytes to send, shape [HEADER_BYTES]."""
        own = xxhash.xxh3_64_intdigest(self._pack(self.checksum)) & 0xFFFFFFFF
        return np.frombuffer(bytearray(self._pack(self.checksum, own)), dtype=np.uint8)

    @classmethod
    def from_buffer(cls, buffer: Buffer) -> Header:
        """Parses bytes, shape [HEADER_BYTES]. Raises WireError if they are not a header as it was sent."""
        magic, kind, codec, layer, layers, transfer_id, *places, own, length, checksum = _LAYOUT.unpack(
            buffer.tobytes()
        )
        sequence, first, blocks, head, heads = places
        if magic != _MAGIC or kind not in Kind.__members__.values():
            raise WireError("not a tokenmesh KV header")
        header = cls(
            Kind(kind), transfer_id, sequence, layer, first, blocks, length, checksum, head, heads, codec, layers
        )
        if own != xxhash.xxh3_64_intdigest(header._pack(checksum)) & 0xFFFFFFFF:
            raise WireError("a damaged KV header")
        return header
