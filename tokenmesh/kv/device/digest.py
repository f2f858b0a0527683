"""Checksums of bytes on a device: 64 bits, order and place of every 8 bytes included.

Each 8 bytes, mixed with their place, go through a bijection of 64 bits in which every bit of the input changes half of
those of the result (splitmix64's), and the results are added: a change within one word is always seen, any other but
for one in 2^64. Additions come in any order, so thread blocks need not wait for each other. Written down in torch here;
GPUs do the same in `passes`.
"""

from __future__ import annotations

import torch

PLACE = -7046029254386353131
"""0x9E3779B97F4A7C15 as int64: odd, so that places differ in all bits."""
MIX = -4658895280553007687
"""0xBF58476D1CE4E5B9 as int64: odd, hence a bijection."""
MIX_AGAIN = -7723592293110705685
"""0x94D049BB133111EB as int64."""


def words(payload: torch.Tensor) -> torch.Tensor:
    """uint8 [n] as int64 [n / 8]; n must divide, which bytes of whole blocks do."""
    return payload.view(torch.int64)


def reference(payload: torch.Tensor) -> torch.Tensor:
    """The digest of uint8 [n], int64 []."""
    data = words(payload)
    place = torch.arange(1, data.numel() + 1, dtype=torch.int64, device=data.device) * PLACE
    mixed = data ^ place
    # Logical shifts: int64 has only the arithmetic one.
    mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * MIX
    mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * MIX_AGAIN
    return (mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)).sum()
