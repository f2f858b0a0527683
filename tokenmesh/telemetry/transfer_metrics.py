"""Metrics of KV transfers, for the side that knows how they ended."""

from __future__ import annotations

from tokenmesh.telemetry import metric_names as names
from tokenmesh.telemetry.metrics import Metrics
from tokenmesh.v1 import kv_pb2


class TransferMetrics:
    """What transfers took."""

    def __init__(self, metrics: Metrics) -> None:
        self._seconds = metrics.histogram(names.KV_SECONDS)
        self._exposed = metrics.histogram(names.KV_EXPOSED_SECONDS)
        self._goodput = metrics.histogram(names.KV_GOODPUT)
        self._attempts = metrics.histogram(names.REMOTE_PREFILL_SECONDS)

    def transfer(self, receipt: kv_pb2.KvReceipt, codec: str) -> None:
        """One transfer that arrived whole. `codec`: its name, e.g. ``none``."""
        labels = (receipt.transport or "unknown", codec)
        self._seconds.labels(*labels).observe(receipt.seconds)
        self._exposed.labels(*labels).observe(receipt.exposed_seconds)
        if receipt.seconds > 0:
            self._goodput.labels(*labels).observe(receipt.bytes / receipt.seconds)

    def attempt(self, outcome: str, seconds: float) -> None:
        """One attempt at a remote prefill: "OK" or the reason of its failure."""
        self._attempts.labels(outcome).observe(seconds)
