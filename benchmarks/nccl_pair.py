"""What a layer's exchange between two GPUs takes by itself, in a CUDA graph: nothing is computed in between.

Two processes, a GPU each; the rows are those of a shape with 32 heads of 128 and 8 KV heads in bfloat16. Prints
microseconds per round trip, the median over replays of a graph of 32 of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.harness import ROOT, median
from tokenmesh.engine.gpu.pair import NcclPair, new_id

LAYERS = 32
REPLAYS = 60
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128


def captured(layer: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of all layers, after two without."""
    layer()
    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAYERS):
            layer()
    return graph


def replay(graph: torch.cuda.CUDAGraph) -> list[float]:
    """Microseconds per layer of every replay."""
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / LAYERS * 1e3)
    return times


def run(pair: NcclPair, is_root: bool, rows: list[int], device: torch.device) -> None:
    """The same work on both ends; the root prints."""
    for count in rows:
        request = torch.zeros(count, HEADS + 2 * KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16, device=device)
        reply = torch.zeros(count, HEADS, HEAD_SIZE, dtype=torch.bfloat16, device=device)

        def layer(request: torch.Tensor = request, reply: torch.Tensor = reply) -> None:
            if is_root:
                pair.send(request)
                pair.receive(reply)
            else:
                pair.receive(request)
                pair.send(reply)

        times = replay(captured(layer))
        if is_root:
            print(f"{count} rows: {median(times):.1f} us per layer", flush=True)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nccl_pair", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rank", metavar="ID", help="be the other end of this pair")
    options = parser.parse_args()
    is_root = options.rank is None
    device = torch.device("cuda", 0 if is_root else torch.cuda.device_count() - 1)
    torch.cuda.set_device(device)
    if not is_root:
        run(NcclPair(bytes.fromhex(options.rank), False, device), False, options.rows, device)
        return 0
    unique_id = new_id()
    command = [sys.executable, "-m", "benchmarks.nccl_pair", "--rank", unique_id.hex()]
    with subprocess.Popen([*command, "--rows", *map(str, options.rows)], cwd=ROOT) as other:
        run(NcclPair(unique_id, True, device), True, options.rows, device)
        return other.wait(60)


if __name__ == "__main__":
    sys.exit(main())
