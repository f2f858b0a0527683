"""Rows of ranks that share a GPU: who has which row, in torch, against a loop that says it plainly."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmesh.engine.gpu.ranks import DeviceRanks
from tokenmesh.engine.gpu.rows import (
    PackedRows,
    SplitRows,
    pack_reference,
    place_reference,
    split_reference,
    unpack_reference,
)
from tokenmesh.parallel.ids import STRIDE
from tokenmesh.parallel.partition import local_blocks, split_blocks

BLOCK, WIDTH, MAX_ROWS = 4, 5, 8


@dataclass
class Batch:
    """A decode batch as vLLM's runner holds it."""

    table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor


def batch(ranks: int, owners: list[int], lens: list[int], seed: int) -> Batch:
    """Blocks of each sequence from its owner; what lies behind them in the table is anybody's."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 50, (len(owners), WIDTH)) + rng.integers(0, ranks, (len(owners), WIDTH)) * STRIDE
    slots = np.full(len(owners) + 3, -1, dtype=np.int64)
    for row, (owner, length) in enumerate(zip(owners, lens, strict=True)):
        used = -(-length // BLOCK)
        table[row, :used] = table[row, :used] % STRIDE + owner * STRIDE
        if length:
            slots[row] = table[row, used - 1] * BLOCK + (length - 1) % BLOCK
    return Batch(
        torch.from_numpy(table.astype(np.int32)), torch.tensor(lens, dtype=torch.int32), torch.from_numpy(slots)
    )


def check_split(ranks: int, owners: list[int], lens: list[int], made: Batch, out: SplitRows) -> None:
    """Every rank has its rows, in order, and nothing else."""
    count = len(owners)
    live = [(row, owner) for row, owner in enumerate(owners) if lens[row]]
    for rank in range(ranks):
        mine = [row for row, owner in live if owner == rank]
        if rank == 0:
            assert out.seq_lens[0, :count].tolist() == [lens[row] if row in mine else 0 for row in range(count)]
            assert out.slots[0, :count].tolist() == [
                int(made.slots[row]) if row in mine else -1 for row in range(count)
            ]
            places = dict(zip(mine, mine, strict=True))
        else:
            rest = count - len(mine)
            assert out.rows[rank - 1, :count].tolist() == mine + [-1] * rest
            assert out.seq_lens[rank, :count].tolist() == [lens[row] for row in mine] + [0] * rest
            slots = [int(made.slots[row]) - rank * STRIDE * BLOCK for row in mine]
            assert out.slots[rank, :count].tolist() == slots + [-1] * rest
            assert out.starts[rank - 1, : count + 1].tolist() == [min(i, len(mine)) for i in range(count + 1)]
            places = {row: place for place, row in enumerate(mine)}
        for row, place in places.items():
            used = -(-lens[row] // BLOCK)
            assert out.tables[rank, place, :used].tolist() == (made.table[row, :used] % STRIDE).tolist()
    # Ids that were never written are those of a block that is there.
    assert int(out.tables.max()) < 50


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 4), st.data(), st.integers(0, 99))
def test_each_rank_gets_its_rows(ranks: int, data: st.DataObject, seed: int) -> None:
    out = SplitRows(ranks, MAX_ROWS, WIDTH, BLOCK, torch.device("cpu"))
    # Steps follow each other in the same buffers, of different sizes.
    for step in range(3):
        rows = st.tuples(st.integers(0, ranks - 1), st.integers(0, BLOCK * WIDTH))
        chosen = data.draw(st.lists(rows, min_size=1, max_size=MAX_ROWS))
        owners, lens = [owner for owner, _ in chosen], [length for _, length in chosen]
        made = batch(ranks, owners, lens, seed + step)
        split_reference(made.table, made.seq_lens, made.slots, out)
        check_split(ranks, owners, lens, made, out)


def test_rows_go_out_and_their_attention_comes_back() -> None:
    # (1) Four rows, two of rank 1 and one of rank 2; q, k and v are views of one tensor, as models make them.
    out = SplitRows(3, MAX_ROWS, WIDTH, BLOCK, torch.device("cpu"))
    made = batch(3, [1, 0, 2, 1], [3, 9, 1, 20], 0)
    split_reference(made.table, made.seq_lens, made.slots, out)
    rows = out.rows[:, :4]
    qkv = torch.randn(6, (4 + 2 + 2) * 8)
    query, key, value = (part.view(6, -1, 8) for part in qkv.split([32, 16, 16], dim=-1))
    packed = PackedRows(2, MAX_ROWS, 4, 2, 8, torch.float32, torch.device("cpu"))
    pack_reference(query, key, value, rows, packed)
    # (2) Each rank has them side by side.
    for rank, places in ((0, [0, 3]), (1, [2])):
        for source, target in ((query, packed.query), (key, packed.key), (value, packed.value)):
            assert torch.equal(target[rank, : len(places)], source[places])
    # (3) What the ranks say lands in their rows; the root's stay as they were.
    packed.output[:] = torch.randn(packed.output.shape)
    output = torch.zeros(6, 4, 8)
    unpack_reference(rows, packed, output)
    assert torch.equal(output[[0, 3]], packed.output[0, :2])
    assert torch.equal(output[2], packed.output[1, 0])
    assert not output[[1, 4, 5]].any()


def test_keys_and_values_go_to_the_blocks_of_their_rank() -> None:
    # (1) Rows of three ranks whose blocks lie one behind the other, and one row without tokens.
    out = SplitRows(3, MAX_ROWS, WIDTH, BLOCK, torch.device("cpu"))
    made = batch(3, [1, 0, 2, 1, 0], [3, 9, 1, 20, 0], 0)
    split_reference(made.table, made.seq_lens, made.slots, out)
    query, key, value = (torch.randn(5, heads, 8) for heads in (4, 2, 2))
    packed = PackedRows(2, MAX_ROWS, 4, 2, 8, torch.float32, torch.device("cpu"))
    firsts = (0, 50, 100)
    cache = torch.zeros(150, 2, BLOCK, 16)
    place_reference(query, key, value, out.rows[:, :5], out.slots[:, :5], firsts, cache, packed)
    # (2) Each is where its slot says, in the part of its rank, and nothing is anywhere else.
    expected = torch.zeros_like(cache)
    for row, slot in enumerate(made.slots[:4].tolist()):
        block, token = divmod(slot, BLOCK)
        expected[firsts[block // STRIDE] + block % STRIDE, :, token] = torch.cat((key[row], value[row]), dim=1)
    assert torch.equal(cache, expected)
    # (3) Ranks other than the root have their queries, too.
    assert torch.equal(packed.query[0, :2], query[[0, 3]])
    assert torch.equal(packed.query[1, 0], query[2])


# Shares of one allocation.


@given(st.integers(8, 10_000), st.integers(2, 6), st.floats(0.0001, 1))
def test_ranks_share_an_allocation(total: int, ranks: int, root_share: float) -> None:
    blocks = local_blocks(total, ranks, root_share)
    assert sum(blocks) == total
    # Also a root with hardly a share has the block that vLLM sets aside, and one more.
    assert blocks[0] >= 2
    assert max(blocks[1:]) - min(blocks[1:]) <= 1
    if root_share == 1:
        assert [blocks[0] - 1, *blocks[1:]] == split_blocks(total - 1, ranks)


def test_spans_follow_each_other() -> None:
    ranks = DeviceRanks(3, 0.5, 4)
    assert ranks.spans(101) == [(0, 21), (21, 61), (61, 101)]
    with pytest.raises(ValueError, match="at most 128"):
        DeviceRanks(129, 1.0, 4).check(16)
    DeviceRanks(128, 1.0, 4).check(16)


# Owners, as the host knows them.


class Tables:
    """The part of vLLM's BlockTables that is watched."""

    def __init__(self) -> None:
        self.appended: list[int] = []

    def append_block_ids(self, req_index: int, new_block_ids: tuple[list[int], ...], overwrite: bool) -> None:
        self.appended.append(req_index)

    def gather_block_tables(self, idx_mapping: object, num_reqs_padded: int) -> str:
        return "real"

    def get_dummy_block_tables(self, num_reqs: int) -> str:
        return "dummy"


def test_owners_follow_the_block_tables() -> None:
    ranks, tables = DeviceRanks(3, 1.0, 4), Tables()
    ranks.watch(tables)  # type: ignore[arg-type]
    # (1) Requests come into slots 0, 1 and 3; the last of them grows on its rank.
    tables.append_block_ids(0, ([STRIDE * 2 + 5],), overwrite=True)
    tables.append_block_ids(1, ([7],), overwrite=True)
    tables.append_block_ids(3, ([STRIDE + 1],), overwrite=True)
    tables.append_block_ids(3, ([STRIDE + 9],), overwrite=False)
    assert tables.gather_block_tables(SimpleNamespace(), num_reqs_padded=3) == "real"
    assert ranks.owners(np.array([3, 0, 1]), 3).tolist() == [1, 2, 0]
    # (2) A slot is used again by a sequence of the root.
    tables.append_block_ids(3, ([2],), overwrite=True)
    assert ranks.owners(np.array([3]), 1).tolist() == [0]
    # (3) Dummy batches name slots of others, and are the root's all the same, until the next real one.
    assert tables.get_dummy_block_tables(2) == "dummy"
    assert ranks.owners(np.array([0, 1]), 2).tolist() == [0, 0]
    tables.gather_block_tables(SimpleNamespace(), num_reqs_padded=1)
    assert ranks.owners(np.array([0]), 1).tolist() == [2]
    # (4) Nothing is kept from vLLM.
    assert tables.appended == [0, 1, 3, 3, 3]
