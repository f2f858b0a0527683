"""A service ends when its engine has died; a worker ends when its mover has."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from tokenmesh.engine import host
from tokenmesh.engine.host import EngineHost


def engine_host(errored: bool) -> EngineHost:
    hub: Any = None
    made = EngineHost(hub, 1, movers=False)
    made.llm = SimpleNamespace(errored=errored)  # type: ignore[assignment]
    return made


async def test_a_service_is_served_until_it_is_told_to_stop() -> None:
    stop = asyncio.Event()
    serving = asyncio.create_task(engine_host(errored=False).serve_until(stop))
    await asyncio.sleep(0.05)
    assert not serving.done()
    stop.set()
    await asyncio.wait_for(serving, 1)


async def test_a_dead_engine_ends_its_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LIFE_S", 0.02)
    made = engine_host(errored=False)
    serving = asyncio.create_task(made.serve_until(asyncio.Event()))
    await asyncio.sleep(0.05)
    made.llm.errored = True  # type: ignore[misc]
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(serving, 1)


WORKER = """
import os, signal, sys, time
from pathlib import Path
import psutil, torch
from tokenmesh.engine.settings import ConnectorSettings
from tokenmesh.engine.shared_kv import SharedKv
from tokenmesh.kv.geometry import BlockGeometry

kv = torch.zeros((2, 4, 16384), dtype=torch.float32)
geometry = BlockGeometry(2, 1, 64, 128, "float32", 65536, "cpu_attn/vec")
settings = ConnectorSettings(hub="ipc:///tmp/nobody", host="127.0.0.1", port=0, transport="tcp", chunk_bytes=1 << 20,
                             window=2, cpus=[0])
shared = SharedKv({"0": kv[0], "1": kv[1]}, geometry, settings, 0)
(mover,) = psutil.Process().children()
if sys.argv[1] == "closes":
    shared.close()
else:
    mover.kill()
time.sleep(5)
print("still here")
"""


@pytest.mark.parametrize(("what", "code", "said"), [("closes", 0, "still here"), ("loses", 1, "the mover has ended")])
def test_a_worker_does_not_outlive_its_mover(what: str, code: int, said: str) -> None:
    # 1. One worker ends its mover, as at the end of its life; another's is killed.
    done = subprocess.run([sys.executable, "-c", WORKER, what], capture_output=True, text=True, timeout=60)
    # 2. The first goes on. The second would wait for KV for ever, and nobody would notice.
    assert done.returncode == code, done.stderr
    assert said in done.stdout
    assert ("still here" in done.stdout) == (what == "closes")
