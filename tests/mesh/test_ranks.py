"""A group of three ranks with little room: queueing, preemption, placement, and a rank that dies."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from tests.conftest import RunningMesh, free_port, mesh_config, run_mesh
from tests.mesh.exact import Truth, prompts, through_mesh
from tests.mesh.test_cancel import rest_body
from tests.mesh.test_failover import prompt
from tests.mesh.test_traces import CLIENT, new_trace
from tests.otlp import Receiver, Trace
from tokenmesh.config import MeshConfig
from tokenmesh.telemetry import span_names as names
from tokenmesh.v1 import admin_pb2, sampling_pb2, worker_pb2, worker_pb2_grpc

RANKS = 3
BLOCKS = 32
"""Of the whole group: 11, 11 and 10."""
NEW_TOKENS = 24
TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Group:
    """The mesh, the prompts of one wave, and what a plain engine answers."""

    mesh: RunningMesh
    file: Path
    wave: list[list[int]]
    truth: list[list[int]]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, spans: Receiver, truth: Truth) -> Iterator[Group]:
    """KV goes through the root here; the session's mesh pushes it to its owners directly."""
    folder = tmp_path_factory.mktemp("ranks")
    base = mesh_config()
    sections = base.model_dump(exclude={"max_model_len", "decode_service", "decode_worker"})
    decode = base.decode_service.model_dump() | {
        "token_parallel_size": RANKS,
        "max_num_seqs": 32,
        "group": {"kv_route": "via_root", "kv_blocks": BLOCKS, "timeout_s": TIMEOUT_S},
    }
    worker = base.decode_worker.model_dump() | {"port": two_free_ports()}
    config = MeshConfig(**sections, max_model_len=1024, decode_service=decode, decode_worker=worker)
    wave = [ids for ids in prompts() if 20 <= len(ids) <= 430][:32]
    with run_mesh(config, folder / "logs") as mesh:
        yield Group(mesh, folder / "logs" / "mesh.yaml", wave, truth.of(wave, NEW_TOKENS))


def two_free_ports() -> int:
    """The first of two adjacent ports that were free a moment ago."""
    while True:
        first = free_port()
        if first < 65535 and not any(
            c.laddr and c.laddr.port == first + 1 for c in psutil.net_connections("tcp") if c.status == "LISTEN"
        ):
            return first


def received_on(trace: Trace) -> set[int]:
    """Ranks other than the root that received KV in a trace."""
    return {span.attributes[names.RANK] for span in trace.named(names.KV_RECEIVE) if span.role == "decode-worker"}


async def watch(mesh: RunningMesh, done: asyncio.Event) -> list[list[admin_pb2.RankStatus]]:
    """What the root tells about its ranks, a few times a second."""
    seen = []
    while not done.is_set():
        seen.append(list((await asyncio.to_thread(mesh.status, mesh.root_address)).ranks))
        await asyncio.sleep(0.1)
    return seen


def worker_process(group: Group, replica: int) -> psutil.Process:
    """The process of one decode worker of this mesh."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "decode-worker" in line and str(group.file) in line and line[-1] == str(replica):
            return process
    raise AssertionError("no such worker")


@pytest.mark.timeout(900)
async def test_a_load_over_capacity_completes_by_queueing(group: Group) -> None:
    # (1) 32 sequences at once, which need about three times the blocks that the group has.
    mesh = group.mesh
    needed = sum(-(-(len(ids) + NEW_TOKENS) // 128) for ids in group.wave)
    assert needed > 2 * BLOCKS
    done = asyncio.Event()
    watching = asyncio.create_task(watch(mesh, done))
    answers = await through_mesh(mesh, group.wave, concurrent=32, new_tokens=NEW_TOKENS)
    done.set()
    seen = await watching

    # (2) Nobody was refused, and everybody got the plain engine's tokens.
    assert [tokens for tokens, _ in answers] == group.truth

    # (3) All ranks were used, nearly all blocks were held, and the ledger added up at every look.
    assert {rank.rank for ranks in seen for rank in ranks if rank.sequences} == {0, 1, 2}
    # The ledger has told nothing before its first step.
    told = [ranks for ranks in seen if ranks[0].blocks_total]
    assert told
    for ranks in told:
        assert [rank.blocks_total for rank in ranks] == [11, 11, 10]
        assert all(rank.blocks_free <= rank.blocks_total for rank in ranks)
    held = max(sum(rank.blocks_total - rank.blocks_free for rank in ranks) for ranks in told)
    print(f"{held} of {BLOCKS} blocks held at most")
    assert held >= 0.9 * BLOCKS

    # (4) Nothing is left.
    assert not any((await asyncio.to_thread(mesh.wait_idle)).values())


def test_a_worker_takes_little_more_than_its_partition(group: Group) -> None:
    # Proportional set sizes: what processes share is counted once.
    worker = worker_process(group, 0)
    processes = [worker, *worker.children(recursive=True)]
    assert len(processes) == 3, "the service, its shard and the shard's mover"
    total = sum(process.memory_full_info().pss for process in processes)
    with grpc.insecure_channel(group.mesh.config.worker_addresses(0)[0]) as channel:
        partition = (
            worker_pb2_grpc.WorkerServiceStub(channel).GetStats(worker_pb2.GetStatsRequest(), timeout=5).kv_bytes
        )
    # Its blocks, not all that it may take.
    assert 0 < partition < group.mesh.config.decode_worker.kv_cache_memory_bytes
    print(f"a worker takes {(total - partition) / 2**30:.2f} GiB beyond its partition")
    assert total < partition + (1 << 30)


@pytest.mark.timeout(900)
async def test_prompts_computed_on_the_root_decode_on_all_ranks(group: Group) -> None:
    # (1) Cold, and with no prefill service's help: the root computes in chunks what two other ranks attend to.
    mesh = group.mesh
    await asyncio.to_thread(mesh.reset_caches)
    done = asyncio.Event()
    watching = asyncio.create_task(watch(mesh, done))
    answers = await through_mesh(mesh, group.wave[:16], concurrent=16, new_tokens=NEW_TOKENS, local=True)
    done.set()
    seen = await watching

    # (2) Token for token, on all ranks, and nothing is left.
    assert [tokens for tokens, _ in answers] == group.truth[:16]
    assert {decision for _, decision in answers} == {sampling_pb2.PREFILL_DECISION_DECODE_ONLY}
    assert {rank.rank for ranks in seen for rank in ranks if rank.sequences} == {0, 1, 2}
    assert not any((await asyncio.to_thread(mesh.wait_idle)).values())


@pytest.mark.timeout(900)
async def test_a_killed_rank_costs_time_and_no_token(group: Group, spans: Receiver) -> None:
    mesh = group.mesh
    # Spans of what came before are still on their way.
    await asyncio.sleep(1.5)
    seen = len(spans.all())
    await asyncio.to_thread(mesh.reset_caches)
    before = await asyncio.to_thread(mesh.status, mesh.root_address)

    # (1) Through the gateway, one sequence for each rank, as others decode.
    clients = [new_trace() for _ in range(RANKS)]
    bodies = [rest_body(mesh, prompt(300, seed=70 + i), max_tokens=300, stream=False) for i in range(RANKS)]
    http = httpx.AsyncClient(base_url=mesh.rest_url, timeout=240)
    asked = [
        asyncio.create_task(http.post("/v1/completions", json=body, headers=headers))
        for body, (_, headers) in zip(bodies, clients, strict=True)
    ]
    # What a worker has not told of its part dies with it.
    while not any(2 in received_on(spans.trace(trace_id)) for trace_id, _ in clients):
        assert not any(answer.done() for answer in asked)
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.5)

    # A wave is decoding on all ranks when the second worker is killed.
    wave = asyncio.create_task(through_mesh(mesh, group.wave, concurrent=16, new_tokens=NEW_TOKENS))
    victim = await asyncio.to_thread(worker_process, group, 1)
    while (await asyncio.to_thread(mesh.status, mesh.root_address)).ranks[2].sequences < 2:
        assert not wave.done()
        await asyncio.sleep(0.05)
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.monotonic()

    # (2) The root notices within its deadline.
    while (await asyncio.to_thread(mesh.status, mesh.root_address)).ranks[2].attached:
        assert time.monotonic() - killed < TIMEOUT_S + 5
        await asyncio.sleep(0.05)
    noticed_ns = time.time_ns()
    print(f"noticed after {time.monotonic() - killed:.2f} s")

    # (3) Every stream completes with the same tokens.
    assert [tokens for tokens, _ in await wave] == group.truth
    after = await asyncio.to_thread(mesh.status, mesh.root_address)
    assert after.group.detached == before.group.detached + 1
    assert [rank.attached for rank in after.ranks] == [True, True, False]

    answers = [await answer for answer in asked]
    await http.aclose()
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [300] * RANKS

    # The traces are whole, and call no sequence failed.
    await asyncio.sleep(1.5)
    through_gateway = [spans.trace(trace_id) for trace_id, _ in clients]
    (hit,) = [trace for trace in through_gateway if 2 in received_on(trace)]
    assert {("gateway", "decode-root"), ("decode-root", "prefill"), ("decode-root", "decode-worker")} == hit.edges()
    met = []
    for trace in through_gateway:
        assert trace.orphans({CLIENT}) == []
        assert not any(span.error for span in trace.spans), [span for span in trace.spans if span.error]
        decode = trace.one(names.DECODE)
        # On a machine that prefills slowly, some are done before.
        if decode.end_ns > noticed_ns:
            assert names.RANK_LOST in decode.events
            met.append(decode)
    ids = {span.trace_id for span in spans.all()[seen:] if span.name == names.DECODE}
    ids -= {trace_id for trace_id, _ in clients}
    traces = [spans.trace(trace_id) for trace_id in ids]
    decodes = [span for trace in traces for span in trace.named(names.DECODE)]
    assert len(decodes) == len(group.wave)
    assert not any(span.error for span in decodes)
    # Those that lived through it say which rank it was, and why it went.
    met += [span for span in decodes if names.RANK_LOST in span.events]
    assert met
    for span in met:
        lost = span.details[span.events.index(names.RANK_LOST)]
        assert lost[names.RANK] == 2
        assert lost[names.LOSS_REASON]
    assert [name for trace in traces for name in trace.orphans(set())] == []

    # (4) Nothing is left, on the prefill service neither.
    assert not any((await asyncio.to_thread(mesh.wait_idle)).values())

    # (5) A worker that comes back is taken in again, and takes its share.
    command = [sys.executable, "-m", "tokenmesh.cli.main", "serve", "decode-worker", "-c", str(group.file)]
    back = subprocess.Popen(  # noqa: ASYNC220 - it outlives this test's loop only if the test fails
        [*command, "--replica", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (await asyncio.to_thread(mesh.status, mesh.root_address)).ranks[2].attached:
            assert back.poll() is None
            await asyncio.sleep(0.2)
        done = asyncio.Event()
        watching = asyncio.create_task(watch(mesh, done))
        answers = await through_mesh(mesh, group.wave[:12], concurrent=12, new_tokens=NEW_TOKENS)
        done.set()
        assert [tokens for tokens, _ in answers] == group.truth[:12]
        assert any(ranks[2].sequences for ranks in await watching)

        # (6) Told to stop, it leaves the group first: nobody's tokens change.
        wave = asyncio.create_task(through_mesh(mesh, group.wave[:12], concurrent=12, new_tokens=NEW_TOKENS))
        await asyncio.sleep(random.uniform(0.5, 1.5))
        back.terminate()
        assert [tokens for tokens, _ in await wave] == group.truth[:12]
        assert await asyncio.to_thread(back.wait, 30) == 0
        left = [
            line for line in (group.file.parent / "decode-root-0.log").read_text().splitlines() if "detached" in line
        ]
        assert json.loads(left[-1])["reason"] == "drained"
    finally:
        back.kill()
