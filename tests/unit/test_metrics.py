"""Metrics: what is declared is what is shown, with few labels, and in the form that Prometheus wants."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.decode.root.group_stats import GroupStats
from services.decode.root.pace import Pace, PaceMetrics
from tests.unit.fake_service import STATUS, free_ports
from tokenmesh.kv.messages import RankCounts, StepTimes
from tokenmesh.rpc.channel import open_channel
from tokenmesh.rpc.errors import Reason, invalid
from tokenmesh.rpc.server import PortInUseError, RpcServer
from tokenmesh.telemetry import metric_names as names
from tokenmesh.telemetry.endpoint import serve_metrics, shifted
from tokenmesh.telemetry.metrics import BucketCounts, Metrics
from tokenmesh.telemetry.status_metrics import StatusCollector, decision_name
from tokenmesh.telemetry.transfer_metrics import TransferMetrics
from tokenmesh.v1 import admin_pb2, admin_pb2_grpc, decode_pb2, decode_pb2_grpc, kv_pb2, sampling_pb2

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def shown(metrics: Metrics) -> Samples:
    """Every sample by name and labels."""
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def group_status() -> admin_pb2.GetStatusResponse:
    """A root with one worker that has worked."""
    status = admin_pb2.GetStatusResponse()
    status.CopyFrom(STATUS["decode-root"])
    stats = GroupStats()
    stats.add(StepTimes(2, 0.1, 0.06, {0: 0.05, 1: 0.04}, [30.0, 50.0]))
    status.group.CopyFrom(stats.describe([RankCounts(0, 90, 70, 2500, 3), RankCounts(1, 91, 71, 2400, 3)]))
    status.peers.add(role=admin_pb2.ROLE_PREFILL, address="p:9100", ready=True)
    return status


# Declarations.


def test_names_are_unique_and_end_in_their_unit() -> None:
    # 1. One name, one metric, one prefix.
    assert len({metric.name for metric in names.METRICS}) == len(names.METRICS) > 30
    assert all(re.fullmatch(r"tokenmesh_[a-z_]+", metric.name) for metric in names.METRICS)
    # 2. Counters, and only they, end in _total; histograms have buckets in order, and only they.
    for metric in names.METRICS:
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert (metric.kind == "histogram") == bool(metric.buckets), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name
    # 3. No label could name a request, and none has more than two.
    labels = {label for metric in names.METRICS for label in metric.labels}
    assert not labels & {"request_id", "trace_id", "prompt", "transfer_id", "user"}
    assert max(len(metric.labels) for metric in names.METRICS if metric is not names.INFO) <= 2


# What a status says.


@pytest.mark.parametrize("role", sorted(STATUS))
def test_a_status_is_shown_as_it_is(role: str) -> None:
    # 1. A service describes itself.
    metrics = Metrics()
    metrics.add(StatusCollector(lambda: STATUS[role]))
    samples = shown(metrics)
    # 2. Who it is, and how deep its queues are.
    ((_, info),) = [key for key in samples if key[0] == "tokenmesh_info"]
    assert dict(info)["role"] == role
    assert value(samples, "tokenmesh_requests_running") == STATUS[role].running
    assert value(samples, "tokenmesh_requests_waiting") == STATUS[role].waiting
    # 3. Blocks are shown by those who know who holds them, transfers by all but the gateway.
    present = {name for name, _ in samples}
    assert ("tokenmesh_kv_blocks" in present) == (role in ("prefill", "decode-root"))
    assert ("tokenmesh_kv_transfers_open" in present) == (role != "gateway")


def test_ranks_are_shown_one_by_one() -> None:
    # 1. A root with a worker.
    metrics, status = Metrics(), group_status()
    metrics.add(StatusCollector(lambda: status))
    samples = shown(metrics)
    # 2. Blocks by rank and state add up to what there is.
    for rank in status.ranks:
        used, free = (value(samples, "tokenmesh_kv_blocks", rank=str(rank.rank), state=s) for s in ("used", "free"))
        assert (used + free, free) == (rank.blocks_total, rank.blocks_free)
        assert value(samples, "tokenmesh_rank_context_tokens", rank=str(rank.rank)) == rank.context_tokens
        assert value(samples, "tokenmesh_kv_utilization_ratio", rank=str(rank.rank)) == used / rank.blocks_total
    # 3. How well they do together.
    assert value(samples, "tokenmesh_token_parallel_efficiency") == status.group.efficiency > 0
    assert value(samples, "tokenmesh_token_parallel_imbalance") == status.group.imbalance > 1
    assert value(samples, "tokenmesh_shared_steps_total") == 2
    assert value(samples, "tokenmesh_peer_up", role="prefill", peer="p:9100") == 1


def test_what_was_never_measured_is_absent() -> None:
    # 1. A group that has not made a step.
    metrics, status = Metrics(), group_status()
    status.group.CopyFrom(GroupStats().describe([]))
    metrics.add(StatusCollector(lambda: status))
    # 2. No efficiency of 0 that an alert would fall for.
    present = {name for name, _ in shown(metrics)}
    assert "tokenmesh_shared_steps_total" in present
    assert "tokenmesh_token_parallel_efficiency" not in present


def test_counts_by_reason_begin_at_zero() -> None:
    # 1. One of three outcomes has occurred, and one decision.
    metrics = Metrics()
    counters: Any = {
        names.DECODE_REQUESTS: lambda: {"finished": 3},
        names.DECISIONS: lambda: {decision_name("PREFILL_DECISION_TOO_SHORT"): 2},
    }
    metrics.add(StatusCollector(lambda: STATUS["decode-root"], counters))
    samples = shown(metrics)
    # 2. The others are there as well, so that their first occurrence is an increase.
    counts = [value(samples, "tokenmesh_decode_requests_total", outcome=o) for o in ("finished", "aborted", "failed")]
    assert counts == [3, 0, 0]
    assert value(samples, "tokenmesh_prefill_decisions_total", reason="too_short") == 2


# What is counted as it happens.


def test_exchange_times_fall_into_their_buckets() -> None:
    # 1. Layers of two reports: at a bound, below the first, beyond the last.
    stats = GroupStats()
    for times in ([20.0, 20.1], [1.0, 5e6]):
        stats.add(StepTimes(1, 1.0, 0.5, {0: 0.1, 1: 0.1}, times))
    metrics = Metrics()
    metrics.add(stats.exchange)
    samples = shown(metrics)
    # 2. A bound belongs to its bucket, everything to the last.
    bucket = "tokenmesh_exchange_seconds_bucket"
    assert [value(samples, bucket, le=le) for le in ("1e-05", "2e-05", "3e-05", "1.0", "+Inf")] == [1, 2, 3, 3, 4]
    assert value(samples, "tokenmesh_exchange_seconds_sum") == pytest.approx(5.0000411)


def test_many_values_at_once_are_as_good_as_one_by_one() -> None:
    # 1. The same values into ours and into prometheus_client's.
    values = np.random.default_rng(7).lognormal(-8, 3, 1000)
    ours, theirs = Metrics(), Metrics()
    counts = BucketCounts(names.EXCHANGE_SECONDS)
    counts.add(values[:400])
    counts.add(values[400:])
    ours.add(counts)
    for one in values:
        theirs.histogram(names.EXCHANGE_SECONDS).observe(one)
    # 2. No sample differs, but for the time of creation, which only theirs has.
    expected = {key: v for key, v in shown(theirs).items() if not key[0].endswith("_created")}
    assert shown(ours) == pytest.approx(expected)


def test_a_sequence_is_timed_message_by_message(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. A clock of our own: first token after 2 s, then one every 0.1 s, then an empty last message.
    now = 10.0
    monkeypatch.setattr("services.decode.root.pace.time.monotonic", lambda: now)
    metrics = Metrics()
    pace = Pace(PaceMetrics(metrics))
    now = 12.0
    pace.first(sampling_pb2.Usage(prompt_tokens=50, cached_tokens=16), 0.5)
    for _ in range(3):
        pace.message(1)
        now += 0.1
    pace.message(0)
    # 2. One TTFT, two gaps, three tokens.
    samples = shown(metrics)
    assert value(samples, "tokenmesh_time_to_first_token_seconds_sum") == pytest.approx(2.0)
    assert value(samples, "tokenmesh_inter_token_seconds_count") == 2
    assert value(samples, "tokenmesh_inter_token_seconds_sum") == pytest.approx(0.2)
    assert value(samples, "tokenmesh_generated_tokens_total") == pace.tokens == 3
    # 3. And the prompt.
    assert value(samples, "tokenmesh_prompt_tokens_total") == 50
    assert value(samples, "tokenmesh_cached_tokens_total") == 16


def test_a_transfer_is_counted_by_transport_and_codec() -> None:
    # 1. 8 MB in 4 ms, 1 ms of it exposed; and an attempt that failed.
    metrics = Metrics()
    transfers = TransferMetrics(metrics)
    receipt = kv_pb2.KvReceipt(bytes=8_000_000, seconds=0.004, exposed_seconds=0.001, transport="sysv")
    transfers.transfer(receipt, "none")
    transfers.attempt("KV_TRANSFER_FAILED", 0.1)
    samples, labels = shown(metrics), {"transport": "sysv", "codec": "none"}
    # 2. Time on the wire, what of it was not hidden, and bytes per second.
    assert value(samples, "tokenmesh_kv_transfer_duration_seconds_sum", **labels) == 0.004
    assert value(samples, "tokenmesh_kv_transfer_exposed_seconds_sum", **labels) == 0.001
    assert value(samples, "tokenmesh_kv_transfer_goodput_bytes_per_second_sum", **labels) == 2e9
    assert value(samples, "tokenmesh_remote_prefill_seconds_count", outcome="KV_TRANSFER_FAILED") == 1


# Calls.


class Fake(admin_pb2_grpc.AdminServiceServicer, decode_pb2_grpc.DecodeServiceServicer):
    """Answers, refuses, fails or waits, as the request id says."""

    async def GetStatus(self, request: Any, context: Any) -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.GenerateResponse]:
        yield decode_pb2.GenerateResponse(token_ids=[7])
        if request.request_id == "refused":
            raise invalid(Reason.BAD_REQUEST, "no")
        if request.request_id == "broken":
            raise RuntimeError("a bug")
        if request.request_id == "waits":
            await asyncio.sleep(60)


async def test_calls_are_timed_by_method_and_code() -> None:
    # 1. A server, and one call of each end.
    server = RpcServer("127.0.0.1", free_ports(1)[0])
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Fake(), server.server)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(Fake(), server.server)
    await server.start()
    async with open_channel(server.address) as channel:
        await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest())
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        for request_id, timeout in (("good", 10), ("refused", 10), ("broken", 10), ("waits", 0.2)):
            call = stub.Generate(decode_pb2.GenerateRequest(request_id=request_id), timeout=timeout)
            try:
                assert [list(part.token_ids) async for part in call] == [[7]]
            except grpc.aio.AioRpcError:
                assert request_id != "good"
        # 2. One client that goes away.
        call = stub.Generate(decode_pb2.GenerateRequest(request_id="waits"), timeout=10)
        await call.read()
        call.cancel()
        await asyncio.sleep(0.2)
    await server.stop(0)
    # 3. Each is counted once, under its own status.
    samples = shown(server.metrics)
    name, method = "tokenmesh_rpc_server_duration_seconds_count", "tokenmesh.v1.DecodeService/Generate"
    for code in ("OK", "INVALID_ARGUMENT", "INTERNAL", "DEADLINE_EXCEEDED", "CANCELLED"):
        assert value(samples, name, method=method, code=code) == 1, code
    assert value(samples, name, method="tokenmesh.v1.AdminService/GetStatus", code="OK") == 1


# The page.


async def test_a_service_shows_its_metrics_and_those_of_the_process() -> None:
    # 1. A free port is picked and told.
    metrics = Metrics()
    metrics.add(StatusCollector(group_status))
    async with serve_metrics(metrics, "127.0.0.1", 0) as port, httpx.AsyncClient() as client:
        page = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        # 2. Ours and Python's, each once.
        assert page.count("# TYPE tokenmesh_kv_blocks gauge") == 1
        assert page.count("# TYPE python_info gauge") == 1
        # 3. The same port cannot be had twice.
        with pytest.raises(PortInUseError, match=str(port)):
            async with serve_metrics(Metrics(), "127.0.0.1", port):
                pytest.fail("it was had twice")
    # 4. Nothing is left: neither on the page of the next service nor on the port.
    async with serve_metrics(Metrics(), "127.0.0.1", port), httpx.AsyncClient() as client:
        page = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        assert "tokenmesh_kv_blocks" not in page
    assert (shifted(0, 3), shifted(9400, 3)) == (0, 9403)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_say() -> None:
    # 1. All that a root and its calls can show.
    metrics = Metrics()
    metrics.add(StatusCollector(group_status))
    PaceMetrics(metrics)
    TransferMetrics(metrics).transfer(kv_pb2.KvReceipt(bytes=1, seconds=1), "none")
    metrics.histogram(names.RPC_SECONDS).labels("m", "OK").observe(1)
    metrics.add(GroupStats().exchange)
    # 2. Prometheus's own linter agrees.
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(metrics.registry), capture_output=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, b"")
