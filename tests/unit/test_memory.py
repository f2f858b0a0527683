"""KV memory by layer, block and head, against plain numpy indexing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmesh.kv.geometry import BlockGeometry, LayerSpan
from tokenmesh.kv.memory import Heads, KvMemory

LAYERS, BLOCKS, HEADS, HEAD_BYTES = 3, 10, 4, 8
SIZE = HEADS * HEAD_BYTES


def cache(interleaved: bool, packing: str = "cpu_attn/vec") -> tuple[KvMemory, np.ndarray]:
    """A memory over counting bytes, and the same storage as [layers, blocks, heads, bytes of a head]."""
    data = np.arange(LAYERS * BLOCKS * SIZE, dtype=np.uint32).astype(np.uint8)
    if interleaved:
        # A block's layers lie side by side.
        spans = [LayerSpan(layer * SIZE, LAYERS * SIZE) for layer in range(LAYERS)]
        whole = data.reshape(BLOCKS, LAYERS, HEADS, HEAD_BYTES).swapaxes(0, 1)
    else:
        spans = [LayerSpan(layer * BLOCKS * SIZE, SIZE) for layer in range(LAYERS)]
        whole = data.reshape(LAYERS, BLOCKS, HEADS, HEAD_BYTES)
    return KvMemory(data, BlockGeometry(LAYERS, HEADS, 1, 4, "uint8", SIZE, packing), spans), whole


places = st.tuples(
    st.booleans(),
    st.integers(0, LAYERS - 1).flatmap(lambda first: st.integers(first + 1, LAYERS).map(lambda end: range(first, end))),
    st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS, unique=True),
    st.integers(0, HEADS - 1).flatmap(lambda first: st.tuples(st.just(first), st.integers(1, HEADS - first))),
)


@given(places)
def test_blocks_and_heads_are_found(place: tuple[bool, range, list[int], tuple[int, int]]) -> None:
    interleaved, layers, ids, (first, count) = place
    memory, whole = cache(interleaved)
    heads, blocks = Heads(first, count), np.array(ids)
    want = whole[layers][:, blocks, first : first + count].reshape(-1)
    # (1) Copied out.
    out = np.zeros(2 * want.size, dtype=np.uint8)
    assert (memory.gather(layers, blocks, heads, out) == want).all()
    assert len(layers) * memory.nbytes(len(ids), heads) == want.size
    assert not out[want.size :].any()
    # (2) In place, if and only if they lie one after the other.
    view = memory.view(layers.start, blocks, heads)
    if view is not None:
        assert (view == want[: view.size]).all()
        assert np.shares_memory(view, whole)
    assert (view is not None) == (
        len(ids) == 1 or (count == HEADS and not interleaved and bool((np.diff(blocks) == 1).all()))
    )
    # (3) Copied in, and nothing else is touched.
    expected = whole.copy()
    for layer, part in zip(layers, want.reshape(len(layers), len(ids), count, HEAD_BYTES), strict=True):
        expected[layer, blocks, first : first + count] = 255 - part
    memory.scatter(layers, blocks, heads, 255 - want)
    assert (whole == expected).all()


def test_a_packing_that_mixes_heads_moves_whole_blocks() -> None:
    memory, whole = cache(False, packing="row_major")
    blocks = np.array([7, 2, 3])
    out = np.zeros(3 * SIZE, dtype=np.uint8)
    assert (memory.gather(range(1, 2), blocks, memory.all_heads, out) == whole[1, blocks].reshape(-1)).all()
    view = memory.view(1, np.array([2, 3]), memory.all_heads)
    assert view is not None
    assert (view == whole[1, 2:4].reshape(-1)).all()


@pytest.mark.parametrize("block", [-1, LAYERS * BLOCKS])
def test_a_block_that_is_not_there_is_an_error(block: int) -> None:
    memory, _ = cache(False)
    out = np.zeros(SIZE, dtype=np.uint8)
    with pytest.raises(IndexError):
        memory.gather(range(1), np.array([block]), memory.all_heads, out)


def test_blocks_that_were_looked_up_are_found_again_for_other_heads_and_layers() -> None:
    memory, whole = cache(False)
    out = np.zeros(2 * SIZE, dtype=np.uint8)
    # (1) The same array, again and again; and more arrays than are remembered, of which some take others' place.
    for number in range(300):
        blocks = np.array([number % BLOCKS, (number * 7 + 1) % BLOCKS])
        for layer in range(LAYERS):
            for heads in (Heads(0, HEADS), Heads(1, 2), Heads(0, HEADS)):
                want = whole[layer, blocks, heads.first : heads.first + heads.count].reshape(-1)
                assert (memory.gather(range(layer, layer + 1), blocks, heads, out) == want).all()
