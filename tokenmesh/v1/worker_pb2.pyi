from tokenmesh.v1 import kv_pb2 as _kv_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("decode_root_id", "geometry", "rank", "blocks")
    DECODE_ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    decode_root_id: str
    geometry: _kv_pb2.BlockGeometry
    rank: int
    blocks: int
    def __init__(self, decode_root_id: _Optional[str] = ..., geometry: _Optional[_Union[_kv_pb2.BlockGeometry, _Mapping]] = ..., rank: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("blocks", "shard")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    shard: _kv_pb2.KvShard
    def __init__(self, blocks: _Optional[int] = ..., shard: _Optional[_Union[_kv_pb2.KvShard, _Mapping]] = ...) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("decode_root_id",)
    DECODE_ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    decode_root_id: str
    def __init__(self, decode_root_id: _Optional[str] = ...) -> None: ...

class DetachResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
