"""Who a piece of work is done for: request id and W3C trace context, carried through every hop.

Bound to the current task, so that log lines and outgoing calls pick it up without being handed it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import structlog

REQUEST_ID = "x-request-id"
TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

MAX_ID_CHARS = 256
"""All headers of a call share 8 KiB."""

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
"""What gRPC and HTTP both carry unchanged: printable ASCII, no space at either end."""


def valid_request_id(value: str) -> bool:
    """Whether every hop can carry an id."""
    return len(value) <= MAX_ID_CHARS and _VALUE.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class WorkContext:
    """Request id and trace context of the work at hand."""

    request_id: str
    traceparent: str
    tracestate: str = ""
    has_parent: bool = True
    """Whether `traceparent` names a span of somebody's; if not, it was drawn here, for its trace id alone."""

    @property
    def trace_id(self) -> str:
        """The 32 hex digits that all hops share."""
        return self.traceparent.split("-")[1]

    def to_metadata(self) -> list[tuple[str, str]]:
        """As gRPC metadata or HTTP headers."""
        pairs = [(REQUEST_ID, self.request_id), (TRACEPARENT, self.traceparent)]
        return [*pairs, (TRACESTATE, self.tracestate)] if self.tracestate else pairs

    @classmethod
    def from_headers(cls, headers: Mapping[str, str], request_id: str = "") -> WorkContext:
        """From lower-case header names; what is absent or malformed is made anew, as W3C asks."""
        parent = headers.get(TRACEPARENT, "")
        valid = _TRACEPARENT.fullmatch(parent) is not None
        state = headers.get(TRACESTATE, "") if valid else ""
        ids = (request_id, headers.get(REQUEST_ID, ""))
        return cls(
            request_id=next(filter(valid_request_id, ids), None) or secrets.token_hex(16),
            traceparent=parent if valid else f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
            # W3C lets a trace state of more than 512 characters be dropped.
            tracestate=state if len(state) <= 512 and _VALUE.fullmatch(state) else "",
            has_parent=valid,
        )


_current: ContextVar[WorkContext | None] = ContextVar("tokenmesh_work", default=None)


def current() -> WorkContext | None:
    """The work that the current task does, if it is a request's."""
    return _current.get()


@contextmanager
def bind(work: WorkContext) -> Iterator[WorkContext]:
    """Makes `work` current, for calls and log lines, until the block ends. Not to be held across a yield."""
    token = _current.set(work)
    with structlog.contextvars.bound_contextvars(request_id=work.request_id, trace_id=work.trace_id):
        try:
            yield work
        finally:
            _current.reset(token)


def adopt(work: WorkContext) -> None:
    """Makes `work` current for the rest of this task: for generators, whose end may come in another context."""
    _current.set(work)
    structlog.contextvars.bind_contextvars(request_id=work.request_id, trace_id=work.trace_id)


def outgoing_metadata() -> list[tuple[str, str]]:
    """gRPC metadata for a call made on behalf of the current work."""
    work = current()
    return work.to_metadata() if work is not None else []
