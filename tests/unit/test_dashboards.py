"""Dashboards and rules: made from the declarations, committed as made, and full of names that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import make_dashboards
from tokenmesh.telemetry import metric_names as names

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
BOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
RULES = DEPLOY / "prometheus" / "rules.yaml"


def queries(path: Path) -> list[str]:
    """Every expression in a file."""
    found: list[str] = []

    def look(node: Any) -> None:
        if isinstance(node, dict):
            found.extend(value for key, value in node.items() if key == "expr")
            node = list(node.values())
        if isinstance(node, list):
            for each in node:
                look(each)

    look(yaml.safe_load(path.read_text()))
    return found


def test_what_is_committed_is_what_is_made(tmp_path: Path) -> None:
    # 1. Made anew.
    make_dashboards.write(tmp_path)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.*")}
    # 2. Not a file differs, and none is missing: `make dashboards`.
    assert {path.parent.name for path in made} == {"grafana", "prometheus"}
    for path, text in made.items():
        assert (DEPLOY / path).read_text() == text, path
    assert len(BOARDS) == len(made) - 1 == 4


@pytest.mark.parametrize("path", [*BOARDS, RULES], ids=lambda path: path.name)
def test_every_name_in_a_query_is_declared(path: Path) -> None:
    # 1. What a query may speak of: a metric, or a series of a histogram.
    known = {metric.name for metric in names.METRICS}
    for metric in names.METRICS:
        if metric.kind == "histogram":
            known |= {f"{metric.name}_{series}" for series in ("bucket", "sum", "count")}
    # 2. It speaks of nothing else.
    used = {name for query in queries(path) for name in re.findall(r"\btokenmesh_\w+", query)}
    assert used
    assert used <= known


def test_every_metric_is_on_a_dashboard() -> None:
    text = " ".join(query for path in BOARDS for query in queries(path))
    missing = {metric.name for metric in names.METRICS if metric.name not in text}
    # Who runs, and whom it can reach: the latter has an alert.
    assert missing == {"tokenmesh_info", "tokenmesh_peer_up", "tokenmesh_shared_steps_total"}


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.name)
def test_panels_do_not_overlap(path: Path) -> None:
    # 1. Every panel has a place, an id and a query.
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 6
    assert all(panel["targets"] for panel in panels)
    # 2. No two share a cell of the grid.
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_a_query_that_does_not_fit_its_metric_cannot_be_made() -> None:
    for made in (
        lambda: make_dashboards.rate(names.READY),
        lambda: make_dashboards.quantile(0.5, names.KV_BYTES),
        lambda: make_dashboards.gauge(names.KV_BLOCKS, "nobody"),
    ):
        with pytest.raises(ValueError, match="not for this query"):
            made()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_reads_the_rules() -> None:
    # 1. With the configuration that loads them.
    config = DEPLOY / "prometheus" / "prometheus.yaml"
    result = subprocess.run(["promtool", "check", "config", str(config)], capture_output=True, text=True, check=False)
    # 2. All of them are read.
    assert result.returncode == 0, result.stderr
    assert f"{len(queries(RULES))} rules found" in result.stdout


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.name)
def test_prometheus_parses_the_queries(path: Path, tmp_path: Path) -> None:
    # 1. A dashboard's queries as rules, with Grafana's variable replaced as Grafana does.
    rules = [
        {"record": f"x{i}", "expr": query.replace("$__rate_interval", "1m")} for i, query in enumerate(queries(path))
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": rules}]}))
    result = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    # 2. They are PromQL.
    assert result.returncode == 0, result.stderr
