"""A decode batch, spread over the ranks of one GPU: static buffers, and who has which row.

Everything stays on the device and at fixed addresses, so that CUDA graphs can hold what reads it.
"""

from __future__ import annotations

import torch

from tokenmesh.parallel.ids import STRIDE


class SplitRows:
    """Where `split` puts its results. N ranks, the root included; R = N - 1 others; B rows; W blocks per sequence."""

    def __init__(self, ranks: int, max_rows: int, width: int, block_size: int, device: torch.device) -> None:
        self.ranks, self.max_rows, self.width, self.block_size = ranks, max_rows, width, block_size
        others = ranks - 1
        self.rows = torch.full((others, max_rows), -1, dtype=torch.int32, device=device)
        """[R, B]: row of the batch at each place of a rank other than the root; -1: none."""
        self.starts = torch.zeros((others, max_rows + 4), dtype=torch.int32, device=device)
        """[R, B + 4], B + 1 in use: where the query of each place starts; places without a row have an empty one."""
        self.seq_lens = torch.zeros((ranks, max_rows), dtype=torch.int32, device=device)
        """[N, B]. The root's rows stay where they are in the batch; others' rows are 0 there."""
        self.slots = torch.full((ranks, max_rows), -1, dtype=torch.int64, device=device)
        """[N, B]: local block id x block size + place in the block; -1: nothing to write."""
        self.tables = torch.zeros((ranks, max_rows, width), dtype=torch.int32, device=device)
        """[N, B, W], local ids. Behind a sequence's blocks stands what stood there before: ids of the same rank."""


class PackedRows:
    """q, k, v of the rows of the ranks other than the root, and their attention. Used by one layer after another."""

    def __init__(
        self,
        others: int,
        max_rows: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.packed = torch.zeros((others, max_rows, heads + 2 * kv_heads, head_size), dtype=dtype, device=device)
        """[R, B, heads + 2 KV heads, head size]."""
        self.output = torch.zeros((others, max_rows, heads, head_size), dtype=dtype, device=device)
        """[R, B, heads, head size]."""
        self.query, self.key, self.value = self.packed.split([heads, kv_heads, kv_heads], dim=2)


def split_reference(table: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor, out: SplitRows) -> None:
    """Splits a batch of one token per row: int32 [rows, W] with global ids, int32 [rows], int64 [>= rows].

    A row belongs to the owner of its last block; one with no tokens to nobody. The same as the kernel does, in torch.
    """
    count = len(seq_lens)
    device = seq_lens.device
    index = torch.arange(count, device=device)
    last = (seq_lens - 1).clamp(min=0) // out.block_size
    ids = table[index, last.long()].long()
    owners = torch.where(seq_lens > 0, ids // STRIDE, -1)
    local_slots = (ids % STRIDE) * out.block_size + (seq_lens - 1) % out.block_size
    columns = torch.arange(table.shape[1], device=device)
    for rank in range(out.ranks):
        mine = owners == rank
        if rank == 0:
            out.seq_lens[0, :count] = torch.where(mine, seq_lens, 0)
            out.slots[0, :count] = torch.where(mine, slots[:count], -1)
            rows = places = index[mine]
        else:
            rows = index[mine]
            places = torch.arange(len(rows), device=device)
            out.rows[rank - 1, :count] = -1
            out.rows[rank - 1, places] = rows.int()
            out.seq_lens[rank, :count] = 0
            out.seq_lens[rank, places] = seq_lens[rows]
            out.slots[rank, :count] = -1
            out.slots[rank, places] = local_slots[rows]
            out.starts[rank - 1, 1 : count + 1] = (index + 1).clamp(max=len(rows)).int()
        valid = columns < (last[rows] + 1)[:, None]
        out.tables[rank, places, : table.shape[1]] = torch.where(
            valid, table[rows] % STRIDE, out.tables[rank, places, : table.shape[1]]
        )


def pack_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, out: PackedRows
) -> None:
    """Copies rows of q, k, v, each [>= rows, heads, head size], to their ranks. `rows`: int32 [R, rows]."""
    for rank, of_rank in enumerate(rows):
        places = torch.nonzero(of_rank >= 0).flatten()
        chosen = of_rank[places].long()
        for source, target in ((query, out.query), (key, out.key), (value, out.value)):
            target[rank, places] = source[chosen]


def place_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    firsts: tuple[int, ...],
    cache: torch.Tensor,
    out: PackedRows,
) -> None:
    """Copies rows of q to their ranks, and of k and v into the cache of theirs, the root's too.

    q, k, v: [>= rows, heads, head size]; `rows`: int32 [R, rows]; `slots`: int64 [N, >= rows], counted from each
    rank's first block, in `firsts`; `cache`: [blocks of all ranks, KV heads, block size, 2 x head size].
    """
    size, block_size = key.shape[2], cache.shape[2]
    for rank, first in enumerate(firsts):
        for place in range(rows.shape[1]):
            row = int(rows[rank - 1, place]) if rank else place
            if row < 0:
                continue
            if rank:
                out.query[rank - 1, place] = query[row]
            if (slot := int(slots[rank, place])) >= 0:
                token = cache[first + slot // block_size, :, slot % block_size]
                token[:, :size], token[:, size:] = key[row], value[row]


def unpack_reference(rows: torch.Tensor, packed: PackedRows, output: torch.Tensor) -> None:
    """Copies the ranks' attention to its rows of `output`, [>= rows, heads, head size]."""
    for rank, of_rank in enumerate(rows):
        places = torch.nonzero(of_rank >= 0).flatten()
        output[of_rank[places].long()] = packed.output[rank, places]
