"""What steps with several ranks cost and gain, from times measured in the root's engine workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from tokenmesh.kv.messages import RankCounts, StepTimes
from tokenmesh.telemetry import metric_names
from tokenmesh.telemetry.metrics import BucketCounts
from tokenmesh.v1 import admin_pb2

WINDOW = 60
"""Reports looked at; one comes every half second at most."""


class GroupStats:
    """Recent steps, and counts since the start."""

    def __init__(self) -> None:
        self._recent: deque[StepTimes] = deque(maxlen=WINDOW)
        self.exchange = BucketCounts(metric_names.EXCHANGE_SECONDS)
        """Of every layer since the start."""
        self.steps = 0
        self.detached = 0
        self.recomputed = 0

    def add(self, times: StepTimes) -> None:
        """Takes a report."""
        self._recent.append(times)
        self.steps += times.steps
        self.exchange.add(us / 1e6 for us in times.exchange_us)

    def _attention(self, rank: int) -> float:
        return sum(times.attention_seconds.get(rank, 0.0) for times in self._recent)

    @property
    def step_seconds(self) -> float:
        """Of the recent steps, all together."""
        return sum(times.step_seconds for times in self._recent)

    def step_share(self, rank: int) -> float:
        """Share of the steps' time that a rank spent in its kernel."""
        total = self.step_seconds
        return self._attention(rank) / total if total else 0.0

    def describe(self, ranks: Iterable[RankCounts]) -> admin_pb2.GroupStatus:
        """Speed-up, efficiency and imbalance; zeros before the first step."""
        status = admin_pb2.GroupStatus(steps=self.steps, detached=self.detached, recomputed=self.recomputed)
        contexts = [entry.context_tokens for entry in ranks]
        if contexts and sum(contexts):
            status.imbalance = max(contexts) / (sum(contexts) / len(contexts))
        total = self.step_seconds
        if not total:
            return status
        took_part = {rank for times in self._recent for rank in times.attention_seconds}
        attention = sum(self._attention(rank) for rank in took_part)
        rest = total - sum(times.attention_phase_seconds for times in self._recent)
        status.speedup = (rest + attention) / total
        status.efficiency = (rest + attention / len(took_part)) / total
        exchange = np.concatenate([np.asarray(times.exchange_us) for times in self._recent])
        status.exchange_us_p50, status.exchange_us_p99 = np.percentile(exchange, (50, 99))
        return status
