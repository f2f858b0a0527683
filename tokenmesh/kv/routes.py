"""Which heads go where, between a sender and an owner of different tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmesh.kv.codecs import NONE, check_codec
from tokenmesh.kv.geometry import BlockGeometry, GeometryMismatchError


@dataclass(frozen=True)
class Route:
    """Adjacent heads that one sender shard has for one owner shard."""

    owner: int
    """The owner's shard."""
    source: int
    """Place of the first in the sender's shard."""
    target: int
    """Place of the first in the owner's shard."""
    heads: int


def shard_heads(total: int, shards: int, shard: int) -> range:
    """The model's KV heads that a shard holds; with more shards than heads, each head is held by several.

    Raises GeometryMismatchError if they do not divide.
    """
    if shards <= total and total % shards == 0:
        size = total // shards
        return range(shard * size, (shard + 1) * size)
    if shards > total and shards % total == 0:
        head = shard // (shards // total)
        return range(head, head + 1)
    raise GeometryMismatchError(f"{total} KV heads do not divide over {shards} shards")


def plan_routes(total: int, senders: int, owners: int) -> list[list[Route]]:
    """For each sender shard the routes that together bring every owner shard each of its heads exactly once.

    `total` counts the model's KV heads. Where several sender shards hold the same head, they share its owners.
    Raises GeometryMismatchError.
    """
    sender_copies, owner_copies = max(1, senders // total), max(1, owners // total)
    routes: list[list[Route]] = [[] for _ in range(senders)]
    for owner in range(owners):
        wanted = shard_heads(total, owners, owner)
        for sender in range(senders):
            held = shard_heads(total, senders, sender)
            first, stop = max(held.start, wanted.start), min(held.stop, wanted.stop)
            if first < stop and sender % sender_copies == owner % owner_copies % sender_copies:
                routes[sender].append(Route(owner, first - held.start, first - wanted.start, stop - first))
    return routes


def check_routes(
    total: int, mine: BlockGeometry, senders: int, theirs: BlockGeometry, owners: int, codec: str = NONE
) -> list[list[Route]]:
    """`plan_routes` for blocks of these geometries. Raises GeometryMismatchError if they cannot be exchanged so."""
    check_codec(codec, mine, theirs)
    routes = plan_routes(total, senders, owners)
    for geometry, shards, side in ((mine, senders, "here"), (theirs, owners, "at the owner")):
        heads = len(shard_heads(total, shards, 0))
        if geometry.kv_heads != heads:
            raise GeometryMismatchError(f"a shard has {geometry.kv_heads} KV heads {side}, not {heads} of {total}")
    cut = any(route.heads != mine.kv_heads or route.heads != theirs.kv_heads for way in routes for route in way)
    if cut and not mine.by_head:
        raise GeometryMismatchError(
            f"KV heads cannot be spread over {owners} shards from {senders}: packing {mine.packing!r} does not keep"
            " the heads of a block apart"
        )
    return routes
