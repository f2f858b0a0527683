"""The baseline: vLLM's own OpenAI server with the settings of a mesh's decode root, and nothing of tokenmesh in it.

vLLM's command does not work in the CPU build, so what `vllm serve` calls is called here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from pathlib import Path
from typing import Any

# Everything else is imported late: vLLM's processes are spawned, and import this file again.


async def serve(config_file: Path, port: int) -> None:
    """Serves until SIGTERM or SIGINT, on 127.0.0.1."""
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client_from_engine_args
    from vllm.entrypoints.launchers.launcher import setup_server

    from services.gateway.rest import server_args
    from tokenmesh.engine.host import engine_args
    from tokenmesh.mesh_file import load_config
    from tokenmesh.model_store import resolve_model

    mesh = load_config(config_file)
    mesh = mesh.model_copy(update={"gateway": mesh.gateway.model_copy(update={"host": "127.0.0.1", "port": port})})
    model_path = await asyncio.to_thread(resolve_model, mesh.model)
    args = server_args(mesh, model_path)
    listen_address, sock = setup_server(args, reuse_port=False)
    arguments = engine_args(mesh, mesh.decode_service, model_path)
    async with build_async_engine_client_from_engine_args(arguments) as engine:
        shutdown = await build_and_serve(engine, listen_address, sock, args)
    try:
        await shutdown
    finally:
        sock.close()


def main() -> None:
    """Sets what vLLM takes from the environment only, before vLLM is imported."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plain_server", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="mesh file whose decode_service is served")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cores", required=True, help="of the engine's threads, e.g. 0-1")
    options = parser.parse_args()
    os.environ.update(
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_OMP_THREADS_BIND=options.cores,
        # No plug-in has this name, so that ours stays out of this engine.
        VLLM_PLUGINS="",
        # As in the mesh, whose services drop vLLM's lower levels.
        VLLM_LOGGING_LEVEL="WARNING",
    )

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    # While the engine starts; vLLM's server brings its own handler.
    signal.signal(signal.SIGTERM, interrupt)

    # vLLM runs its server on uvloop.
    import uvloop

    uvloop.run(serve(options.config, options.port))


if __name__ == "__main__":
    main()
