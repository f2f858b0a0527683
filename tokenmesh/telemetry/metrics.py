"""A service's own instruments, made from their declarations, and the collector that shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from tokenmesh.telemetry.metric_names import Metric

Family = Any
"""A family of prometheus_client, which has no types."""


class Metrics(Collector):
    """All metrics of one service. Itself a collector, so that a process shows them beside vLLM's."""

    def __init__(self) -> None:
        # Of its own: tests run several services in one process.
        self.registry = CollectorRegistry()
        self._made: dict[Metric, Any] = {}

    def counter(self, metric: Metric) -> Counter:
        """The counter of that name."""
        return self._get(metric, lambda: Counter(metric.name, metric.help, metric.labels, registry=self.registry))

    def histogram(self, metric: Metric) -> Histogram:
        """The histogram of that name."""
        return self._get(
            metric,
            lambda: Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry),
        )

    def _get(self, metric: Metric, make: Callable[[], Any]) -> Any:
        if metric not in self._made:
            self._made[metric] = make()
        return self._made[metric]

    def add(self, collector: Collector) -> None:
        """Adds a collector that reads its values when asked."""
        self.registry.register(collector)

    def describe(self) -> Iterable[Family]:
        """prometheus_client's hook: names are not asked for before the service can say anything."""
        return ()

    def collect(self) -> Iterable[Family]:
        """prometheus_client's hook."""
        yield from self.registry.collect()


class BucketCounts(Collector):
    """A histogram that takes many values at once."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._edges = np.asarray([*metric.buckets, np.inf])
        self._counts = np.zeros(len(self._edges), dtype=np.int64)
        self._sum = 0.0

    def add(self, values: Iterable[float]) -> None:
        """Counts values, in the metric's unit."""
        array = np.asarray(list(values), dtype=np.float64)
        # Bounds belong to their bucket.
        places = np.searchsorted(self._edges, array, side="left")
        self._counts += np.bincount(places, minlength=len(self._edges))
        self._sum += float(array.sum())

    def collect(self) -> Iterable[Family]:
        """prometheus_client's hook."""
        filled = family(self._metric)
        bounds = [*map(str, self._metric.buckets), "+Inf"]
        filled.add_metric((), list(zip(bounds, self._counts.cumsum().tolist(), strict=True)), self._sum)
        return [filled]


def family(metric: Metric) -> Family:
    """An empty family, for collectors that read their values when asked."""
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[metric.kind](metric.name, metric.help, labels=metric.labels)
