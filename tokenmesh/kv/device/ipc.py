"""Device memory of one process in another: what CUDA calls IPC handles.

Torch shares tensors too, but keeps their memory until every receiver has said that it is done, and a mover that was
killed never does: its engine worker could not free a cache. Here memory belongs to who allocated it, and to nobody
else. Of CUDA's driver, three calls are needed, which torch does not bind.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from tokenmesh.kv.shares import DeviceShare

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    # CUipcMemHandle, cuda.h.
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class DeviceIpcError(Exception):
    """Memory cannot be shared, or mapped; the message says why."""


def share(storage: torch.UntypedStorage) -> DeviceShare:
    """What another process needs to map a storage. Raises DeviceIpcError."""
    driver = ctypes.CDLL("libcuda.so.1")
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    pointer = ctypes.c_uint64(storage.data_ptr())
    _check(driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), pointer), "find an allocation")
    handle = _Handle()
    _check(
        driver.cuIpcGetMemHandle(ctypes.byref(handle), base),
        "share an allocation (with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True it cannot)",
    )
    offset = storage.data_ptr() - base.value
    opaque = ctypes.string_at(ctypes.byref(handle), _HANDLE_BYTES)
    return DeviceShare(storage.device.index, opaque, offset, storage.nbytes())


def map_share(given: DeviceShare) -> torch.Tensor:
    """The bytes of a share, uint8 [nbytes], until this process ends. Raises DeviceIpcError."""
    torch.cuda.set_device(given.device)
    # The driver works in the context that torch makes on first use.
    torch.zeros(1, device="cuda")
    driver = ctypes.CDLL("libcuda.so.1")
    base, handle = ctypes.c_uint64(), _Handle()
    ctypes.memmove(ctypes.byref(handle), given.handle, _HANDLE_BYTES)
    driver.cuIpcOpenMemHandle_v2.argtypes = (ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint)
    _check(driver.cuIpcOpenMemHandle_v2(ctypes.byref(base), handle, _LAZY_PEER_ACCESS), "map another's memory")
    return torch.as_tensor(_Bytes(base.value + given.offset, given.nbytes), device=f"cuda:{given.device}")


class _Bytes:
    """A range of device memory, as torch takes it."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


def _check(result: int, what: str) -> None:
    if result:
        raise DeviceIpcError(f"CUDA cannot {what}: error {result}")
