from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvCodec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_CODEC_UNSPECIFIED: _ClassVar[KvCodec]
    KV_CODEC_NONE: _ClassVar[KvCodec]
    KV_CODEC_LOSSLESS: _ClassVar[KvCodec]
    KV_CODEC_BF16: _ClassVar[KvCodec]
    KV_CODEC_FP16: _ClassVar[KvCodec]
    KV_CODEC_FP8: _ClassVar[KvCodec]
KV_CODEC_UNSPECIFIED: KvCodec
KV_CODEC_NONE: KvCodec
KV_CODEC_LOSSLESS: KvCodec
KV_CODEC_BF16: KvCodec
KV_CODEC_FP16: KvCodec
KV_CODEC_FP8: KvCodec

class BlockGeometry(_message.Message):
    __slots__ = ("layers", "kv_heads", "head_size", "block_size", "dtype", "block_bytes", "packing", "weights")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PACKING_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: str
    block_bytes: int
    packing: str
    weights: str
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_size: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ..., block_bytes: _Optional[int] = ..., packing: _Optional[str] = ..., weights: _Optional[str] = ...) -> None: ...

class KvShard(_message.Message):
    __slots__ = ("host", "port")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class KvTarget(_message.Message):
    __slots__ = ("transfer_id", "shards", "geometry", "start_token", "block_ids", "codec")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    START_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    shards: _containers.RepeatedCompositeFieldContainer[KvShard]
    geometry: BlockGeometry
    start_token: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    codec: KvCodec
    def __init__(self, transfer_id: _Optional[bytes] = ..., shards: _Optional[_Iterable[_Union[KvShard, _Mapping]]] = ..., geometry: _Optional[_Union[BlockGeometry, _Mapping]] = ..., start_token: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., codec: _Optional[_Union[KvCodec, str]] = ...) -> None: ...

class KvReceipt(_message.Message):
    __slots__ = ("bytes", "block_layers", "seconds", "transport", "exposed_seconds")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_LAYERS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    block_layers: int
    seconds: float
    transport: str
    exposed_seconds: float
    def __init__(self, bytes: _Optional[int] = ..., block_layers: _Optional[int] = ..., seconds: _Optional[float] = ..., transport: _Optional[str] = ..., exposed_seconds: _Optional[float] = ...) -> None: ...
