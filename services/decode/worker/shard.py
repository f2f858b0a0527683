"""One tensor-parallel shard of a decode worker: a process that holds KV blocks and attends when its root says so.

It waits in one thread for whatever comes next, and polls only within a step. Its mover, which prefill services write
to, is a process of its own over the same memory.

Started by the worker service; ends when its standard input closes, so it cannot outlive the service.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from tokenmesh.heap import freeze_heap
from tokenmesh.kv.hub import EngineLink
from tokenmesh.kv.messages import (
    NOT_OPEN,
    CloseShard,
    OpenShard,
    ShardClosed,
    ShardOpen,
    ShardState,
    ShardUp,
    ShardZeroed,
    ZeroShard,
)
from tokenmesh.logs import setup_inherited_logging

if TYPE_CHECKING:
    import torch

    from tokenmesh.engine.gpu.rank import DeviceRank
    from tokenmesh.engine.shared_kv import SharedKv
    from tokenmesh.parallel.rank import RankProtocol

log = structlog.get_logger()

ROOT_WAIT_S = 30.0
"""A root that attached and does not connect for this long is forgotten."""
SLICE_S = 0.05
"""Longest sleep between two looks at the service's messages."""
NAP_S = 0.0002
"""Between two looks at a large message under way."""
STATE_S = 0.5


class ShardArgs(msgspec.Struct, frozen=True):
    """What the service tells a shard; passed as JSON on the command line."""

    shard: int
    hub: str
    cores: list[int]
    """Cores to compute on; empty: all."""
    cpus: list[int]
    """Cores of the service."""
    host: str
    exchange: str
    """As in GroupConfig: with "nccl" the blocks lie on the GPU of the shard's number."""
    exchange_port: int
    exchange_transport: str
    poll_s: float
    kv_host: str
    kv_port: int
    kv_transport: str
    chunk_bytes: int
    window: int


class Shard:
    """The process's one job after another: open, serve a root, close."""

    def __init__(self, args: ShardArgs) -> None:
        self._args = args
        self._link = EngineLink(args.hub, f"shard-{args.shard}")
        self._closing = False

    def run(self) -> None:
        """Serves until the process ends."""
        self._link.send(ShardUp(self._args.shard))
        while True:
            for message in self._link.poll(SLICE_S):
                if isinstance(message, OpenShard):
                    self._open(message)
                elif isinstance(message, CloseShard):
                    # Crossed with our own report that we are closed.
                    self._link.send(ShardClosed(self._args.shard, NOT_OPEN))

    def _open(self, order: OpenShard) -> None:
        from tokenmesh.engine.cpu_kernel import UnsupportedAttentionError
        from tokenmesh.parallel.ucx_exchange import UcxLoop

        args = self._args
        self._closing = False
        reason = ""
        with contextlib.ExitStack() as stack:
            try:
                partition = stack.enter_context(contextlib.closing(Partition(order, args)))
                loop = stack.enter_context(contextlib.closing(UcxLoop(args.exchange_transport)))
                port = loop.listen(args.exchange_port)
            except (UnsupportedAttentionError, RuntimeError, OSError) as error:
                log.exception("shard cannot open")
                self._link.send(ShardOpen(args.shard, 0, f"{type(error).__name__}: {error}"))
                return
            self._link.send(ShardOpen(args.shard, port, ""))
            reason = self._serve(partition, loop, order.token)
        log.info("shard closed", reason=reason)
        self._link.send(ShardClosed(args.shard, reason))

    def _serve(self, partition: Partition, loop: Any, token: bytes) -> str:
        """Serves one root until it goes or the service says so; returns why it ended."""
        from tokenmesh.parallel.exchange import PeerLostError

        deadline = time.monotonic() + ROOT_WAIT_S
        pair = None
        while pair is None:
            if time.monotonic() > deadline:
                return "no root connected"
            pair = loop.accept(token, SLICE_S)
            self._look(partition, idle=True)
            if self._closing:
                return "detached"
        log.info("root connected", transport=pair.transport)
        protocol = partition.protocol
        reported = -STATE_S
        try:
            while True:
                if protocol.idle and time.monotonic() - reported > STATE_S:
                    reported = time.monotonic()
                    self._link.send(
                        ShardState(
                            self._args.shard,
                            pair.transport,
                            protocol.steps,
                            protocol.context_tokens,
                            protocol.attention_seconds,
                        )
                    )
                request = pair.start_receive(protocol.expects)
                self._wait(request, loop, partition)
                if self._closing:
                    return "detached"
                pair.finish(request)
                answer = protocol.received()
                if answer is not None:
                    pair.send(answer)
                    pair.flush()
                    if protocol.refused:
                        # Time for the root to hear why.
                        loop.sleep(SLICE_S)
                        return "refused a plan"
        except PeerLostError as error:
            return f"root gone: {error}"
        finally:
            pair.close()

    def _wait(self, request: Any, loop: Any, partition: Partition) -> None:
        """Until the message is there or the service wants us to close."""
        from tokenmesh.parallel.ucx_exchange import EAGER_BYTES

        progress = loop.worker.progress
        # Between steps the root's other processes have work to do, perhaps on this core.
        poll_until = time.monotonic() + (0.0 if partition.protocol.idle else self._args.poll_s)
        # A large message comes in many pieces, and not every piece wakes a sleeper.
        bulk = partition.protocol.expects.numel() > EAGER_BYTES
        looked = time.monotonic()
        while not request.completed:
            progress()
            if request.completed or time.monotonic() < poll_until:
                continue
            if bulk:
                time.sleep(NAP_S)
                if time.monotonic() - looked < SLICE_S:
                    continue
                looked = time.monotonic()
            else:
                loop.sleep(SLICE_S)
            self._look(partition, partition.protocol.idle)
            if self._closing:
                return

    def _look(self, partition: Partition, idle: bool) -> None:
        for message in self._link.poll():
            if isinstance(message, CloseShard):
                self._closing = True
            elif isinstance(message, ZeroShard):
                may = idle and time.monotonic() < message.until
                if may:
                    partition.zero()
                self._link.send(ShardZeroed(self._args.shard, may))


class Partition:
    """A shard's blocks, their mover if they have one, and the protocol over them."""

    def __init__(self, order: OpenShard, args: ShardArgs) -> None:
        """Raises UnsupportedAttentionError, RuntimeError if the memory cannot be had."""
        import torch

        from tokenmesh.parallel.rank import RankProtocol, RankSpec

        spec = msgspec.msgpack.decode(order.spec, type=RankSpec)
        shape = spec.shape
        size = (len(spec.layers), order.blocks, shape.kv_heads, spec.block_size, 2 * shape.head_size)
        self._shared: SharedKv | None = None
        self.protocol: RankProtocol | DeviceRank
        if args.exchange == "nccl":
            from tokenmesh.engine.gpu.rank import DeviceRank

            device = torch.device("cuda", args.shard)
            torch.cuda.set_device(device)
            self._kv = torch.zeros(size, dtype=shape.torch_dtype, device=device)
            torch.cuda.synchronize(device)
            self.protocol = DeviceRank(spec, self._kv)
        else:
            from tokenmesh.engine.cpu_kernel import CpuKernel

            # In shared memory from the start: moving it there later would take its size twice for a moment.
            storage = torch.UntypedStorage._new_shared(math.prod(size) * shape.torch_dtype.itemsize, device="cpu")
            self._kv = torch.empty(0, dtype=shape.torch_dtype).set_(storage).view(size).zero_()
            self.protocol = RankProtocol(spec, order.blocks, CpuKernel(spec, self._kv))
        # Last: nobody would end the mover of a partition that fails to be made.
        if args.kv_transport != "none":
            self._shared = _share(self._kv, order, args)

    def zero(self) -> None:
        """Overwrites every block. Returns once they are: kernels of the next step run on a stream of their own."""
        if self._kv.is_cuda:
            import torch

            torch.cuda.synchronize(self._kv.device)
        self._kv.zero_()
        if self._kv.is_cuda:
            torch.cuda.synchronize(self._kv.device)

    def close(self) -> None:
        """Ends the mover and what the device may wait for; the memory goes with the last reference."""
        self.protocol.close()
        if self._shared is not None:
            self._shared.close()


def _share(kv: torch.Tensor, order: OpenShard, args: ShardArgs) -> SharedKv:
    """Starts the mover of a partition."""
    from tokenmesh.engine.settings import ConnectorSettings
    from tokenmesh.engine.shared_kv import SharedKv

    settings = ConnectorSettings(
        hub=args.hub,
        host=args.kv_host,
        port=args.kv_port,
        transport=args.kv_transport,
        chunk_bytes=args.chunk_bytes,
        window=args.window,
        cpus=args.cpus,
    )
    layers = {str(number): layer for number, layer in enumerate(kv)}
    return SharedKv(layers, order.geometry, settings, args.shard)


def main() -> None:
    """Entry point: ``python -m services.decode.worker.shard JSON``."""
    args = msgspec.json.decode(sys.argv[1], type=ShardArgs)
    setup_inherited_logging(process="shard", shard=args.shard)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if args.cores:
        # Before torch makes its threads.
        os.sched_setaffinity(0, args.cores)
        os.environ["OMP_NUM_THREADS"] = str(len(args.cores))
    import torch

    # Loading the kernels takes seconds, which Attach must not wait for.
    importlib.import_module("tokenmesh.engine." + ("gpu.rank" if args.exchange == "nccl" else "cpu_kernel"))
    if args.cores:
        torch.set_num_threads(len(args.cores))
    freeze_heap()
    Shard(args).run()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
