"""What clients of this gateway get: speed in the last seconds, decisions, and the requests that began last."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from tokenmesh.v1 import observe_pb2

WINDOW_S = 5.0
KEPT_TIMES = 4096
KEPT_REQUESTS = 100


@dataclass(eq=False)
class Sequence:
    """One sequence; times are those of time.monotonic()."""

    request_id: str
    prompt_tokens: int
    begun: float
    stamp: float
    """When it began, in seconds since the epoch."""
    trace_id: str = ""
    first: float = 0.0
    last: float = 0.0
    ended: float = 0.0
    tokens: int = 0
    decision: str = ""
    outcome: str = "running"

    def view(self) -> observe_pb2.RequestView:
        """As it is now."""
        view = observe_pb2.RequestView(
            request_id=self.request_id,
            trace_id=self.trace_id,
            begun=_stamp(self.stamp),
            duration=_duration((self.ended or time.monotonic()) - self.begun),
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.tokens,
            decision=self.decision,
            outcome=self.outcome,
        )
        if self.first:
            view.ttft.CopyFrom(_duration(self.first - self.begun))
        return view


class Pulse:
    """Of all sequences."""

    def __init__(self) -> None:
        self._recent: deque[Sequence] = deque(maxlen=KEPT_REQUESTS)
        self._tokens: deque[tuple[float, int]] = deque(maxlen=KEPT_TIMES)
        self._ttft: deque[tuple[float, float]] = deque(maxlen=KEPT_TIMES)
        self._itl: deque[tuple[float, float]] = deque(maxlen=KEPT_TIMES)
        self.decisions: Counter[str] = Counter()

    def begin(self, request_id: str, prompt_tokens: int) -> Sequence:
        """A sequence has come."""
        sequence = Sequence(request_id, prompt_tokens, begun=time.monotonic(), stamp=time.time())
        self._recent.appendleft(sequence)
        return sequence

    def decided(self, sequence: Sequence, decision: str) -> None:
        """Its prompt's KV is in place."""
        sequence.decision = decision
        self.decisions[decision] += 1

    def message(self, sequence: Sequence, tokens: int) -> None:
        """It got tokens."""
        now = time.monotonic()
        if not tokens:
            return
        if sequence.first:
            self._itl.append((now, now - sequence.last))
        else:
            sequence.first = now
            self._ttft.append((now, now - sequence.begun))
        sequence.last = now
        sequence.tokens += tokens
        self._tokens.append((now, tokens))

    def end(self, sequence: Sequence, outcome: str) -> None:
        """It is over."""
        sequence.ended, sequence.outcome = time.monotonic(), outcome

    def describe(self) -> observe_pb2.Pulse:
        """The last seconds."""
        since = time.monotonic() - WINDOW_S
        ttft, itl = _since(self._ttft, since), _since(self._itl, since)
        # A busy gateway's window is shorter than wanted: as long as what is kept of it.
        oldest = max(since, self._tokens[0][0]) if len(self._tokens) == KEPT_TIMES else since
        tokens = sum(count for at, count in self._tokens if at >= since)
        pulse = observe_pb2.Pulse(
            tokens_per_second=tokens / (time.monotonic() - oldest), decisions=dict(self.decisions)
        )
        if ttft:
            pulse.ttft_p50, pulse.ttft_p99 = np.percentile(ttft, (50, 99))
        if itl:
            pulse.itl_p50, pulse.itl_p99 = np.percentile(itl, (50, 99))
        return pulse

    def requests(self) -> list[observe_pb2.RequestView]:
        """The newest first."""
        return [sequence.view() for sequence in self._recent]


def _since(times: deque[tuple[float, float]], since: float) -> list[float]:
    return [value for at, value in times if at >= since]


def _stamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
