"""Triton kernels for the rows of ranks: split a batch, pack rows or put them in place, unpack attention.

No kernel needs the host to know who owns what, none allocates, and all can be captured. What they do is written down
in torch in `rows`.
"""

import torch
from vllm.triton_utils import tl, triton

from tokenmesh.engine.gpu.rows import PackedRows, SplitRows
from tokenmesh.parallel.ids import STRIDE

_SHIFT = STRIDE.bit_length() - 1
_COLUMNS = 256
_ELEMENTS = 1024


def split(table: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor, out: SplitRows) -> None:
    """See `rows.split_reference`."""
    count = seq_lens.shape[0]
    assert table.dtype == seq_lens.dtype == torch.int32
    assert slots.dtype == torch.int64
    assert count <= out.max_rows
    assert table.shape[0] >= count
    assert table.shape[1] <= out.width
    assert table.stride(1) == seq_lens.stride(0) == slots.stride(0) == 1
    assert slots.shape[0] >= count
    _split_kernel[(count,)](
        table,
        table.stride(0),
        seq_lens,
        slots,
        out.rows,
        out.starts,
        out.starts.stride(0),
        out.seq_lens,
        out.slots,
        out.tables,
        out.max_rows,
        out.width,
        count,
        BLOCK_SIZE=out.block_size,
        RANKS=out.ranks,
        ROWS=triton.next_power_of_2(out.max_rows),
        COLUMNS=_COLUMNS,
        SHIFT=_SHIFT,
    )


def pack(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, out: PackedRows) -> None:
    """See `rows.pack_reference`. q, k, v may be views of one tensor; a row's heads must lie side by side."""
    others, count = rows.shape
    for tensor in (query, key, value):
        assert tensor.stride(2) == 1
        assert tensor.stride(1) == tensor.shape[2]
        assert tensor.dtype == out.packed.dtype
    assert query.shape[0] >= count
    assert rows.stride(1) == 1
    _pack_kernel[(count, others)](
        query,
        key,
        value,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        rows,
        rows.stride(0),
        out.packed,
        out.packed.stride(0),
        out.packed.stride(1),
        Q=query.shape[1] * query.shape[2],
        KV=key.shape[1] * key.shape[2],
        ELEMENTS=_ELEMENTS,
    )


def place(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    firsts: tuple[int, ...],
    cache: torch.Tensor,
    out: PackedRows,
) -> None:
    """See `rows.place_reference`. q, k, v as in `pack`."""
    others, count = rows.shape
    for tensor in (query, key, value):
        assert tensor.stride(2) == 1
        assert tensor.stride(1) == tensor.shape[2]
        assert tensor.dtype == out.packed.dtype
    assert query.shape[0] >= count
    assert len(firsts) == slots.shape[0] == others + 1
    assert slots.shape[1] >= count
    assert rows.stride(1) == slots.stride(1) == cache.stride(3) == 1
    assert cache.dtype == out.packed.dtype
    assert cache.shape[3] == 2 * key.shape[2]
    _place_kernel[(count, others + 1)](
        query,
        key,
        value,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        rows,
        rows.stride(0),
        slots,
        slots.stride(0),
        firsts,
        cache,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        out.packed,
        out.packed.stride(0),
        out.packed.stride(1),
        Q=query.shape[1] * query.shape[2],
        KV=key.shape[1] * key.shape[2],
        SIZE=key.shape[2],
        BLOCK_SIZE=cache.shape[2],
        RANKS=others + 1,
        ELEMENTS=_ELEMENTS,
    )


def unpack(rows: torch.Tensor, packed: PackedRows, output: torch.Tensor) -> None:
    """See `rows.unpack_reference`."""
    others, count = rows.shape
    assert output.stride(2) == 1
    assert output.stride(1) == output.shape[2]
    assert output.dtype == packed.output.dtype
    assert output.shape[0] >= count
    assert rows.stride(1) == 1
    _unpack_kernel[(count, others)](
        rows,
        rows.stride(0),
        packed.output,
        packed.output.stride(0),
        packed.output.stride(1),
        output,
        output.stride(0),
        Q=output.shape[1] * output.shape[2],
        ELEMENTS=_ELEMENTS,
    )


# One program per row of the batch. It finds the place of its row, and clears the place of its own number where a rank
# has fewer rows than that; these are never the same place.
@triton.jit(do_not_specialize=["count"])
def _split_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    table_stride,
    seq_lens_ptr,
    slots_ptr,
    rows_out,
    starts_out,
    starts_stride,
    seq_lens_out,
    slots_out,
    tables_out,
    max_rows,
    width,
    count,
    BLOCK_SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    row = tl.program_id(0)
    all_rows = tl.arange(0, ROWS)
    all_lens = tl.load(seq_lens_ptr + all_rows, mask=all_rows < count, other=0)
    all_last = tl.maximum(all_lens - 1, 0) // BLOCK_SIZE
    all_ids = tl.load(table_ptr + all_rows.to(tl.int64) * table_stride + all_last, mask=all_lens > 0, other=0)
    all_owners = tl.where(all_lens > 0, all_ids >> SHIFT, -1)

    seq_len = tl.load(seq_lens_ptr + row)
    last = tl.maximum(seq_len - 1, 0) // BLOCK_SIZE
    block = tl.load(table_ptr + row.to(tl.int64) * table_stride + last)
    owner = tl.where(seq_len > 0, block >> SHIFT, -1)
    local = block & ((1 << SHIFT) - 1)
    slot = local.to(tl.int64) * BLOCK_SIZE + (tl.maximum(seq_len - 1, 0) % BLOCK_SIZE)

    root_slot = tl.load(slots_ptr + row)
    tl.store(seq_lens_out + row, tl.where(owner == 0, seq_len, 0))
    tl.store(slots_out + row, tl.where(owner == 0, root_slot, -1))

    before = tl.sum(((all_owners == owner) & (all_rows < row)).to(tl.int32), axis=0)
    for rank in tl.static_range(1, RANKS):
        rows_of_rank = tl.sum((all_owners == rank).to(tl.int32), axis=0)
        tl.store(starts_out + (rank - 1) * starts_stride + row + 1, tl.minimum(row + 1, rows_of_rank))
        unused = row >= rows_of_rank
        tl.store(rows_out + (rank - 1) * max_rows + row, -1, mask=unused)
        tl.store(seq_lens_out + rank * max_rows + row, 0, mask=unused)
        tl.store(slots_out + rank * max_rows + row, -1, mask=unused)
        mine = owner == rank
        tl.store(rows_out + (rank - 1) * max_rows + before, row, mask=mine)
        tl.store(seq_lens_out + rank * max_rows + before, seq_len, mask=mine)
        tl.store(slots_out + rank * max_rows + before, slot, mask=mine)

    known = (owner >= 0) & (owner < RANKS)
    blocks = tl.where(known, last + 1, 0)
    place = tl.where(owner > 0, before, row)
    source = table_ptr + row.to(tl.int64) * table_stride
    target = tables_out + (tl.maximum(owner, 0).to(tl.int64) * max_rows + place) * width
    for first in range(0, blocks, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        ids = tl.load(source + column, mask=column < blocks, other=0)
        tl.store(target + column, ids & ((1 << SHIFT) - 1), mask=column < blocks)


@triton.jit
def _pack_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    query_stride,
    key_stride,
    value_stride,
    rows_ptr,
    rows_stride,
    packed_ptr,
    rank_stride,
    place_stride,
    Q: tl.constexpr,
    KV: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    place = tl.program_id(0)
    rank = tl.program_id(1)
    row = tl.load(rows_ptr + rank * rows_stride + place).to(tl.int64)
    if row < 0:
        return
    target = packed_ptr + rank.to(tl.int64) * rank_stride + place * place_stride
    for first in tl.static_range(0, Q, ELEMENTS):
        element = first + tl.arange(0, ELEMENTS)
        data = tl.load(query_ptr + row * query_stride + element, mask=element < Q)
        tl.store(target + element, data, mask=element < Q)
    for first in tl.static_range(0, KV, ELEMENTS):
        element = first + tl.arange(0, ELEMENTS)
        keys = tl.load(key_ptr + row * key_stride + element, mask=element < KV)
        values = tl.load(value_ptr + row * value_stride + element, mask=element < KV)
        tl.store(target + Q + element, keys, mask=element < KV)
        tl.store(target + Q + KV + element, values, mask=element < KV)


# A program per rank and place: one launch before ranks attend, where packing for others and writing each rank's cache
# were two, one after the other.
@triton.jit
def _place_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    query_stride,
    key_stride,
    value_stride,
    rows_ptr,
    rows_stride,
    slots_ptr,
    slots_stride,
    firsts,
    cache_ptr,
    block_stride,
    head_stride,
    token_stride,
    packed_ptr,
    rank_stride,
    place_stride,
    Q: tl.constexpr,
    KV: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    place = tl.program_id(0)
    rank = tl.program_id(1)
    row = place.to(tl.int64)
    if rank > 0:
        row = tl.load(rows_ptr + (rank - 1) * rows_stride + place).to(tl.int64)
        if row < 0:
            return
        target = packed_ptr + (rank - 1).to(tl.int64) * rank_stride + place * place_stride
        for first in tl.static_range(0, Q, ELEMENTS):
            element = first + tl.arange(0, ELEMENTS)
            data = tl.load(query_ptr + row * query_stride + element, mask=element < Q)
            tl.store(target + element, data, mask=element < Q)
    slot = tl.load(slots_ptr + rank.to(tl.int64) * slots_stride + place)
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    for other in tl.static_range(0, RANKS):
        block += tl.where(rank == other, firsts[other], 0)
    token = cache_ptr + block * block_stride + (slot % BLOCK_SIZE) * token_stride
    for first in tl.static_range(0, KV, ELEMENTS):
        element = first + tl.arange(0, ELEMENTS)
        keys = tl.load(key_ptr + row * key_stride + element, mask=element < KV)
        values = tl.load(value_ptr + row * value_stride + element, mask=element < KV)
        target = token + (element // SIZE) * head_stride + element % SIZE
        tl.store(target, keys, mask=element < KV)
        tl.store(target + SIZE, values, mask=element < KV)


@triton.jit
def _unpack_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,
    rows_stride,
    packed_ptr,
    rank_stride,
    place_stride,
    output_ptr,
    output_stride,
    Q: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    place = tl.program_id(0)
    rank = tl.program_id(1)
    row = tl.load(rows_ptr + rank * rows_stride + place).to(tl.int64)
    if row < 0:
        return
    source = packed_ptr + rank.to(tl.int64) * rank_stride + place * place_stride
    for first in tl.static_range(0, Q, ELEMENTS):
        element = first + tl.arange(0, ELEMENTS)
        data = tl.load(source + element, mask=element < Q)
        tl.store(output_ptr + row * output_stride + element, data, mask=element < Q)
