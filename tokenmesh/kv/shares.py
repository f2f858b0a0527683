"""How an engine worker gives its mover the memory that its KV lies in."""

from __future__ import annotations

import msgspec


class HostShare(msgspec.Struct, frozen=True, tag=True):
    """Shared memory."""

    fd: int
    """An inherited file descriptor."""
    nbytes: int


class DeviceShare(msgspec.Struct, frozen=True, tag=True):
    """Bytes of a GPU, as another process of this host can map them."""

    device: int
    """Number of the GPU, among those that both processes see."""
    handle: bytes
    """CUDA's handle of the allocation that they are in."""
    offset: int
    """Of the first byte, in that allocation."""
    nbytes: int


KvShare = HostShare | DeviceShare
