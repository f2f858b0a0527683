"""Two real movers over UCX: what one engine's memory holds arrives in another's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from tokenmesh.kv.geometry import BlockGeometry, LayerSpan
from tokenmesh.kv.hub import LinkHub
from tokenmesh.kv.messages import (
    CancelSend,
    Commit,
    Connect,
    Connected,
    Destination,
    Expect,
    MoverReady,
    OpenSend,
    Push,
    SendDone,
    Settle,
    Settled,
    Sync,
    Synced,
    ToMover,
    ToService,
    encode,
)
from tokenmesh.kv.mover import MoverArgs
from tokenmesh.kv.shares import HostShare

T = TypeVar("T")
LAYERS, BLOCKS, SIZE = 4, 32, 48 << 10
GEOMETRY = BlockGeometry(LAYERS, 3, 64, 64, "bfloat16", SIZE, "test")
NBYTES = LAYERS * BLOCKS * SIZE

pytestmark = pytest.mark.timeout(60)


class LocalMover:
    """A mover process with its memory, as an engine worker and a service together see it."""

    def __init__(self, folder: Path, name: str, transport: str) -> None:
        self.messages: asyncio.Queue[ToService] = asyncio.Queue()
        self.hub = LinkHub(self.messages.put_nowait)
        self._fd = os.memfd_create(name)
        os.ftruncate(self._fd, NBYTES)
        self.data = np.memmap(f"/proc/self/fd/{self._fd}", dtype=np.uint8, mode="r+").reshape(LAYERS, BLOCKS, SIZE)
        self._inbox = f"ipc://{folder}/{name}"
        self._transport = transport
        self.process: subprocess.Popen[bytes]
        self.address: tuple[str, int]

    async def start(self) -> None:
        await self.hub.__aenter__()
        os.set_inheritable(self._fd, True)
        spans = [LayerSpan(layer * BLOCKS * SIZE, SIZE) for layer in range(LAYERS)]
        args = MoverArgs(
            0,
            HostShare(self._fd, NBYTES),
            GEOMETRY,
            spans,
            self.hub.address,
            self._inbox,
            "127.0.0.1",
            0,
            self._transport,
            1 << 20,
            4,
            sorted(os.sched_getaffinity(0)),
        )
        command = [sys.executable, "-m", "tokenmesh.kv.mover", msgspec.json.encode(args).decode()]
        self.process = subprocess.Popen(  # noqa: ASYNC220 - as the engine worker does
            command, stdin=subprocess.PIPE, pass_fds=(self._fd,)
        )
        self._context = zmq.asyncio.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._commands.connect(self._inbox)
        ready = await self.expect(MoverReady)
        self.address = (ready.host, ready.port)

    async def tell(self, message: ToMover) -> None:
        await self._commands.send(encode(message))

    async def expect(self, kind: type[T]) -> T:
        message = await asyncio.wait_for(self.messages.get(), 20)
        assert isinstance(message, kind), message
        return message

    async def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.to_thread(self.process.wait, 10)
        finally:
            self.process.kill()
            self._context.destroy(linger=0)
            await self.hub.__aexit__()
            os.close(self._fd)


@pytest.fixture(params=["auto", "tcp"])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[LocalMover, LocalMover]]:
    """(sender, owner), started."""
    movers = LocalMover(tmp_path, "sender", request.param), LocalMover(tmp_path, "owner", request.param)
    await asyncio.gather(*(mover.start() for mover in movers))
    yield movers
    await asyncio.gather(*(mover.stop() for mover in movers))
    assert [mover.process.returncode for mover in movers] == [0, 0]


async def transfer(
    sender: LocalMover, owner: LocalMover, ticket: bytes, source: list[int], target: list[int]
) -> tuple[SendDone, Settled]:
    """All layers of `source` blocks into `target` blocks, in two pushes a layer as chunked prefill does."""
    # What a fast sender writes before the ticket is open would be dropped.
    owner.hub.send("mover-0", Expect(ticket, target))
    owner.hub.send("mover-0", Sync(ticket))
    assert (await owner.expect(Synced)).transfer_id == ticket
    await sender.tell(OpenSend(ticket, [Destination(*owner.address)]))
    half = len(source) // 2
    for first, blocks in ((0, source[:half]), (half, source[half:])):
        for layer in range(LAYERS):
            await sender.tell(Push(ticket, layer, first, blocks))
    await sender.tell(Commit(ticket))
    done = await sender.expect(SendDone)
    owner.hub.send("mover-0", Settle(ticket))
    return done, await owner.expect(Settled)


async def test_blocks_arrive(pair: tuple[LocalMover, LocalMover]) -> None:
    sender, owner = pair
    rng = np.random.default_rng(1)
    sender.data[:] = rng.integers(0, 256, sender.data.shape, dtype=np.uint8)
    # (1) Connecting ahead names the transport and measures it.
    sender.hub.send("mover-0", Connect(*owner.address))
    connected = await sender.expect(Connected)
    assert connected.error == ""
    assert connected.transport not in ("", "unknown")
    assert connected.goodput > 0
    # (2) Contiguous, scattered and reversed blocks, several transfers one after the other.
    for number, (source, target) in enumerate(
        [
            (list(range(20)), list(range(5, 25))),
            ([3, 9, 4, 30, 31, 1], [0, 2, 4, 6, 8, 10]),
            (list(range(12))[::-1], list(range(12))),
        ]
    ):
        done, settled = await transfer(sender, owner, bytes([number + 1]) * 16, source, target)
        assert done.error == ""
        assert settled.complete
        assert done.nbytes == settled.nbytes == LAYERS * len(source) * SIZE
        for layer in range(LAYERS):
            assert (owner.data[layer, target] == sender.data[layer, source]).all()


async def test_a_transfer_without_a_ticket_is_refused(pair: tuple[LocalMover, LocalMover]) -> None:
    sender, owner = pair
    sender.data[:] = 1
    await sender.tell(OpenSend(b"n" * 16, [Destination(*owner.address)]))
    await sender.tell(Push(b"n" * 16, 0, 0, [1, 2]))
    await sender.tell(Commit(b"n" * 16))
    assert "refused" in (await sender.expect(SendDone)).error
    assert not owner.data.any()


async def test_cancel_ends_a_transfer(pair: tuple[LocalMover, LocalMover]) -> None:
    sender, owner = pair
    await sender.tell(OpenSend(b"c" * 16, [Destination(*owner.address)]))
    await sender.tell(Push(b"c" * 16, 0, 0, [1, 2]))
    await sender.tell(CancelSend(b"c" * 16))
    assert (await sender.expect(SendDone)).error == "cancelled"


async def test_a_dead_owner_fails_the_transfer_at_once(pair: tuple[LocalMover, LocalMover]) -> None:
    sender, owner = pair
    # (1) A connected pair with an open transfer.
    done, _ = await transfer(sender, owner, b"1" * 16, [1, 2], [3, 4])
    assert done.error == ""
    await sender.tell(OpenSend(b"d" * 16, [Destination(*owner.address)]))
    await sender.tell(Push(b"d" * 16, 0, 0, [1, 2]))
    # (2) The owner is killed; COMMIT is answered by an error, not by silence.
    owner.process.kill()
    owner.process.wait()
    await sender.tell(Commit(b"d" * 16))
    start = asyncio.get_running_loop().time()
    assert (await sender.expect(SendDone)).error != ""
    assert asyncio.get_running_loop().time() - start < 5
    # (3) Nobody listens there any more: the next transfer says so.
    await sender.tell(OpenSend(b"e" * 16, [Destination(*owner.address)]))
    await sender.tell(Commit(b"e" * 16))
    assert "KV owner" in (await sender.expect(SendDone)).error
    owner.process.returncode = 0


async def test_an_idle_mover_uses_no_cpu(pair: tuple[LocalMover, LocalMover]) -> None:
    import psutil

    sender, owner = pair
    await transfer(sender, owner, b"1" * 16, [1, 2], [3, 4])
    watched = [psutil.Process(mover.process.pid) for mover in pair]
    before = [sum(p.cpu_times()[:2]) for p in watched]
    await asyncio.sleep(2)
    used = [sum(p.cpu_times()[:2]) - b for p, b in zip(watched, before, strict=True)]
    assert max(used) < 0.2
