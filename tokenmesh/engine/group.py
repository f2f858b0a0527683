"""The ranks of a decode group as one of the root's engine workers sees them: who is there, their shares, the times.

One per worker process: vLLM makes attention backends by class name, so they find it through `active()`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
import torch

from tokenmesh.kv.messages import StepTimes
from tokenmesh.parallel.exchange import PeerLostError
from tokenmesh.parallel.peer import RankPeer
from tokenmesh.parallel.plan import IntArray

if TYPE_CHECKING:
    from tokenmesh.engine.gpu.peer import PeerWatch
    from tokenmesh.engine.gpu.ranks import DeviceRanks

log = structlog.get_logger()

REPORT_S = 0.5
"""How often step times are told to the service."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank does in the current step."""

    rank: int
    peer: RankPeer | None
    """None for a rank that is not there (any more): its rows are given zeros, and its loss is reported."""
    tokens: torch.Tensor | slice
    """Rows of the batch's q, k and v that are the rank's."""
    requests: IntArray
    """Places of its requests in the batch."""


class RankGroup:
    """Ranks other than the root. Used by the thread that runs the model, between and within steps."""

    def __init__(self) -> None:
        self._peers: dict[int, tuple[int, RankPeer]] = {}
        self._lost: dict[tuple[int, int], str] = {}
        self._shares: list[Share] = []
        self.layer_names: list[str] = []
        """Attention layers in the order of the KV cache, which is how ranks number them."""
        self.shared = False
        """Other ranks take part in the current step."""
        self.times = _Times()
        self.device: DeviceRanks | None = None
        """On GPUs, whose ranks are not peers here: who owns what."""
        self.watch: PeerWatch | None = None
        """The ranks on other GPUs, as soon as there is one."""

    def number_layers(self, names: list[str], layers: Mapping[str, Any]) -> None:
        """Tells every attention layer its number, as `rank_layer`."""
        self.layer_names = names
        for number, name in enumerate(names):
            layers[name].rank_layer = number

    def __len__(self) -> int:
        return len(self._peers)

    def attach(self, rank: int, epoch: int, peer: RankPeer) -> None:
        """Adds a rank; one that bears its number is given up."""
        self.drop(rank)
        self._peers[rank] = (epoch, peer)

    def drop(self, rank: int, epoch: int | None = None) -> None:
        """Gives a rank up, unless another epoch of it is here by now. Unknown: nothing."""
        if self.watch is not None:
            self.watch.drop(rank, epoch)
        known = self._peers.get(rank)
        if known is not None and epoch in (None, known[0]):
            del self._peers[rank]
            known[1].close()

    def take_lost(self) -> dict[tuple[int, int], str]:
        """(rank, epoch) → why, of ranks lost since last asked; of those on other GPUs, lost and not dropped yet."""
        lost, self._lost = self._lost, {}
        return lost if self.watch is None else self.watch.lost()

    def begin(
        self,
        shares: list[tuple[int, torch.Tensor | slice, IntArray]],
        plans: list[tuple[IntArray, IntArray, IntArray]],
    ) -> None:
        """Announces a step.

        `shares`: (rank, token rows, places of its requests); `plans`: query lens, seq lens, local block table of each.
        """
        self._shares = []
        self.shared = True
        for (rank, tokens, requests), plan in zip(shares, plans, strict=True):
            known = self._peers.get(rank)
            peer = known[1] if known is not None else None
            if peer is not None:
                try:
                    peer.plan(*plan)
                except PeerLostError as error:
                    self._lose(rank, error)
                    peer = None
            self._shares.append(Share(rank, peer, tokens, requests))

    def unanswered(self) -> list[int]:
        """Places of requests in the batch of the step that was begun last whose rank was not there to the end."""
        return [int(place) for share in self._shares if share.peer is None for place in share.requests]

    def send(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Sends each rank its rows of a layer."""
        for index, share in enumerate(self._shares):
            if share.peer is not None:
                try:
                    share.peer.send(layer, query, key, value, share.tokens)
                except PeerLostError as error:
                    self._mark_absent(index, error)

    def receive(self, layer: int, output: torch.Tensor) -> int:
        """Fills each rank's rows of `output`; rows of a lost rank with zeros, which the scheduler throws away.

        Returns the longest time that a rank spent in its kernel, in nanoseconds.
        """
        longest = 0
        for index, share in enumerate(self._shares):
            if share.peer is not None:
                try:
                    share.peer.receive(layer, output, share.tokens)
                    longest = max(longest, share.peer.attention_ns)
                    self.times.add_rank(share.rank, share.peer.attention_ns)
                    continue
                except PeerLostError as error:
                    self._mark_absent(index, error)
            output[share.tokens] = 0
        return longest

    def _mark_absent(self, index: int, error: PeerLostError) -> None:
        share = self._shares[index]
        self._lose(share.rank, error)
        self._shares[index] = dataclasses.replace(share, peer=None)

    def _lose(self, rank: int, error: PeerLostError) -> None:
        known = self._peers.get(rank)
        if known is not None:
            self._lost[rank, known[0]] = str(error)
            log.warning("rank lost", rank=rank, error=str(error))
            self.drop(rank)

    def close(self) -> None:
        """Gives every rank up."""
        for rank in list(self._peers):
            self.drop(rank)


class _Times:
    """Where the time of steps with several ranks goes. Summed up here, told to the service now and then."""

    def __init__(self) -> None:
        self._reset()
        self._reported = time.monotonic()

    def _reset(self) -> None:
        self._attention: dict[int, int] = {}
        self._exchange: list[int] = []
        self._phase = 0
        self._steps = 0
        self._step = 0

    def add_layer(self, local_ns: int, longest_ns: int, total_ns: int) -> None:
        """One layer: the root's own kernel, the slowest rank's, and the whole phase from sending to having it all."""
        self.add_rank(0, local_ns)
        self._phase += total_ns
        self._exchange.append(total_ns - max(local_ns, longest_ns))

    def add_rank(self, rank: int, ns: int) -> None:
        """Kernel time of a rank."""
        self._attention[rank] = self._attention.get(rank, 0) + ns

    def add_step(self, ns: int) -> None:
        """One step, from its plan to the last layer."""
        self._steps += 1
        self._step += ns

    def add_sampling(self, ns: int) -> None:
        """What follows the last layer."""
        self._step += ns

    def take(self) -> StepTimes | None:
        """What has come together since the last report, if it is time for one and there is any."""
        now = time.monotonic()
        if not self._steps or now - self._reported < REPORT_S:
            return None
        self._reported = now
        times = StepTimes(
            steps=self._steps,
            step_seconds=self._step / 1e9,
            attention_phase_seconds=self._phase / 1e9,
            attention_seconds={rank: ns / 1e9 for rank, ns in self._attention.items()},
            exchange_us=np.asarray(self._exchange, dtype=np.float64).__truediv__(1e3).round(1).tolist(),
        )
        self._reset()
        return times


_active: RankGroup | None = None


def activate() -> RankGroup:
    """Makes this process's group. Called once, before the model is built."""
    global _active
    _active = RankGroup()
    return _active


def active() -> RankGroup | None:
    """This process's group, if it is a root's engine worker."""
    return _active
