"""Elements as 8-bit floats (e4m3) under a scale of their own for the keys and the values of each head of each block."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tokenmesh.kv.codecs.elements import expect_size, float_type
from tokenmesh.kv.geometry import BlockGeometry, GeometryMismatchError
from tokenmesh.kv.memory import Buffer

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_LARGEST = 448.0

# Conversions by table: an order of magnitude faster than element by element. Rounding through bfloat16 costs nothing
# but the choice between two equally near neighbours.
with np.errstate(invalid="ignore"):
    _TO_FP8: npt.NDArray[np.uint8] = (
        (np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32).clip(-_LARGEST, _LARGEST))
        .astype(_E4M3)
        .view(np.uint8)
    )
_FROM_FP8: npt.NDArray[np.float32] = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)


class Fp8:
    """Payload: a float32 scale per group, then a byte per element. A group is the keys, or the values, of a head."""

    def __init__(self, geometry: BlockGeometry) -> None:
        """Raises GeometryMismatchError."""
        self._memory = float_type(geometry, "fp8")
        if not geometry.by_head:
            raise GeometryMismatchError(f"codec fp8 needs heads that lie apart, packing is {geometry.packing!r}")
        # On CPUs the first half of a head's part of a block is keys, whatever their order, and the second is values.
        self._group = geometry.head_bytes // self._memory.itemsize // 2

    def encode(self, raw: Buffer) -> Buffer | None:
        """See `Codec`. The unwritten end of a last block may hold anything; what is not finite is sent as 0."""
        values = raw.view(self._memory).astype(np.float32).reshape(-1, self._group)
        peaks = np.maximum(values.max(axis=1), -values.min(axis=1))
        if not np.isfinite(peaks).all():
            np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
            peaks = np.abs(values).max(axis=1)
        scales = np.maximum(peaks / _LARGEST, np.finfo(np.float32).tiny).astype(np.float32)
        values *= (1.0 / scales)[:, None]
        payload = np.empty(4 * len(scales) + values.size, dtype=np.uint8)
        payload[: 4 * len(scales)] = scales.view(np.uint8)
        np.take(
            _TO_FP8,
            values.astype(ml_dtypes.bfloat16).view(np.uint16).reshape(-1),
            out=payload[4 * len(scales) :],
            mode="clip",
        )
        return payload

    def decode(self, payload: Buffer, nbytes: int) -> Buffer:
        """See `Codec`."""
        elements = nbytes // self._memory.itemsize
        groups = elements // self._group
        expect_size(payload, 4 * groups + elements)
        scales = payload[: 4 * groups].view(np.float32)
        values = np.take(_FROM_FP8, payload[4 * groups :]).reshape(groups, self._group)
        values *= scales[:, None]
        return values.astype(self._memory).reshape(-1).view(np.uint8)
