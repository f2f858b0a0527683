"""What the service tells every engine worker about a rank that joins."""

from __future__ import annotations

import msgspec


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
