"""Who owns which sequence of a batch on a GPU, and which blocks, where the ranks share the root's.

There, rank r of N has blocks [offset_r, offset_r + n_r) of every layer's tensor, so nothing new is allocated, and CUDA
graphs that were captured at start hold the kernels of all ranks, whether sequences live there or not.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenmesh.parallel.ids import STRIDE, rank_of
from tokenmesh.parallel.partition import local_blocks

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.block_table import BlockTables

MAX_SLOTS = 1 << 31
"""vLLM computes slots, block id x block size, in int32."""


class DeviceRanks:
    """What an engine worker knows of its group's ranks without asking the device."""

    def __init__(self, ranks: int, root_share: float | None, max_seqs: int) -> None:
        """`ranks`: the root included; `root_share`: None if each has its own GPU; `max_seqs`: vLLM's request slots."""
        self.ranks = ranks
        self.here = 1 if root_share is None else ranks
        """Those on this GPU, the root included."""
        self._root_share = root_share
        self._spans: dict[int, list[tuple[int, int]]] = {}
        self._owners = np.zeros(max_seqs, dtype=np.int32)
        self.dummy = True
        """The batch under way is none of the scheduler's: capture, profiling, warm-up."""

    def spans(self, total: int) -> list[tuple[int, int]]:
        """(first block, one past the last) of each rank here in tensors of `total` blocks."""
        if self._root_share is None:
            return [(0, total)]
        spans = self._spans.get(total)
        if spans is None:
            spans = list(pairwise(accumulate(local_blocks(total, self.ranks, self._root_share), initial=0)))
            self._spans[total] = spans
        return spans

    def check(self, block_size: int) -> None:
        """Raises ValueError if slots of the last rank do not fit vLLM's arithmetic."""
        if self.ranks * STRIDE * block_size > MAX_SLOTS:
            raise ValueError(f"{self.ranks} ranks with blocks of {block_size} tokens; at most {2048 // block_size}")

    def watch(self, tables: BlockTables) -> None:
        """Mirrors on the host who owns which request slot, from what vLLM writes into its block tables."""
        append, gather, dummy = tables.append_block_ids, tables.gather_block_tables, tables.get_dummy_block_tables

        def append_block_ids(req_index: int, new_block_ids: tuple[list[int], ...], overwrite: bool) -> None:
            append(req_index, new_block_ids, overwrite)
            ids = new_block_ids[0]
            if ids or overwrite:
                self._owners[req_index] = rank_of(ids[-1]) if ids else 0

        def gather_block_tables(*args: Any, **kwargs: Any) -> Any:
            self.dummy = False
            return gather(*args, **kwargs)

        def get_dummy_block_tables(*args: Any, **kwargs: Any) -> Any:
            self.dummy = True
            return dummy(*args, **kwargs)

        tables.append_block_ids = append_block_ids
        tables.gather_block_tables = gather_block_tables
        tables.get_dummy_block_tables = get_dummy_block_tables

    def owners(self, req_idx: np.ndarray | None, rows: int) -> np.ndarray:
        """int32 [rows]: the rank of each request of a batch. Dummies name request slots that are not theirs."""
        if self.dummy or req_idx is None:
            return np.zeros(rows, dtype=np.int32)
        assert len(req_idx) == rows, (len(req_idx), rows)
        owners: np.ndarray = self._owners[req_idx]
        return owners
