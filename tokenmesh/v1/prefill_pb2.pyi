from tokenmesh.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "target", "cache_salt", "decode_root_id", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    DECODE_ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    target: _kv_pb2.KvTarget
    cache_salt: str
    decode_root_id: str
    priority: int
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., target: _Optional[_Union[_kv_pb2.KvTarget, _Mapping]] = ..., cache_salt: _Optional[str] = ..., decode_root_id: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("cached_tokens", "first_token_id", "queue_seconds", "compute_seconds", "receipt")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    first_token_id: int
    queue_seconds: float
    compute_seconds: float
    receipt: _kv_pb2.KvReceipt
    def __init__(self, cached_tokens: _Optional[int] = ..., first_token_id: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ..., receipt: _Optional[_Union[_kv_pb2.KvReceipt, _Mapping]] = ...) -> None: ...

class ConnectOwnerRequest(_message.Message):
    __slots__ = ("shards", "geometry", "codec")
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedCompositeFieldContainer[_kv_pb2.KvShard]
    geometry: _kv_pb2.BlockGeometry
    codec: _kv_pb2.KvCodec
    def __init__(self, shards: _Optional[_Iterable[_Union[_kv_pb2.KvShard, _Mapping]]] = ..., geometry: _Optional[_Union[_kv_pb2.BlockGeometry, _Mapping]] = ..., codec: _Optional[_Union[_kv_pb2.KvCodec, str]] = ...) -> None: ...

class ConnectOwnerResponse(_message.Message):
    __slots__ = ("transport", "goodput")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_FIELD_NUMBER: _ClassVar[int]
    transport: str
    goodput: float
    def __init__(self, transport: _Optional[str] = ..., goodput: _Optional[float] = ...) -> None: ...

class GetPrefillLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPrefillLoadResponse(_message.Message):
    __slots__ = ("running", "waiting", "queued_tokens", "blocks_total", "blocks_free", "max_queue", "credits_per_root")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    CREDITS_PER_ROOT_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    queued_tokens: int
    blocks_total: int
    blocks_free: int
    max_queue: int
    credits_per_root: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., blocks_total: _Optional[int] = ..., blocks_free: _Optional[int] = ..., max_queue: _Optional[int] = ..., credits_per_root: _Optional[int] = ...) -> None: ...
