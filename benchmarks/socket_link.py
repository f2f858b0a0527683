"""A plain TCP socket between two processes: what moving bytes costs without UCX."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import time
from multiprocessing.connection import Connection

CHUNK_BYTES = 8 << 20


def _receive(nbytes: int, transfers: int, pipe: Connection) -> None:
    os.sched_setaffinity(0, {1})
    buffer = memoryview(bytearray(nbytes))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        link, _ = listener.accept()
        with link:
            for _ in range(transfers):
                got = 0
                while got < nbytes:
                    got += link.recv_into(buffer[got : got + CHUNK_BYTES])
                link.sendall(b"r")


def _send(nbytes: int, transfers: int, pipe: Connection) -> None:
    os.sched_setaffinity(0, {0})
    buffer = memoryview(bytearray(os.urandom(1 << 20)) * -(-nbytes // (1 << 20)))[:nbytes]
    times = []
    with socket.create_connection(("127.0.0.1", pipe.recv())) as link:
        for _ in range(transfers):
            begun = time.perf_counter()
            link.sendall(buffer)
            link.recv(1)
            times.append(time.perf_counter() - begun)
    # The first one has warmed up.
    pipe.send(sum(times[1:]))


def _measure(nbytes: int, transfers: int) -> float:
    context = multiprocessing.get_context("spawn")
    (sender, sender_end), (receiver, receiver_end) = context.Pipe(), context.Pipe()
    processes = [
        context.Process(target=target, args=(nbytes, transfers + 1, end), daemon=True)
        for target, end in ((_receive, receiver_end), (_send, sender_end))
    ]
    try:
        for process in processes:
            process.start()
        sender.send(receiver.recv())
        seconds = sender.recv()
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return nbytes * transfers / float(seconds)


async def socket_link(nbytes: int, transfers: int) -> float:
    """Bytes per second, one transfer after another, each acknowledged; a process on each core."""
    return await asyncio.to_thread(_measure, nbytes, transfers)
