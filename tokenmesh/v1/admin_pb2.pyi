from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_GATEWAY: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE_ROOT: _ClassVar[Role]
    ROLE_DECODE_WORKER: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_GATEWAY: Role
ROLE_PREFILL: Role
ROLE_DECODE_ROOT: Role
ROLE_DECODE_WORKER: Role

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("role", "instance_id", "version", "uptime_seconds", "ready", "running", "waiting", "blocks_total", "blocks_free", "kv_transport", "kv_bytes", "kv_transfers", "kv_open", "counters", "peers", "kv_seconds", "ranks", "group", "metrics_port", "draining")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    KV_OPEN_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    KV_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    METRICS_PORT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    role: Role
    instance_id: str
    version: str
    uptime_seconds: float
    ready: bool
    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    kv_transport: str
    kv_bytes: int
    kv_transfers: int
    kv_open: int
    counters: _containers.ScalarMap[str, int]
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    kv_seconds: float
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    group: GroupStatus
    metrics_port: int
    draining: bool
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., instance_id: _Optional[str] = ..., version: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., ready: _Optional[bool] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., blocks_total: _Optional[int] = ..., blocks_free: _Optional[int] = ..., kv_transport: _Optional[str] = ..., kv_bytes: _Optional[int] = ..., kv_transfers: _Optional[int] = ..., kv_open: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., kv_seconds: _Optional[float] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., group: _Optional[_Union[GroupStatus, _Mapping]] = ..., metrics_port: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("rank", "address", "attached", "blocks_total", "blocks_free", "context_tokens", "sequences", "step_share", "exchange_transport", "error")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    STEP_SHARE_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    rank: int
    address: str
    attached: bool
    blocks_total: int
    blocks_free: int
    context_tokens: int
    sequences: int
    step_share: float
    exchange_transport: str
    error: str
    def __init__(self, rank: _Optional[int] = ..., address: _Optional[str] = ..., attached: _Optional[bool] = ..., blocks_total: _Optional[int] = ..., blocks_free: _Optional[int] = ..., context_tokens: _Optional[int] = ..., sequences: _Optional[int] = ..., step_share: _Optional[float] = ..., exchange_transport: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("steps", "speedup", "efficiency", "imbalance", "exchange_us_p50", "exchange_us_p99", "detached", "recomputed")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SPEEDUP_FIELD_NUMBER: _ClassVar[int]
    EFFICIENCY_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_US_P50_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_US_P99_FIELD_NUMBER: _ClassVar[int]
    DETACHED_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    steps: int
    speedup: float
    efficiency: float
    imbalance: float
    exchange_us_p50: float
    exchange_us_p99: float
    detached: int
    recomputed: int
    def __init__(self, steps: _Optional[int] = ..., speedup: _Optional[float] = ..., efficiency: _Optional[float] = ..., imbalance: _Optional[float] = ..., exchange_us_p50: _Optional[float] = ..., exchange_us_p99: _Optional[float] = ..., detached: _Optional[int] = ..., recomputed: _Optional[int] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("role", "address", "ready")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    role: Role
    address: str
    ready: bool
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., ready: _Optional[bool] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("remaining",)
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    remaining: int
    def __init__(self, remaining: _Optional[int] = ...) -> None: ...

class ResetPrefixCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResetPrefixCacheResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
