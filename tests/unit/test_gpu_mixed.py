"""Batches with a prefill chunk in them, spread over the ranks of a GPU: what each rank is told of its share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from tokenmesh.engine.gpu import attention
from tokenmesh.engine.gpu.metadata import TokenParallelFlashBuilder
from tokenmesh.engine.gpu.rows import SplitRows, split_reference
from tokenmesh.parallel.ids import STRIDE

BLOCK = 4


def test_each_rank_sees_its_requests_as_if_they_were_the_batch() -> None:
    # 1. Four requests of 3, 1, 2 and 1 tokens; the first and third live on rank 1.
    owners, query_lens, seq_lens = np.array([1, 0, 1, 0]), [3, 1, 2, 1], [7, 5, 2, 9]
    starts = np.array([0, 3, 4, 6, 7], dtype=np.int32)
    table = torch.tensor([[5, 6, 0], [7, 8, 0], [9, 0, 0], [1, 2, 3]], dtype=torch.int32)
    table += torch.from_numpy(owners[:, None] * STRIDE).int()
    slots = []
    for row, (query, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        for position in range(length - query, length):
            slots.append(int(table[row, position // BLOCK]) * BLOCK + position % BLOCK)
    common = CommonAttentionMetadata(
        query_start_loc=torch.from_numpy(starts),
        query_start_loc_cpu=torch.from_numpy(starts),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=4,
        num_actual_tokens=7,
        max_query_len=3,
        max_seq_len=9,
        block_table_tensor=table,
        # Padding behind the tokens, as vLLM leaves it.
        slot_mapping=torch.tensor([*slots, -1]),
    )
    builder: Any = SimpleNamespace(block_size=BLOCK, _upload=torch.from_numpy)
    # 2. Rank 1: five tokens, local ids and slots.
    part, tokens = TokenParallelFlashBuilder._select(builder, common, starts, np.flatnonzero(owners == 1), 1)
    assert tokens.tolist() == [0, 1, 2, 4, 5]
    assert part.query_start_loc.tolist() == [0, 3, 5]
    assert part.seq_lens.tolist() == [7, 2]
    assert part.block_table_tensor.tolist() == [[5, 6, 0], [9, 0, 0]]
    assert part.slot_mapping.tolist() == [24, 25, 26, 36, 37]
    assert (part.num_reqs, part.num_actual_tokens, part.max_query_len, part.max_seq_len) == (2, 5, 3, 7)
    # 3. The root: its slots are vLLM's own.
    part, tokens = TokenParallelFlashBuilder._select(builder, common, starts, np.flatnonzero(owners == 0), 0)
    assert tokens.tolist() == [3, 6]
    assert part.slot_mapping.tolist() == [slots[3], slots[6]]
    assert part.block_table_tensor.dtype == part.seq_lens.dtype == part.query_start_loc.dtype == torch.int32
    # 4. Requests side by side are a slice, which copies nothing.
    _, tokens = TokenParallelFlashBuilder._select(builder, common, starts, np.array([1, 2]), 1)
    assert tokens == slice(3, 6)


class Watch:
    """Stands in for the watch over ranks on other GPUs: notes what they are told."""

    def __init__(self, *ranks: int) -> None:
        self.peers = {rank: f"peer {rank}" for rank in ranks}
        self.told: list[tuple[Any, ...]] = []

    def announce(self, rank: int, step: tuple[int, ...], *plan: torch.Tensor) -> None:
        self.told.append((rank, step, [tensor.tolist() for tensor in plan]))
        assert all(tensor.is_contiguous() for tensor in plan)


def test_a_rank_on_another_gpu_is_told_of_its_share() -> None:
    # 1. Two requests of 3 and 2 tokens; both live on rank 2, and rank 1 is there as well.
    starts = np.array([0, 3, 5], dtype=np.int32)
    common = CommonAttentionMetadata(
        query_start_loc=torch.from_numpy(starts),
        query_start_loc_cpu=torch.from_numpy(starts),
        seq_lens=torch.tensor([7, 2], dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor([7, 2], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=5,
        max_query_len=3,
        max_seq_len=7,
        block_table_tensor=torch.tensor([[5, 6], [9, 0]], dtype=torch.int32) + 2 * STRIDE,
        slot_mapping=torch.tensor([24, 25, 26, 36, 37, -1]) + 2 * STRIDE * BLOCK,
    )
    watch = Watch(1, 2)
    builder: Any = SimpleNamespace(
        block_size=BLOCK, _upload=torch.from_numpy, _group=SimpleNamespace(watch=watch), _others=[]
    )
    builder._select = lambda *args: TokenParallelFlashBuilder._select(builder, *args)
    metadata = TokenParallelFlashBuilder._build_mixed(builder, common, np.array([2, 2]), False)
    # 2. Its host hears the sizes, its GPU lengths, slots, starts and block table, all in its own numbers.
    assert watch.told == [(2, (2, 5, 3, 7, 2, False), [[7, 2], [24, 25, 26, 36, 37], [0, 3, 5], [[5, 6], [9, 0]]])]
    assert metadata.shares == []
    assert metadata.elsewhere == [("peer 2", slice(0, 5))]


def test_all_ranks_on_other_gpus_hear_of_a_decode_batch_unless_it_is_none() -> None:
    # 1. A batch of two rows, one of them rank 1's; rank 2 has none, but its part of the graph.
    split = SplitRows(3, 4, 2, BLOCK, torch.device("cpu"))
    table = torch.tensor([[3, 0], [STRIDE + 4, 0]], dtype=torch.int32)
    split_reference(table, torch.tensor([1, 2], dtype=torch.int32), torch.tensor([12, 0]), split)
    watch = Watch(1, 2)
    builder: Any = SimpleNamespace(
        _group=SimpleNamespace(watch=watch),
        _ranks=SimpleNamespace(dummy=False),
        use_full_cuda_graph=True,
        _captured={2, 4},
    )
    assert TokenParallelFlashBuilder._announce(builder, split, 2, 9)
    step = (2, 2, 1, 9, 2, True)
    assert [told[:2] for told in watch.told] == [(1, step), (2, step)]
    assert watch.told[0][2] == [[2, 0], [4 * BLOCK + 1, -1], [0, 1, 1], [[4, 0], [0, 0]]]
    assert watch.told[1][2][0] == [0, 0]
    # 2. While graphs are captured nothing is exchanged, so nobody may wait for it.
    builder._ranks.dummy = True
    assert not TokenParallelFlashBuilder._announce(builder, split, 2, 9)
    assert len(watch.told) == 2


def test_before_a_rank_on_another_gpu_has_come_the_root_attends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. Graphs are captured at start: a decode batch, and nobody to be told of it. No rank shares the root's GPU.
    done: list[str] = []
    told = {name: lambda *_, name=name: done.append(name) for name in ("pack", "place", "unpack")}
    monkeypatch.setattr(attention, "kernels", SimpleNamespace(**told))
    impl: Any = object.__new__(attention.TokenParallelFlashImpl)
    impl._group = SimpleNamespace(watch=None)
    impl._attend = lambda *_: done.append("attend")
    metadata: Any = SimpleNamespace(
        root=None, others=[], announced=False, rows=torch.full((1, 4), -1), packed=SimpleNamespace(packed=None)
    )
    impl._decode(None, None, None, None, None, metadata, None)
    # 2. Nothing is written into caches of ranks that are not here.
    assert done == ["pack", "attend", "unpack"]
