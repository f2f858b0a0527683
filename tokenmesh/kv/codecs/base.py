"""What a codec is, and which there are."""

from __future__ import annotations

from typing import Protocol

from tokenmesh.kv.memory import Payload

NONE = "none"
NAMES = ("none", "lossless", "bf16", "fp16", "fp8")
"""The place of a name is its number in a message's header."""
EXACT = ("none", "lossless")
"""What the owner gets is what the sender had, bit for bit."""


class CodecError(Exception):
    """A payload that this codec has not made."""


class Codec(Protocol):
    """Encodes and decodes heads of blocks, back to back. Stateless: any thread may use it, for any message."""

    def encode(self, raw: Payload) -> Payload | None:
        """What goes on the wire for these bytes; None: they had better go as they are. May be a view of `raw`."""

    def decode(self, payload: Payload, nbytes: int) -> Payload:
        """The `nbytes` bytes that were encoded, in this end's element type. Raises CodecError."""
