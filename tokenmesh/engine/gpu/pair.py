"""Two GPUs that exchange rows over NCCL: vLLM's communicator, with two members.

A pair of its own for every rank, so that ranks join and leave one at a time, and a death breaks one pair. All verbs
only enqueue on the current stream, and CUDA graphs may hold them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

from tokenmesh.parallel.exchange import PeerLostError

ID_BYTES = 128
"""Length of what both ends must know to find each other."""

LOCK_S = 0.5
CLOSE_S = 10.0


def new_id() -> bytes:
    """Names a pair that is to be."""
    return bytes(NCCLLibrary().ncclGetUniqueId().internal)


class NcclPair:
    """One end. Its verbs raise PeerLostError once it is aborted; used by one thread but for `abort`."""

    def __init__(self, unique_id: bytes, is_root: bool, device: torch.device) -> None:
        """Meets the other end, which must come at the same time. Raises PeerLostError.

        NCCL connects two GPUs with their first message, which a graph cannot: there is one each way before this ends.
        """
        self._peer = int(is_root)
        self._aborting: threading.Thread | None = None
        self._using = threading.Lock()
        try:
            self._comm = PyNcclCommunicator.from_unique_id_bytes(unique_id, 1 - self._peer, 2, device)
        except RuntimeError as error:
            raise PeerLostError(f"no NCCL pair: {error}") from error
        token = torch.zeros(1, dtype=torch.uint8, device=device)
        for verb in (self.send, self.receive) if is_root else (self.receive, self.send):
            verb(token)
        # Not the device: kernels of a pair that was given up may wait there for ever.
        torch.cuda.current_stream(device).synchronize()

    @contextlib.contextmanager
    def _in_one_go(self) -> Iterator[torch.cuda.Stream]:
        with self._using:
            if self._aborting is not None:
                raise PeerLostError("aborted")
            try:
                self._comm.group_start()
                try:
                    yield torch.cuda.current_stream()
                finally:
                    self._comm.group_end()
            except RuntimeError as error:
                raise PeerLostError(str(error)) from error

    def send(self, *tensors: torch.Tensor) -> None:
        """Sends contiguous tensors."""
        with self._in_one_go() as stream:
            for tensor in tensors:
                self._comm.send(tensor, self._peer, stream)

    def receive(self, *tensors: torch.Tensor) -> None:
        """Fills contiguous tensors with what the other end sends in one go, in the same order."""
        with self._in_one_go() as stream:
            for tensor in tensors:
                self._comm.recv(tensor, self._peer, stream)

    @property
    def aborted(self) -> bool:
        """Nothing is exchanged any more."""
        return self._aborting is not None

    def abort(self) -> None:
        """Ends what is under way, whatever it waits for; buffers then hold anything. Does not block for long."""
        # A verb that cannot enqueue any more, since the GPU waits for the other end, is helped by nothing but this.
        held = self._using.acquire(timeout=LOCK_S)
        try:
            if self._aborting is None:
                # NCCL's call returns only when the graphs that hold the pair are gone.
                self._aborting = threading.Thread(target=self._abort, name="nccl-abort", daemon=True)
                self._aborting.start()
        finally:
            if held:
                self._using.release()

    def _abort(self) -> None:
        torch.cuda.set_device(self._comm.device)
        self._comm.nccl.ncclCommAbort(self._comm.comm)

    def close(self) -> None:
        """Frees the pair, when no graph holds it any more."""
        self.abort()
        assert self._aborting is not None
        self._aborting.join(CLOSE_S)
