"""Checksums of bytes on a device: 64 bits, order and place of every 8 bytes included, in one pass over them.

Each 8 bytes, mixed with their place, go through a bijection of 64 bits, and the results are added: a change within one
word is always seen, any other but for one in 2^64. Additions come in any order, so thread blocks need not wait for each
other. Written down in torch (`reference`), and as a Triton kernel for GPUs, which can gather cells in the same pass.
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


class Tally:
    """A digest under way, and its answer. Used by one launch at a time, or by launches that follow each other."""

    def __init__(self, device: torch.device) -> None:
        self.state = torch.zeros(2, dtype=torch.int64, device=device)
        """Sum so far, and thread blocks that have added to it; zeros between launches."""
        self.answer = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        """The digest, in host memory, once the device is done."""


def words(payload: torch.Tensor) -> torch.Tensor:
    """uint8 [n] as int64 [n / 8]; n must divide, which bytes of whole blocks do."""
    return payload.view(torch.int64)


def digest(payload: torch.Tensor, tally: Tally) -> None:
    """Launches the digest of `payload`, uint8 [n]."""
    if not payload.is_cuda:
        tally.answer[0] = reference(payload)
        return
    data = words(payload)
    _launch(data, data, data, tally, data.numel(), 1, gather=False)


def gather(cells: torch.Tensor, ids: torch.Tensor, out: torch.Tensor, tally: Tally) -> None:
    """Launches a copy of cells, int64 [cells, words], to `out`, uint8 [n], back to back, and their digest.

    `ids`: int64 [cells] on the device, within the layer.
    """
    target = words(out)
    if not out.is_cuda:
        torch.index_select(cells, 0, ids, out=target.view(len(ids), -1))
        digest(out, tally)
        return
    _launch(cells, ids, target, tally, target.numel(), cells.shape[1], gather=True)


def _launch(
    source: torch.Tensor, ids: torch.Tensor, target: torch.Tensor, tally: Tally, count: int, cell: int, gather: bool
) -> None:
    assert 0 < count < _LONGEST
    grid = (-(-count // _WORDS),)
    _kernel()[grid](
        source, ids, target, tally.state, tally.answer, count, cell, place=PLACE, mix=MIX, WORDS=_WORDS, GATHER=gather
    )


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
    from tokenmesh.kv.device.kernels import pass_kernel

    return pass_kernel
