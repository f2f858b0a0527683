"""One pass over a message: gathered and digested, digested, or scattered. In torch where there is no GPU.

To launch costs a mover more than the device needs for what is launched, so there is one launch for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from tokenmesh.kv.device.digest import MIX, MIX_AGAIN, PLACE, reference, words

_WORDS = 4096
_LONGEST = 1 << 31


class Tally:
    """A digest under way, and its answer. Used by one launch at a time, or by launches that follow each other."""

    def __init__(self, device: torch.device) -> None:
        self.state = torch.zeros(2, dtype=torch.int64, device=device)
        """Sum so far, and thread blocks that have added to it; zeros between launches."""
        self.answer = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        """The digest, in host memory, once the device is done."""


@dataclass(frozen=True)
class Places:
    """Cells of the cache that a message is about: the same in each of its layers."""

    cells: torch.Tensor
    """The whole cache, int64 [cells, words]."""
    bases: torch.Tensor
    """Number of each layer's first cell, int64 [layers]."""
    layers: range
    ids: torch.Tensor
    """Numbers of cells in a layer, int64 [n]; all within the layer."""

    @property
    def numbers(self) -> torch.Tensor:
        """Of the cells, int64 [layers * n]."""
        return (self.bases[self.layers.start : self.layers.stop, None] + self.ids).view(-1)


def digest(payload: torch.Tensor, tally: Tally) -> None:
    """Of `payload`, uint8 [n]."""
    if payload.is_cuda:
        data = words(payload)
        _launch(data, data, data, data, tally, 1, 0, cell=1, GATHER=False, SCATTER=False)
    else:
        tally.answer[0] = reference(payload)


def gather(places: Places, out: torch.Tensor, tally: Tally) -> None:
    """Copies cells to `out`, uint8 [n], back to back and layer by layer, and digests them."""
    if out.is_cuda:
        _launch_at(places, out, tally, GATHER=True, SCATTER=False)
    else:
        torch.index_select(places.cells, 0, places.numbers, out=words(out).view(-1, places.cells.shape[1]))
        digest(out, tally)


def scatter(places: Places, data: torch.Tensor, tally: Tally) -> None:
    """Copies cells from `data`, uint8 [n], as `gather` puts them. The tally is not used."""
    if data.is_cuda:
        _launch_at(places, data, tally, GATHER=False, SCATTER=True)
    else:
        places.cells.index_copy_(0, places.numbers, words(data).view(-1, places.cells.shape[1]))


def _launch_at(places: Places, flat: torch.Tensor, tally: Tally, **how: bool) -> None:
    per_layer, cell = len(places.ids), places.cells.shape[1]
    assert flat.numel() == 8 * len(places.layers) * per_layer * cell
    _launch(
        words(flat), places.cells, places.ids, places.bases, tally, per_layer, places.layers.start, cell=cell, **how
    )


def _launch(
    flat: torch.Tensor,
    cells: torch.Tensor,
    ids: torch.Tensor,
    bases: torch.Tensor,
    tally: Tally,
    per_layer: int,
    layer: int,
    **constants: int,
) -> None:
    count = flat.numel()
    assert 0 < count < _LONGEST
    tensors = (flat, cells, ids, bases, tally.state, tally.answer)
    _kernel()[(-(-count // _WORDS),)](
        *tensors, count, per_layer, layer, place=PLACE, mix=MIX, mix_again=MIX_AGAIN, WORDS=_WORDS, **constants
    )


@cache
def _kernel() -> Any:
    """Made on first use: hosts without GPUs have no Triton."""
    from tokenmesh.kv.device.kernels import pass_kernel

    return pass_kernel
