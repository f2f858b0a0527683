"""The kernels for ranks that share a GPU, against what is written down in torch: kernel_checks.py runs all."""

from __future__ import annotations

import torch

from tokenmesh.engine.gpu import kernels
from tokenmesh.engine.gpu.rows import (
    PackedRows,
    SplitRows,
    pack_reference,
    place_reference,
    split_reference,
    unpack_reference,
)
from tokenmesh.parallel.ids import STRIDE

RANKS = (2, 3, 5)
HEADS = ((9, 3, 64), (32, 8, 64), (32, 8, 128), (4, 1, 128))
"""Heads, KV heads, head size."""


def check_split(ranks: int) -> None:
    """Batches of all sizes, one after the other in the same buffers. Raises AssertionError."""
    block, width, most = 16, 300, 100
    device = torch.device("cuda")
    ours, theirs = (SplitRows(ranks, most, width, block, device) for _ in range(2))
    generator = torch.Generator().manual_seed(ranks)
    # (1) Steps of all sizes follow each other in the same buffers; some rows are empty, as padding is.
    for count in (1, 2, 3, 16, 64, 99, 100, 5):
        owners = torch.randint(0, ranks, (count, 1), generator=generator)
        table = (torch.randint(0, 1000, (count, width), generator=generator) + owners * STRIDE).int()
        lens = torch.randint(0, width * block + 1, (count,), generator=generator).int()
        slots = torch.randint(-1, 1000, (count + 7,), generator=generator)
        arguments = [tensor.to(device) for tensor in (table, lens, slots)]
        kernels.split(*arguments, ours)
        split_reference(*arguments, theirs)
        # (2) Both buffers hold the same after each, what earlier steps left behind included.
        for name in ("rows", "starts", "seq_lens", "slots", "tables"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (count, name)


def _rows(most: int, count: int) -> torch.Tensor:
    """Places of `count` rows of three owners."""
    owners = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(1))
    rows = torch.full((2, most), -1, dtype=torch.int32)
    for rank in (1, 2):
        mine = torch.nonzero(owners == rank).flatten()
        rows[rank - 1, : len(mine)] = mine.int()
    return rows.to("cuda")[:, :count]


def _qkv(most: int, heads: int, kv_heads: int, size: int) -> list[torch.Tensor]:
    """Views of one tensor that has padding behind the rows."""
    qkv = torch.randn(most, (heads + 2 * kv_heads) * size, device="cuda", dtype=torch.bfloat16)
    parts = qkv.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    return [part.view(most, -1, size) for part in parts]


def check_place(heads: int, kv_heads: int, size: int) -> None:
    """Queries to their ranks, keys and values into the blocks of theirs. Raises AssertionError."""
    device, most, count, block, firsts = torch.device("cuda"), 40, 33, 16, (0, 50, 80)
    # (1) Three ranks share 100 blocks; some rows have no slot, as padding has none.
    rows, (query, key, value) = _rows(most, count), _qkv(most, heads, kv_heads, size)
    order = torch.stack([torch.randperm(20 * block)[:most] for _ in firsts])
    slots = torch.where(torch.rand(order.shape) < 0.2, -1, order).to(device)
    slots[1:, :count][rows < 0] = -1
    # Rows of other ranks have no slot at the root.
    slots[0, rows[rows >= 0].long()] = -1
    first, second = (torch.zeros(100, kv_heads, block, 2 * size, device=device, dtype=key.dtype) for _ in range(2))
    ours, theirs = (PackedRows(2, most, heads, kv_heads, size, torch.bfloat16, device) for _ in range(2))
    kernels.place(query, key, value, rows, slots[:, :count], firsts, first, ours)
    place_reference(query, key, value, rows, slots[:, :count], firsts, second, theirs)
    # (2) The same rows go to the same places, and nothing else is written.
    assert torch.equal(first, second)
    assert torch.equal(ours.packed, theirs.packed)
    assert first.any()


def check_pack_and_unpack(heads: int, kv_heads: int, size: int) -> None:
    """Rows out and back. Raises AssertionError."""
    device, most, count = torch.device("cuda"), 40, 33
    # (1) Rows out, for ranks on other GPUs.
    rows, (query, key, value) = _rows(most, count), _qkv(most, heads, kv_heads, size)
    ours, theirs = (PackedRows(2, most, heads, kv_heads, size, torch.bfloat16, device) for _ in range(2))
    kernels.pack(query, key, value, rows, ours)
    pack_reference(query, key, value, rows, theirs)
    assert torch.equal(ours.packed, theirs.packed)
    # (2) Attention comes back into its rows, and no others.
    ours.output.copy_(torch.randn_like(ours.output))
    theirs.output.copy_(ours.output)
    first, second = (torch.zeros(most, heads, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    kernels.unpack(rows, ours, first)
    unpack_reference(rows, theirs, second)
    assert torch.equal(first, second)
    assert not first[count:].any()


if __name__ == "__main__":
    for ranks in RANKS:
        check_split(ranks)
    for shape in HEADS:
        check_pack_and_unpack(*shape)
        check_place(*shape)
    print("kernels do what they should")
