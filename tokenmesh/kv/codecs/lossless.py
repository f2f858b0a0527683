"""Byte planes and zstd: bits of the mantissa are noise and go as they are, signs and exponents become half as many."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from tokenmesh.kv.codecs.base import CodecError
from tokenmesh.kv.codecs.elements import float_type
from tokenmesh.kv.geometry import BlockGeometry
from tokenmesh.kv.memory import Buffer

LEVEL = 1


class Lossless:
    """Payload: all bytes of every element but its highest, element by element; then the highest ones, compressed."""

    def __init__(self, geometry: BlockGeometry) -> None:
        """Raises GeometryMismatchError."""
        self._width = int(float_type(geometry, "lossless").itemsize)
        # zstd's contexts are dear to make, and must not be used by two threads at a time.
        self._local = threading.local()

    @property
    def _contexts(self) -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
        if not hasattr(self._local, "pair"):
            self._local.pair = (zstandard.ZstdCompressor(level=LEVEL), zstandard.ZstdDecompressor())
        pair: tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor] = self._local.pair
        return pair

    def encode(self, raw: Buffer) -> Buffer | None:
        """See `Codec`."""
        count = len(raw) // self._width
        highest = np.ascontiguousarray(raw[self._width - 1 :: self._width])
        packed = self._contexts[0].compress(highest.data)
        if len(packed) >= count:
            return None
        low = count * (self._width - 1)
        payload = np.empty(low + len(packed), dtype=np.uint8)
        self._split(payload[:low], raw, to_wire=True)
        payload[low:] = np.frombuffer(packed, dtype=np.uint8)
        return payload

    def decode(self, payload: Buffer, nbytes: int) -> Buffer:
        """See `Codec`."""
        count = nbytes // self._width
        low = count * (self._width - 1)
        try:
            # Never more than is expected, whatever the frame claims to hold.
            frame = payload[low:].tobytes()
            if zstandard.frame_content_size(frame) != count:
                raise CodecError("a frame of another size")
            highest = self._contexts[1].decompress(frame, max_output_size=count, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CodecError(str(error)) from error
        raw = np.empty(nbytes, dtype=np.uint8)
        raw[self._width - 1 :: self._width] = np.frombuffer(highest, dtype=np.uint8)
        self._split(payload[:low], raw, to_wire=False)
        return raw

    def _split(self, low: Buffer, raw: Buffer, to_wire: bool) -> None:
        """Copies the lower bytes between their place on the wire and their place in the elements."""
        pairs: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]
        if self._width == 2:
            pairs = [(low, raw[0::2])]
        else:
            # Two bytes at a time, then the third: numpy is slow at copying three.
            count = len(raw) // 4
            pairs = [
                (low[: 2 * count].view(np.uint16), raw.view(np.uint16)[0::2]),
                (low[2 * count :], raw[2::4]),
            ]
        for wire, element in pairs:
            if to_wire:
                wire[:] = element
            else:
                element[:] = wire
