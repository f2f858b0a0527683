"""Batches with a prefill chunk in them, spread over the ranks of a GPU: what each rank is told of its share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from tokenmesh.engine.gpu.attention import TokenParallelFlashBuilder
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
