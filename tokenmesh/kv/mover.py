"""The mover: a small process beside each engine worker that moves KV blocks over UCX.

It is a process of its own because UCX progress and the engine would otherwise fight for one interpreter lock: a busy
Python thread beside a UCX loop costs it most of its bandwidth. KV memory is shared, a GPU's too, so nothing is copied
to get here.

Started by the engine worker; ends when its standard input closes, so it cannot outlive the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING

import msgspec
import structlog
import zmq
import zmq.asyncio

from tokenmesh.heap import freeze_heap
from tokenmesh.kv import transports
from tokenmesh.kv.geometry import BlockGeometry, LayerSpan
from tokenmesh.kv.memory import BlockMemory, KvMemory
from tokenmesh.kv.messages import (
    CancelSend,
    Commit,
    Connect,
    Expect,
    MoverReady,
    OpenSend,
    Push,
    Relay,
    Settle,
    Sync,
    ToMover,
    encode,
    to_mover,
)
from tokenmesh.kv.shares import DeviceShare, HostShare, KvShare
from tokenmesh.logs import setup_inherited_logging

if TYPE_CHECKING:
    from tokenmesh.kv.receiver import Receiver
    from tokenmesh.kv.relay import Relays
    from tokenmesh.kv.sender import Sender

log = structlog.get_logger()

BURST = 16
"""Commands taken in one turn of the event loop."""


class MoverArgs(msgspec.Struct, frozen=True):
    """What an engine worker tells its mover; passed as JSON on the command line."""

    shard: int
    memory: KvShare
    geometry: BlockGeometry
    spans: list[LayerSpan]
    hub: str
    """ZeroMQ address of the service's LinkHub."""
    inbox: str
    """ZeroMQ address to bind for the worker's commands."""
    host: str
    port: int
    transport: str
    chunk_bytes: int
    window: int
    cpus: list[int]
    """Cores of the service."""


async def _run(args: MoverArgs) -> None:
    # UCX reads its environment on import.
    settings = transports.environment(args.transport, device=isinstance(args.memory, DeviceShare))
    os.environ.update({k: v for k, v in settings.items() if k not in os.environ})
    from tokenmesh.kv.receiver import Receiver
    from tokenmesh.kv.relay import Relays
    from tokenmesh.kv.sender import Sender
    from tokenmesh.kv.ucx import UcxWorker

    worker = UcxWorker()
    memory = _map(args)
    context = zmq.asyncio.Context()
    hub = context.socket(zmq.DEALER)
    hub.setsockopt(zmq.IDENTITY, f"mover-{args.shard}".encode())
    hub.setsockopt(zmq.LINGER, 0)
    hub.connect(args.hub)
    inbox = context.socket(zmq.PULL)
    inbox.bind(args.inbox)

    outbox: asyncio.Queue[bytes] = asyncio.Queue()

    def report(message: object) -> None:
        outbox.put_nowait(encode(message))

    sender = Sender(worker, memory, args.chunk_bytes, args.window, report, args.shard)
    relays = Relays(sender.peer)
    receiver = Receiver(args.shard, memory, args.chunk_bytes, args.window, report, relays)
    port = worker.listen(args.port, receiver.serve)
    freeze_heap()
    report(MoverReady(args.shard, args.host, port, args.geometry, os.getpid()))
    log.info("mover ready", host=args.host, port=port)

    async def send_reports() -> None:
        while True:
            await hub.send(await outbox.get())

    async def serve(socket: zmq.asyncio.Socket) -> None:
        # Awaiting costs ZeroMQ's asyncio layer more than handling does, so what has come meanwhile is taken without.
        at_once: zmq.Socket[bytes] = zmq.Socket.shadow(socket)
        while True:
            _dispatch(to_mover(await socket.recv()), sender, receiver, relays)
            with contextlib.suppress(zmq.Again):
                for _ in range(BURST):
                    _dispatch(to_mover(at_once.recv(zmq.NOBLOCK)), sender, receiver, relays)

    tasks = [asyncio.create_task(send_reports()), asyncio.create_task(serve(hub)), asyncio.create_task(serve(inbox))]
    stdin_closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stdin_closed.set)
    closed = asyncio.create_task(stdin_closed.wait())
    done, _ = await asyncio.wait([*tasks, closed], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    for task in tasks:
        task.cancel()
    await sender.close()
    worker.close()
    context.destroy(linger=0)


def _map(args: MoverArgs) -> BlockMemory:
    if isinstance(args.memory, HostShare):
        return KvMemory.map(args.memory, args.geometry, args.spans)
    # Here alone, since torch takes seconds and memory.
    from tokenmesh.kv.device.memory import DeviceKvMemory

    return DeviceKvMemory.map(args.memory, args.geometry, args.spans)


_background: set[asyncio.Task[None]] = set()


def _dispatch(message: ToMover, sender: Sender, receiver: Receiver, relays: Relays) -> None:
    match message:
        case Push() | Commit():
            sender.add(message)
        case OpenSend(transfer_id, destinations, codec):
            sender.start(transfer_id, destinations, codec)
        case CancelSend(transfer_id):
            sender.cancel(transfer_id)
        case Expect():
            receiver.expect(message)
        case Relay():
            relays.open(message)
        case Sync(transfer_id):
            receiver.sync(transfer_id)
        case Settle(transfer_id):
            receiver.settle(transfer_id)
        case Connect(host, port):
            task = asyncio.create_task(sender.connect(host, port))
            _background.add(task)
            task.add_done_callback(_background.discard)


def main() -> None:
    """Entry point: ``python -m tokenmesh.kv.mover JSON``."""
    args = msgspec.json.decode(sys.argv[1], type=MoverArgs)
    setup_inherited_logging(process="mover", shard=args.shard)
    # The thread that started us may be bound to a core where it computes; the service may have others.
    os.sched_setaffinity(0, args.cpus)
    asyncio.run(_run(args))


if __name__ == "__main__":
    main()
