"""A prefill's mover and an owner's, with real memory and no engine: the path of KV as a benchmark drives it."""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import zmq

from benchmarks.harness import median
from benchmarks.mover_memory import Place, make_blocks
from tokenmesh.kv.geometry import BlockGeometry, LayerSpan
from tokenmesh.kv.hub import LinkHub
from tokenmesh.kv.messages import (
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
    ToMover,
    ToService,
    encode,
)
from tokenmesh.kv.mover import MoverArgs

T = TypeVar("T")
ANSWER_S = 60.0
CHUNK_BYTES, WINDOW = 8 << 20, 4
"""As KvTransferConfig has them by default."""


@dataclass(frozen=True)
class Layout:
    """Blocks of a transfer: `source` at the prefill, `target` at the owner, in every layer."""

    name: str
    layers: int
    block_bytes: int
    source: Sequence[int]
    target: Sequence[int]

    @property
    def nbytes(self) -> int:
        """Of one transfer."""
        return self.layers * len(self.source) * self.block_bytes

    @property
    def message_bytes(self) -> int:
        """Of the messages that movers cut it into."""
        blocks = max(1, CHUNK_BYTES // self.block_bytes)
        return min(blocks, len(self.source)) * self.block_bytes


class KvMoverError(Exception):
    """A transfer did not go as it should; the message says how."""


class MoverProcess:
    """A mover with its memory, as its engine worker and its service see it together."""

    def __init__(
        self,
        layout: Layout,
        blocks: int,
        transport: str,
        place: Place,
        geometry: BlockGeometry | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """`blocks`: of each layer; `geometry`: of an engine's blocks, where one writes to them."""
        self.messages: asyncio.Queue[ToService] = asyncio.Queue()
        self.hub = LinkHub(self.messages.put_nowait)
        self.address: tuple[str, int] = ("", 0)
        self._folder = Path(tempfile.mkdtemp(prefix="tokenmesh-bench-"))
        self._place = place
        size = layout.block_bytes
        self.blocks = make_blocks(place, layout.layers, blocks, size)
        self._args = MoverArgs(
            shard=0,
            memory=self.blocks.share,
            geometry=geometry or BlockGeometry(layout.layers, 1, 1, 1, "uint8", size, "bench"),
            spans=[LayerSpan(layer * blocks * size, size) for layer in range(layout.layers)],
            hub=self.hub.address,
            inbox=f"ipc://{self._folder}/inbox",
            host="127.0.0.1",
            port=0,
            transport=transport,
            chunk_bytes=chunk_bytes,
            window=WINDOW,
            cpus=list(place.cpus),
        )
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self.process: subprocess.Popen[bytes]

    async def start(self) -> None:
        """Starts it and gives it its core."""
        await self.hub.__aenter__()
        command = [sys.executable, "-m", "tokenmesh.kv.mover", msgspec.json.encode(self._args).decode()]
        self.process = subprocess.Popen(  # noqa: ASYNC220 - as the engine worker does
            command, stdin=subprocess.PIPE, pass_fds=self.blocks.inherited
        )
        self._commands.connect(self._args.inbox)
        ready = await self.hear(MoverReady)
        self.address = (ready.host, ready.port)
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), self._place.cpus)

    def command(self, message: ToMover) -> None:
        """Tells it what its engine worker would."""
        self._commands.send(encode(message))

    async def hear(self, kind: type[T]) -> T:
        """Its next report, which must be of this kind. Raises KvMoverError."""
        message = await asyncio.wait_for(self.messages.get(), ANSWER_S)
        if not isinstance(message, kind):
            raise KvMoverError(f"{message} came, not a {kind.__name__}")
        return message

    async def stop(self) -> None:
        """Ends it and frees its memory."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.to_thread(self.process.wait, 10)
        finally:
            self.process.kill()
            self._context.destroy(linger=0)
            await self.hub.__aexit__()
            self.blocks.close()
            shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class Goodput:
    """Of some equal transfers, in bytes per second."""

    streamed: float
    """With two under way at a time, as when one prompt follows another."""
    alone: float
    """One at a time, from the first message to the mover until its report that the owner has everything; median."""


class MoverPair:
    """A prefill's mover on core 0, connected to an owner's on core 1."""

    def __init__(self, sender: MoverProcess, owner: MoverProcess, transport: str) -> None:
        self.sender = sender
        self.owner = owner
        self.transport = transport
        """What UCX says it uses."""

    async def measure(self, layout: Layout, transfers: int) -> Goodput:
        """Moves a layout's blocks again and again. Raises KvMoverError unless the owner has them all in the end."""
        self.owner.blocks.clear(layout.target)
        streamed = await self._timed(layout, transfers, depth=2)
        alone = [await self._timed(layout, 1, depth=1) for _ in range(min(transfers, 8))]
        for place, block in zip(layout.source, layout.target, strict=True):
            if not np.array_equal(self.sender.blocks.block(place), self.owner.blocks.block(block)):
                raise KvMoverError(f"block {block} of the owner is not block {place} of the sender")
        return Goodput(layout.nbytes * transfers / streamed, layout.nbytes / median(alone))

    async def _timed(self, layout: Layout, transfers: int, depth: int) -> float:
        tickets = [secrets.token_bytes(16) for _ in range(transfers)]
        for ticket in tickets:
            self.owner.hub.send("mover-0", Expect(ticket, list(layout.target)))
        # Tickets and KV come by different ways; in a mesh a gRPC call lies between them.
        await asyncio.sleep(0.02)
        begun = time.perf_counter()
        for number, ticket in enumerate(tickets):
            if number >= depth:
                await self._done()
            self._push(ticket, layout)
        for _ in range(min(depth, transfers)):
            await self._done()
        seconds = time.perf_counter() - begun
        for ticket in tickets:
            self.owner.hub.send("mover-0", Settle(ticket))
            settled = await self.owner.hear(Settled)
            if not settled.complete or settled.nbytes != layout.nbytes:
                raise KvMoverError(f"the owner has {settled.nbytes} of {layout.nbytes} bytes: {settled.error}")
        return seconds

    def _push(self, ticket: bytes, layout: Layout) -> None:
        self.sender.command(OpenSend(ticket, [Destination(*self.owner.address)]))
        for layer in range(layout.layers):
            self.sender.command(Push(ticket, layer, 0, list(layout.source)))
        self.sender.command(Commit(ticket))

    async def _done(self) -> None:
        done = await self.sender.hear(SendDone)
        if done.error:
            raise KvMoverError(f"a transfer failed: {done.error}")


@asynccontextmanager
async def mover_pair(
    layout: Layout,
    transport: str,
    places: tuple[Place, Place] = (Place((0,)), Place((1,))),
    chunk_bytes: int = CHUNK_BYTES,
) -> AsyncIterator[MoverPair]:
    """Two movers for the length of the block, connected, with memory for a layout full of random bytes."""
    blocks = 1 + max(*layout.source, *layout.target)
    sender, owner = (MoverProcess(layout, blocks, transport, place, chunk_bytes=chunk_bytes) for place in places)
    sender.blocks.fill(1)
    await asyncio.gather(sender.start(), owner.start())
    try:
        sender.hub.send("mover-0", Connect(*owner.address))
        connected = await sender.hear(Connected)
        if connected.error:
            raise KvMoverError(connected.error)
        yield MoverPair(sender, owner, connected.transport)
    finally:
        await asyncio.gather(sender.stop(), owner.stop())


def scattered(blocks: int, seed: int) -> list[int]:
    """Block ids in the order in which a cache that has been in use for long hands them out."""
    order = np.random.default_rng(seed).permutation(math.ceil(blocks * 1.5))
    return [int(block) for block in order[:blocks]]
