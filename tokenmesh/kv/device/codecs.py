"""Lossy codecs on a GPU; what they put on the wire is what their namesakes for host memory do, block layout aside."""

from __future__ import annotations

import torch

from tokenmesh.kv.codecs.base import CodecError
from tokenmesh.kv.geometry import HND, BlockGeometry, GeometryMismatchError

_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FP16_MAX = 65504.0
_FP8_MAX = 448.0


def device_codec(name: str, geometry: BlockGeometry) -> DeviceCast | DeviceFp8:
    """The codec of this name. Raises GeometryMismatchError if it cannot work on these blocks."""
    assert geometry.packing == HND
    if geometry.dtype not in _FLOATS:
        raise GeometryMismatchError(f"codec {name} cannot work on a cache of dtype {geometry.dtype}")
    if name == "fp8":
        return DeviceFp8(geometry)
    if name in ("bf16", "fp16"):
        return DeviceCast(name, geometry)
    raise GeometryMismatchError(f"codec {name} does not work on a GPU")


class DeviceCast:
    """See `codecs.cast.Cast`."""

    def __init__(self, name: str, geometry: BlockGeometry) -> None:
        self._memory = _FLOATS[geometry.dtype]
        self._wire = torch.bfloat16 if name == "bf16" else torch.float16

    def encode(self, raw: torch.Tensor) -> torch.Tensor | None:
        """See `Codec`."""
        return _cast(raw, self._memory, self._wire)

    def decode(self, payload: torch.Tensor, nbytes: int) -> torch.Tensor:
        """See `Codec`."""
        _expect_size(payload, nbytes // self._memory.itemsize * self._wire.itemsize)
        return _cast(payload, self._wire, self._memory)


class DeviceFp8:
    """See `codecs.fp8.Fp8`: a float32 scale for the keys and one for the values of each head of each block, then e4m3.

    In a block's part of a head, the keys and values of a token lie side by side: [tokens, 2, head size].
    """

    def __init__(self, geometry: BlockGeometry) -> None:
        self._memory = _FLOATS[geometry.dtype]
        self._head = (geometry.block_size, 2, geometry.head_size)

    def encode(self, raw: torch.Tensor) -> torch.Tensor | None:
        """See `Codec`. The unwritten end of a last block may hold anything; what is not finite is sent as 0."""
        values = raw.view(self._memory).view(-1, *self._head).float().nan_to_num_(0.0, 0.0, 0.0)
        scales = (values.abs().amax(dim=(1, 3)) / _FP8_MAX).clamp_min_(torch.finfo(torch.float32).tiny)
        values = (values / scales[:, None, :, None]).clamp_(-_FP8_MAX, _FP8_MAX)
        return torch.cat((scales.view(-1).view(torch.uint8), values.to(torch.float8_e4m3fn).view(torch.uint8).view(-1)))

    def decode(self, payload: torch.Tensor, nbytes: int) -> torch.Tensor:
        """See `Codec`."""
        elements = nbytes // self._memory.itemsize
        heads = elements // (self._head[0] * self._head[1] * self._head[2])
        _expect_size(payload, 8 * heads + elements)
        scales = payload[: 8 * heads].view(torch.float32).view(heads, 1, 2, 1)
        values = payload[8 * heads :].view(torch.float8_e4m3fn).float().view(heads, *self._head)
        return (values * scales).to(self._memory).view(-1).view(torch.uint8)


def _cast(data: torch.Tensor, source: torch.dtype, target: torch.dtype) -> torch.Tensor:
    """What is too large for float16 becomes the largest number there is, rather than infinity."""
    if source == target:
        return data
    values = data.view(source)
    if target == torch.float16:
        values = values.float().clamp_(-_FP16_MAX, _FP16_MAX)
    return values.to(target).view(torch.uint8)


def _expect_size(payload: torch.Tensor, nbytes: int) -> None:
    if len(payload) != nbytes:
        raise CodecError(f"{len(payload)} bytes instead of {nbytes}")
