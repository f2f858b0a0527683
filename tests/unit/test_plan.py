"""Plans of steps: whatever a batch looks like, the rank sees it as it is, and only new blocks travel."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmesh.parallel.plan import HEADER_BYTES, IntArray, PlanMismatchError, PlanReader, PlanWriter, StepPlan

BLOCK, ROWS, WIDTH, BLOCKS = 4, 6, 8, 64
HEADER = struct.Struct("<IIIIII")

Row = tuple[int, int, list[int]]
"""(query length, sequence length, blocks)."""


def ints(*values: int) -> IntArray:
    return np.array(values, dtype=np.int32)


def arrays(rows: list[Row]) -> tuple[IntArray, IntArray, IntArray]:
    """A batch as vLLM has it; behind the end of a sequence its table holds whatever was there before."""
    width = max((len(blocks) for _, _, blocks in rows), default=1)
    table = np.full((len(rows), width), 12345, dtype=np.int32)
    for row, (_, _, blocks) in enumerate(rows):
        table[row, : len(blocks)] = blocks
    return ints(*(q for q, _, _ in rows)), ints(*(s for _, s, _ in rows)), table


class Pair:
    """Both ends, and the messages between them."""

    def __init__(self) -> None:
        self.writer = PlanWriter(ROWS, WIDTH, BLOCK)
        self.reader = PlanReader(ROWS, WIDTH, BLOCK, BLOCKS)
        self.body_bytes = 0

    def write(self, rows: list[Row]) -> tuple[bytes, bytes]:
        return self.writer.write(*arrays(rows))

    def read(self, header: bytes, body: bytes) -> StepPlan:
        head = np.frombuffer(header, dtype=np.uint8)
        self.body_bytes = PlanReader.body_bytes(head)
        return self.reader.read(head, np.frombuffer(body, dtype=np.uint8))

    def step(self, rows: list[Row]) -> StepPlan:
        header, body = self.write(rows)
        assert len(header) == HEADER_BYTES
        plan = self.read(header, body)
        assert self.body_bytes == len(body)
        return plan

    def snapshot(self) -> tuple[int, bytes, bytes]:
        """All that a reader knows."""
        table = self.reader._table
        return self.reader.version, table.blocks.tobytes(), table.known.tobytes()


@st.composite
def histories(draw: st.DrawFn) -> list[list[Row]]:
    """Steps over a few sequences that grow, pause, end and are preempted, in any order."""
    ids = itertools.cycle(range(BLOCKS))
    lengths: dict[int, int] = {}
    tables: dict[int, list[int]] = {}
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        batch = draw(st.lists(st.integers(0, 9), unique=True, max_size=ROWS))
        rows: list[Row] = []
        for name in batch:
            if draw(st.integers(0, 5)) == 0 or lengths.get(name, 0) >= WIDTH * BLOCK:
                # Computed again, in other blocks.
                lengths.pop(name, None)
                tables.pop(name, None)
            length = lengths.get(name, 0)
            query = draw(st.integers(1, min(WIDTH * BLOCK - length, draw(st.sampled_from((1, 1, 11, 32))))))
            length += query
            blocks = tables.setdefault(name, [])
            while len(blocks) * BLOCK < length:
                blocks.append(next(ids))
            lengths[name] = length
            rows.append((query, length, list(blocks)))
        steps.append(rows)
    return steps


@settings(max_examples=200, deadline=None)
@given(histories())
def test_a_rank_sees_every_batch_as_it_is(steps: list[list[Row]]) -> None:
    pair = Pair()
    known: list[list[int]] = [[] for _ in range(ROWS)]
    for number, rows in enumerate(steps):
        # (1) The plan is the batch, in its order.
        plan = pair.step(rows)
        assert plan.version == number + 1
        assert plan.query_lens.tolist() == [q for q, _, _ in rows]
        assert plan.seq_lens.tolist() == [s for _, s, _ in rows]
        assert plan.tokens == sum(q for q, _, _ in rows)
        assert plan.block_table.dtype == np.int32
        new = 0
        for row, (_, _, blocks) in enumerate(rows):
            assert plan.block_table[row, : len(blocks)].tolist() == blocks
            same = sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(known[row], blocks, strict=False)))
            new += len(blocks) - same
            known[row] = blocks
        # (2) Three numbers a row, and the blocks that its place did not hold before: no byte more.
        assert pair.body_bytes == 4 * (3 * len(rows) + new)
    # (3) Both ends hold the same at the end.
    assert pair.writer._table.blocks.tobytes() == pair.reader._table.blocks.tobytes()
    assert pair.writer._table.known.tobytes() == pair.reader._table.known.tobytes()


def test_decoding_costs_three_numbers_a_sequence_and_a_block_now_and_then() -> None:
    pair = Pair()
    # (1) Two prompts: all their blocks.
    pair.step([(6, 6, [10, 11]), (3, 3, [20])])
    assert pair.body_bytes == 4 * (6 + 3)
    # (2) A token each, no new block.
    pair.step([(1, 7, [10, 11]), (1, 4, [20])])
    assert pair.body_bytes == 4 * 6
    # (3) The second one begins a block.
    pair.step([(1, 8, [10, 11]), (1, 5, [20, 21])])
    assert pair.body_bytes == 4 * (6 + 1)
    # (4) The first one has gone, the second has its place: its blocks travel once more.
    pair.step([(1, 6, [20, 21])])
    assert pair.body_bytes == 4 * (3 + 2)
    # (5) Nobody.
    plan = pair.step([])
    assert pair.body_bytes == 0
    assert plan.tokens == 0


def test_a_block_in_the_middle_that_changes_travels_with_all_behind_it() -> None:
    pair = Pair()
    pair.step([(16, 16, [1, 2, 3, 4])])
    plan = pair.step([(1, 16, [1, 9, 3, 4])])
    assert pair.body_bytes == 4 * (3 + 3)
    assert plan.block_table[0].tolist() == [1, 9, 3, 4]


def test_the_version_wraps_around() -> None:
    pair = Pair()
    pair.writer.version = pair.reader.version = 0xFFFFFFFE
    assert [pair.step([(1, 1, [5])]).version for _ in range(3)] == [0xFFFFFFFF, 0, 1]


START: list[Row] = [(6, 6, [10, 11]), (3, 3, [20])]
NEXT: list[Row] = [(1, 7, [10, 11]), (2, 5, [20, 21])]


@pytest.fixture
def pair() -> Pair:
    """One step old."""
    pair = Pair()
    pair.step(START)
    return pair


def refused(pair: Pair, header: bytes, body: bytes) -> None:
    """The reader refuses, and knows afterwards what it knew before."""
    before = pair.snapshot()
    with pytest.raises(PlanMismatchError):
        pair.read(header, body)
    assert pair.snapshot() == before


def test_a_skipped_or_repeated_plan_is_refused(pair: Pair) -> None:
    # (1) Repeated.
    header, body = pair.write(NEXT)
    pair.read(header, body)
    refused(pair, header, body)
    # (2) One is lost, the next comes.
    pair.write(NEXT)
    refused(pair, *pair.write(NEXT))
    # (3) A writer that has started over.
    refused(pair, *Pair().write(START))


def test_what_is_no_plan_is_refused(pair: Pair) -> None:
    header, body = pair.write(NEXT)
    refused(pair, b"\0" + header[1:], body)
    refused(pair, bytes(HEADER_BYTES), body)


def forged(
    query: tuple[int, ...] = (1, 2),
    seq: tuple[int, ...] = (7, 5),
    first: tuple[int, ...] = (2, 1),
    ids: tuple[int, ...] = (21,),
    **fields: int,
) -> tuple[bytes, bytes]:
    """NEXT as its writer encodes it, but for what is given."""
    body = ints(*query, *seq, *first, *ids).tobytes()
    values = {"version": 2, "rows": len(query), "new": len(ids), "width": 2, **fields}
    magic = HEADER.unpack(PlanWriter(1, 1, 1).write(ints(), ints(), np.zeros((0, 1), dtype=np.int32))[0])[0]
    header = HEADER.pack(magic, values["version"], values["rows"], values["new"], values["width"], len(body))
    return header, body


def test_the_forgery_would_be_taken_if_it_were_right(pair: Pair) -> None:
    assert forged() == pair.write(NEXT)
    assert pair.read(*forged()).block_table.tolist() == [[10, 11], [20, 21]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": (BLOCKS,)},
        {"ids": (-1,)},
        {"ids": (1 << 20,)},
        {"query": (0, 2)},
        {"query": (-1, 2)},
        {"query": (8, 2)},
        {"seq": (0, 5)},
        {"seq": (7, -(2**31))},
        {"seq": (7, 2**31 - 1)},
        {"seq": (9, 5), "ids": (12, 21)},
        {"seq": (7, 9)},
        {"first": (-1, 1)},
        {"first": (2, 2), "ids": ()},
        {"first": (2, 0)},
        {"first": (3, 0)},
        {"ids": (21, 22)},
        {"ids": ()},
        {"new": 2},
        {"new": 0},
        {"rows": 1},
        {"rows": ROWS + 1},
        {"rows": 0xFFFFFFFF},
        {"width": 1},
        {"width": WIDTH + 1},
        {"width": 0xFFFFFFFF},
        {"version": 1},
        {"version": 3},
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit_is_refused(pair: Pair, wrong: dict[str, tuple[int, ...]]) -> None:
    refused(pair, *forged(**wrong))  # type: ignore[arg-type]
    # Nothing of it was applied: the right one is taken as if the wrong one had never come.
    assert pair.read(*forged()).block_table.tolist() == [[10, 11], [20, 21]]


def test_more_rows_than_the_rank_has_room_for(pair: Pair) -> None:
    many = tuple([1] * (ROWS + 1))
    refused(pair, *forged(query=many, seq=many, first=(0,) * len(many), ids=many, width=1))


def test_a_truncated_or_padded_body_is_refused(pair: Pair) -> None:
    header, body = pair.write(NEXT)
    for size in range(len(body)):
        refused(pair, header, body[:size])
    refused(pair, header, body + b"\0")
    refused(pair, header, body + b"\0" * 4)
    pair.read(header, body)
    assert pair.reader.version == pair.writer.version
