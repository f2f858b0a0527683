"""A decode worker's shard processes: how many run, and what a start that fails leaves behind."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from services.decode.worker import shard as shard_module
from services.decode.worker.processes import ShardProcesses
from services.decode.worker.shard import ShardArgs
from tokenmesh.config import ConfigError, DecodeWorkerConfig, GroupConfig
from tokenmesh.kv.messages import ShardUp, ShardZeroed, ZeroShard


class Started(ShardProcesses):
    """Starts nothing; who would be started is up at once."""

    def __init__(self, bind: str | None) -> None:
        hub: Any = SimpleNamespace(address="")
        super().__init__(DecodeWorkerConfig(cpu_omp_threads_bind=bind), GroupConfig(), 0, hub)
        self.args: list[ShardArgs] = []

    def _start(self, args: ShardArgs) -> Any:
        self.args.append(args)
        asyncio.get_running_loop().call_soon(self.note, ShardUp(args.shard))
        return SimpleNamespace(stdin=None, poll=lambda: None, wait=lambda _: 0)


@pytest.mark.parametrize(("left_s", "idle", "zeroed"), [(5, True, True), (5, False, False), (-0.01, True, False)])
def test_blocks_are_zeroed_between_steps_and_while_somebody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, left_s: float, idle: bool, zeroed: bool
) -> None:
    # A process that was frozen finds orders that were given up, when others may have blocks there.
    sent: list[Any] = []
    link = SimpleNamespace(poll=lambda: [ZeroShard(time.monotonic() + left_s)], send=sent.append)
    monkeypatch.setattr(shard_module, "EngineLink", lambda *_: link)
    done: list[bool] = []
    partition: Any = SimpleNamespace(zero=lambda: done.append(True))
    args: Any = SimpleNamespace(hub="", shard=3)
    shard_module.Shard(args)._look(partition, idle)
    assert sent == [ShardZeroed(3, zeroed)]
    assert bool(done) == zeroed


async def test_one_more_shard_is_started_beside_those_that_run() -> None:
    shards = Started("0|1")
    await shards.ensure(1)
    await shards.ensure(2)
    assert [args.cores for args in shards.args] == [[0], [1]]
    assert shards.numbers == range(2)


async def test_shards_without_cores_are_refused_before_any_is_started() -> None:
    shards = Started("0")
    with pytest.raises(ConfigError, match="no cores for shard 1"):
        await shards.ensure(2)
    assert not shards.args
    # Fewer may be had as before.
    await asyncio.wait_for(shards.ensure(1), 5)
    assert shards.numbers == range(1)
