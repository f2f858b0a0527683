"""The one configuration of a mesh: read once, validated once, frozen, passed in.

A mesh is one YAML file. Every key can be overridden from the environment as ``TOKENMESH_`` plus the path in capitals
with ``__`` between levels, e.g. ``TOKENMESH_DECODE_SERVICE__MAX_NUM_SEQS=64``. Keys that mean what a vLLM flag means
have that flag's name. Nothing but this and `mesh_file` reads the environment for settings.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tokenmesh.cpus import parse_cpus

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""Name of the model that installs with the package and needs no hub."""

Port = Annotated[int, Field(ge=0, le=65535)]


def _is_cpu_list(text: str) -> str:
    parse_cpus(text)
    return text


CpuList = Annotated[str, AfterValidator(_is_cpu_list)]


class ConfigError(Exception):
    """The configuration is unusable; the message is one line fit for an operator."""

    def __init__(self, message: str) -> None:
        # Names and values of the file's own may have line breaks in them.
        super().__init__(" ".join(message.splitlines()))


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class KvTransferConfig(_Section):
    """How KV moves between prefill services and the owners of blocks."""

    connector: Literal["TokenParallelKVConnector"] = "TokenParallelKVConnector"
    """Fixed; accepted so that a vLLM-style section can be pasted."""
    role: Literal["kv_producer", "kv_consumer"] | None = None
    """Follows from the section it stands in; a contradiction is an error."""
    transport: Literal["auto", "shm", "tcp", "system", "none"] = "auto"
    """``auto``: on one host shared memory, or GPU to GPU (cuda_ipc), else UCX's best; ``tcp``: only that; ``system``:
    UCX_* untouched; ``none``: no KV moves and no mover runs, prompts are computed where they are decoded."""
    host: str = "127.0.0.1"
    """Address of this service's UCX listener, as its peers reach it."""
    port: Port = 0
    """Port of the UCX listener of replica 0's shard 0; the next shard listens on the next port, and after the last
    shard the next replica begins. 0 picks free ones."""
    chunk_bytes: Annotated[int, Field(ge=64 << 10, le=256 << 20)] | None = None
    """Largest UCX message. Scattered blocks are gathered up to this size. Absent: 8 MiB, or 128 MiB between GPUs,
    where a message costs more to begin than to move. A mover holds 2 x ``window`` of them."""
    window: Annotated[int, Field(ge=1, le=16)] = 4
    """Messages in flight per pair."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A remote prefill, queueing included, that takes longer is given up and the prompt computed locally."""
    codec: Literal["none", "lossless", "bf16", "fp16", "fp8", "auto"] = "none"
    """How KV is encoded on its way; a decode root asks for it. ``lossless``: exact, for links slower than its
    compression, in CPU memory only. ``bf16``, ``fp16``, ``fp8``: rounded, which also bridges caches of different dtype.
    ``auto``: of the exact ones, what the measured link and codecs promise most of."""
    same_weights: bool = True
    """Of a decode root: refuse KV of prefill services that have other weights, as in the middle of an update. False
    where they are meant to differ, as with quantised ones."""

    def chunk(self, device: bool) -> int:
        """Largest UCX message in bytes. `device`: KV lies on a GPU."""
        return self.chunk_bytes or (128 << 20 if device else 8 << 20)


class EngineConfig(_Section):
    """What prefill and decode engines have in common. Names and meanings are vLLM's."""

    model: str | None = None
    """The mesh's, or absent: both sides must run the same weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    """Sequences of one step. Absent: 64, or 1 for a prefill service on CPUs: prompts that share a step there take as
    long as one after the other, and the first of them waits for the last."""
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of one step. Absent: 256 on CPUs, vLLM's own choice on GPUs."""
    block_size: Annotated[int, Field(ge=1)] | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    kv_cache_memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """Size of the KV cache. Absent: 1 GiB on CPUs, vLLM's own profiling on GPUs."""
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    seed: int = 0
    gpus: CpuList | None = None
    """GPUs of this service by CUDA's numbers, e.g. ``0-3``, for services that share a host: replica i has the i-th
    ``tensor_parallel_size`` of them. Absent: what CUDA_VISIBLE_DEVICES says."""
    cpus: CpuList | None = None
    """Cores of all processes of this service, as a cpuset would give them, e.g. ``0-15``. For services that share a
    host; absent: all. Threads that compute are bound within it by ``cpu_omp_threads_bind``."""
    cpu_omp_threads_bind: str | None = None
    """Cores of this engine on a CPU host, e.g. ``0-15``, or ``nobind``; as VLLM_CPU_OMP_THREADS_BIND. Absent: vLLM
    chooses."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Any other vLLM engine argument, by its Python name."""

    host: str = "127.0.0.1"
    """Address the gRPC server listens on and is reached at."""
    port: Port
    """gRPC port of replica 0; replica i listens on port + i."""
    replicas: Annotated[int, Field(ge=0)] = 1
    """How many of this service ``tokenmesh up`` starts and others expect."""
    metrics_port: Port = 0
    """HTTP port of replica 0's ``/metrics``; replica i listens on port + i. 0 picks a free one, which the service's
    status names."""
    max_queue: Annotated[int, Field(ge=1)] = 256
    """Requests accepted and not finished; more are refused with RESOURCE_EXHAUSTED."""
    kv_transfer: KvTransferConfig = KvTransferConfig()


class PrefillConfig(EngineConfig):
    """A prefill service."""

    port: Port = 9100
    credits_per_root: Annotated[int, Field(ge=1)] = 64
    """Prompts one decode root may have here at a time, so that no root can drown the others."""

    @model_validator(mode="after")
    def _producer(self) -> PrefillConfig:
        if self.kv_transfer.role == "kv_consumer":
            raise ValueError("prefill_service.kv_transfer.role must be kv_producer")
        if self.kv_transfer.transport == "none" and self.replicas:
            raise ValueError("prefill_service.kv_transfer.transport: none leaves it nothing to do; set replicas to 0")
        if self.kv_transfer.codec != "none":
            raise ValueError("prefill_service.kv_transfer.codec is set in decode_service: the owner of blocks asks")
        if not self.kv_transfer.same_weights:
            raise ValueError("prefill_service.kv_transfer.same_weights is set in decode_service: the root decides")
        return self


class GroupConfig(_Section):
    """How a decode root and its ranks work together."""

    workers: tuple[str, ...] | None = None
    """host:port of the root's decode workers, rank 1 first. Absent: those of ``decode_worker``."""
    exchange: Literal["ucx", "nccl", "local"] = "ucx"
    """How rows travel. ``ucx``: between hosts' memories. ``nccl``: between GPUs, of which every rank has its own.
    ``local``: the ranks live inside the root's own process, for tests and measurements; on a GPU they share its KV
    cache, each with a slice of its own."""
    transport: Literal["auto", "shm", "tcp", "system"] = "auto"
    """UCX transport of the rows, and with ``nccl`` of what hosts tell each other; as in kv_transfer."""
    timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """A rank that is silent for longer within a step is given up and its sequences are computed again elsewhere."""
    placement: Literal["balance", "hash"] = "balance"
    """``balance``: the longest cached prefix, then the least context tokens. ``hash``: by the id
    that the root's engine gives a request, which ends in random characters; blind to load, to compare with."""
    kv_route: Literal["direct", "via_root"] = "direct"
    """``direct``: prefill services write into the owning rank. ``via_root``: the root passes the KV on, for networks
    in which they cannot reach it."""
    kv_blocks: Annotated[int, Field(ge=1)] | None = None
    """KV blocks of the whole group, split over the ranks; what does not divide goes to the first. Absent: each rank
    holds what its own ``kv_cache_memory_bytes`` gives."""
    root_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """With ``kv_blocks``, and of ranks that share a GPU: the root's part relative to a worker's; less than 1 where
    weights crowd its memory."""


class DecodeWorkerConfig(_Section):
    """A decode worker: KV and attention, no weights. Everything about the model comes from its root."""

    host: str = "127.0.0.1"
    """Address the gRPC server listens on and is reached at."""
    port: Port = 9300
    """gRPC port of replica 0; replica i listens on port + i. The workers of one root follow each other."""
    metrics_port: Port = 0
    """HTTP port of replica 0's ``/metrics``, as for engines."""
    kv_cache_memory_bytes: Annotated[int, Field(ge=1)] = 1 << 30
    """Size of each shard's partition."""
    gpus: CpuList | None = None
    """GPUs of this service, as for engines."""
    cpus: CpuList | None = None
    """Cores of all processes of this service, as for engines."""
    cpu_omp_threads_bind: str | None = None
    """Cores on a CPU host, e.g. ``16-31``; shards are separated by ``|``. Absent: all."""
    poll_s: Annotated[float, Field(ge=0)] = 0.002
    """How long a shard polls for the next layer before it sleeps. Right where it has cores of its own; 0 where it
    shares them, since there polling takes from the others what it needs itself a moment later."""
    exchange_port: Port = 0
    """Port of the row listener of replica 0's shard 0; further shards and replicas follow. 0 picks free ones."""
    kv_transfer: KvTransferConfig = KvTransferConfig()

    @model_validator(mode="after")
    def _receives(self) -> DecodeWorkerConfig:
        if self.kv_transfer.codec != "none":
            raise ValueError("decode_worker.kv_transfer.codec is set in decode_service: the root asks")
        if not self.kv_transfer.same_weights:
            raise ValueError("decode_worker.kv_transfer.same_weights is set in decode_service: the root decides")
        return self


class DecodeConfig(EngineConfig):
    """A decode root and its group."""

    port: Port = 9200
    max_queue: Annotated[int, Field(ge=1)] = 4096
    """As for engines; as many as a gateway takes, which refuses more before an answer has begun. What does not fit a
    step waits in vLLM's queue."""
    token_parallel_size: Annotated[int, Field(ge=1, le=64)] = 2
    """Ranks that hold KV and attend, the root included. 1: the root alone, on vLLM's stock path."""
    group: GroupConfig = GroupConfig()
    remote_prefill_min_tokens: Annotated[int, Field(ge=1)] = 128
    """Prompts with fewer uncached tokens are computed on the root."""
    prefills: tuple[str, ...] | None = None
    """Prefill services to use when a request names none. Absent: those of ``prefill_service``."""

    @model_validator(mode="after")
    def _consumer(self) -> DecodeConfig:
        if self.kv_transfer.role == "kv_producer":
            raise ValueError("decode_service.kv_transfer.role must be kv_consumer")
        return self


class GatewayConfig(_Section):
    """The gateway."""

    host: str = "127.0.0.1"
    port: Port = 8000
    """REST port."""
    grpc_port: Port = 9000
    """Port of InferenceService, health, reflection and AdminService."""
    mode: Literal["unified", "prefill", "decode"] = "unified"
    """``unified``: prompts are prefilled remotely. ``decode``: decode roots do everything.
    ``prefill``: prompts are only prefilled and answered with their first token."""
    decode_roots: tuple[str, ...] | None = None
    """host:port of decode roots. Absent: those of ``decode_service``."""
    prefills: tuple[str, ...] | None = None
    """host:port of prefill services. Absent: those of ``prefill_service``."""
    api_keys: tuple[str, ...] = ()
    """Accepted Bearer keys; empty: no authentication. Health, /metrics, /version and reflection stay open."""
    admin_key: str | None = None
    """Bearer key for the live page, ObserveService and the gateway's AdminService. Absent: ``api_keys`` open them."""
    max_request_bytes: Annotated[int, Field(ge=1024)] = 8 << 20
    """Larger bodies are refused with 413."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """No request lives longer."""
    prefix_affinity_tokens: Annotated[int, Field(ge=0)] = 256
    """Prompts that share this many leading tokens prefer the same root, unless it is busier than the others."""
    local_prefill_penalty: Annotated[float, Field(ge=0)] = 1.5
    """A prompt is computed on its decode root when the best prefill service has more than this many times as much
    prefill work queued as the root would have: 1 balances the two, more spares decoding. 0: never, however long the
    queues."""
    tool_call_parser: str | None = "hermes"
    """vLLM tool parser; absent: no automatic tool calls."""
    reasoning_parser: str | None = None
    """vLLM reasoning parser; decode roots use it too, and constrain structured answers only after thinking."""
    chat_template: str | None = None
    server_args: dict[str, Any] = Field(default_factory=dict)
    """Any other argument that vLLM's OpenAI application reads, by its Python name, e.g. ``allowed_origins``. TLS is for
    what stands in front of the gateway."""


class LogConfig(_Section):
    """Logs go to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"
    prompts: bool = False
    """The gateway logs what its REST clients send, texts and tokens. Otherwise no service logs any of it."""


class TelemetryConfig(_Section):
    """Spans. They go to the gateway, and to any collector that the standard OTEL_* variables name."""

    traces: Literal["auto", "on", "off"] = "auto"
    """``auto``: on if OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set."""
    kept_traces: Annotated[int, Field(ge=0)] = 500
    """Requests whose spans the gateway keeps, for its page and ``tokenmesh trace``; 0: none are sent there."""
    gateway: str | None = None
    """host:port of the gateway that the others send spans to. Absent: that of this file."""


class MeshConfig(BaseSettings):
    """A whole mesh."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="TOKENMESH_",
        env_nested_delimiter="__",
        protected_namespaces=(),
    )

    model: str = EMBEDDED_MODEL
    """``smollm2-135m-instruct`` (ships with the package), a local Hugging Face folder, or a hub name."""
    served_model_name: str | None = None
    """Name that clients use. Absent: the model's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Longest sequence. Absent: what the model says."""
    gateway: GatewayConfig = GatewayConfig()
    prefill_service: PrefillConfig = PrefillConfig()
    decode_service: DecodeConfig = DecodeConfig()
    decode_worker: DecodeWorkerConfig = DecodeWorkerConfig()
    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file, which arrives as init arguments."""
        return env_settings, init_settings

    @field_validator("model")
    @classmethod
    def _model_given(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty")
        return value

    @model_validator(mode="after")
    def _one_model(self) -> MeshConfig:
        for name in ("prefill_service", "decode_service"):
            other = getattr(self, name).model
            if other is not None and other != self.model:
                raise ValueError(f"{name}.model is {other!r}, but the mesh serves {self.model!r}")
        return self

    @model_validator(mode="after")
    def _all_receive(self) -> MeshConfig:
        transports = self.decode_service.kv_transfer.transport, self.decode_worker.kv_transfer.transport
        if self.workers_per_root and transports[1] == "none" != transports[0]:
            raise ValueError(
                "decode_worker.kv_transfer.transport is none, but decode_service has KV moved to its ranks; set both"
            )
        return self

    @property
    def model_name(self) -> str:
        """Name that clients use."""
        return self.served_model_name or self.model

    def prefill_addresses(self) -> tuple[str, ...]:
        """host:port of every prefill replica of this file."""
        return _addresses(self.prefill_service)

    def decode_addresses(self) -> tuple[str, ...]:
        """host:port of every decode root of this file."""
        return _addresses(self.decode_service)

    @property
    def workers_per_root(self) -> int:
        """Decode workers that each root of this file expects ``tokenmesh up`` to start."""
        group = self.decode_service.group
        if group.exchange == "local" or group.workers is not None:
            return 0
        return self.decode_service.token_parallel_size - 1

    def worker_addresses(self, root: int) -> tuple[str, ...]:
        """host:port of the decode workers of a root, rank 1 first."""
        group, count = self.decode_service.group, self.workers_per_root
        if group.workers is not None:
            return group.workers
        worker = self.decode_worker
        return tuple(f"{worker.host}:{worker.port + root * count + i}" for i in range(count))


def _addresses(section: EngineConfig) -> tuple[str, ...]:
    return tuple(f"{section.host}:{section.port + i}" for i in range(section.replicas))
