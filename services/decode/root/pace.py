"""How fast sequences get their tokens, as the root's callers see it."""

from __future__ import annotations

import time

from tokenmesh.telemetry import metric_names as names
from tokenmesh.telemetry.metrics import Metrics
from tokenmesh.v1 import sampling_pb2


class PaceMetrics:
    """The root's instruments for it."""

    def __init__(self, metrics: Metrics) -> None:
        self.queue = metrics.histogram(names.QUEUE_SECONDS)
        self.ttft = metrics.histogram(names.TTFT_SECONDS)
        self.itl = metrics.histogram(names.ITL_SECONDS)
        self.prompt = metrics.counter(names.PROMPT_TOKENS)
        self.cached = metrics.counter(names.CACHED_TOKENS)
        self.generated = metrics.counter(names.GENERATED_TOKENS)


class Pace:
    """Of one sequence, from the call on."""

    def __init__(self, metrics: PaceMetrics) -> None:
        self._metrics = metrics
        self._last = time.monotonic()
        self.tokens = 0

    def first(self, usage: sampling_pb2.Usage, queue_seconds: float) -> None:
        """The prompt is computed."""
        self._metrics.prompt.inc(usage.prompt_tokens)
        self._metrics.cached.inc(usage.cached_tokens)
        self._metrics.queue.observe(queue_seconds)

    def message(self, tokens: int) -> None:
        """A message with so many new tokens is about to leave."""
        if not tokens:
            return
        now = time.monotonic()
        (self._metrics.itl if self.tokens else self._metrics.ttft).observe(now - self._last)
        self._metrics.generated.inc(tokens)
        self._last = now
        self.tokens += tokens
