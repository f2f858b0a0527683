"""What moving a layer's rows to a rank and back costs, with a rank that computes nothing: UCX against Gloo.

The rows of SmolLM2-135M (9 heads, 3 KV heads of 64) in bfloat16, packed and unpacked as in a real step.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
import torch
from torch.distributed import TCPStore

from tokenmesh.parallel.exchange import Exchange
from tokenmesh.parallel.gloo_exchange import GlooExchange
from tokenmesh.parallel.peer import RankPeer
from tokenmesh.parallel.plan import StepPlan
from tokenmesh.parallel.rank import LayerSpec, RankProtocol, RankSpec
from tokenmesh.parallel.rows import HeadShape, RowViews

Transport = Literal["ucx", "gloo"]

SHAPE = HeadShape(heads=9, kv_heads=3, head_size=64, dtype="bfloat16")
SPEC = RankSpec(SHAPE, [LayerSpec(0.125)] * 30, 128, "none", max_seqs=64, max_tokens=64, max_blocks=8)
BLOCKS = 64
TOKEN = bytes(range(16))


@dataclass(frozen=True)
class Cost:
    """Microseconds per layer."""

    transport: str
    rows: int
    p50: float
    p99: float


class Nothing:
    """A kernel that computes nothing."""

    def prepare(self, plan: StepPlan) -> None:
        """Nothing."""

    def attend(self, layer: int, views: RowViews) -> None:
        """Nothing."""


def _serve(transport: Transport, core: int, steps: int, pipe: Connection) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    protocol = RankProtocol(SPEC, BLOCKS, Nothing())
    pair: Exchange
    loop = None
    if transport == "ucx":
        from tokenmesh.parallel.ucx_exchange import UcxLoop

        loop = UcxLoop("auto")
        pipe.send(loop.listen(0))
        accepted = loop.accept(TOKEN, 30)
        assert accepted is not None
        pair = accepted
    else:
        store = TCPStore("127.0.0.1", pipe.recv(), 2, False)
        pair = GlooExchange(store, False, None)
    while protocol.steps < steps:
        pair.receive(protocol.expects)
        answer = protocol.received()
        if answer is not None:
            pair.send(answer)
    while not pipe.poll(0.01):
        # The last answer may still be on its way.
        if loop is not None:
            loop.worker.progress()
    pair.close()


def measure(transport: Transport, rows: int, steps: int, cores: tuple[int, int] = (0, 1)) -> Cost:
    """Times `steps` steps of 30 layers with `rows` tokens, the first tenth left out; each end has a core of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(transport, cores[1], steps, theirs), daemon=True)
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    process.start()
    os.sched_setaffinity(0, {cores[0]})
    # A second thread on this core would only wait for the first.
    torch.set_num_threads(1)
    try:
        times = _drive(transport, rows, steps, ours)
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
        ours.send("done")
        process.join(10)
        process.kill()
    measured = np.asarray(times[len(times) // 10 :]) / 1e3
    p50, p99 = np.percentile(measured, (50, 99))
    return Cost(transport, rows, float(p50), float(p99))


def _drive(transport: Transport, rows: int, steps: int, pipe: Connection) -> list[int]:
    exchange: Exchange
    if transport == "ucx":
        from tokenmesh.parallel.ucx_exchange import UcxLoop

        exchange = UcxLoop("auto").connect("127.0.0.1", pipe.recv(), TOKEN, 30)
    else:
        store = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
        pipe.send(store.port)
        exchange = GlooExchange(store, True, 30)
    peer = RankPeer(1, exchange, SPEC)
    dtype = SHAPE.torch_dtype
    query = torch.zeros(rows, SHAPE.heads, SHAPE.head_size, dtype=dtype)
    key, value = (torch.zeros(rows, SHAPE.kv_heads, SHAPE.head_size, dtype=dtype) for _ in range(2))
    output = torch.zeros_like(query)
    lens = np.ones(rows, dtype=np.int32)
    table = np.arange(rows, dtype=np.int32)[:, None]
    times = []
    for _ in range(steps):
        peer.plan(lens, lens, table)
        for layer in range(len(SPEC.layers)):
            start = time.perf_counter_ns()
            peer.send(layer, query, key, value, slice(None))
            peer.receive(layer, output, slice(None))
            times.append(time.perf_counter_ns() - start)
    peer.close()
    return times
