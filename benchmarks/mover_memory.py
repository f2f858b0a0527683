"""Blocks for a mover without an engine, [layers, blocks, bytes of a block]: in shared memory, or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tokenmesh.kv.shares import HostShare, KvShare


@dataclass(frozen=True)
class Place:
    """Where a mover runs, and where its blocks lie."""

    cpus: tuple[int, ...]
    device: int | None = None
    """None: in host memory."""


class Blocks(Protocol):
    """What a benchmark does with a mover's blocks itself."""

    share: KvShare
    inherited: list[int]
    """File descriptors that the mover needs."""

    def fill(self, seed: int) -> None:
        """Random bytes everywhere."""

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeros in these blocks of all layers."""

    def block(self, number: int) -> npt.NDArray[np.uint8]:
        """A block of all layers, [layers, bytes]."""

    def close(self) -> None:
        """Gives the memory back."""


def make_blocks(place: Place, layers: int, blocks: int, nbytes: int) -> Blocks:
    """Zeroed blocks of `nbytes` each."""
    if place.device is None:
        return HostBlocks(layers, blocks, nbytes)
    return DeviceBlocks(place.device, layers, blocks, nbytes)


class HostBlocks:
    """In shared memory."""

    def __init__(self, layers: int, blocks: int, nbytes: int) -> None:
        self._fd = os.memfd_create("blocks")
        total = layers * blocks * nbytes
        os.ftruncate(self._fd, total)
        file = f"/proc/self/fd/{self._fd}"
        self.data = np.memmap(file, dtype=np.uint8, mode="r+").reshape(layers, blocks, nbytes)
        os.set_inheritable(self._fd, True)
        self.share: KvShare = HostShare(self._fd, total)
        self.inherited = [self._fd]

    def fill(self, seed: int) -> None:
        """See `Blocks`."""
        source = np.random.default_rng(seed)
        for layer in self.data:
            layer[:] = source.integers(0, 256, layer.shape, dtype=np.uint8)

    def clear(self, blocks: Sequence[int]) -> None:
        """See `Blocks`."""
        self.data[:, list(blocks)] = 0

    def block(self, number: int) -> npt.NDArray[np.uint8]:
        """See `Blocks`."""
        return self.data[:, number]

    def close(self) -> None:
        """See `Blocks`."""
        os.close(self._fd)


class DeviceBlocks:
    """On a GPU of this host."""

    def __init__(self, device: int, layers: int, blocks: int, nbytes: int) -> None:
        import torch

        from tokenmesh.kv.device import ipc

        self.data: Any = torch.zeros(layers, blocks, nbytes, dtype=torch.uint8, device=f"cuda:{device}")
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            self.share: KvShare = ipc.share(self.data.untyped_storage())
        self.inherited: list[int] = []

    def fill(self, seed: int) -> None:
        """See `Blocks`."""
        import torch

        torch.manual_seed(seed)
        self.data.random_(0, 256)
        torch.cuda.synchronize(self.data.device)

    def clear(self, blocks: Sequence[int]) -> None:
        """See `Blocks`."""
        import torch

        self.data[:, list(blocks)] = 0
        torch.cuda.synchronize(self.data.device)

    def block(self, number: int) -> npt.NDArray[np.uint8]:
        """See `Blocks`."""
        host: npt.NDArray[np.uint8] = self.data[:, number].cpu().numpy()
        return host

    def close(self) -> None:
        """See `Blocks`."""
        self.data = None
