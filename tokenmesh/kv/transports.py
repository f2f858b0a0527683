"""UCX settings per transport, and what UCX made of them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_SHM = {"UCX_MM_ERROR_HANDLING": "y"}
_TCP = {"UCX_TLS": "tcp", "UCX_RNDV_SCHEME": "put_zcopy"}
_GET = {"UCX_RNDV_SCHEME": "get_zcopy", "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on"}


def environment(transport: str, device: bool = False) -> Mapping[str, str]:
    """UCX_* variables for a transport of KvTransferConfig, to be set before ucxx is imported.

    Endpoint error handling stays on everywhere, so that a killed peer is seen at once. By default it drops UCX's
    shared-memory lanes; MM_ERROR_HANDLING keeps them (8-9 GB/s instead of about 1 on loopback). TCP needs put_zcopy:
    otherwise rendezvous falls back to fragmented copies. The two must not be mixed: put_zcopy slows shared memory.

    `device`: for KV on a GPU. There the receiver must fetch (get_zcopy): it alone may then write into its blocks, and
    blocks that are mapped from an engine worker can be written by nobody else. By itself UCX lets receivers fetch only
    where it sees NVLinks, and on a host of one GPU would copy through the host instead, at 0.7 GB/s.
    """
    shm = {**_SHM, "UCX_TLS": "sysv,posix,cma,self,tcp"}
    chosen = {"auto": _SHM, "shm": shm, "tcp": _TCP, "system": {}}[transport]
    if device:
        chosen = {"auto": {**_SHM, **_GET}, "tcp": {"UCX_TLS": "tcp,cuda_copy"}, "system": {}}[transport]
    # A restarted service must get its listener's port back at once.
    return {"UCX_TCP_CM_REUSEADDR": "y", "UCX_WARN_UNUSED_ENV_VARS": "n", **chosen}


@contextmanager
def in_environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets what is not set, while UCX reads it: on import, and as a context and a worker are made.

    Not longer: a mover that is started later has settings of its own.
    """
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


class _TransportEntry(ctypes.Structure):
    _fields_ = (("transport_name", ctypes.c_char_p), ("device_name", ctypes.c_char_p))


class _EpAttr(ctypes.Structure):
    # ucp_ep_attr_t of UCX 1.21, ucp.h.
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", ctypes.c_char * 128),
        ("remote_sockaddr", ctypes.c_char * 128),
        ("entries", ctypes.POINTER(_TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    )


_FIELD_TRANSPORTS = 1 << 3


def of_endpoint(ucp_endpoint: int) -> str:
    """Transports that carry an endpoint's bulk data, e.g. "sysv,posix" or "tcp"; "unknown" if UCX does not say.

    Asks libucp itself (ucp_ep_query), as ucxx does not bind it. Call it from the thread that progresses the worker.
    """
    libucp = ctypes.CDLL("libucp.so.0")
    table = (_TransportEntry * 16)()
    attr = _EpAttr(field_mask=_FIELD_TRANSPORTS, num_entries=16, entry_size=ctypes.sizeof(_TransportEntry))
    attr.entries = table
    if libucp.ucp_ep_query(ctypes.c_void_p(ucp_endpoint), ctypes.byref(attr)) != 0:
        return "unknown"
    names = dict.fromkeys(table[i].transport_name.decode() for i in range(attr.num_entries))
    # An endpoint connected by address always has a tcp lane for control; bulk data prefers any other.
    bulk = [name for name in names if name != "tcp"]
    return ",".join(bulk or names) or "unknown"
