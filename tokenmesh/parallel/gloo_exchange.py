"""The exchange over Gloo, between hosts' memories: to compare UCX's with, by the same verbs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Store

from tokenmesh.parallel.exchange import PeerLostError

IDLE = timedelta(days=365)
"""For a rank, which may wait for its next step as long as its root likes."""


class GlooExchange:
    """One end of a pair; see `Exchange`. A process group of torch's with two members."""

    def __init__(self, store: Store, is_root: bool, deadline_s: float | None) -> None:
        """Meets the other end in `store`, which nobody else uses. `deadline_s`: None for a rank.

        Raises PeerLostError if the other end does not come in time.
        """
        self._peer = int(is_root)
        self._sent: list[Any] = []
        self._deadline = IDLE if deadline_s is None else timedelta(seconds=deadline_s)
        self._group: Any
        try:
            self._group = torch.distributed.ProcessGroupGloo(store, 1 - self._peer, 2, self._deadline)
            token = torch.zeros(1, dtype=torch.uint8)
            for verb in (self.send, self.receive) if is_root else (self.receive, self.send):
                verb(token)
        except Exception as error:
            raise PeerLostError(f"no pair: {_line(error)}") from error

    def send(self, data: torch.Tensor) -> None:
        """See `Exchange`."""
        if self._group is None:
            raise PeerLostError("closed")
        try:
            self._sent.append(self._group.send([data], self._peer, 0))
        except Exception as error:
            raise PeerLostError(_line(error)) from error

    def receive(self, data: torch.Tensor) -> None:
        """See `Exchange`."""
        if self._group is None:
            raise PeerLostError("closed")
        try:
            self._group.recv([data], self._peer, 0).wait(self._deadline)
            # What the peer has answered is out.
            self._sent.clear()
        except Exception as error:
            raise PeerLostError(_line(error)) from error

    def close(self) -> None:
        """See `Exchange`."""
        group, self._group = self._group, None
        if group is not None:
            self._sent.clear()
            group.abort()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
