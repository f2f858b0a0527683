"""Runs one service in this process: the entry point of containers."""

from __future__ import annotations

import asyncio
import enum
import importlib
import signal
import sys
from pathlib import Path

import structlog
import uvloop

from tokenmesh.config import ConfigError, MeshConfig, load_config
from tokenmesh.cpus import confine
from tokenmesh.gpus import show_gpus
from tokenmesh.logs import setup_logging
from tokenmesh.model_store import ModelNotFoundError
from tokenmesh.rpc.server import PortInUseError
from tokenmesh.telemetry.export import recording

log = structlog.get_logger()


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
        confine(_cpus(mesh, role))
        show_gpus(*_gpus(mesh, role), replica)
    except ValueError as error:
        print(f"tokenmesh: {role.value}: {error}", file=sys.stderr)
        return 2
    setup_logging(mesh.log.level, mesh.log.format, role=role.value, replica=replica)
    # Imported late: a gateway must not pay for engines, nor a bad configuration for any of them.
    module = importlib.import_module(_MODULES[role])

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await module.serve(mesh, replica, stop)

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


def _cpus(mesh: MeshConfig, role: ServiceRole) -> str | None:
    match role:
        case ServiceRole.PREFILL:
            return mesh.prefill_service.cpus
        case ServiceRole.DECODE_ROOT:
            return mesh.decode_service.cpus
        case ServiceRole.DECODE_WORKER:
            return mesh.decode_worker.cpus
        case ServiceRole.GATEWAY:
            return None


def _gpus(mesh: MeshConfig, role: ServiceRole) -> tuple[str | None, int]:
    """(GPUs of all replicas, how many one has)."""
    match role:
        case ServiceRole.PREFILL:
            return mesh.prefill_service.gpus, mesh.prefill_service.tensor_parallel_size
        case ServiceRole.DECODE_ROOT:
            return mesh.decode_service.gpus, mesh.decode_service.tensor_parallel_size
        case ServiceRole.DECODE_WORKER:
            return mesh.decode_worker.gpus, mesh.decode_service.tensor_parallel_size
        case ServiceRole.GATEWAY:
            return None, 0
