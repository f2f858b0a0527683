"""NIXL, in an environment of its own: its packages must not touch ours."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

from benchmarks.harness import ROOT
from benchmarks.movers import Layout
from benchmarks.nixl_peer import Task
from tokenmesh.kv import transports

VERSION = "1.5.1"
HOME = ROOT / "build" / f"nixl-{VERSION}"
RUN_S = 120.0


class NixlError(Exception):
    """NIXL cannot be installed or does not run; the message says why."""


def install() -> None:
    """Makes the environment unless it is there. Raises NixlError.

    The wheel declares torch, but imports it only where tensors are handed over; host memory by address needs none of
    its CUDA libraries, so it goes in without dependencies.
    """
    if (HOME / ".ready").exists():
        return
    pip = [str(HOME / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", HOME], check=True, capture_output=True, text=True)
        subprocess.run([*pip, "numpy"], check=True, capture_output=True, text=True)
        subprocess.run([*pip, "--no-deps", f"nixl-cu12=={VERSION}"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NixlError(f"NIXL cannot be installed: {getattr(error, 'stderr', error)}") from error
    (HOME / ".ready").touch()


def pieces(layout: Layout) -> list[tuple[int, int, int]]:
    """(offset at the sender, offset at the owner, length), a piece per block and layer, as vLLM's connector does it.

    NIXL itself merges pieces that touch on both sides.
    """
    size, blocks = layout.block_bytes, 1 + max(*layout.source, *layout.target)
    return [
        ((layer * blocks + source) * size, (layer * blocks + target) * size, size)
        for layer in range(layout.layers)
        for source, target in zip(layout.source, layout.target, strict=True)
    ]


async def nixl(layout: Layout, transport: str, transfers: int, depth: int = 2) -> float:
    """Bytes per second of equal transfers, `depth` at a time, a process on each core. Raises NixlError."""
    environment = dict(os.environ, NIXL_LOG_LEVEL="ERROR", **transports.environment(transport))
    if transport == "tcp":
        # It connects by worker address, where put_zcopy is slow.
        del environment["UCX_RNDV_SCHEME"]
    blocks = 1 + max(*layout.source, *layout.target)
    task = Task(layout.layers * blocks * layout.block_bytes, pieces(layout), transfers, depth)
    process = await asyncio.create_subprocess_exec(
        HOME / "bin" / "python",
        ROOT / "benchmarks" / "nixl_peer.py",
        json.dumps(asdict(task)),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), RUN_S)
    except TimeoutError:
        raise NixlError(f"NIXL does not end within {RUN_S:g} s") from None
    finally:
        if process.returncode is None:
            # It has a process of its own, which polls.
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode != 0:
        raise NixlError(f"NIXL failed: {err.decode()[-500:]}")
    return float(out)
