"""Triton kernels of the mover."""

import triton
import triton.language as tl


# One program per WORDS words. `place` and `mix` as in `digest`.
@triton.jit(do_not_specialize=["count"])
def digest_kernel(  # type: ignore[no-untyped-def]
    data_ptr, out_ptr, count, place: tl.constexpr, mix: tl.constexpr, WORDS: tl.constexpr
):
    index = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = index < count
    data = tl.load(data_ptr + index, mask=inside, other=0)
    mixed = (data ^ ((index.to(tl.int64) + 1) * place)) * mix
    mixed = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
    tl.atomic_add(out_ptr, tl.sum(tl.where(inside, mixed, 0), axis=0))
