"""Every service's /metrics under real requests: names, types, units, labels, and numbers that agree with each other."""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import RunningMesh
from tokenmesh.telemetry import metric_names as names

MAX_SERIES = 40
"""Of one metric of one service, buckets not counted."""

LONG = "The quick brown fox jumps over the lazy dog. " * 40

ALWAYS = (names.INFO, names.READY, names.RUNNING, names.WAITING, names.PEER_UP, names.RPC_SECONDS)
KV = (names.KV_BYTES, names.KV_TRANSFERS, names.KV_OPEN)
BLOCKS = (names.KV_BLOCKS, names.KV_UTILIZATION)
PROMPTS = (names.QUEUE_SECONDS, names.PROMPT_TOKENS, names.CACHED_TOKENS)
SHOWN = {
    "gateway": (*ALWAYS, names.GATEWAY_REQUESTS),
    "prefill": (*ALWAYS, *KV, *BLOCKS, *PROMPTS, names.PREFILL_REQUESTS, names.PREFILL_SECONDS),
    "decode-worker": (*ALWAYS, *KV, names.KV_DROPPED),
    "decode-root": (
        *(*ALWAYS, *KV, *BLOCKS, *PROMPTS, names.DECODE_REQUESTS, names.DECISIONS, names.KV_FAILURES),
        names.KV_DROPPED,
        *(names.REMOTE_PREFILL_SECONDS, names.KV_SECONDS, names.KV_EXPOSED_SECONDS, names.KV_GOODPUT),
        *(names.TTFT_SECONDS, names.ITL_SECONDS, names.GENERATED_TOKENS, names.EXCHANGE_SECONDS),
        *(names.RANK_ATTACHED, names.RANK_CONTEXT, names.RANK_SEQUENCES, names.RANK_SHARE, names.SHARED_STEPS),
        *(names.EFFICIENCY, names.SPEEDUP, names.IMBALANCE, names.RANKS_DETACHED, names.RECOMPUTED),
    ),
}
"""What each service shows; together, all that is declared."""


def addresses(mesh: RunningMesh) -> dict[str, str]:
    """gRPC address of a service of each role."""
    worker = mesh.config.worker_addresses(0)[0]
    return {
        "gateway": mesh.grpc_address,
        "prefill": mesh.prefill_address,
        "decode-root": mesh.root_address,
        "decode-worker": worker,
    }


def page(mesh: RunningMesh, role: str) -> str:
    address = addresses(mesh)[role]
    port = mesh.status(address).metrics_port
    return httpx.get(f"http://{address.rpartition(':')[0]}:{port}/metrics", timeout=10, follow_redirects=True).text


def scrape(mesh: RunningMesh, role: str) -> dict[str, Family]:
    """Families by name, as a Prometheus server would see them; counters without their _total."""
    return {family.name: family for family in text_string_to_metric_families(page(mesh, role))}


def total(families: dict[str, Family], name: str, **labels: str) -> float:
    """Sum of the samples that have these labels."""
    base = name.removesuffix("_total").removesuffix("_count").removesuffix("_sum")
    found = [s for s in families[base].samples if s.name == name and labels.items() <= s.labels.items()]
    return sum(sample.value for sample in found)


@pytest.fixture(scope="module")
def loaded(mesh: RunningMesh) -> dict[str, dict[str, Family]]:
    """What all services show after short prompts, which stay on the root, and long ones, which do not."""
    prompts = [prompt for number in range(4) for prompt in (f"{number} is", f"{number}. {LONG}")]
    with openai.OpenAI(base_url=f"{mesh.rest_url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        def complete(prompt: str) -> None:
            client.completions.create(
                model=mesh.config.model_name, prompt=prompt, max_tokens=48, extra_body={"ignore_eos": True}
            )

        # Together, so that they do not all find room on the root.
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(complete, prompts))
    mesh.wait_idle()
    return {role: scrape(mesh, role) for role in SHOWN}


def test_what_is_declared_is_shown_somewhere() -> None:
    # 1. The table above leaves nothing out.
    assert {metric for metrics in SHOWN.values() for metric in metrics} == set(names.METRICS)


@pytest.mark.parametrize("role", sorted(SHOWN))
def test_names_types_labels(loaded: dict[str, dict[str, Family]], role: str) -> None:
    # 1. What a service should show it shows, as declared, and nothing of ours besides.
    ours = {name: family for name, family in loaded[role].items() if name.startswith("tokenmesh_")}
    declared = {metric.name.removesuffix("_total"): metric for metric in SHOWN[role]}
    assert ours.keys() == declared.keys()
    for name, family in ours.items():
        metric = declared[name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        # 2. With the labels that it was declared with, and few series.
        series = defaultdict(int)
        for sample in family.samples:
            labels = set(sample.labels) - {"le"}
            assert labels == set(metric.labels), sample
            series[sample.name, "le" in sample.labels] += 1
        assert max((n for (_, buckets), n in series.items() if not buckets), default=0) <= MAX_SERIES, name


def test_engines_show_vllm_as_well(loaded: dict[str, dict[str, Family]]) -> None:
    # 1. vLLM's own names pass through wherever vLLM counts.
    for role in ("gateway", "prefill", "decode-root"):
        assert total(loaded[role], "vllm:prompt_tokens_total") > 0, role
    # 2. A worker has no engine, only Python.
    assert not any(name.startswith("vllm:") for name in loaded["decode-worker"])
    assert "python_info" in loaded["decode-worker"]


def test_the_numbers_agree(loaded: dict[str, dict[str, Family]]) -> None:
    root, prefill, gateway = (loaded[role] for role in ("decode-root", "prefill", "gateway"))
    # 1. Every sequence has one decision and one first token.
    decisions = total(root, "tokenmesh_prefill_decisions_total")
    assert decisions == total(root, "tokenmesh_time_to_first_token_seconds_count") >= 8
    assert total(root, "tokenmesh_prefill_decisions_total", reason="too_short") >= 4
    # 2. Every disaggregated one (for some the prefill service may have been too busy) has one transfer, with bytes,
    #    time and a transport that has a name. A client may have gone once its KV had arrived, before the first token.
    moved = total(root, "tokenmesh_prefill_decisions_total", reason="disaggregated")
    arrived = total(root, "tokenmesh_kv_transfer_duration_seconds_count")
    cancelled = total(root, "tokenmesh_decode_requests_total", outcome="aborted")
    assert 2 <= moved <= arrived <= moved + cancelled
    assert arrived == total(root, "tokenmesh_remote_prefill_seconds_count", outcome="OK")
    assert total(root, "tokenmesh_kv_transfer_duration_seconds_count", transport="unknown") == 0
    assert total(root, "tokenmesh_kv_transfer_duration_seconds_sum") > 0
    assert total(root, "tokenmesh_kv_transfer_bytes_total") > 1e6
    # 3. What the gateway has finished, the root has finished; other tests ask the root itself.
    finished = total(root, "tokenmesh_decode_requests_total", outcome="finished")
    assert finished >= total(gateway, "tokenmesh_gateway_requests_total", outcome="finished") >= 8
    assert total(prefill, "tokenmesh_prefill_requests_total", outcome="finished") >= moved
    # 4. The group has worked, and its figures are possible ones.
    assert total(root, "tokenmesh_shared_steps_total") > 0
    assert total(root, "tokenmesh_exchange_seconds_count") >= 30 * total(root, "tokenmesh_shared_steps_total") * 0.5
    assert 0 < total(root, "tokenmesh_token_parallel_efficiency") <= 1.05
    # 5. Nothing is held: all is idle.
    assert total(root, "tokenmesh_kv_blocks", state="used") == 0
    assert total(root, "tokenmesh_requests_running") == total(root, "tokenmesh_kv_transfers_open") == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("role", sorted(SHOWN))
def test_promtool_reads_the_page(mesh: RunningMesh, loaded: dict[str, dict[str, Family]], role: str) -> None:
    # 1. Prometheus's linter over the whole page.
    result = subprocess.run(["promtool", "check", "metrics"], input=page(mesh, role).encode(), capture_output=True)
    # 2. It has no complaint about ours; vLLM's and Python's are not ours to mend.
    complaints = [line for line in result.stderr.decode().splitlines() if line.startswith("tokenmesh_")]
    assert not complaints
    assert "error while linting" not in result.stderr.decode()
