"""Errors that cross services: a canonical gRPC code and a stable reason, with details a program can read."""

from __future__ import annotations

import enum
from typing import NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "tokenmesh"

MOST_DEATHS = 2
"""Services that may die with a request before it is given up: it may be what they die of."""

MAX_TEXT_BYTES = 1024
"""Longer texts are cut. A message travels twice, escaped to three times its size and in base 64, and gRPC turns an
error whose trailers exceed 8 KiB into another one."""


class Reason(enum.StrEnum):
    """Every reason a call may be refused or fail with. Stable: clients switch on these."""

    EMPTY_PROMPT = "EMPTY_PROMPT"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    TOKEN_OUT_OF_VOCABULARY = "TOKEN_OUT_OF_VOCABULARY"
    BAD_SAMPLING_PARAMS = "BAD_SAMPLING_PARAMS"
    BAD_TARGET = "BAD_TARGET"
    BAD_REQUEST = "BAD_REQUEST"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    DUPLICATE_REQUEST = "DUPLICATE_REQUEST"
    GEOMETRY_MISMATCH = "GEOMETRY_MISMATCH"
    QUEUE_FULL = "QUEUE_FULL"
    NO_CREDIT = "NO_CREDIT"
    DRAINING = "DRAINING"
    ALREADY_ATTACHED = "ALREADY_ATTACHED"
    NOT_ATTACHED = "NOT_ATTACHED"
    RANK_UNREACHABLE = "RANK_UNREACHABLE"
    NOT_ENOUGH_MEMORY = "NOT_ENOUGH_MEMORY"
    UNSUPPORTED_ATTENTION = "UNSUPPORTED_ATTENTION"
    BUSY = "BUSY"
    ENGINE_DEAD = "ENGINE_DEAD"
    KV_OWNER_UNREACHABLE = "KV_OWNER_UNREACHABLE"
    KV_TRANSFER_FAILED = "KV_TRANSFER_FAILED"
    NO_DECODE_ROOT = "NO_DECODE_ROOT"
    UNKNOWN_REQUEST = "UNKNOWN_REQUEST"
    BAD_API_KEY = "BAD_API_KEY"
    DEADLINE_MISSING = "DEADLINE_MISSING"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"


class MeshError(Exception):
    """A refusal or failure that the caller is told about as it is."""

    def __init__(self, code: grpc.StatusCode, reason: Reason, message: str, /, **metadata: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = metadata

    def to_status(self) -> status_pb2.Status:
        """As google.rpc.Status with one ErrorInfo."""
        detail = any_pb2.Any()
        metadata = {key: _cut(value) for key, value in self.metadata.items()}
        detail.Pack(error_details_pb2.ErrorInfo(reason=self.reason.value, domain=DOMAIN, metadata=metadata))
        code = code_pb2.Code.Value(self.code.name if self.code.name != "OK" else "INTERNAL")
        return status_pb2.Status(code=code, message=_cut(self.message), details=[detail])

    @property
    def fatal(self) -> bool:
        """The peer has died with the call, perhaps of what it was asked. So not everybody should be asked the same."""
        # Those of gRPC's that say that nothing was sent.
        unsent = any(text in self.message for text in ("failed to connect", "resolving", "resolution failed"))
        lost = self.reason is Reason.INTERNAL and not unsent
        return self.code is grpc.StatusCode.UNAVAILABLE and (lost or self.reason is Reason.ENGINE_DEAD)

    @classmethod
    def from_rpc(cls, error: grpc.aio.AioRpcError) -> MeshError:
        """What a peer answered. Without an ErrorInfo of ours (peer down, deadline) the code decides the reason."""
        info = _our_info(error)
        if info is not None:
            return cls(error.code(), Reason(info.reason), error.details() or "", **dict(info.metadata))
        reason = Reason.DEADLINE_EXCEEDED if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else Reason.INTERNAL
        return cls(error.code(), reason, error.details() or error.code().name)


def _cut(text: str) -> str:
    # What is quoted from a client's JSON may have half characters in it, which no message can hold.
    raw = text.encode(errors="replace")
    return raw.decode() if len(raw) <= MAX_TEXT_BYTES else raw[:MAX_TEXT_BYTES].decode(errors="ignore") + "…"


def _our_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo | None:
    """The ErrorInfo of ours that a status carries, if it can be believed and this version knows its reason."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        for detail in status.details if status is not None else ():
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
                return info
    except (ValueError, DecodeError):
        # They contradict the code, or are no message at all: somebody on the way has touched them.
        return None
    return None


def invalid(reason: Reason, message: str, **metadata: str) -> MeshError:
    """INVALID_ARGUMENT; put the offending field into `param`."""
    return MeshError(grpc.StatusCode.INVALID_ARGUMENT, reason, message, **metadata)


def unavailable(reason: Reason, message: str) -> MeshError:
    """UNAVAILABLE: try again, perhaps elsewhere."""
    return MeshError(grpc.StatusCode.UNAVAILABLE, reason, message)


async def abort(context: grpc.aio.ServicerContext[object, object], error: MeshError) -> NoReturn:
    """Ends an RPC with a rich status."""
    status = rpc_status.to_status(error.to_status())
    context.set_trailing_metadata(status.trailing_metadata)
    await context.abort(status.code, status.details)
    raise AssertionError("abort returns never")
