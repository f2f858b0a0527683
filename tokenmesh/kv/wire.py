"""The bytes on a UCX endpoint: a fixed header, and for DATA a payload right behind it.

Every message names its transfer, so an endpoint carries any number of transfers interleaved. The checksum covers the
header and the payload; a message that fails it fails its transfer and nothing else.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

Buffer = npt.NDArray[np.uint8]

_LAYOUT = struct.Struct("<IHH16sIIIIQQ")
HEADER_BYTES = _LAYOUT.size
_MAGIC = 0x544B4D31

HEADER_CHANNEL = 1
PAYLOAD_CHANNEL = 2


class WireError(Exception):
    """Bytes that are no message of ours: the endpoint is out of step and must be closed."""


class Kind(enum.IntEnum):
    """What a message is."""

    DATA = 1
    """`blocks` blocks of `layer`, the first being the `first`-th of the target's list."""
    COMMIT = 2
    """Everything was sent; `first` counts the DATA messages."""
    CANCEL = 3
    """Nothing more will come."""
    RECEIPT = 4
    """The owner's answer to COMMIT; `first` is 1 if everything arrived, else 0."""


@dataclass(frozen=True, slots=True)
class Header:
    """One message. Payload length in bytes."""

    kind: Kind
    transfer_id: bytes
    sequence: int = 0
    layer: int = 0
    first: int = 0
    blocks: int = 0
    length: int = 0
    checksum: int = 0

    def _pack(self, checksum: int) -> bytes:
        return _LAYOUT.pack(
            _MAGIC,
            self.kind,
            self.layer,
            self.transfer_id,
            self.sequence,
            self.first,
            self.blocks,
            0,
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
        return np.frombuffer(bytearray(self._pack(self.checksum)), dtype=np.uint8)

    @classmethod
    def from_buffer(cls, buffer: Buffer) -> Header:
        """Parses bytes, shape [HEADER_BYTES]. Raises WireError if they cannot be a header of ours."""
        magic, kind, layer, transfer_id, sequence, first, blocks, zero, length, checksum = _LAYOUT.unpack(
            buffer.tobytes()
        )
        if magic != _MAGIC or zero != 0 or kind not in Kind.__members__.values():
            raise WireError("not a tokenmesh KV header")
        return cls(Kind(kind), transfer_id, sequence, layer, first, blocks, length, checksum)
