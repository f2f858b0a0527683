"""Runs one service in this process: the entry point of containers."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import psutil
import structlog
import uvloop

from tokenmesh.config import ConfigError, DecodeWorkerConfig, EngineConfig, MeshConfig
from tokenmesh.cpus import confine
from tokenmesh.gpus import show_gpus
from tokenmesh.heap import leave_heap_at_exit
from tokenmesh.lifecycle import Stop
from tokenmesh.logs import setup_logging
from tokenmesh.mesh_file import load_config
from tokenmesh.model_store import ModelNotFoundError
from tokenmesh.rpc.server import PortInUseError
from tokenmesh.telemetry.export import recording

log = structlog.get_logger()

END_S = 5.0
"""For a service that has not started to let go of what it has."""


class ServiceRole(enum.StrEnum):
    """What can be served."""

    GATEWAY = "gateway"
    PREFILL = "prefill"
    DECODE_ROOT = "decode-root"
    DECODE_WORKER = "decode-worker"


_MODULES = {
    ServiceRole.GATEWAY: "services.gateway.main",
    ServiceRole.PREFILL: "services.prefill.main",
    ServiceRole.DECODE_ROOT: "services.decode.root.main",
    ServiceRole.DECODE_WORKER: "services.decode.worker.main",
}


def serve(role: ServiceRole, config: Path | None, replica: int) -> int:
    """Serves until SIGTERM or SIGINT, then drains. Returns the exit status; prints one line if it cannot start."""
    try:
        mesh = load_config(config)
    except ConfigError as error:
        print(f"tokenmesh: {error}", file=sys.stderr)
        return 2
    try:
        _confine(mesh, role, replica)
    except ValueError as error:
        print(f"tokenmesh: {role.value}: {error}", file=sys.stderr)
        return 2
    # Process 1 of a container gets no signal that it has no handler for. Nothing has been started yet.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    setup_logging(mesh.log.level, mesh.log.format, role=role.value, replica=replica)
    leave_heap_at_exit()
    # Imported late: a gateway must not pay for engines, nor a bad configuration for any of them.
    module = importlib.import_module(_MODULES[role])

    async def run() -> None:
        stop = Stop()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        serving = asyncio.create_task(module.serve(mesh, replica, stop))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not serving.done() and not stop.started:
            log.info("told to stop before it has started")
            serving.cancel()
            await asyncio.wait({serving}, timeout=END_S)
            _end_now()
        await serving

    try:
        with recording(mesh, role.value, replica):
            uvloop.run(run())
    except (PortInUseError, ModelNotFoundError, ConfigError) as error:
        print(f"tokenmesh: {role.value}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        log.exception("service failed")
        print(f"tokenmesh: {role.value} failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _end_now() -> NoReturn:
    """Ends this process and what it has begun to start: the thread that starts an engine cannot be cancelled."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(0)


def _confine(mesh: MeshConfig, role: ServiceRole, replica: int) -> None:
    """Keeps the service to its cores and its GPUs. Raises ValueError if it has none of them."""
    match role:
        case ServiceRole.PREFILL:
            section: EngineConfig | DecodeWorkerConfig = mesh.prefill_service
            shards = mesh.prefill_service.tensor_parallel_size
        case ServiceRole.DECODE_ROOT:
            section, shards = mesh.decode_service, mesh.decode_service.tensor_parallel_size
        case ServiceRole.DECODE_WORKER:
            section, shards = mesh.decode_worker, mesh.decode_service.tensor_parallel_size
        case ServiceRole.GATEWAY:
            return
    confine(section.cpus)
    show_gpus(section.gpus, shards, replica)
