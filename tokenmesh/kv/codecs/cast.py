"""Elements rounded to 16 bits: half the bytes of a float32 cache, and a bridge between caches of different dtype."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tokenmesh.kv.codecs.elements import expect_size, float_type
from tokenmesh.kv.geometry import BlockGeometry
from tokenmesh.kv.memory import Buffer

_FP16_MAX = 65504.0


class Cast:
    """bf16 keeps float32's range and 8 bits of precision; fp16 keeps 11 bits, and values up to 65,504."""

    def __init__(self, name: str, geometry: BlockGeometry) -> None:
        """Raises GeometryMismatchError."""
        self._memory = float_type(geometry, name)
        self._wire = np.dtype(ml_dtypes.bfloat16 if name == "bf16" else np.float16)

    def encode(self, raw: Buffer) -> Buffer | None:
        """See `Codec`. What is too large becomes the largest number there is, rather than infinity."""
        values = raw.view(self._memory)
        if self._memory == self._wire:
            return raw
        if self._wire == np.float16:
            values = np.clip(values.astype(np.float32), -_FP16_MAX, _FP16_MAX)
        payload: Buffer = values.astype(self._wire).view(np.uint8)
        return payload

    def decode(self, payload: Buffer, nbytes: int) -> Buffer:
        """See `Codec`."""
        expect_size(payload, nbytes // self._memory.itemsize * self._wire.itemsize)
        if self._memory == self._wire:
            return payload
        values = payload.view(self._wire)
        if self._memory == np.float16:
            values = np.clip(values.astype(np.float32), -_FP16_MAX, _FP16_MAX)
        raw: Buffer = values.astype(self._memory).view(np.uint8)
        return raw
