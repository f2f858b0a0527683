"""A rank on a GPU of its own: KV blocks, vLLM's FlashAttention over them, and no model.

Its host hears of every step and launches the kernels of all layers; these wait on the device for the root's rows.
"""

from __future__ import annotations

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import (
    flash_attn_varlen_func,
    get_flash_attn_version,
    get_scheduler_metadata,
    reshape_and_cache_flash,
)

from tokenmesh.engine.cpu_kernel import UnsupportedAttentionError
from tokenmesh.engine.gpu.pair import ID_BYTES, NcclPair
from tokenmesh.engine.gpu.peer import ANSWER_BYTES
from tokenmesh.kv.geometry import HND
from tokenmesh.parallel.device_step import STEP_BYTES, DeviceStep
from tokenmesh.parallel.exchange import PeerLostError
from tokenmesh.parallel.rank import RankSpec


class DeviceRank:
    """What a shard's host does with its root's messages; has the face of a RankProtocol."""

    def __init__(self, spec: RankSpec, kv: torch.Tensor) -> None:
        """`kv`: the rank's blocks, [layers, blocks, KV heads, block size, 2 x head size].

        Raises UnsupportedAttentionError.
        """
        self._kernel = FlashKernel(spec, kv)
        self._device = kv.device
        self._pair: NcclPair | None = None
        self._id = torch.zeros(ID_BYTES, dtype=torch.uint8)
        self._head = torch.zeros(STEP_BYTES, dtype=torch.uint8)
        self._answer = torch.zeros(ANSWER_BYTES, dtype=torch.uint8)
        self.refused = False
        self.steps = 0
        self.context_tokens = 0
        """Known on the device only."""
        self.attention_seconds = 0.0
        """Likewise."""

    idle = True
    """For its host, that is: what is under way is the device's."""

    @property
    def expects(self) -> torch.Tensor:
        """Where the next message belongs."""
        return self._id if self._pair is None else self._head

    def received(self) -> torch.Tensor | None:
        """Takes the message that now fills `expects`. Returns the answer, if there is one. Raises PeerLostError."""
        if self._pair is None:
            self._pair = NcclPair(bytes(self._id.tolist()), False, self._device)
            return None
        step = DeviceStep.from_bytes(self._head.numpy().tobytes())
        if step.version != (self.steps + 1) & 0xFFFFFFFF:
            raise PeerLostError(f"step {step.version} came after step {self.steps}")
        self.steps += 1
        self._kernel.run(step, self._pair)
        return self._answer

    def close(self) -> None:
        """Ends what the device may be waiting for."""
        if self._pair is not None:
            self._pair.abort()
            self._kernel.close()
            self._pair.close()
            self._pair = None


class FlashKernel:
    """Attention of all layers of a step, from its rows to its answers."""

    def __init__(self, spec: RankSpec, kv: torch.Tensor) -> None:
        """Raises UnsupportedAttentionError."""
        if spec.packing != HND:
            raise UnsupportedAttentionError(f"blocks are packed as {spec.packing!r}, not for a GPU")
        shape, device = spec.shape, kv.device
        self._spec = spec
        self._version = get_flash_attn_version(head_size=shape.head_size)
        if self._version is None:
            raise UnsupportedAttentionError("this machine has no FlashAttention")
        # [blocks, block size, KV heads, head size] each, as vLLM's kernels want them.
        halves = [blocks.transpose(1, 2).split(shape.head_size, dim=-1) for blocks in kv]
        self._caches = [tuple(map(canonicalize_singleton_dim_strides, pair)) for pair in halves]
        windows = {layer.sliding_window for layer in spec.layers}
        self._window: int | None = windows.pop() if len(windows) == 1 else None
        """Of all layers; only then can the kernel's schedule be made ahead."""
        self._ones = torch.ones(1, dtype=torch.float32, device=device)
        self._lens = torch.zeros(spec.max_seqs, dtype=torch.int32, device=device)
        self._slots = torch.full((spec.max_tokens,), -1, dtype=torch.int64, device=device)
        self._starts = torch.zeros(spec.max_seqs + 1, dtype=torch.int32, device=device)
        self._table = torch.zeros(0, dtype=torch.int32, device=device)
        heads = shape.heads + 2 * shape.kv_heads
        rows = (spec.max_tokens, heads, shape.head_size)
        self._request = torch.zeros(rows, dtype=shape.torch_dtype, device=device)
        self._reply = torch.zeros((rows[0], shape.heads, rows[2]), dtype=shape.torch_dtype, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._seen: set[int] = set()
        self._stream = torch.cuda.Stream(device)

    def run(self, step: DeviceStep, pair: NcclPair) -> None:
        """Launches a step. Raises PeerLostError if it does not fit what the rank was made for."""
        spec = self._spec
        if step.rows > spec.max_seqs or step.tokens > spec.max_tokens or not step.width:
            raise PeerLostError(f"a step of {step.rows} rows, {step.tokens} tokens and {step.width} blocks")
        if self._table.numel() != spec.max_seqs * step.width:
            self._graphs.clear()
            self._seen.clear()
            self._table = self._table.new_zeros(spec.max_seqs * step.width)
        with torch.cuda.stream(self._stream):
            if not step.graph:
                self._enqueue(step, pair)
            elif step.rows in self._graphs:
                self._graphs[step.rows].replay()
            elif step.rows in self._seen:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self._stream):
                    # Longer sequences may come.
                    self._enqueue(step._replace(max_seq_len=spec.max_blocks * spec.block_size), pair)
                self._graphs[step.rows] = graph
                graph.replay()
            else:
                # The first of its kind loads kernels, which a capture cannot.
                self._seen.add(step.rows)
                self._enqueue(step, pair)

    def _enqueue(self, step: DeviceStep, pair: NcclPair) -> None:
        spec, shape, rows, tokens = self._spec, self._spec.shape, step.rows, step.tokens
        lens, slots, starts = self._lens[:rows], self._slots[:tokens], self._starts[: rows + 1]
        table = self._table[: rows * step.width].view(rows, step.width)
        pair.receive(lens, slots, starts, table)
        schedule = self._schedule(step, lens, starts)
        request, reply = self._request[:tokens], self._reply[:tokens]
        query, key, value = request.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        for layer, (keys, values) in zip(spec.layers, self._caches, strict=True):
            pair.receive(request)
            reshape_and_cache_flash(key, value, keys, values, slots, "auto", self._ones, self._ones)
            flash_attn_varlen_func(
                q=query,
                k=keys,
                v=values,
                out=reply,
                cu_seqlens_q=starts,
                max_seqlen_q=step.max_query_len,
                seqused_k=lens,
                max_seqlen_k=step.max_seq_len,
                softmax_scale=layer.scale,
                causal=True,
                window_size=_sides(layer.sliding_window),
                block_table=table,
                softcap=layer.softcap,
                scheduler_metadata=schedule,
                fa_version=self._version,
            )
            pair.send(reply)

    def _schedule(self, step: DeviceStep, lens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor | None:
        """FlashAttention 3's plan of its thread blocks, made once for all layers."""
        if self._version != 3 or self._window is None:
            return None
        shape = self._spec.shape
        schedule: torch.Tensor = get_scheduler_metadata(
            batch_size=step.rows,
            max_seqlen_q=step.max_query_len,
            max_seqlen_k=step.max_seq_len,
            num_heads_q=shape.heads,
            num_heads_kv=shape.kv_heads,
            headdim=shape.head_size,
            cache_seqlens=lens,
            qkv_dtype=shape.torch_dtype,
            cu_seqlens_q=starts,
            page_size=self._spec.block_size,
            causal=True,
            window_size=tuple(_sides(self._window)),
        )
        return schedule

    def close(self) -> None:
        """Lets go of what holds the pair."""
        self._stream.synchronize()
        self._graphs.clear()


def _sides(window: int) -> list[int]:
    """Tokens to the left and right that a token sees, as FlashAttention takes it; -1: all."""
    return [window - 1, 0] if window > 0 else [-1, -1]
