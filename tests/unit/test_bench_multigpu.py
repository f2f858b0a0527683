"""What token parallelism over GPUs is predicted to take."""

from __future__ import annotations

import pytest

from benchmarks.gpu import BLOCK, TOKENS
from benchmarks.multigpu import SHORT, Measured

EACH = -(-(4096 + TOKENS + 2) // BLOCK)
"""Blocks of a sequence of 4,096 tokens."""


def measured(blocks: list[int], steps: dict[str, list[float]] | None = None) -> Measured:
    return Measured("8b", "one", blocks, steps or {})


@pytest.mark.parametrize(
    ("rooms", "batch", "fullest"),
    [
        ((9, 9, 9, 9), 16, 4),
        ((9, 9, 9), 16, 6),
        # The root holds two; fourteen are left to three others.
        ((2, 9, 9, 9), 16, 5),
        ((0, 16), 16, 16),
    ],
)
def test_sequences_are_spread_as_ranks_hold_them(rooms: tuple[int, ...], batch: int, fullest: int) -> None:
    assert measured([room * EACH + 1 for room in rooms]).fullest(batch, 4096) == fullest


def test_attention_follows_from_the_nearest_load_that_fits() -> None:
    steps = {
        f"16x{SHORT}": [0.007],
        f"64x{SHORT}": [0.008],
        "16x4096": [0.009, 0.0095, 0.02],
        "64x4096": [0.018],
        "64x12288": [],
    }
    one = measured([1], steps)
    # (1) The load itself; its median counts.
    assert one.attention(16, 4096) == pytest.approx(0.0025)
    # (2) One that does not fit, from the largest that does, in proportion to tokens.
    assert one.attention(64, 12288) == pytest.approx(0.010 * (12288 - SHORT) / (4096 - SHORT))
    assert one.attention(20, 4096) == pytest.approx(0.0025 * 20 / 16)
    # (3) Short loads say nothing.
    assert measured([1], {f"16x{SHORT}": [0.007], "16x4096": []}).attention(16, 4096) is None
