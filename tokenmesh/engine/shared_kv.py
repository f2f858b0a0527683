"""Shares an engine worker's KV cache, in host memory or on a GPU, with the mover that it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING

import msgspec
import structlog
import torch
import zmq

from tokenmesh.engine.device_order import InDeviceOrder
from tokenmesh.engine.settings import ConnectorSettings
from tokenmesh.engine.weights import weights_id
from tokenmesh.kv.geometry import HND, BlockGeometry, LayerSpan
from tokenmesh.kv.messages import ToMover, encode
from tokenmesh.kv.mover import MoverArgs
from tokenmesh.kv.shares import DeviceShare, HostShare, KvShare

if TYPE_CHECKING:
    from vllm.config import VllmConfig


log = structlog.get_logger()


class UnsupportedKvCacheError(Exception):
    """This model's KV cache cannot be moved; the message says why."""


class SharedKv:
    """A worker's KV cache, its mover, and the channel to it."""

    def __init__(
        self, kv_caches: dict[str, torch.Tensor], geometry: BlockGeometry, settings: ConnectorSettings, shard: int
    ) -> None:
        """`kv_caches`: per layer [num_blocks, ...], all views of one storage (vLLM allocates them so)."""
        self.layers = {name: i for i, name in enumerate(kv_caches)}
        tensors = list(kv_caches.values())
        storage = tensors[0].untyped_storage()
        if any(t.untyped_storage().data_ptr() != storage.data_ptr() for t in tensors):
            raise UnsupportedKvCacheError("the layers' KV caches do not share one storage")
        if any(t.shape != tensors[0].shape or t.dtype != tensors[0].dtype for t in tensors):
            raise UnsupportedKvCacheError("the layers' KV caches differ in shape or dtype")
        if not tensors[0][0].is_contiguous():
            raise UnsupportedKvCacheError("a block's bytes are not contiguous")
        memory = share(storage)
        element = tensors[0].element_size()
        self.geometry = geometry
        spans = [LayerSpan(t.storage_offset() * element, t.stride(0) * element) for t in tensors]
        self._folder = tempfile.mkdtemp(prefix="tokenmesh-mover-")
        inbox = f"ipc://{self._folder}/inbox"
        args = MoverArgs(
            shard=shard,
            memory=memory,
            geometry=self.geometry,
            spans=spans,
            hub=settings.hub,
            inbox=inbox,
            host=settings.host,
            port=settings.port + shard if settings.port else 0,
            transport=settings.transport,
            chunk_bytes=settings.chunk_bytes,
            window=settings.window,
            cpus=settings.cpus,
        )
        inherited = [memory.fd] if isinstance(memory, HostShare) else []
        for fd in inherited:
            os.set_inheritable(fd, True)
        # Its standard input is our lifeline: when this process ends, however it ends, the pipe closes.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tokenmesh.kv.mover", msgspec.json.encode(args).decode()],
            stdin=subprocess.PIPE,
            pass_fds=inherited,
            env=_mover_environment(),
        )
        self._closing = False
        threading.Thread(target=self._end_with_mover, name="mover-watch", daemon=True).start()
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._commands.setsockopt(zmq.LINGER, 0)
        self._commands.setsockopt(zmq.SNDHWM, 0)
        self._commands.connect(inbox)
        self._device = isinstance(memory, DeviceShare)
        self._order: InDeviceOrder | None = None

    def command(self, message: ToMover) -> None:
        """Tells the mover, on a GPU as soon as what was launched before is done; never blocks."""
        if not self._device:
            self._tell(message)
            return
        if self._order is None:
            self._order = InDeviceOrder(self._tell)
        self._order.send(message)

    def _tell(self, message: ToMover) -> None:
        self._commands.send(encode(message), zmq.NOBLOCK)

    def _end_with_mover(self) -> None:
        """Without its mover a worker would wait for KV that never comes, and hold blocks that nobody frees.

        Whoever started this process sees that it has ended, and starts both anew.
        """
        code = self._process.wait()
        if not self._closing:
            log.critical("the mover has ended by itself, and so does this process", exit_code=code)
            os._exit(1)

    def close(self) -> None:
        """Ends the mover."""
        self._closing = True
        if self._order is not None:
            self._order.close()
        self._context.destroy(linger=0)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def share(storage: torch.UntypedStorage) -> KvShare:
    """Makes a storage reachable for a child process, in place: every view that vLLM holds follows it.

    Raises DeviceIpcError.
    """
    if storage.device.type == "cuda":
        from tokenmesh.kv.device import ipc

        return ipc.share(storage)
    storage.share_memory_()
    return HostShare(*storage._share_fd_cpu_())


def geometry_of(kv_caches: dict[str, torch.Tensor], vllm_config: VllmConfig) -> BlockGeometry:
    """The shape of an engine worker's blocks."""
    tensors = list(kv_caches.values())
    model = vllm_config.model_config
    return BlockGeometry(
        layers=len(tensors),
        kv_heads=model.get_num_kv_heads(vllm_config.parallel_config),
        head_size=model.get_head_size(),
        block_size=vllm_config.cache_config.block_size,
        dtype=str(tensors[0].dtype).removeprefix("torch."),
        block_bytes=tensors[0][0].numel() * tensors[0].element_size(),
        packing=packing(vllm_config),
        weights=weights_id(model),
    )


def packing(vllm_config: VllmConfig) -> str:
    """How keys lie inside a block: CPU kernels of different instruction sets pack them differently.

    On GPUs the connector asks vLLM for [heads, tokens, keys and values], which keeps heads apart.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return HND
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = vllm_config.model_config, vllm_config.cache_config
    isa = _get_attn_isa(model.dtype, cache.block_size, model.get_head_size(), cache.cache_dtype)
    return f"cpu_attn/{isa}"


def _mover_environment() -> dict[str, str]:
    # The worker's OpenMP settings pin threads to its cores; the mover must stay clear of them.
    dropped = ("OMP_", "GOMP_", "KMP_", "LD_PRELOAD")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
