"""What of a transfer is not hidden behind its prefill, and what a first request pays that later ones do not."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.load import run_load
from benchmarks.mover_memory import Place
from benchmarks.movers import KvMoverError, Layout, MoverProcess
from benchmarks.servers import START_TIMEOUT_S, mesh_config
from services.prefill.service import PrefillServicer
from tokenmesh.cli.mesh import Mesh
from tokenmesh.config import MeshConfig
from tokenmesh.engine.host import run_engine
from tokenmesh.kv.messages import Expect, Settle, Settled
from tokenmesh.model_store import resolve_model
from tokenmesh.telemetry.metrics import Metrics
from tokenmesh.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc

CALL_S = 120.0
TOKEN_IDS = range(1000, 40_000)
"""Ordinary words of the embedded model."""


@dataclass(frozen=True)
class Exposure:
    """One prefill whose KV went to an owner. Seconds."""

    tokens: int
    prefill: float
    """From its scheduling to its first token."""
    exposed: float
    """From the end of computing to the owner's receipt."""
    wire: float
    """While KV was on the wire."""
    nbytes: int


class PrefillPath:
    """A prefill service with a real engine, and an owner's mover without one."""

    def __init__(self, stub: prefill_pb2_grpc.PrefillServiceStub, owner: MoverProcess, geometry: kv_pb2.BlockGeometry):
        self._stub = stub
        self._owner = owner
        self._geometry = geometry
        self._shards = [kv_pb2.KvShard(host=owner.address[0], port=owner.address[1])]
        self._random = random.Random(7)

    async def connect(self) -> str:
        """Connects the pair as a decode root does at its start; returns the transport."""
        request = prefill_pb2.ConnectOwnerRequest(shards=self._shards, geometry=self._geometry)
        return str((await self._stub.ConnectOwner(request, timeout=CALL_S)).transport)

    async def prefill(self, tokens: int) -> Exposure:
        """Computes a prompt of random tokens and moves its KV. Raises KvMoverError."""
        ticket = secrets.token_bytes(16)
        blocks = list(range(-(-tokens // self._geometry.block_size)))
        self._owner.hub.send("mover-0", Expect(ticket, blocks))
        target = kv_pb2.KvTarget(
            transfer_id=ticket,
            shards=self._shards,
            geometry=self._geometry,
            block_ids=blocks,
            codec=kv_pb2.KV_CODEC_NONE,
        )
        request = prefill_pb2.PrefillRequest(
            request_id=ticket.hex(),
            prompt_token_ids=self._random.choices(TOKEN_IDS, k=tokens),
            target=target,
            decode_root_id="bench",
        )
        answer = await self._stub.Prefill(request, timeout=CALL_S)
        self._owner.hub.send("mover-0", Settle(ticket))
        settled = await self._owner.hear(Settled)
        if not settled.complete:
            raise KvMoverError(f"the owner did not get the KV: {settled.error}")
        receipt = answer.receipt
        return Exposure(tokens, answer.compute_seconds, receipt.exposed_seconds, receipt.seconds, receipt.bytes)


@asynccontextmanager
async def prefill_path(config: MeshConfig, place: Place) -> AsyncIterator[PrefillPath]:
    """Both for the length of the block; `place` is the owner's."""
    path = await asyncio.to_thread(resolve_model, config.model)
    servicer = PrefillServicer(config.prefill_service, Metrics())
    server = grpc.aio.server()
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(run_engine(config, config.prefill_service, path, 0, servicer.handle))
        servicer.attach(engine)
        await server.start()
        stack.push_async_callback(server.stop, 1)
        geometry = engine.movers[0].geometry
        blocks = geometry.blocks_for(engine.llm.model_config.max_model_len)
        layout = Layout("owner", geometry.layers, geometry.block_bytes, range(blocks), range(blocks))
        transfer = config.prefill_service.kv_transfer
        chunk = transfer.chunk(device=place.device is not None)
        owner = MoverProcess(layout, blocks, transfer.transport, place, geometry, chunk)
        await owner.start()
        stack.push_async_callback(owner.stop)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        path_ = PrefillPath(prefill_pb2_grpc.PrefillServiceStub(channel), owner, geometry.to_proto())
        await path_.connect()
        yield path_


async def exposures(lengths: Sequence[int], rounds: int, eager: bool) -> list[Exposure]:
    """Prefills of every length in turn, `rounds` times after one that warms up; prefix cache off."""
    mesh = mesh_config(eager)
    section = {"cpu_omp_threads_bind": "0", "enable_prefix_caching": False}
    config = MeshConfig.model_validate(
        {**mesh.model_dump(), "prefill_service": {**mesh.prefill_service.model_dump(), **section}}
    )
    async with prefill_path(config, Place((1,))) as path:
        for tokens in lengths:
            await path.prefill(tokens)
        return [await path.prefill(tokens) for _ in range(rounds) for tokens in lengths]


async def first_requests(tokens: int, eager: bool, logs: Path) -> list[float]:
    """Seconds to first token of the first ten requests after a mesh has started, one at a time, prefix caches off."""
    mesh = mesh_config(eager)
    sections = {
        name: {**getattr(mesh, name).model_dump(), "enable_prefix_caching": False}
        for name in ("prefill_service", "decode_service")
    }
    config = MeshConfig.model_validate({**mesh.model_dump(), **sections})
    source = random.Random(11)
    ttfts = []
    async with Mesh(config, logs, START_TIMEOUT_S):
        for _ in range(10):
            prompt = source.choices(TOKEN_IDS, k=tokens)
            url = f"http://{config.gateway.host}:{config.gateway.port}"
            result = await run_load(url, config.model_name, [prompt], concurrency=1, output_tokens=4)
            ttfts.append(result.streams[0].ttft)
            # The client and vLLM's processes come to rest.
            await asyncio.sleep(2.0)
    return ttfts
