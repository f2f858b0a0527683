"""A rank's part of a step: takes plans and rows, gives attention. The same for every exchange."""

from __future__ import annotations

import time
from typing import Protocol

import msgspec
import numpy as np
import torch

from tokenmesh.parallel import plan as plans
from tokenmesh.parallel.plan import PlanMismatchError, PlanReader, StepPlan
from tokenmesh.parallel.rows import HEAD_BYTES, REFUSED, HeadShape, RowBuffers, RowViews


class LayerSpec(msgspec.Struct, frozen=True):
    """What distinguishes the attention of one layer."""

    scale: float
    sliding_window: int = -1
    """Tokens that a token sees, itself included; -1: all. As vLLM's kernels take it."""
    softcap: float = 0.0
    """Bound of the logits; 0: none."""


class RankSpec(msgspec.Struct, frozen=True):
    """All a rank needs to know of the model; it never sees the model itself."""

    shape: HeadShape
    layers: list[LayerSpec]
    block_size: int
    packing: str
    """Kernel and order inside a block, as in BlockGeometry."""
    max_seqs: int
    """Sequences in a step, at most."""
    max_tokens: int
    """Tokens in a step, at most."""
    max_blocks: int
    """Blocks in a sequence, at most."""
    kv_split: bool = True
    """Whether the CPU kernel may split a long sequence over threads; the same on all ranks."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer, keys and values together."""
        shape = self.shape
        return 2 * shape.kv_heads * self.block_size * shape.head_size * int(shape.torch_dtype.itemsize)

    @property
    def plan_body_bytes(self) -> int:
        """Bytes of the body of the largest plan."""
        return 4 * self.max_seqs * (3 + self.max_blocks)


class AttentionKernel(Protocol):
    """Writes new keys and values into blocks and attends over them."""

    def prepare(self, plan: StepPlan) -> None:
        """Once a step; what it makes of the plan lasts until the next one."""

    def attend(self, layer: int, views: RowViews) -> None:
        """Reads views.query, key and value, and fills views.output."""


class RankProtocol:
    """Which message a rank expects next and what it answers. Free of any transport.

    A plan's head and body, then one request per layer, each answered, and from the start again.
    """

    def __init__(self, spec: RankSpec, blocks: int, kernel: AttentionKernel) -> None:
        self._kernel = kernel
        self._layers = len(spec.layers)
        self._reader = PlanReader(spec.max_seqs, spec.max_blocks, spec.block_size, blocks)
        self._rows = RowBuffers(spec.shape, spec.max_tokens)
        self._head = torch.zeros(plans.HEADER_BYTES, dtype=torch.uint8)
        self._body_buffer = torch.zeros(spec.plan_body_bytes, dtype=torch.uint8)
        self._body = self._body_buffer
        self._plan: StepPlan | None = None
        self._views: RowViews | None = None
        self._layer = 0
        self._expects = self._head
        self.refused = False
        """A plan or request did not fit; the pair is of no more use."""
        self.steps = 0
        self.context_tokens = 0
        """Tokens attended over in the last step."""
        self.attention_seconds = 0.0
        """Time spent in the kernel since the start."""

    @property
    def idle(self) -> bool:
        """Between steps: the next message may be long in coming."""
        return self._expects is self._head

    @property
    def expects(self) -> torch.Tensor:
        """Where the next message belongs."""
        return self._expects

    def received(self) -> torch.Tensor | None:
        """Takes the message that now fills `expects`. Returns the answer, if there is one.

        After a refusal nothing more may be received.
        """
        if self._expects is self._head:
            return self._take_head()
        if self._expects is self._body:
            return self._take_body()
        return self._attend()

    def close(self) -> None:
        """Nothing is under way between messages."""

    def _take_head(self) -> torch.Tensor | None:
        try:
            length = PlanReader.body_bytes(self._head.numpy())
        except PlanMismatchError:
            return self._refuse()
        if length > len(self._body_buffer):
            return self._refuse()
        self._body = self._body_buffer[:length]
        self._expects = self._body
        return None

    def _take_body(self) -> torch.Tensor | None:
        try:
            plan = self._reader.read(self._head.numpy(), self._body.numpy())
            self._views = self._rows.views(plan.tokens)
        except (PlanMismatchError, ValueError):
            return self._refuse()
        self._plan = plan
        self.context_tokens = int(plan.seq_lens.sum())
        start = time.perf_counter()
        self._kernel.prepare(plan)
        self.attention_seconds += time.perf_counter() - start
        self._layer = 0
        self._expects = self._views.request
        return None

    def _attend(self) -> torch.Tensor:
        views, head = self._views, self._rows.request_head
        assert views is not None
        if head[0] != self._reader.version & 0xFFFFFFFF or head[1] >= self._layers:
            return self._refuse()
        start = time.perf_counter_ns()
        self._kernel.attend(int(head[1]), views)
        spent = time.perf_counter_ns() - start
        self.attention_seconds += spent / 1e9
        reply = self._rows.reply_head
        reply[:2] = head[:2]
        reply[2:] = np.uint32(spent & 0xFFFFFFFF), np.uint32(spent >> 32)
        self._layer += 1
        if self._layer == self._layers:
            self.steps += 1
            self._expects = self._head
        return views.reply

    def _refuse(self) -> torch.Tensor:
        reply = self._rows.reply_head
        reply[:] = 0
        reply[1] = REFUSED
        self.refused = True
        return self._rows.views(0).reply[:HEAD_BYTES]
