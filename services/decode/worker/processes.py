"""The shard processes of a decode worker: as many as its root has tensor-parallel shards, started ahead of time."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import msgspec
import structlog

from services.decode.worker.shard import ShardArgs
from tokenmesh.config import ConfigError, DecodeWorkerConfig, GroupConfig
from tokenmesh.cpus import parse_cpus
from tokenmesh.gpus import check_device_transfer
from tokenmesh.kv.hub import LinkHub
from tokenmesh.kv.messages import ShardUp, ToService

log = structlog.get_logger()

START_TIMEOUT_S = 180.0
"""CUDA's libraries take a minute to load from a cold disk."""


class ShardProcesses:
    """Starts, counts and ends them."""

    def __init__(self, config: DecodeWorkerConfig, group: GroupConfig, replica: int, hub: LinkHub) -> None:
        """Raises ConfigError for ways of KV that lead to no GPU, if the group is one of GPUs."""
        self._device = group.exchange == "nccl"
        if self._device:
            check_device_transfer(config.kv_transfer, "decode_worker")
        self._config = config
        self._group = group
        self._replica = replica
        self.hub = hub
        self._processes: list[subprocess.Popen[bytes]] = []
        self._up: dict[int, asyncio.Event] = {}

    @property
    def numbers(self) -> range:
        """Numbers of the shards that run."""
        return range(len(self._processes))

    def note(self, message: ToService) -> bool:
        """Takes the messages that are about processes themselves; False for any other."""
        if isinstance(message, ShardUp):
            self._up[message.shard].set()
            return True
        return False

    async def ensure(self, count: int) -> None:
        """Makes it `count` shards, all up.

        Raises TimeoutError, OSError, and ConfigError for cores that are not given for all; then as many run as before.
        """
        if any(process.poll() is not None for process in self._processes):
            log.error("a shard has ended by itself")
            await self.stop()
        if count < len(self._processes):
            await self.stop()
        for args in [self._args(shard, count) for shard in range(len(self._processes), count)]:
            self._processes.append(self._start(args))
            self._up[args.shard] = asyncio.Event()
        waits = [event.wait() for event in self._up.values()]
        await asyncio.wait_for(asyncio.gather(*waits), START_TIMEOUT_S)

    async def restart(self) -> None:
        """Ends all and starts as many again."""
        count = len(self._processes)
        await self.stop()
        await self.ensure(count)

    def _args(self, shard: int, count: int) -> ShardArgs:
        config, transfer = self._config, self._config.kv_transfer
        number = self._replica * count + shard
        return ShardArgs(
            shard=shard,
            hub=self.hub.address,
            cores=_cores(config.cpu_omp_threads_bind, shard),
            cpus=sorted(os.sched_getaffinity(0)),
            host=config.host,
            exchange=self._group.exchange,
            exchange_port=config.exchange_port + number if config.exchange_port else 0,
            exchange_transport=self._group.transport,
            poll_s=config.poll_s,
            kv_host=transfer.host,
            kv_port=transfer.port + self._replica * count if transfer.port else 0,
            kv_transport=transfer.transport,
            chunk_bytes=transfer.chunk(self._device),
            window=transfer.window,
        )

    def _start(self, args: ShardArgs) -> subprocess.Popen[bytes]:
        # Its standard input is our lifeline: when this process ends, however it ends, the pipe closes.
        command = [sys.executable, "-m", "services.decode.worker.shard", msgspec.json.encode(args).decode()]
        return subprocess.Popen(command, stdin=subprocess.PIPE)

    async def stop(self) -> None:
        """Ends all."""
        processes, self._processes = self._processes, []
        self._up.clear()
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in processes:
            try:
                await asyncio.to_thread(process.wait, 5)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)


def _cores(bind: str | None, shard: int) -> list[int]:
    """Cores of a shard: ``0-3|4-7`` as in VLLM_CPU_OMP_THREADS_BIND. Raises ConfigError."""
    if bind is None or bind in ("auto", "nobind"):
        return []
    try:
        return sorted(parse_cpus(bind.split("|")[shard]))
    except (IndexError, ValueError) as error:
        raise ConfigError(f"decode_worker.cpu_omp_threads_bind {bind!r} names no cores for shard {shard}") from error
