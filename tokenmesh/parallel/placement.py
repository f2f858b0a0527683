"""Which rank a sequence shall live on. Pure functions over what the ledger sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import xxhash

Policy = Literal["balance", "hash"]

TOLERANCE = 0.1
"""How much longer than need be the longest rank may get so that a prefix is reused.

A step lasts as long as its longest rank, for as long as the sequence lives; a cached prefix saves its prefill once.
"""


@dataclass(frozen=True, slots=True)
class RankView:
    """A rank as seen by the sequence that is to be placed. Sizes in tokens."""

    rank: int
    context_tokens: int
    """Tokens of the sequences that live there."""
    prefix_tokens: int
    """Leading tokens of the new sequence that its cache holds."""
    fits: bool
    """The sequence can ever live there, at its full length."""
    has_room: bool
    """Blocks for its present length are free now."""


def place(views: Sequence[RankView], tokens: int, policy: Policy, request_id: str) -> int:
    """The rank for a sequence of `tokens` tokens; the request waits if that rank has no room.

    ``balance``: of the ranks with room, those that keep the longest rank short; of these the one with the longest
    cached prefix, then the least context. ``hash``: by a stable hash of the request id, room or not.

    Raises ValueError without views.
    """
    if not views:
        raise ValueError("no ranks")
    fitting = [view for view in views if view.fits] or list(views)
    if policy == "hash":
        return fitting[xxhash.xxh3_64_intdigest(request_id.encode()) % len(fitting)].rank
    candidates = [view for view in fitting if view.has_room] or fitting

    def longest_with(chosen: RankView) -> int:
        return max(view.context_tokens + (tokens if view is chosen else 0) for view in views)

    bound = min(map(longest_with, candidates)) * (1 + TOLERANCE)
    short = [view for view in candidates if longest_with(view) <= bound]
    return min(short, key=lambda view: (-view.prefix_tokens, view.context_tokens, view.rank)).rank
