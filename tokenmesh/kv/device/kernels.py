"""The Triton kernel of the mover."""

import triton
import triton.language as tl


# One program per WORDS of `count` words (8 bytes) of a message, which lie at `flat`: the cells of a layer back to back,
# one layer after the other. In the cache a cell is the `bases[layer] + ids[its place in the layer]`-th of `cells`.
# GATHER copies from there, SCATTER to there. Without SCATTER, words are added up; `place`, `mix`, `mix_again` as in
# `digest`.
# `state` is what programs have added up and how many have, zeros before and after. The last of them writes the digest
# to `answer`, which the host reads.
@triton.jit(do_not_specialize=["count", "per_layer", "layer"])
def pass_kernel(  # type: ignore[no-untyped-def]
    flat_ptr,
    cells_ptr,
    ids_ptr,
    bases_ptr,
    state_ptr,
    answer_ptr,
    count,
    per_layer,
    layer,
    cell: tl.constexpr,
    place: tl.constexpr,
    mix: tl.constexpr,
    mix_again: tl.constexpr,
    WORDS: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
):
    index = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = index < count
    there = index.to(tl.int64)
    if GATHER or SCATTER:
        number = index // cell
        base = tl.load(bases_ptr + layer + number // per_layer, mask=inside, other=0)
        there = (base + tl.load(ids_ptr + number % per_layer, mask=inside, other=0)) * cell + index % cell
    if GATHER:
        data = tl.load(cells_ptr + there, mask=inside, other=0)
        tl.store(flat_ptr + index, data, mask=inside)
    else:
        data = tl.load(flat_ptr + index, mask=inside, other=0)
    if SCATTER:
        tl.store(cells_ptr + there, data, mask=inside)
    else:
        mixed = data ^ ((index.to(tl.int64) + 1) * place)
        mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * mix
        mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * mix_again
        mixed = mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)
        tl.atomic_add(state_ptr, tl.sum(tl.where(inside, mixed, 0), axis=0))
        done = tl.atomic_add(state_ptr + 1, 1)
        if done == tl.num_programs(0) - 1:
            tl.store(answer_ptr, tl.atomic_xchg(state_ptr, 0))
            tl.store(state_ptr + 1, 0)
