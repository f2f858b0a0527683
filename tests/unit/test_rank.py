"""A rank with vLLM's CPU kernel against attention written out in torch, over the exchange that needs no transport."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tokenmesh.engine.cpu_kernel import CpuKernel, UnsupportedAttentionError
from tokenmesh.parallel import plan as plans
from tokenmesh.parallel.exchange import PeerLostError
from tokenmesh.parallel.local_exchange import LocalExchange
from tokenmesh.parallel.peer import RankPeer
from tokenmesh.parallel.rank import LayerSpec, RankProtocol, RankSpec
from tokenmesh.parallel.rows import HEAD_BYTES, REFUSED, HeadShape

BLOCK, BLOCKS = 32, 24
HEADS, KV_HEADS, SIZE = 4, 2, 32
SCALE = 1 / math.sqrt(SIZE)


def spec(*layers: LayerSpec, packing: str = "cpu_attn/vec", block_size: int = BLOCK) -> RankSpec:
    return RankSpec(
        shape=HeadShape(HEADS, KV_HEADS, SIZE, "float32"),
        layers=list(layers),
        block_size=block_size,
        packing=packing,
        max_seqs=4,
        max_tokens=64,
        max_blocks=8,
    )


def kernel(what: RankSpec) -> CpuKernel:
    size = (len(what.layers), BLOCKS, KV_HEADS, what.block_size, 2 * SIZE)
    return CpuKernel(what, torch.zeros(size, dtype=what.shape.torch_dtype))


def expected(layer: LayerSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of the last tokens of one sequence: [tokens, heads, size] over [length, KV heads, size]."""
    group = HEADS // KV_HEADS
    keys, values = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    logits = torch.einsum("qhd,khd->hqk", query, keys) * layer.scale
    if layer.softcap:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    at = torch.arange(len(key) - len(query), len(key))[:, None]
    seen = torch.arange(len(key))[None, :]
    visible = seen <= at
    if layer.sliding_window >= 0:
        visible &= seen > at - layer.sliding_window
    weights = logits.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


@dataclass
class Sequence:
    """What a sequence has said so far, per layer, and where its blocks are."""

    blocks: list[int]
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    length: int = 0


class Root:
    """The root's end of one rank, with a reference beside it."""

    def __init__(self, what: RankSpec) -> None:
        self.spec = what
        self.protocol = RankProtocol(what, BLOCKS, kernel(what))
        self.peer = RankPeer(1, LocalExchange(self.protocol), what)
        self._random = torch.Generator().manual_seed(1)

    def _draw(self, tokens: int, heads: int) -> torch.Tensor:
        return torch.randn((tokens, heads, SIZE), generator=self._random)

    def step(self, *batch: tuple[Sequence, int], tokens: torch.Tensor | None = None) -> None:
        """Each sequence says so many tokens; what the rank answers is what it should.

        `tokens`: the rank's rows among those of a larger batch; by default all rows are the rank's.
        """
        query_lens = np.array([count for _, count in batch], dtype=np.int32)
        for sequence, count in batch:
            sequence.length += count
        table = np.zeros((len(batch), max(len(s.blocks) for s, _ in batch)), dtype=np.int32)
        for row, (sequence, _) in enumerate(batch):
            table[row, : len(sequence.blocks)] = sequence.blocks
        self.peer.plan(query_lens, np.array([s.length for s, _ in batch], dtype=np.int32), table)
        total = int(query_lens.sum())
        rows = slice(0, total) if tokens is None else tokens
        size = total if tokens is None else int(tokens.max()) + 3
        for number, layer in enumerate(self.spec.layers):
            query, key, value = (self._draw(size, heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
            output = torch.full((size, HEADS, SIZE), 7.0)
            self.peer.send(number, query, key, value, rows)
            self.peer.receive(number, output, rows)
            untouched = torch.ones(size, dtype=torch.bool)
            untouched[rows] = False
            assert (output[untouched] == 7).all()
            mine, start = [x[rows] for x in (query, key, value, output)], 0
            for sequence, count in batch:
                q, k, v, out = (x[start : start + count] for x in mine)
                start += count
                none = torch.empty((0, KV_HEADS, SIZE))
                sequence.keys[number] = torch.cat([sequence.keys.get(number, none), k])
                sequence.values[number] = torch.cat([sequence.values.get(number, none), v])
                wanted = expected(layer, q, sequence.keys[number], sequence.values[number])
                torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


LAYERS = {
    "plain": [LayerSpec(SCALE), LayerSpec(0.3)],
    "sliding window": [LayerSpec(SCALE, sliding_window=11)] * 2,
    "softcap": [LayerSpec(SCALE, softcap=2.0), LayerSpec(1.0, softcap=1.5)],
    "mixed": [LayerSpec(SCALE), LayerSpec(SCALE, sliding_window=5), LayerSpec(SCALE, sliding_window=20, softcap=3.0)],
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("packing", "block_size"), [("cpu_attn/vec", 32), ("cpu_attn/vec16", 16)])
def test_attention_is_what_torch_says(layers: list[LayerSpec], packing: str, block_size: int) -> None:
    root = Root(spec(*layers, packing=packing, block_size=block_size))
    one, two = Sequence([5, 3, 17, 0, 9, 22, 14, 2]), Sequence([8, 23, 1, 12])
    # (1) A prompt in three chunks that end within blocks, the second prompt beside the last of them.
    root.step((one, 41))
    root.step((one, 33))
    root.step((one, 20), (two, 30))
    # (2) Both decode, across the ends of blocks, in either order.
    for number in range(8):
        batch = ((one, 1), (two, 1))
        root.step(*(batch if number % 3 else batch[::-1]))
    # (3) A step of one of them alone; one decodes while the other says several tokens.
    root.step((two, 1))
    root.step((one, 1), (two, 7))
    assert root.protocol.steps == 13
    assert root.protocol.context_tokens == one.length + two.length
    # (4) Between steps.
    assert root.protocol.idle
    assert root.protocol.attention_seconds > 0
    assert not root.protocol.refused


def test_rows_are_taken_from_and_put_into_their_places_in_a_batch() -> None:
    root = Root(spec(LayerSpec(SCALE)))
    one, two = Sequence([0, 1]), Sequence([2])
    root.step((one, 3), (two, 2), tokens=torch.tensor([1, 2, 3, 7, 8]))
    root.step((one, 1), (two, 1), tokens=torch.tensor([0, 4]))


def test_blocks_can_be_given_to_somebody_else() -> None:
    root = Root(spec(LayerSpec(SCALE)))
    root.step((Sequence([4, 5]), 30))
    # What was there before is not seen.
    root.step((Sequence([5, 4]), 20))


def test_a_rank_tells_how_long_its_kernel_took() -> None:
    root = Root(spec(LayerSpec(SCALE)))
    root.step((Sequence([4, 5]), 30))
    assert 0 < root.peer.attention_ns < 1e9
    assert root.protocol.attention_seconds * 1e9 >= root.peer.attention_ns


def plan(root: Root, query: int = 2, length: int = 2, blocks: tuple[int, ...] = (1,)) -> None:
    root.peer.plan(
        np.array([query], dtype=np.int32), np.array([length], dtype=np.int32), np.array([blocks], dtype=np.int32)
    )


def rows(root: Root, tokens: int = 2, layer: int = 0) -> torch.Tensor:
    output = torch.full((tokens, HEADS, SIZE), 7.0)
    query, key = torch.zeros(tokens, HEADS, SIZE), torch.zeros(tokens, KV_HEADS, SIZE)
    root.peer.send(layer, query, key, key, slice(0, tokens))
    root.peer.receive(layer, output, slice(0, tokens))
    return output


def a_block_that_is_not_there(root: Root) -> None:
    plan(root, blocks=(BLOCKS,))


def a_plan_is_missing(root: Root) -> None:
    root.peer._writer.write(*(np.array([1], dtype=np.int32),) * 2, np.array([[1]], dtype=np.int32))
    plan(root)


def more_new_tokens_than_tokens(root: Root) -> None:
    plan(root, query=2, length=1)


@pytest.mark.parametrize("mismatch", [a_block_that_is_not_there, a_plan_is_missing, more_new_tokens_than_tokens])
def test_a_plan_that_does_not_fit_is_refused(mismatch: Callable[[Root], None]) -> None:
    root = Root(spec(LayerSpec(SCALE)))
    root.step((Sequence([0]), 3))
    # (1) The rank refuses as soon as it has the plan.
    mismatch(root)
    assert root.protocol.refused
    # (2) The root hears of it, at its first rows or where it waits for their answer; nothing is taken for attention.
    output = torch.full((2, HEADS, SIZE), 7.0)
    with pytest.raises(PeerLostError):
        rows(root)
    with pytest.raises(PeerLostError, match="refused the plan"):
        root.peer.receive(0, output, slice(0, 2))
    assert (output == 7).all()
    # (3) No step was counted.
    assert root.protocol.steps == 1


def test_bytes_that_are_no_plan_are_refused() -> None:
    protocol = RankProtocol(spec(LayerSpec(SCALE)), BLOCKS, kernel(spec(LayerSpec(SCALE))))
    # (1) A header of zeros.
    assert protocol.expects.numel() == plans.HEADER_BYTES
    protocol.expects.zero_()
    answer = protocol.received()
    assert answer is not None
    assert answer.numel() == HEAD_BYTES
    assert answer.view(torch.int32)[1] == np.uint32(REFUSED).view(np.int32)
    assert protocol.refused


def test_a_body_larger_than_any_plan_is_refused() -> None:
    small, large = spec(LayerSpec(SCALE)), RankSpec(HeadShape(4, 2, 32, "float32"), [], BLOCK, "", 64, 64, 8)
    protocol = RankProtocol(small, BLOCKS, kernel(small))
    one = np.ones(64, dtype=np.int32)
    header, body = plans.PlanWriter(large.max_seqs, 8, BLOCK).write(one, one, np.ones((64, 8), dtype=np.int32))
    assert len(body) > small.plan_body_bytes
    protocol.expects.copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
    assert protocol.received() is not None
    assert protocol.refused


@pytest.mark.parametrize(("what", "value"), [("layer", 1), ("version", 9)])
def test_rows_of_another_step_or_layer_are_refused(what: str, value: int) -> None:
    root = Root(spec(LayerSpec(SCALE)))
    plan(root)
    head = root.peer._rows.request_head
    if what == "version":
        head[0] = value
    with pytest.raises(PeerLostError, match="refused the plan"):
        rows(root, layer=value if what == "layer" else 0)
    assert root.protocol.refused


def test_a_closed_exchange_is_lost() -> None:
    root = Root(spec(LayerSpec(SCALE)))
    plan(root)
    root.peer.close()
    root.peer.close()
    with pytest.raises(PeerLostError, match="closed"):
        rows(root)


def test_blocks_that_are_packed_for_something_else() -> None:
    for packing in ("flash_attn/NHD", "cpu_attn", "cpu_attn/unheard-of"):
        with pytest.raises(UnsupportedAttentionError, match="packed as"):
            kernel(spec(LayerSpec(SCALE), packing=packing))
