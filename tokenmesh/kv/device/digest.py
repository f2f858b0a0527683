"""Checksums of bytes on a device: 64 bits, order and place of every 8 bytes included, in one pass over them.

Each 8 bytes, mixed with their place, go through a bijection of 64 bits, and the results are added: a change within one
word is always seen, any other but for one in 2^64. Additions come in any order, so thread blocks need not wait for each
other. Written down in torch (`reference`), and as a Triton kernel for GPUs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

PLACE = -7046029254386353131
"""0x9E3779B97F4A7C15 as int64: odd, so that places differ in all bits."""
MIX = -4658895280553007687
"""0xBF58476D1CE4E5B9 as int64: odd, hence a bijection."""
_WORDS = 4096
_LONGEST = 1 << 31


def words(payload: torch.Tensor) -> torch.Tensor:
    """uint8 [n] as int64 [n / 8]; n must divide, which bytes of whole blocks do."""
    return payload.view(torch.int64)


def digest(payload: torch.Tensor, out: torch.Tensor) -> None:
    """Adds the digest of `payload`, uint8 [n], to `out`, int64 [1], on the device."""
    data = words(payload)
    assert data.numel() < _LONGEST
    if not payload.is_cuda:
        out += reference(payload)
        return
    _kernel()[(-(-data.numel() // _WORDS),)](data, out, data.numel(), place=PLACE, mix=MIX, WORDS=_WORDS)


def reference(payload: torch.Tensor) -> torch.Tensor:
    """The digest in torch, int64 []."""
    data = words(payload)
    place = torch.arange(1, data.numel() + 1, dtype=torch.int64, device=data.device) * PLACE
    mixed = (data ^ place) * MIX
    # A logical shift: int64 has only the arithmetic one.
    return (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)).sum()


@cache
def _kernel() -> Any:
    """Made on first use: hosts without GPUs have no Triton."""
    from tokenmesh.kv.device.kernels import digest_kernel

    return digest_kernel
