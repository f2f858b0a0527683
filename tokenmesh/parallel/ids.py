"""Block ids that say who owns the block.

The scheduler's ids give each rank a fixed stride, so a block table alone tells which rank a sequence lives on, and
nothing else has to be passed along. Ids of rank 0 are its local ids.
"""

from __future__ import annotations

from collections.abc import Iterable

STRIDE = 1 << 20
"""Ids per rank. Block tables are int32, which leaves room for 2,047 ranks of a million blocks."""

MAX_RANKS = (1 << 31) // STRIDE - 1


def rank_of(block_id: int) -> int:
    """The rank that owns a block."""
    return block_id // STRIDE


def local_id(block_id: int) -> int:
    """The block's place in its owner's memory."""
    return block_id % STRIDE


def split_owner(block_ids: Iterable[int]) -> tuple[int, list[int]]:
    """(rank, local ids) of the blocks of one sequence.

    Raises ValueError if they are none or have several owners: a sequence lives wholly on one rank.
    """
    ids = list(block_ids)
    owners = {rank_of(i) for i in ids}
    if len(owners) != 1:
        raise ValueError(f"the blocks of one sequence have owners {sorted(owners)}")
    return owners.pop(), [local_id(i) for i in ids]
