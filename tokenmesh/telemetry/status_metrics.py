"""Metrics that a service's status holds already: read when scraped, so that there is one truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.registry import Collector

from tokenmesh import __version__
from tokenmesh.telemetry import metric_names as names
from tokenmesh.telemetry.metric_names import Metric
from tokenmesh.telemetry.metrics import Family, family
from tokenmesh.v1 import admin_pb2

_PLAIN: dict[Metric, str] = {
    names.RUNNING: "running",
    names.WAITING: "waiting",
    names.KV_BYTES: "kv_bytes",
    names.KV_TRANSFERS: "kv_transfers",
    names.KV_OPEN: "kv_open",
}
_OF_RANK: dict[Metric, str] = {
    names.RANK_ATTACHED: "attached",
    names.RANK_CONTEXT: "context_tokens",
    names.RANK_SEQUENCES: "sequences",
    names.RANK_SHARE: "step_share",
}
_OF_GROUP: dict[Metric, str] = {
    names.SHARED_STEPS: "steps",
    names.RANKS_DETACHED: "detached",
    names.RECOMPUTED: "recomputed",
}
_OF_STEPS: dict[Metric, str] = {
    names.SPEEDUP: "speedup",
    names.EFFICIENCY: "efficiency",
    names.IMBALANCE: "imbalance",
}
"""Known only once there has been something to measure."""

_WITHOUT_KV = (admin_pb2.ROLE_GATEWAY,)
_WITH_LEDGER = (admin_pb2.ROLE_PREFILL, admin_pb2.ROLE_DECODE_ROOT)
"""Who holds a worker's blocks its root alone knows, and shows."""


def role_name(role: admin_pb2.Role) -> str:
    """As in commands and log lines, e.g. ``decode-root``."""
    return admin_pb2.Role.Name(role).removeprefix("ROLE_").lower().replace("_", "-")


def decision_name(name: str) -> str:
    """A PrefillDecision as in labels and attributes, e.g. ``too_short``."""
    return name.removeprefix("PREFILL_DECISION_").lower()


@dataclass(eq=False)
class StatusCollector(Collector):
    """What one service says of itself, as metric families."""

    status: Callable[[], admin_pb2.GetStatusResponse]
    """As for AdminService."""
    counters: dict[Metric, Callable[[], Mapping[str, int]]] = field(default_factory=dict)
    """Counts by the one label of their metric."""

    def collect(self) -> Iterator[Family]:
        """prometheus_client's hook."""
        status = self.status()
        yield _filled(names.INFO, {(role_name(status.role), status.instance_id, __version__): 1})
        yield _filled(names.READY, {(): status.ready})
        for metric, name in _PLAIN.items():
            if status.role not in _WITHOUT_KV or not name.startswith("kv_"):
                yield _filled(metric, {(): getattr(status, name)})
        yield _filled(names.PEER_UP, {(role_name(peer.role), peer.address): peer.ready for peer in status.peers})
        for metric, counts in self.counters.items():
            known = {**dict.fromkeys(metric.values, 0), **counts()}
            yield _filled(metric, {(key,): count for key, count in known.items()})
        if status.role in _WITH_LEDGER:
            yield from _blocks(status)
        if status.ranks:
            for metric, name in _OF_RANK.items():
                yield _filled(metric, {(str(rank.rank),): getattr(rank, name) for rank in status.ranks})
        if status.HasField("group"):
            for metric, name in _OF_GROUP.items():
                yield _filled(metric, {(): getattr(status.group, name)})
            for metric, name in _OF_STEPS.items():
                value = getattr(status.group, name)
                yield _filled(metric, {(): value} if value else {})


def _blocks(status: admin_pb2.GetStatusResponse) -> Iterator[Family]:
    ranks = {str(rank.rank): (rank.blocks_total, rank.blocks_free) for rank in status.ranks}
    ranks = ranks or {"0": (status.blocks_total, status.blocks_free)}
    used = {rank: total - free for rank, (total, free) in ranks.items()}
    yield _filled(
        names.KV_BLOCKS,
        {(rank, "used"): used[rank] for rank in ranks} | {(rank, "free"): free for rank, (_, free) in ranks.items()},
    )
    yield _filled(names.KV_UTILIZATION, {(rank,): used[rank] / total for rank, (total, _) in ranks.items() if total})


def _filled(metric: Metric, values: Mapping[Any, float]) -> Family:
    """`values`: by the tuple of their labels."""
    filled = family(metric)
    for labels, value in values.items():
        filled.add_metric(labels, float(value))
    return filled
