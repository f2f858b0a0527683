"""The Triton kernel of the mover."""

import triton
import triton.language as tl


# One program per WORDS words; `place` and `mix` as in `digest`. Words of 8 bytes: with GATHER those of the cells that
# `ids` names, which are copied to `target` back to back, else those at `source`. `state` is what programs have added up
# and how many have, zeros before and after. The last of them writes the digest to `answer`, which the host reads.
@triton.jit(do_not_specialize=["count"])
def pass_kernel(  # type: ignore[no-untyped-def]
    source_ptr,
    ids_ptr,
    target_ptr,
    state_ptr,
    answer_ptr,
    count,
    cell: tl.constexpr,
    place: tl.constexpr,
    mix: tl.constexpr,
    WORDS: tl.constexpr,
    GATHER: tl.constexpr,
):
    index = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = index < count
    if GATHER:
        ids = tl.load(ids_ptr + index // cell, mask=inside, other=0)
        data = tl.load(source_ptr + ids * cell + index % cell, mask=inside, other=0)
        tl.store(target_ptr + index, data, mask=inside)
    else:
        data = tl.load(source_ptr + index, mask=inside, other=0)
    mixed = (data ^ ((index.to(tl.int64) + 1) * place)) * mix
    mixed = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
    tl.atomic_add(state_ptr, tl.sum(tl.where(inside, mixed, 0), axis=0))
    done = tl.atomic_add(state_ptr + 1, 1)
    if done == tl.num_programs(0) - 1:
        tl.store(answer_ptr, tl.atomic_xchg(state_ptr, 0))
        tl.store(state_ptr + 1, 0)
