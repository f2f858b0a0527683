"""The exchange over UCX: a tagged message per direction and layer, polled by whoever waits.

Measured against Gloo in docs/token-parallel.md: shared memory under UCX answers in tens of microseconds where Gloo's
TCP takes hundreds. A rank that has nothing to do sleeps on UCX's event descriptor.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import select
import time
from collections.abc import Sequence
from typing import Any

import torch

from tokenmesh.kv import transports
from tokenmesh.parallel.exchange import PeerLostError

TOKEN_BYTES = 16
"""Length of the secret that a root shows to the rank that it was given by."""

EAGER_BYTES = 64 << 10
"""Messages up to this size go out at once; larger ones are announced first, which costs a round trip."""

_HELLO_TAG = 1
_TO_RANK, _TO_ROOT = 1, 2
_CLOCK_EVERY = 256


class UcxLoop:
    """One UCX context and worker of a process, progressed by the thread that waits."""

    def __init__(self, transport: str) -> None:
        """`transport` as in KvTransferConfig."""
        settings = {**transports.environment(transport), "UCX_RNDV_THRESH": str(EAGER_BYTES)}
        with transports.in_environment(settings):
            from ucxx._lib import libucxx as core
            from ucxx._lib.arr import Array

            self.core, self.array = core, Array
            self._context = core.UCXContext({}, (core.Feature.TAG, core.Feature.WAKEUP))
            self.worker = core.UCXWorker(self._context)
            self.worker.init_blocking_progress_mode()
        self._listener: Any = None
        self._arrived: list[Any] = []

    def listen(self, port: int) -> int:
        """Accepts roots; returns the port, chosen by UCX if 0 was given."""
        self._listener = self.core.UCXListener.create(self.worker, port, self._arrived.append, deliver_endpoint=True)
        return int(self._listener.port)

    def accept(self, token: bytes, timeout: float) -> UcxExchange | None:
        """The pair that a root opens by showing `token`; None if no root came in time. Others are turned away."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not self._arrived:
                self.sleep(min(0.05, timeout))
                continue
            raw = self._arrived.pop(0)
            with contextlib.suppress(PeerLostError):
                hello = torch.zeros(TOKEN_BYTES + 8, dtype=torch.uint8)
                UcxExchange(self, raw, 0, _HELLO_TAG, 2.0).receive(hello)
                data = bytes(hello.tolist())
                if hmac.compare_digest(data[:TOKEN_BYTES], token):
                    base = int.from_bytes(data[TOKEN_BYTES:], "little") << 8
                    pair = UcxExchange(self, raw, base | _TO_ROOT, base | _TO_RANK, None)
                    pair.send(torch.zeros(1, dtype=torch.uint8))
                    return pair
            raw.close_blocking(period=10**9, max_attempts=1)
        return None

    def connect(self, host: str, port: int, token: bytes, deadline_s: float) -> UcxExchange:
        """Opens a pair with a rank. Raises PeerLostError if it does not answer within the deadline."""
        try:
            raw = self.core.UCXEndpoint.create(self.worker, host, port, True)
        except Exception as error:
            raise PeerLostError(f"cannot reach {host}:{port}: {error}") from error
        base = secrets.randbits(40) << 8
        hello = torch.tensor([*token, *(base >> 8).to_bytes(8, "little")], dtype=torch.uint8)
        UcxExchange(self, raw, _HELLO_TAG, 0, deadline_s).send(hello)
        pair = UcxExchange(self, raw, base | _TO_RANK, base | _TO_ROOT, deadline_s)
        try:
            pair.receive(torch.zeros(1, dtype=torch.uint8))
        except PeerLostError as error:
            pair.close()
            raise PeerLostError(f"{host}:{port} did not take us in: {error}") from error
        return pair

    def sleep(self, seconds: float, others: Sequence[int] = ()) -> None:
        """Sleeps until UCX, or one of the other file descriptors, has something, or the time is up."""
        self.worker.progress()
        if self._arrived or not self.worker.arm():
            return
        select.select([self.worker.epoll_file_descriptor, *others], [], [], seconds)
        self.worker.progress()

    def close(self) -> None:
        """Stops listening."""
        self._listener = None
        self._arrived.clear()


class UcxExchange:
    """One end of a pair; see `Exchange`."""

    def __init__(self, loop: UcxLoop, raw: Any, send_tag: int, recv_tag: int, deadline_s: float | None) -> None:
        self._loop = loop
        self._raw = raw
        self._send_tag = loop.core.UCXXTag(send_tag)
        self._recv_tag = loop.core.UCXXTag(recv_tag)
        self._full = loop.core.UCXXTagMaskFull
        self._deadline_s = deadline_s
        self._arrays: dict[tuple[int, int], Any] = {}
        self._sent: tuple[Any, torch.Tensor] | None = None
        self._receiving: tuple[Any, torch.Tensor] | None = None

    @property
    def transport(self) -> str:
        """What carries the rows, e.g. "sysv,posix"; UCX knows once a message has come."""
        return transports.of_endpoint(self._raw.handle) if self._raw is not None else ""

    @property
    def alive(self) -> bool:
        """UCX has not heard of the other end's end, so far."""
        return self._raw is not None and bool(self._raw.alive)

    def _array(self, data: torch.Tensor) -> Any:
        key = (data.data_ptr(), data.numel())
        array = self._arrays.get(key)
        if array is None:
            if len(self._arrays) > 1024:
                self._arrays.clear()
            array = self._arrays[key] = self._loop.array(data.numpy())
        return array

    def send(self, data: torch.Tensor) -> None:
        """See `Exchange`."""
        if self._raw is None:
            raise PeerLostError("closed")
        try:
            self._sent = (self._raw.tag_send(self._array(data), self._send_tag), data)
        except Exception as error:
            raise PeerLostError(f"{type(error).__name__}: {error}") from error

    def flush(self) -> None:
        """Progresses UCX until the last message is out. A large one needs that; nothing moves while its sender sleeps.

        Raises PeerLostError.
        """
        if self._sent is not None:
            self._until_completed(self._sent[0])
            self._sent = None

    def start_receive(self, data: torch.Tensor) -> Any:
        """Posts a receive; its `completed` turns true as UCX is progressed. Raises PeerLostError."""
        if self._raw is None:
            raise PeerLostError("closed")
        try:
            request = self._raw.tag_recv(self._array(data), self._recv_tag, self._full)
        except Exception as error:
            raise PeerLostError(f"{type(error).__name__}: {error}") from error
        self._receiving = (request, data)
        return request

    def receive(self, data: torch.Tensor) -> None:
        """See `Exchange`. Polls: a step waits for microseconds."""
        self._until_completed(self.start_receive(data))

    def _until_completed(self, request: Any) -> None:
        progress = self._loop.worker.progress
        deadline = None if self._deadline_s is None else time.monotonic() + self._deadline_s
        while not request.completed:
            for _ in range(_CLOCK_EVERY):
                progress()
                if request.completed:
                    break
            else:
                if deadline is not None and time.monotonic() > deadline:
                    raise PeerLostError(f"silent for {self._deadline_s:g} s")
                # The peer may be waiting for this very core.
                os.sched_yield()
        self.finish(request)

    @staticmethod
    def finish(request: Any) -> None:
        """Raises PeerLostError if a completed request has failed."""
        try:
            request.check_error()
        except Exception as error:
            raise PeerLostError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """See `Exchange`."""
        if self._raw is not None:
            self._raw.close_blocking(period=10**9, max_attempts=1)
            self._raw = None
            self._loop.worker.progress()
