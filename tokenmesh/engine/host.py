"""Starts a vLLM engine inside a service, with its link hub and movers."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import structlog

from tokenmesh.config import ConfigError, DecodeConfig, EngineConfig, MeshConfig, PrefillConfig
from tokenmesh.engine import compile_cache
from tokenmesh.engine.settings import ConnectorSettings
from tokenmesh.gpus import check_device_transfer
from tokenmesh.kv.hub import LinkHub
from tokenmesh.kv.messages import EngineCounts, MoverReady, Roused, ToService
from tokenmesh.parallel.partition import local_blocks, split_blocks

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

log = structlog.get_logger()

GIB = 1 << 30

LIFE_S = 0.5
"""Between two looks at whether an engine lives."""

CPU_STEP_TOKENS = 256
"""Tokens of a step on CPUs. An abort takes effect between steps, and there 512 tokens can take a second."""
STEP_SEQS = 64
CPU_PREFILL_SEQS = 1
"""Sequences of a step."""


def engine_args(mesh: MeshConfig, section: EngineConfig, model_path: str, **extra: Any) -> AsyncEngineArgs:
    """vLLM's arguments for an engine of this mesh. `extra` wins over everything.

    Raises ConfigError for `engine_args` that the mesh sets itself.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    max_num_seqs = section.max_num_seqs or (
        CPU_PREFILL_SEQS if cpu and isinstance(section, PrefillConfig) else STEP_SEQS
    )
    values: dict[str, Any] = {
        "model": model_path,
        "served_model_name": [mesh.model_name],
        "dtype": section.dtype or mesh.dtype,
        "max_model_len": section.max_model_len or mesh.max_model_len,
        "tensor_parallel_size": section.tensor_parallel_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": section.max_num_batched_tokens,
        "block_size": section.block_size,
        "enable_prefix_caching": section.enable_prefix_caching,
        "enforce_eager": section.enforce_eager,
        "seed": section.seed,
        "kv_cache_memory_bytes": section.kv_cache_memory_bytes,
        "gpu_memory_utilization": section.gpu_memory_utilization,
        "enable_log_requests": False,
    }
    if cpu:
        values["kv_cache_memory_bytes"] = section.kv_cache_memory_bytes or GIB
        values.pop("gpu_memory_utilization")
        values["max_num_batched_tokens"] = section.max_num_batched_tokens or max(CPU_STEP_TOKENS, max_num_seqs)
    if isinstance(section, DecodeConfig) and mesh.gateway.reasoning_parser is not None:
        # The root constrains a structured answer once thinking has ended, and must know its end.
        values["reasoning_parser"] = mesh.gateway.reasoning_parser
    # Those left out are joined with what is configured, or mean the same on both sides.
    for name in section.engine_args.keys() & extra.keys() - {
        "additional_config",
        "attention_config",
        "tensor_parallel_size",
    }:
        raise ConfigError(f"engine_args.{name} is set by the mesh, and would be ignored")
    values.update(section.engine_args)
    values.update(extra)
    return AsyncEngineArgs(**{k: v for k, v in values.items() if v is not None})


class EngineHost:
    """A running engine: AsyncLLM, its hub, its movers, and the block counts it last reported."""

    def __init__(self, hub: LinkHub, shards: int, movers: bool = True) -> None:
        """`movers`: whether there are any."""
        self.hub = hub
        self.shards = shards
        self.movers: dict[int, MoverReady] = {}
        self.counts = EngineCounts(0, 0)
        self.device_blocks: list[int] = []
        """Blocks of each rank on the root's own GPU, the root first; empty if there are none but the root."""
        self.llm: AsyncLLM
        self._ready = asyncio.Event()
        if not movers:
            self._ready.set()

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        if self.movers:
            return self.movers[0].geometry.block_size
        return int(self.llm.vllm_config.cache_config.block_size)

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

    def rouse(self) -> None:
        """To be called before a request is submitted: it would wait for the end of an idle step otherwise."""
        for shard in range(self.shards):
            self.hub.send(f"worker-{shard}", Roused())

    async def serve_until(self, stop: asyncio.Event) -> None:
        """Waits for `stop`. Raises EngineDeadError if the engine dies before: only a new start brings it back."""
        from vllm.v1.engine.exceptions import EngineDeadError

        while not stop.is_set():
            if self.llm.errored:
                raise EngineDeadError()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), LIFE_S)

    async def movers_ready(self, timeout: float) -> None:
        """Waits until every shard's mover listens, if there are movers. Raises TimeoutError."""
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
    from vllm.platforms import current_platform

    device = not current_platform.is_cpu()
    producer = isinstance(section, PrefillConfig)
    transfer = section.kv_transfer
    host: EngineHost | None = None

    def route(message: ToService) -> None:
        if host is None or not host.note(message):
            handle(message)

    async with LinkHub(route) as hub:
        check_platform(section)
        device_ranks = ranks_on_device(section)
        root_share = section.group.root_share if isinstance(section, DecodeConfig) else 1.0
        host = EngineHost(hub, section.tensor_parallel_size, movers=transfer.transport != "none")
        settings = ConnectorSettings(
            hub=hub.address,
            host=transfer.host,
            port=transfer.port + replica * section.tensor_parallel_size if transfer.port else 0,
            transport=transfer.transport,
            chunk_bytes=transfer.chunk(device),
            window=transfer.window,
            cpus=sorted(os.sched_getaffinity(0)),
            remote_prefill_min_tokens=section.remote_prefill_min_tokens if isinstance(section, DecodeConfig) else 1,
            placement=section.group.placement if isinstance(section, DecodeConfig) else "balance",
            ranks=section.token_parallel_size if isinstance(section, DecodeConfig) else 1,
            device_ranks=device_ranks,
            root_share=root_share,
            device=device,
            layerwise=producer,
        )
        host.llm = await asyncio.to_thread(_start, mesh, section, model_path, producer, settings, extra)
        try:
            if device_ranks > 1:
                blocks = host.llm.vllm_config.cache_config.num_gpu_blocks
                host.device_blocks = local_blocks(blocks, device_ranks, root_share)
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
            # By path, since entry points are not installed where only a checkout is in use.
            kv_connector_module_path="tokenmesh.engine.connector",
            kv_role="kv_producer" if producer else "kv_consumer",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=settings.to_extra_config(),
        ),
        additional_config=compiled_apart(section),
        **(token_parallel_args(section) if isinstance(section, DecodeConfig) else {}),
        **extra,
    )
    try:
        vllm_config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if isinstance(section, DecodeConfig) and section.token_parallel_size > 1:
        check_model(vllm_config)
    warn_of_slow_dtype(vllm_config)
    return AsyncLLM.from_vllm_config(vllm_config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=False)


def warn_of_slow_dtype(vllm_config: VllmConfig) -> None:
    """Says so where this CPU has no instructions for the dtype: bfloat16 then takes 6 times as long as float32."""
    import torch
    from vllm.platforms import current_platform

    dtype = vllm_config.model_config.dtype
    if current_platform.is_cpu() and dtype is torch.bfloat16 and not computes_bfloat16():
        log.warning("this CPU computes bfloat16 slowly; dtype: float32 is faster here", dtype=str(dtype))


def computes_bfloat16() -> bool:
    """Whether this CPU has instructions for it, as oneDNN sees it."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def token_parallel_args(section: DecodeConfig) -> dict[str, Any]:
    """vLLM's arguments that make an engine the root of a group; none for a group of one."""
    if section.token_parallel_size == 1:
        return {}
    from vllm.platforms import current_platform

    group = section.group
    if current_platform.is_cpu():
        values: dict[str, Any] = {
            "worker_cls": "tokenmesh.engine.worker.TokenParallelCpuWorker",
            "scheduler_cls": "tokenmesh.engine.scheduler.TokenParallelScheduler",
        }
    else:
        values = {
            "worker_cls": "tokenmesh.engine.gpu.worker.TokenParallelGpuWorker",
            "scheduler_cls": "tokenmesh.engine.scheduler.AsyncTokenParallelScheduler",
            "attention_config": flash_attention(section),
        }
    if group.kv_blocks is not None:
        # One more: vLLM sets its first block aside.
        here = ranks_on_device(section) > 1
        blocks = split_blocks(group.kv_blocks, section.token_parallel_size, group.root_share)
        values["num_gpu_blocks_override"] = (group.kv_blocks if here else blocks[0]) + 1
    return values


def flash_attention(section: EngineConfig) -> dict[str, Any]:
    """vLLM's attention_config as configured, for ranks on GPUs. Raises ConfigError for another backend."""
    config = dict(section.engine_args.get("attention_config", {}))
    if config.setdefault("backend", "FLASH_ATTN") != "FLASH_ATTN":
        raise ConfigError(f"engine_args.attention_config: ranks on GPUs know FLASH_ATTN, not {config['backend']}")
    return config


def compiled_apart(section: EngineConfig) -> dict[str, Any]:
    """vLLM's additional_config, which is part of its compile cache's key.

    What is compiled for the stock backend writes new keys and values by itself, to slots that need not be the root's.
    And what is compiled for one CPU is not for another.
    """
    from vllm.platforms import current_platform

    config = dict(section.engine_args.get("additional_config", {}))
    if isinstance(section, DecodeConfig) and section.token_parallel_size > 1:
        config["tokenmesh"] = "token_parallel"
    if current_platform.is_cpu():
        config[compile_cache.KEY] = compile_cache.this_cpu()
    return config


def ranks_on_device(section: EngineConfig) -> int:
    """Ranks that share the KV tensors of one GPU, the root included; 1 where ranks have their own."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() or not isinstance(section, DecodeConfig) or section.group.exchange != "local":
        return 1
    return section.token_parallel_size


def check_platform(section: EngineConfig) -> None:
    """Raises ConfigError for what does not work on CPUs, or on GPUs."""
    from vllm.platforms import current_platform

    grouped = isinstance(section, DecodeConfig) and section.token_parallel_size > 1
    exchange = section.group.exchange if isinstance(section, DecodeConfig) else ""
    if current_platform.is_cpu():
        if grouped and exchange == "nccl":
            raise ConfigError(
                "decode_service.group.exchange: nccl connects GPUs, and this host has none; set it to ucx"
            )
        return
    name = "decode_service" if isinstance(section, DecodeConfig) else "prefill_service"
    check_device_transfer(section.kv_transfer, name)
    if grouped and exchange == "nccl" and section.tensor_parallel_size > 1:
        # A lost rank has graphs captured again, which shards would have to begin at the same step.
        raise ConfigError(
            "decode_service.tensor_parallel_size: more than 1 does not go with group.exchange: nccl, in this version;"
            " set it to 1"
        )
    if grouped and exchange == "ucx":
        raise ConfigError(
            "decode_service.group.exchange: ucx reaches ranks on CPUs only; on GPUs set it to nccl, or to local for"
            " ranks on the root's own"
        )


def check_model(vllm_config: VllmConfig) -> None:
    """Raises ConfigError for a model or an engine that cannot be spread over ranks."""
    model, problem = vllm_config.model_config, ""
    if model.use_mla:
        problem = "its attention (MLA) is not supported"
    elif model.is_hybrid or model.is_attention_free or model.is_encoder_decoder:
        problem = "only decoders with attention in every layer are supported"
    elif vllm_config.speculative_config is not None:
        problem = "speculative decoding is not supported"
    elif vllm_config.cache_config.cache_dtype.startswith(("fp8", "int", "nvfp4")):
        problem = f"a KV cache in {vllm_config.cache_config.cache_dtype} is not supported"
    elif vllm_config.scheduler_config.policy != "fcfs":
        problem = "priority scheduling preempts without regard to ranks"
    if problem:
        raise ConfigError(f"{model.model} cannot be decoded token-parallel: {problem}; set token_parallel_size to 1")
