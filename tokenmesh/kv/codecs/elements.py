"""Element types of caches, as numpy has them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tokenmesh.kv.codecs.base import CodecError
from tokenmesh.kv.geometry import BlockGeometry, GeometryMismatchError
from tokenmesh.kv.memory import Buffer

_FLOATS: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def float_type(geometry: BlockGeometry, codec: str) -> Any:
    """numpy's name for a cache's element type. Raises GeometryMismatchError if it is no float of 2 or 4 bytes."""
    if geometry.dtype not in _FLOATS:
        raise GeometryMismatchError(f"codec {codec} cannot work on a cache of dtype {geometry.dtype}")
    return _FLOATS[geometry.dtype]


def expect_size(payload: Buffer, nbytes: int) -> None:
    """Raises CodecError if a payload has another size than it must."""
    if len(payload) != nbytes:
        raise CodecError(f"{len(payload)} bytes instead of {nbytes}")
