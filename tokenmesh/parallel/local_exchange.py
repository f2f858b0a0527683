"""The exchange for a rank that lives in the root's own process: for tests, and to measure what partitioning costs."""

from __future__ import annotations

import torch

from tokenmesh.parallel.exchange import PeerLostError
from tokenmesh.parallel.rank import RankProtocol


class LocalExchange:
    """The root's end; the other end computes inside `send`."""

    def __init__(self, protocol: RankProtocol) -> None:
        self._protocol: RankProtocol | None = protocol
        self._answer: torch.Tensor | None = None

    def send(self, data: torch.Tensor) -> None:
        """See `Exchange`."""
        if self._protocol is None:
            raise PeerLostError("closed")
        expected = self._protocol.expects
        if expected.numel() != data.numel():
            raise PeerLostError(f"{data.numel()} bytes sent, {expected.numel()} expected")
        expected.copy_(data)
        self._answer = self._protocol.received()

    def receive(self, data: torch.Tensor) -> None:
        """See `Exchange`."""
        if self._answer is None:
            raise PeerLostError("nothing was sent that has an answer")
        data[: self._answer.numel()].copy_(self._answer)
        self._answer = None

    def close(self) -> None:
        """See `Exchange`."""
        self._protocol = None
