from tokenmesh.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LayerAttention(_message.Message):
    __slots__ = ("scale", "sliding_window", "softcap")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SLIDING_WINDOW_FIELD_NUMBER: _ClassVar[int]
    SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    scale: float
    sliding_window: int
    softcap: float
    def __init__(self, scale: _Optional[float] = ..., sliding_window: _Optional[int] = ..., softcap: _Optional[float] = ...) -> None: ...

class Attention(_message.Message):
    __slots__ = ("heads", "dtype", "layers", "max_seqs", "max_tokens", "max_blocks", "kv_split")
    HEADS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_SPLIT_FIELD_NUMBER: _ClassVar[int]
    heads: int
    dtype: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerAttention]
    max_seqs: int
    max_tokens: int
    max_blocks: int
    kv_split: bool
    def __init__(self, heads: _Optional[int] = ..., dtype: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerAttention, _Mapping]]] = ..., max_seqs: _Optional[int] = ..., max_tokens: _Optional[int] = ..., max_blocks: _Optional[int] = ..., kv_split: _Optional[bool] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("decode_root_id", "geometry", "rank", "blocks", "attention", "shards")
    DECODE_ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    decode_root_id: str
    geometry: _kv_pb2.BlockGeometry
    rank: int
    blocks: int
    attention: Attention
    shards: int
    def __init__(self, decode_root_id: _Optional[str] = ..., geometry: _Optional[_Union[_kv_pb2.BlockGeometry, _Mapping]] = ..., rank: _Optional[int] = ..., blocks: _Optional[int] = ..., attention: _Optional[_Union[Attention, _Mapping]] = ..., shards: _Optional[int] = ...) -> None: ...

class RankShard(_message.Message):
    __slots__ = ("kv", "exchange")
    KV_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    kv: _kv_pb2.KvShard
    exchange: _kv_pb2.KvShard
    def __init__(self, kv: _Optional[_Union[_kv_pb2.KvShard, _Mapping]] = ..., exchange: _Optional[_Union[_kv_pb2.KvShard, _Mapping]] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("blocks", "shards", "token")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    shards: _containers.RepeatedCompositeFieldContainer[RankShard]
    token: bytes
    def __init__(self, blocks: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[RankShard, _Mapping]]] = ..., token: _Optional[bytes] = ...) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("decode_root_id",)
    DECODE_ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    decode_root_id: str
    def __init__(self, decode_root_id: _Optional[str] = ...) -> None: ...

class DetachResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerServiceDrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerServiceDrainResponse(_message.Message):
    __slots__ = ("attached",)
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    attached: bool
    def __init__(self, attached: _Optional[bool] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("decode_root_id", "rank", "blocks", "kv_bytes", "steps", "context_tokens", "attention_seconds", "exchange_transport", "draining", "kv_received_bytes", "kv_open")
    DECODE_ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    KV_RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_OPEN_FIELD_NUMBER: _ClassVar[int]
    decode_root_id: str
    rank: int
    blocks: int
    kv_bytes: int
    steps: int
    context_tokens: int
    attention_seconds: float
    exchange_transport: str
    draining: bool
    kv_received_bytes: int
    kv_open: int
    def __init__(self, decode_root_id: _Optional[str] = ..., rank: _Optional[int] = ..., blocks: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., steps: _Optional[int] = ..., context_tokens: _Optional[int] = ..., attention_seconds: _Optional[float] = ..., exchange_transport: _Optional[str] = ..., draining: _Optional[bool] = ..., kv_received_bytes: _Optional[int] = ..., kv_open: _Optional[int] = ...) -> None: ...

class ResetCacheRequest(_message.Message):
    __slots__ = ("decode_root_id",)
    DECODE_ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    decode_root_id: str
    def __init__(self, decode_root_id: _Optional[str] = ...) -> None: ...

class ResetCacheResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExpectKvRequest(_message.Message):
    __slots__ = ("decode_root_id", "transfer_id", "block_ids", "codec")
    DECODE_ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    decode_root_id: str
    transfer_id: bytes
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    codec: _kv_pb2.KvCodec
    def __init__(self, decode_root_id: _Optional[str] = ..., transfer_id: _Optional[bytes] = ..., block_ids: _Optional[_Iterable[int]] = ..., codec: _Optional[_Union[_kv_pb2.KvCodec, str]] = ...) -> None: ...

class ExpectKvResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SettleKvRequest(_message.Message):
    __slots__ = ("decode_root_id", "transfer_id")
    DECODE_ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    decode_root_id: str
    transfer_id: bytes
    def __init__(self, decode_root_id: _Optional[str] = ..., transfer_id: _Optional[bytes] = ...) -> None: ...

class SettleKvResponse(_message.Message):
    __slots__ = ("complete", "error", "receipt")
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    complete: bool
    error: str
    receipt: _kv_pb2.KvReceipt
    def __init__(self, complete: _Optional[bool] = ..., error: _Optional[str] = ..., receipt: _Optional[_Union[_kv_pb2.KvReceipt, _Mapping]] = ...) -> None: ...
