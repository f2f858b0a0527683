"""How KV is encoded on a link: as cached, without loss but smaller, or with fewer bits.

Both ends make a codec from their own geometry and its name; what is on the wire does not depend on either end's element
type, except where both must have the same. The owner asks for a codec when it opens a ticket, and refuses any other.
"""

from __future__ import annotations

from tokenmesh.kv.codecs.base import EXACT, NAMES, NONE, Codec, CodecError
from tokenmesh.kv.geometry import HND, BlockGeometry, GeometryMismatchError
from tokenmesh.v1 import kv_pb2

KNOWN: dict[int, str] = {0: NONE, **dict(enumerate(NAMES, start=1))}

__all__ = ["EXACT", "NAMES", "NONE", "Codec", "CodecError", "check_codec", "codec_label", "codec_name", "make_codec"]


def codec_label(name: str) -> str:
    """A codec's name, as gRPC has it."""
    return f"KV_CODEC_{name.upper()}"


def codec_name(number: kv_pb2.KvCodec) -> str:
    """The same, off gRPC; one that is absent is `none`. Raises GeometryMismatchError for one that is not known here."""
    name = KNOWN.get(number)
    if name is None:
        raise GeometryMismatchError(f"there is no codec of number {number}")
    return name


def make_codec(name: str, geometry: BlockGeometry) -> Codec | None:
    """The codec of this name for this end's blocks; None: blocks travel as cached.

    Raises GeometryMismatchError if the codec cannot work on them.
    """
    # Movers that use none of them start without their libraries.
    if geometry.packing == HND and name != NONE:
        from tokenmesh.kv.device.codecs import device_codec

        return device_codec(name, geometry)
    match name:
        case "none":
            return None
        case "lossless":
            from tokenmesh.kv.codecs.lossless import Lossless

            return Lossless(geometry)
        case "bf16" | "fp16":
            from tokenmesh.kv.codecs.cast import Cast

            return Cast(name, geometry)
        case "fp8":
            from tokenmesh.kv.codecs.fp8 import Fp8

            return Fp8(geometry)
    raise GeometryMismatchError(f"there is no codec {name!r}")


def check_codec(name: str, mine: BlockGeometry, theirs: BlockGeometry) -> None:
    """Raises GeometryMismatchError unless blocks of ours, sent under this codec, can become blocks of the owner's."""
    mine.check_reaches(theirs, bridged=name not in EXACT)
    for geometry in (mine, theirs):
        make_codec(name, geometry)
