"""Starts a vLLM engine inside a service, with its link hub and movers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import structlog

from tokenmesh.config import EngineConfig, MeshConfig, PrefillConfig
from tokenmesh.engine.settings import ConnectorSettings
from tokenmesh.kv.hub import LinkHub
from tokenmesh.kv.messages import EngineCounts, MoverReady, ToService

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

log = structlog.get_logger()

GIB = 1 << 30

CPU_STEP_TOKENS = 256
"""Tokens of a step on CPUs. An abort takes effect between steps, and there 512 tokens can take a second."""


def engine_args(mesh: MeshConfig, section: EngineConfig, model_path: str, **extra: Any) -> AsyncEngineArgs:
    """vLLM's arguments for an engine of this mesh. `extra` wins over everything."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    values: dict[str, Any] = {
        "model": model_path,
        "served_model_name": [mesh.model_name],
        "dtype": section.dtype or mesh.dtype,
        "max_model_len": section.max_model_len or mesh.max_model_len,
        "tensor_parallel_size": section.tensor_parallel_size,
        "max_num_seqs": section.max_num_seqs,
        "max_num_batched_tokens": section.max_num_batched_tokens,
        "block_size": section.block_size,
        "enable_prefix_caching": section.enable_prefix_caching,
        "enforce_eager": section.enforce_eager,
        "seed": section.seed,
        "kv_cache_memory_bytes": section.kv_cache_memory_bytes,
        "gpu_memory_utilization": section.gpu_memory_utilization,
        "enable_log_requests": False,
    }
    if current_platform.is_cpu():
        values["kv_cache_memory_bytes"] = section.kv_cache_memory_bytes or GIB
        values.pop("gpu_memory_utilization")
        values["max_num_batched_tokens"] = section.max_num_batched_tokens or max(CPU_STEP_TOKENS, section.max_num_seqs)
    values.update(section.engine_args)
    values.update(extra)
    return AsyncEngineArgs(**{k: v for k, v in values.items() if v is not None})


class EngineHost:
    """A running engine: AsyncLLM, its hub, its movers, and the block counts it last reported."""

    def __init__(self, hub: LinkHub, shards: int) -> None:
        self.hub = hub
        self.shards = shards
        self.movers: dict[int, MoverReady] = {}
        self.counts = EngineCounts(0, 0)
        self.llm: AsyncLLM
        self._ready = asyncio.Event()

    def note(self, message: ToService) -> bool:
        """Takes the messages that are about the engine itself; False for any other."""
        if isinstance(message, MoverReady):
            self.movers[message.shard] = message
            if len(self.movers) == self.shards:
                self._ready.set()
            return True
        if isinstance(message, EngineCounts):
            self.counts = message
            return True
        return False

    async def movers_ready(self, timeout: float) -> None:
        """Waits until every shard's mover listens. Raises TimeoutError."""
        await asyncio.wait_for(self._ready.wait(), timeout)


@asynccontextmanager
async def run_engine(
    mesh: MeshConfig,
    section: EngineConfig,
    model_path: str,
    replica: int,
    handle: Callable[[ToService], None],
    **extra: Any,
) -> AsyncIterator[EngineHost]:
    """Runs an engine for the length of the context.

    `handle` gets what the hub hears about transfers. Starting takes tens of seconds and happens in a thread, so that
    the service can answer health checks meanwhile.
    """
    producer = isinstance(section, PrefillConfig)
    transfer = section.kv_transfer
    host: EngineHost | None = None

    def route(message: ToService) -> None:
        if host is None or not host.note(message):
            handle(message)

    async with LinkHub(route) as hub:
        host = EngineHost(hub, section.tensor_parallel_size)
        settings = ConnectorSettings(
            hub=hub.address,
            host=transfer.host,
            port=transfer.port + replica * section.tensor_parallel_size if transfer.port else 0,
            transport=transfer.transport,
            chunk_bytes=transfer.chunk_bytes,
            window=transfer.window,
            remote_prefill_min_tokens=getattr(section, "remote_prefill_min_tokens", 1),
        )
        host.llm = await asyncio.to_thread(_start, mesh, section, model_path, producer, settings, extra)
        try:
            await host.movers_ready(timeout=60)
            yield host
        finally:
            await asyncio.to_thread(host.llm.shutdown)


def _start(
    mesh: MeshConfig,
    section: EngineConfig,
    model_path: str,
    producer: bool,
    settings: ConnectorSettings,
    extra: dict[str, Any],
) -> AsyncLLM:
    # vLLM takes these from the environment only, when its processes start.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if section.cpu_omp_threads_bind is not None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = section.cpu_omp_threads_bind

    from vllm.config import KVTransferConfig
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from tokenmesh.engine.plugin import register

    register()
    args = engine_args(
        mesh,
        section,
        model_path,
        kv_transfer_config=KVTransferConfig(
            kv_connector="TokenParallelKVConnector",
            kv_role="kv_producer" if producer else "kv_consumer",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=settings.to_extra_config(),
        ),
        **extra,
    )
    return AsyncLLM.from_engine_args(args, usage_context=UsageContext.OPENAI_API_SERVER)
