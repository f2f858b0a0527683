"""What the service tells every engine worker about a rank that joins."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import structlog

log = structlog.get_logger()


class JoinRank(msgspec.Struct, frozen=True):
    """How an engine worker reaches a rank; the argument of `join_rank`."""

    rank: int
    epoch: int
    shards: list[tuple[str, int]]
    """(host, port) of the exchange listener of each tensor-parallel shard; empty: a rank inside this process."""
    token: bytes
    """What those listeners want to see."""
    transport: str
    deadline_s: float
    """A rank that is silent for longer within a step is lost."""
    blocks: int


def joined(connect: Callable[[], str]) -> tuple[str, str]:
    """What an engine worker answers: the transport that `connect` returns, or why there is none; the other is empty.

    Nothing is raised. vLLM's executor gives up at the first worker that raises, and takes what the others answer for
    the results of the next step, of which the engine dies.
    """
    try:
        return connect(), ""
    except Exception as error:  # noqa: BLE001 - whatever it is, the service is told and tries again
        log.info("rank not taken in", error=str(error))
        return "", str(error).strip() or type(error).__name__
