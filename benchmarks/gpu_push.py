"""KV from GPU to GPU, the moving part of `make bench-gpu`: goodput, and what of a transfer prefill does not hide.

Two movers, each a process, move blocks of GPU memory as in a mesh: tickets, checksums, receipts. Beside them, in the
same run, ucx_perftest over the same transport, which neither gathers nor checks, and the device's own copy. On a host
of several GPUs the owner is on another than the sender; else both share the one.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.exposure import prefill_path
from benchmarks.harness import median
from benchmarks.mover_memory import Place
from benchmarks.movers import WINDOW, Layout, mover_pair, scattered
from benchmarks.perftest import PerftestError, perftest
from tokenmesh.config import KvTransferConfig, MeshConfig

MIB = 1 << 20
PROMPTS = (2000, 8192)
"""Tokens of the prompts whose exposed time is measured."""
ROUNDS = 5
LARGEST = "4 x 256 MB"
CHUNK = KvTransferConfig().chunk(device=True)
"""Largest messages, as configured by default."""
LAYOUTS = (
    Layout("256 MB", 1, MIB, range(256), range(256)),
    # What 65,536 tokens of Llama-3.1-8B take in each of four layers.
    Layout(LARGEST, 4, MIB, range(256), range(256)),
    # 8,192 tokens of it in all layers, in blocks of 16 and in the order in which a cache in use hands them out.
    Layout("8b 8192 tokens", 32, 64 << 10, scattered(512, 1), scattered(512, 2)),
)


def places() -> tuple[Place, Place]:
    """The sender's and the owner's."""
    return Place(tuple(range(4)), 0), Place(tuple(range(4, 8)), min(1, torch.cuda.device_count() - 1))


def copied(nbytes: int) -> float:
    """Bytes per second of the device's own copy between the two places; median."""
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{place.device}") for place in places())
    seconds = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return nbytes / median(seconds)


async def goodputs() -> list[dict[str, Any]]:
    """Per layout, bytes per second of our movers, of ucx_perftest and of the device's copy."""
    rows = []
    for layout in LAYOUTS:
        async with mover_pair(layout, "auto", places(), CHUNK) as pair:
            transfers = max(8, min(64, (4 << 30) // layout.nbytes))
            await pair.measure(layout, 4)
            ours = await pair.measure(layout, transfers)
        # Layers of the same blocks leave together.
        message = min(CHUNK, layout.nbytes)
        try:
            ucx: float | None = await perftest(
                "auto", message, WINDOW, 400, devices=tuple(int(p.device or 0) for p in places())
            )
        except PerftestError as error:
            print(error, flush=True)
            ucx = None
        row = {
            "layout": layout.name,
            "chunk_mb": CHUNK // MIB,
            "transport": pair.transport,
            "gpus": [place.device for place in places()],
            "streamed_gb_s": ours.streamed / 1e9,
            "alone_gb_s": ours.alone / 1e9,
            "perftest_gb_s": ucx and ucx / 1e9,
            "copy_gb_s": copied(message) / 1e9,
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def config(model: Path, engine_args: Mapping[str, Any]) -> MeshConfig:
    """A prefill service on the first GPU."""
    return MeshConfig.model_validate(
        {
            "model": str(model),
            "dtype": "bfloat16",
            "max_model_len": max(PROMPTS) + 64,
            "prefill_service": {
                "max_num_seqs": 16,
                "max_num_batched_tokens": max(PROMPTS),
                "block_size": 16,
                "gpu_memory_utilization": 0.6,
                "enable_prefix_caching": False,
                "engine_args": dict(engine_args),
            },
        }
    )


async def exposed(model: Path, engine_args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per length, medians of a prefill and of what of its transfer is not hidden behind it."""
    rows = []
    async with prefill_path(config(model, engine_args), places()[1]) as path:
        for tokens in PROMPTS:
            await path.prefill(tokens)
            seen = [await path.prefill(tokens) for _ in range(ROUNDS)]
            row = {
                "tokens": tokens,
                "prefill_s": median([one.prefill for one in seen]),
                "exposed_s": median([one.exposed for one in seen]),
                "exposed_s_all": [one.exposed for one in seen],
                "wire_s": median([one.wire for one in seen]),
                "nbytes": seen[0].nbytes,
            }
            print(row, flush=True)
            rows.append(row)
    return rows


def measure(shape: Mapping[str, Any], engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """Both parts; `shape`: of the model whose prompts are prefilled."""
    from benchmarks.gpu import write_model

    with tempfile.TemporaryDirectory(prefix="tokenmesh-bench-") as name:
        hidden = asyncio.run(exposed(write_model(shape, Path(name)), engine_args))
    return {"goodput": asyncio.run(goodputs()), "exposed": hidden}
