"""The bytes of a layer on the wire: q, k and v of a rank's tokens one way, their attention the other.

A request is a 16-byte head (plan version, layer) and three packed arrays; a reply is a head (version, layer, time
spent) and one. Both ends keep one buffer per direction for the largest step and look at as much of it as a step needs.
"""

from __future__ import annotations

import math

import msgspec
import torch

HEAD_BYTES = 16

REFUSED = 0xFFFFFFFF
"""In place of a layer: the rank refuses the plan."""


class HeadShape(msgspec.Struct, frozen=True):
    """Attention heads of one tensor-parallel shard."""

    heads: int
    kv_heads: int
    head_size: int
    dtype: str
    """By torch's name."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def request_token_bytes(self) -> int:
        """Bytes of q, k and v of one token."""
        return (self.heads + 2 * self.kv_heads) * self.head_size * int(self.torch_dtype.itemsize)

    @property
    def reply_token_bytes(self) -> int:
        """Bytes of the attention of one token."""
        return self.heads * self.head_size * int(self.torch_dtype.itemsize)


class RowViews:
    """The buffers as a step of `tokens` tokens sees them."""

    __slots__ = ("key", "output", "query", "reply", "request", "value")

    def __init__(self, shape: HeadShape, tokens: int, request: torch.Tensor, reply: torch.Tensor) -> None:
        self.request = request[: HEAD_BYTES + tokens * shape.request_token_bytes]
        self.reply = reply[: HEAD_BYTES + tokens * shape.reply_token_bytes]
        dtype, size = shape.torch_dtype, shape.head_size
        arrays = []
        start = HEAD_BYTES
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads):
            stop = start + math.prod((tokens, heads, size)) * dtype.itemsize
            arrays.append(self.request[start:stop].view(dtype).view(tokens, heads, size))
            start = stop
        self.query, self.key, self.value = arrays
        """[tokens, heads or KV heads, head size], contiguous."""
        self.output = self.reply[HEAD_BYTES:].view(dtype).view(tokens, shape.heads, size)
        """[tokens, heads, head size], contiguous."""


class RowBuffers:
    """Memory for one pair, both directions."""

    def __init__(self, shape: HeadShape, max_tokens: int, device: torch.device | None = None) -> None:
        self.shape = shape
        self.max_tokens = max_tokens
        # Touched now, so that the first step does not pay for its pages.
        self._request = torch.zeros(HEAD_BYTES + max_tokens * shape.request_token_bytes, dtype=torch.uint8).to(device)
        self._reply = torch.zeros(HEAD_BYTES + max_tokens * shape.reply_token_bytes, dtype=torch.uint8).to(device)
        self.request_head = self._request[:HEAD_BYTES].view(torch.int64).numpy().view("uint32")
        """uint32 [4]: version, layer, 0, 0."""
        self.reply_head = self._reply[:HEAD_BYTES].view(torch.int64).numpy().view("uint32")
        """uint32 [4]: version, layer, nanoseconds (low, high)."""
        self._views: dict[int, RowViews] = {}

    def views(self, tokens: int) -> RowViews:
        """The same objects for the same number of tokens, so that whoever prepared them once need not again."""
        views = self._views.get(tokens)
        if views is None:
            if tokens > self.max_tokens:
                raise ValueError(f"{tokens} tokens in a step, {self.max_tokens} at most")
            if len(self._views) > 512:
                self._views.clear()
            views = self._views[tokens] = RowViews(self.shape, tokens, self._request, self._reply)
        return views
