"""The exchange over a process group of torch's that has two members: NCCL between GPUs, Gloo between hosts' memories.

Pairwise, like every exchange: ranks come and go one at a time, and NCCL's or Gloo's failure is the failure of one pair.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed import Store

from tokenmesh.parallel.exchange import PeerLostError

Backend = Literal["nccl", "gloo"]

IDLE = timedelta(days=365)
"""For a rank, which may wait for its next step as long as its root likes."""


class ProcessGroupExchange:
    """One end of a pair; see `Exchange`. Buffers lie on the GPU for NCCL, and in host memory for Gloo.

    With NCCL both verbs only enqueue on the current stream, so that a step needs no synchronisation with the host; what
    was sent and received is there when the stream has got that far.
    """

    def __init__(
        self,
        backend: Backend,
        store: Store,
        is_root: bool,
        deadline_s: float | None,
        device: torch.device | None = None,
    ) -> None:
        """Meets the other end in `store`, which nobody else uses. `deadline_s`: None for a rank.

        `device`: for NCCL, this end's GPU. Raises PeerLostError if the other end does not come in time.
        """
        self._peer = int(is_root)
        self._me = 1 - self._peer
        self._sent: list[Any] = []
        self._waits = backend == "gloo"
        self._deadline = IDLE if deadline_s is None else timedelta(seconds=deadline_s)
        try:
            self._group = self._make(backend, store, device)
            # NCCL connects with the first message: not within a step.
            self._meet(device)
        except Exception as error:
            raise PeerLostError(f"no {backend} pair: {_line(error)}") from error

    def _make(self, backend: Backend, store: Store, device: torch.device | None) -> Any:
        if backend == "gloo":
            return torch.distributed.ProcessGroupGloo(store, self._me, 2, self._deadline)
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = self._deadline
        group = torch.distributed.ProcessGroupNCCL(store, self._me, 2, options)
        group.bound_device_id = device
        return group

    def _meet(self, device: torch.device | None) -> None:
        token = torch.zeros(1, dtype=torch.uint8, device=device)
        for verb in (self.send, self.receive) if self._peer else (self.receive, self.send):
            verb(token)
        if device is not None:
            torch.cuda.synchronize(device)

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
            work = self._group.recv([data], self._peer, 0)
            if self._waits:
                work.wait(self._deadline)
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
