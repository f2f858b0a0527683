"""The root's view of one rank: writes its plans, packs its rows, takes its attention."""

from __future__ import annotations

import torch

from tokenmesh.parallel.exchange import Exchange, PeerLostError
from tokenmesh.parallel.plan import IntArray, PlanWriter
from tokenmesh.parallel.rank import RankSpec
from tokenmesh.parallel.rows import REFUSED, RowBuffers, RowViews


class RankPeer:
    """One rank other than the root. Used by the thread that runs the model."""

    def __init__(self, rank: int, exchange: Exchange, spec: RankSpec) -> None:
        self.rank = rank
        self._exchange = exchange
        self._writer = PlanWriter(spec.max_seqs, spec.max_blocks, spec.block_size)
        self._rows = RowBuffers(spec.shape, spec.max_tokens)
        self._plan_buffer = torch.zeros(64 + spec.plan_body_bytes, dtype=torch.uint8)
        self._views: RowViews | None = None
        self.attention_ns = 0
        """Time that the rank spent in its kernel for the layer last received."""

    def plan(self, query_lens: IntArray, seq_lens: IntArray, block_table: IntArray) -> None:
        """Announces a step: int32 [rows], [rows], [rows, width] with local ids. Raises PeerLostError."""
        header, body = self._writer.write(query_lens, seq_lens, block_table)
        start = 0
        for part in (header, body):
            message = self._plan_buffer[start : start + len(part)]
            message.copy_(torch.frombuffer(bytearray(part), dtype=torch.uint8))
            self._exchange.send(message)
            start += len(part)
        self._views = self._rows.views(int(query_lens.sum()))
        self._rows.request_head[0] = self._writer.version & 0xFFFFFFFF

    def send(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: torch.Tensor | slice
    ) -> None:
        """Sends the rank's tokens of one layer. Arrays are [tokens, heads, head size]. Raises PeerLostError."""
        views = self._views
        assert views is not None
        for source, target in ((query, views.query), (key, views.key), (value, views.value)):
            if isinstance(tokens, slice):
                target.copy_(source[tokens])
            else:
                torch.index_select(source, 0, tokens, out=target)
        self._rows.request_head[1] = layer
        self._exchange.send(views.request)

    def receive(self, layer: int, output: torch.Tensor, tokens: torch.Tensor | slice) -> None:
        """Waits for the layer's attention and puts it into its rows of `output`. Raises PeerLostError."""
        views = self._views
        assert views is not None
        self._exchange.receive(views.reply)
        head = self._rows.reply_head
        if head[1] != layer or head[0] != self._writer.version & 0xFFFFFFFF:
            what = "refused the plan" if head[1] == REFUSED else f"answered for layer {head[1]} instead of {layer}"
            raise PeerLostError(f"rank {self.rank} {what}")
        self.attention_ns = int(head[2]) | int(head[3]) << 32
        output[tokens] = views.output

    def close(self) -> None:
        """Gives the rank up."""
        self._exchange.close()
