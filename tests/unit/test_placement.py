"""Which rank gets what: shares of the blocks, and sequences."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmesh.parallel.ids import MAX_RANKS, STRIDE, local_id, rank_of, split_owner
from tokenmesh.parallel.partition import split_blocks
from tokenmesh.parallel.placement import TOLERANCE, Policy, RankView, place

# Shares.


@given(st.integers(0, 10_000), st.integers(1, 16))
def test_even_shares(total: int, ranks: int) -> None:
    if total < ranks:
        with pytest.raises(ValueError, match="too few"):
            split_blocks(total, ranks)
        return
    shares = split_blocks(total, ranks)
    assert len(shares) == ranks
    assert sum(shares) == total
    # What does not divide goes to the first ranks, one each.
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[-1] == (1 if total % ranks else 0)


@given(st.integers(100, 10_000), st.integers(2, 8), st.floats(0.1, 0.99))
def test_a_root_with_less(total: int, ranks: int, root_share: float) -> None:
    shares = split_blocks(total, ranks, root_share)
    assert sum(shares) == total
    root, *workers = shares
    # (1) The root has its part of what a worker has, to within the blocks that rounding costs.
    assert root <= workers[0]
    assert abs(root - root_share * total / (root_share + ranks - 1)) <= 1
    # (2) The workers share evenly, the remainder going to the first.
    assert workers == sorted(workers, reverse=True)
    assert workers[0] - workers[-1] <= 1


def test_shares_of_known_size() -> None:
    assert split_blocks(10, 1) == [10]
    assert split_blocks(10, 3) == [4, 3, 3]
    assert split_blocks(11, 3) == [4, 4, 3]
    assert split_blocks(100, 3, 0.5) == [20, 40, 40]
    assert split_blocks(101, 3, 0.5) == [20, 41, 40]


@pytest.mark.parametrize(("ranks", "root_share"), [(0, 1.0), (-1, 1.0), (2, 0.0), (2, -0.5), (2, 1.5)])
def test_shares_that_make_no_sense(ranks: int, root_share: float) -> None:
    with pytest.raises(ValueError, match="cannot split"):
        split_blocks(100, ranks, root_share)


def test_a_rank_without_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="too few"):
        split_blocks(3, 4)
    # Also if it is the root, whose part comes to less than a block.
    with pytest.raises(ValueError, match="too few"):
        split_blocks(100, 3, 0.01)


@given(st.integers(1, 10_000), st.floats(0.01, 1))
def test_a_root_alone_has_everything(total: int, root_share: float) -> None:
    assert split_blocks(total, 1, root_share) == [total]


# Places.


class Ranks:
    """As much of a ledger as placing needs."""

    def __init__(self, count: int, policy: Policy = "balance") -> None:
        self.context = [0] * count
        self.policy: Policy = policy

    def views(self, **of_all: bool) -> list[RankView]:
        flags = {"fits": True, "has_room": True, **of_all}
        return [RankView(rank, context, 0, **flags) for rank, context in enumerate(self.context)]

    def add(self, tokens: int, request_id: str = "r") -> int:
        rank = place(self.views(), tokens, self.policy, request_id)
        self.context[rank] += tokens
        return rank

    @property
    def imbalance(self) -> float:
        return max(self.context) * len(self.context) / sum(self.context)


LONG, SHORT = 8 * [2000], 24 * [100]


def orders() -> Iterable[list[int]]:
    """8 long and 24 short prompts: sorted both ways, interleaved, shuffled."""
    yield LONG + SHORT
    yield SHORT + LONG
    yield [tokens for long in LONG for tokens in (long, 100, 100, 100)]
    for seed in range(200):
        order = LONG + SHORT
        random.Random(seed).shuffle(order)
        yield order


def worst(count: int, orders: Iterable[list[int]], growth: int = 0) -> float:
    """The largest imbalance that is left once all have come, one a step; all grow by `growth` tokens a step."""
    found = 0.0
    for order in orders:
        ranks, sequences = Ranks(count), [0] * count
        for tokens in order:
            sequences[ranks.add(tokens)] += 1
            ranks.context = [c + growth * n for c, n in zip(ranks.context, sequences, strict=True)]
        assert all(sequences)
        found = max(found, ranks.imbalance)
    return found


# Over 4 ranks no policy that places what comes when it comes can promise 1.2: if 3 long prompts and then 20 short ones
# have come, the 5 long ones that follow leave one rank with 3. A third more is what placing by least context promises.
@pytest.mark.parametrize(("count", "bound"), [(2, 1.2), (3, 1.2), (4, 1.33)])
def test_a_mixed_load_is_balanced_in_any_order(count: int, bound: float) -> None:
    # (1) All at once.
    assert worst(count, orders()) <= bound
    # (2) One a step, while those who are there decode.
    assert worst(count, orders(), growth=1) <= bound


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("growth", [0, 1])
def test_a_sorted_or_interleaved_load_is_balanced(count: int, growth: int) -> None:
    assert worst(count, itertools.islice(orders(), 3), growth) <= 1.2


def view(rank: int, context: int = 0, prefix: int = 0, fits: bool = True, has_room: bool = True) -> RankView:
    return RankView(rank, context, prefix, fits, has_room)


def balanced(views: list[RankView], tokens: int) -> int:
    return place(views, tokens, "balance", "r")


def test_ties_go_to_the_first_rank() -> None:
    assert balanced([view(0), view(1), view(2)], 100) == 0
    assert balanced([view(0, 5), view(1, 3), view(2, 3)], 100) == 1


def test_a_cached_prefix_decides_among_ranks_that_are_short_enough() -> None:
    # (1) Its rank is a little longer: worth it.
    assert balanced([view(0, 1000), view(1, 1050, prefix=512)], 500) == 1
    # (2) The longest prefix wins.
    assert balanced([view(0, 1000), view(1, 1050, prefix=512), view(2, 1080, prefix=768)], 500) == 2
    # (3) As long: the one with less.
    assert balanced([view(0, 1040, prefix=512), view(1, 1000, prefix=512)], 500) == 1


def test_a_cached_prefix_costs_at_most_the_tolerance() -> None:
    tokens, best = 500, 1500
    bound = int(best * (1 + TOLERANCE)) - tokens
    assert balanced([view(0, 1000), view(1, bound, prefix=512)], tokens) == 1
    assert balanced([view(0, 1000), view(1, bound + 1, prefix=512)], tokens) == 0
    # Where a third rank is the longest whoever gets it, nothing is lost below that.
    assert balanced([view(0, 1000), view(1, 4000, prefix=512), view(2, 5000)], tokens) == 1


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 2000), st.booleans(), st.booleans()), min_size=1),
    st.integers(1, 4000),
)
def test_what_a_balanced_place_is(ranks: list[tuple[int, int, bool, bool]], tokens: int) -> None:
    views = [view(rank, *values) for rank, values in enumerate(ranks)]
    chosen = views[balanced(views, tokens)]
    # (1) Fitting goes before room, and both before everything else.
    candidates = [v for v in views if v.fits] or views
    candidates = [v for v in candidates if v.has_room] or candidates
    assert chosen in candidates

    # (2) No candidate would keep the longest rank shorter by more than the tolerance.
    def longest(with_it: RankView) -> int:
        return max(v.context_tokens + (tokens if v is with_it else 0) for v in views)

    assert longest(chosen) <= min(map(longest, candidates)) * (1 + TOLERANCE)
    # (3) None that keeps it as short has a longer prefix.
    assert all(v.prefix_tokens <= chosen.prefix_tokens for v in candidates if longest(v) <= longest(chosen))


def test_ranks_without_room_and_ranks_that_never_fit() -> None:
    # (1) A rank that can never hold it is no rank; one without room is the last resort.
    assert balanced([view(0, fits=False), view(1, 9000)], 100) == 1
    assert balanced([view(0, has_room=False), view(1, 9000)], 100) == 1
    # (2) Without room anywhere it waits where it fits, even if there is room where it does not.
    assert balanced([view(0, fits=False), view(1, 9000, has_room=False)], 100) == 1
    # (3) If it fits nowhere, somebody must still refuse it.
    assert balanced([view(0, 10, fits=False), view(1, 5, fits=False)], 100) == 1
    with pytest.raises(ValueError, match="no ranks"):
        balanced([], 100)


# By hash.


def hashed(ids: Iterable[str], views: list[RankView]) -> list[int]:
    return [place(views, 100, "hash", name) for name in ids]


def test_a_hash_looks_at_the_id_and_at_what_can_ever_fit() -> None:
    ids = [f"request-{i}" for i in range(400)]
    ranks = hashed(ids, [view(0), view(1), view(2)])
    # (1) All ranks are used, and about alike.
    assert all(80 < ranks.count(rank) < 190 for rank in range(3))
    # (2) Neither load, nor prefix, nor room move anything.
    assert hashed(ids, [view(0, 9000), view(1, prefix=64), view(2, has_room=False)]) == ranks
    # (3) Ranks that never fit are not counted.
    assert set(hashed(ids, [view(0), view(1, fits=False), view(2)])) == {0, 2}


def test_a_hash_is_the_same_in_every_process() -> None:
    ids = [f"request-{i}" for i in range(64)]
    here = hashed(ids, [view(rank) for rank in range(4)])
    program = (
        "from tokenmesh.parallel.placement import RankView, place\n"
        "views = [RankView(r, 0, 0, True, True) for r in range(4)]\n"
        "print([place(views, 100, 'hash', f'request-{i}') for i in range(64)])"
    )
    for seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert there.stdout.strip() == str(here)


# Ids.


@given(st.integers(0, MAX_RANKS - 1), st.lists(st.integers(0, STRIDE - 1), min_size=1))
def test_ids_name_their_owner(rank: int, local: list[int]) -> None:
    ids = [rank * STRIDE + block for block in local]
    assert split_owner(ids) == (rank, local)
    assert [(rank_of(i), local_id(i)) for i in ids] == [(rank, block) for block in local]
    # They fit into a block table.
    assert max(ids) < 1 << 31


def test_a_sequence_has_one_owner() -> None:
    assert split_owner(iter([3, 1, 2])) == (0, [3, 1, 2])
    with pytest.raises(ValueError, match=r"owners \[0, 1\]"):
        split_owner([1, STRIDE + 1])
    with pytest.raises(ValueError, match="owners"):
        split_owner([])
