"""What moves between a root and one rank while a step runs, three verbs wide.

Every pair has one exchange of its own, so that a rank may join or leave between steps and a death breaks one pair.
"""

from __future__ import annotations

from typing import Protocol

import torch


class PeerLostError(Exception):
    """The other end is dead, silent beyond the deadline, or answered out of turn. The pair is of no more use."""


class Exchange(Protocol):
    """One end of a pair. Messages arrive whole and in order; both ends know their lengths.

    Buffers are flat uint8 tensors, allocated once and used again: implementations keep what they prepared for one.
    """

    def send(self, data: torch.Tensor) -> None:
        """Starts to send. `data` must stay as it is until the peer's next message has been received.

        Raises PeerLostError.
        """

    def receive(self, data: torch.Tensor) -> None:
        """Waits for the next message and fills `data`. Raises PeerLostError, at the deadline at the latest."""

    def close(self) -> None:
        """Gives the pair up. The peer notices. Idempotent."""
