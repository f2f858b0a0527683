"""A decode root's engine and its ranks without the services around them: for benchmarks, and for tests of exactness.

Prompts are computed by the engine itself, or (`pretend`) not at all: their KV counts as fetched and holds whatever the
blocks held, which costs a decode step exactly what real KV costs.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import yaml

from benchmarks.harness import median
from services.decode.root.group import Group
from tokenmesh.cli.child import Child
from tokenmesh.cli.serve import ServiceRole
from tokenmesh.cli.status import Endpoint
from tokenmesh.config import MeshConfig
from tokenmesh.engine.host import EngineHost, run_engine
from tokenmesh.engine.settings import FetchFrom
from tokenmesh.kv.messages import KvArrived, RankDetached, Settled, StepTimes, Synced, ToService, WantKv
from tokenmesh.model_store import resolve_model

ATTACH_TIMEOUT_S = 300.0
"""For all ranks. More shards than cores may need several attempts, of which one takes up to a minute."""


@dataclass
class Stream:
    """One finished sequence."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each token came, time.perf_counter()."""


def random_prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Random token ids of these lengths."""
    source = random.Random(seed)
    return [source.choices(range(1000, 40_000), k=length) for length in lengths]


def step_seconds(streams: Sequence[Stream]) -> float:
    """Median time between two tokens while all sequences decode together."""
    begun = max(stream.times[1] for stream in streams)
    ended = min(stream.times[-1] for stream in streams)
    stamps = [t for t in streams[0].times if begun <= t <= ended]
    return median([b - a for a, b in pairwise(stamps)])


class EngineGroup:
    """A running root with all its ranks attached."""

    def __init__(self, engine: EngineHost, group: Group, workers: Sequence[Child]) -> None:
        self.engine = engine
        self.group = group
        self.workers = workers
        self.times: list[StepTimes] = []
        """What engine workers reported, oldest first."""

    async def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, pretend: bool = False) -> list[Stream]:
        """Greedy, all at once, to exactly `max_tokens` tokens."""
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        async def one(ids: Sequence[int]) -> Stream:
            name = secrets.token_hex(8)
            params = SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            if pretend:
                params.extra_args = {"kv_transfer_params": {FetchFrom.KEY: name}}
            stream = Stream()
            prompt = TokensPrompt(prompt_token_ids=list(ids))
            async for output in self.engine.llm.generate(prompt, params, name):
                new = output.outputs[0].token_ids
                stream.tokens += new
                stream.times += [time.perf_counter()] * len(new)
            return stream

        return await asyncio.gather(*(one(ids) for ids in prompts))


@asynccontextmanager
async def engine_group(
    config: MeshConfig, folder: Path, worker_env: Mapping[str, str] | None = None
) -> AsyncIterator[EngineGroup]:
    """A root and its ranks for the length of the block; workers are processes with logs in `folder`.

    `worker_env`: environment variables that they have besides ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "mesh.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    running: EngineGroup | None = None
    group = Group(config.decode_service, "bench", config.worker_addresses(0))

    def handle(message: ToService) -> None:
        assert running is not None
        match message:
            case WantKv():
                for shard in range(running.engine.shards):
                    running.engine.hub.send(f"worker-{shard}", KvArrived(message.request_id, True))
            case Synced() | Settled():
                group.settling.note(message)
            case StepTimes():
                running.times.append(message)
                group.handle(message)
            case RankDetached():
                group.handle(message)

    async with AsyncExitStack() as stack:
        workers = await _start_workers(config, file, stack, worker_env)
        path = await asyncio.to_thread(resolve_model, config.model)
        engine = await stack.enter_async_context(run_engine(config, config.decode_service, path, 0, handle))
        running = EngineGroup(engine, group, workers)
        await group.start(engine)
        stack.push_async_callback(group.close)
        await _all_attached(running)
        # The scheduler hears of ranks before a step, and a wave that came at once could be placed without them.
        await asyncio.sleep(0.2)
        await running.generate([[5, 6]], 1)
        running.times.clear()
        yield running


async def _start_workers(
    config: MeshConfig, file: Path, stack: AsyncExitStack, env: Mapping[str, str] | None
) -> list[Child]:
    """Starts the decode workers of a mesh file, for as long as the stack is open."""
    children = []
    for replica, address in enumerate(config.worker_addresses(0)):
        command = [sys.executable, "-m", "tokenmesh.cli.main", "serve", "decode-worker", "-c", str(file)]
        endpoint = Endpoint(ServiceRole.DECODE_WORKER, replica, address)
        child = Child(endpoint, [*command, "--replica", str(replica)], file.parent / f"{endpoint.name}.log", env)
        stack.push_async_callback(child.stop, asyncio.Event())
        children.append(child)
    return children


async def _all_attached(running: EngineGroup) -> None:
    deadline = time.monotonic() + ATTACH_TIMEOUT_S
    while missing := [rank for rank in running.group.ranks if not rank.attached]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {missing[0].rank} is not attached: {missing[0].error}")
        await asyncio.sleep(0.2)
