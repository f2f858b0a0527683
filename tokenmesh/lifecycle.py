"""The life of a service, and of a request in it: one enum, its allowed transitions, one table of the living."""

from __future__ import annotations

import asyncio
import enum
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from tokenmesh.rpc.errors import MeshError, Reason, unavailable


class Stop(asyncio.Event):
    """Set when a service is to end. One that has not `started` is not waited for: an engine may take half an hour."""

    started = False


class RequestState(enum.IntEnum):
    """Ordered: everything from FINISHED on is terminal."""

    ACCEPTED = 0
    """Validated; the engine may still be waiting for blocks."""
    AWAITING_KV = 1
    """Blocks are reserved and a prefill service is at work."""
    RUNNING = 2
    """The engine computes: prompt or next tokens."""
    FINISHED = 3
    ABORTED = 4
    """Cancelled by the client or its deadline."""
    FAILED = 5

    @property
    def terminal(self) -> bool:
        """Whether nothing can follow."""
        return self >= RequestState.FINISHED


_NEXT: dict[RequestState, frozenset[RequestState]] = {
    RequestState.ACCEPTED: frozenset(set(RequestState) - {RequestState.ACCEPTED}),
    RequestState.AWAITING_KV: frozenset({RequestState.RUNNING, RequestState.ABORTED, RequestState.FAILED}),
    RequestState.RUNNING: frozenset({RequestState.FINISHED, RequestState.ABORTED, RequestState.FAILED}),
    RequestState.FINISHED: frozenset(),
    RequestState.ABORTED: frozenset(),
    RequestState.FAILED: frozenset(),
}


class InvalidTransitionError(Exception):
    """A bug: the request cannot go there from where it is."""


@dataclass
class LiveRequest:
    """One request and where it stands."""

    request_id: str
    owner: str = ""
    """On whose behalf it counts against credits."""
    prompt_tokens: int = 0
    state: RequestState = RequestState.ACCEPTED
    since: float = field(default_factory=time.monotonic)

    def enter(self, state: RequestState) -> None:
        """Moves on. Raises InvalidTransitionError; staying where it is is allowed."""
        if state is self.state:
            return
        if state not in _NEXT[self.state]:
            raise InvalidTransitionError(f"{self.request_id}: {self.state.name} → {state.name}")
        self.state = state


class RequestTable:
    """All live requests of a service. Bounds them, keeps ids unique, counts outcomes."""

    def __init__(self, limit: int, limit_per_owner: int | None = None) -> None:
        self.limit = limit
        self._limit_per_owner = limit_per_owner
        self._live: dict[str, LiveRequest] = {}
        self._owners: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.draining = False
        """For good: what is here ends, and nothing else comes."""
        self.paused = False
        """Refuses new requests for a moment."""

    def __len__(self) -> int:
        return len(self._live)

    def get(self, request_id: str) -> LiveRequest | None:
        """A live request."""
        return self._live.get(request_id)

    def count(self, state: RequestState) -> int:
        """Live requests in a state."""
        return sum(request.state is state for request in self._live.values())

    def tokens_before(self, state: RequestState) -> int:
        """Prompt tokens of requests that have not reached a state."""
        return sum(request.prompt_tokens for request in self._live.values() if request.state < state)

    def check_open(self) -> None:
        """Raises MeshError UNAVAILABLE (DRAINING) once it drains."""
        if self.draining:
            raise unavailable(Reason.DRAINING, "the service is shutting down")

    def check_room(self, count: int = 1) -> None:
        """Raises MeshError if that many more requests would be refused: as `admit`, but for ids and owners."""
        self._check_lets_in()
        self._check_limit(count)

    def _check_lets_in(self) -> None:
        self.check_open()
        if self.paused:
            raise unavailable(Reason.DRAINING, "the prefix cache is being emptied")

    def _check_limit(self, count: int) -> None:
        if len(self._live) + count > self.limit:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL, f"{self.limit} requests are already accepted"
            )

    @contextmanager
    def admit(self, request: LiveRequest) -> Iterator[LiveRequest]:
        """Keeps a request for the length of the block; whatever ends the block ends the request.

        Raises MeshError: UNAVAILABLE (DRAINING), ALREADY_EXISTS (DUPLICATE_REQUEST), RESOURCE_EXHAUSTED (QUEUE_FULL,
        NO_CREDIT).
        """
        self._check_lets_in()
        if request.request_id in self._live:
            raise MeshError(
                grpc.StatusCode.ALREADY_EXISTS,
                Reason.DUPLICATE_REQUEST,
                f"request {request.request_id} is already running",
            )
        self._check_limit(1)
        if self._limit_per_owner is not None and self._owners[request.owner] >= self._limit_per_owner:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.NO_CREDIT,
                f"{request.owner!r} already has {self._limit_per_owner} requests here",
            )
        self._live[request.request_id] = request
        self._owners[request.owner] += 1
        try:
            yield request
            request.enter(RequestState.FINISHED)
        except BaseException as error:
            # Cancellation and a dropped generator are not failures of ours.
            failed = isinstance(error, Exception)
            if not request.state.terminal:
                request.enter(RequestState.FAILED if failed else RequestState.ABORTED)
            raise
        finally:
            del self._live[request.request_id]
            self._owners[request.owner] -= 1
            if not self._owners[request.owner]:
                del self._owners[request.owner]
            self.outcomes[request.state.name.lower()] += 1
