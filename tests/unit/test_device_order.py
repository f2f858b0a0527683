"""What must not overtake a GPU: pushes of layers, and prompts whose blocks a step under way may still write to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from services.decode.root.owners import RootOwner
from tokenmesh.engine.connector import TokenParallelKVConnector
from tokenmesh.engine.consumer import ConsumerPlan, ConsumerScheduler, ConsumerWorker
from tokenmesh.engine.device_order import InDeviceOrder
from tokenmesh.engine.settings import ConnectorSettings, FetchFrom
from tokenmesh.kv.messages import Expect, WantKv

pytestmark = pytest.mark.timeout(30)


class Device:
    """A GPU that does what was launched when it is told to."""

    def __init__(self) -> None:
        self._events: list[threading.Event] = []
        self._done = 0

    def event(self, **_: object) -> Any:
        happened = threading.Event()
        record = lambda: self._events.append(happened)  # noqa: E731
        return SimpleNamespace(record=record, synchronize=lambda: happened.wait(10))

    def finish(self, count: int) -> None:
        """The next so many launches."""
        for event in self._events[self._done : self._done + count]:
            event.set()
        self._done += count


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    return device


class Heard:
    """Messages that were delivered."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self._news = threading.Condition()

    def take(self, message: Any) -> None:
        with self._news:
            self.messages.append(message)
            self._news.notify()

    def wait(self, count: int) -> list[Any]:
        with self._news:
            self._news.wait_for(lambda: len(self.messages) >= count, 10)
            return list(self.messages)


def test_messages_wait_for_the_device_and_keep_their_order(device: Device) -> None:
    heard = Heard()
    order = InDeviceOrder(heard.take)
    # (1) Three are sent without waiting; the device has done nothing.
    for number in range(3):
        order.send(number)
    assert heard.messages == []
    # (2) They follow it one by one, and closing loses none.
    device.finish(1)
    assert heard.wait(1) == [0]
    device.finish(2)
    order.close()
    assert heard.messages == [0, 1, 2]


def settings(device: bool) -> ConnectorSettings:
    return ConnectorSettings("", "h", 0, "none", 1, 1, [0], device=device)


def scheduled(monkeypatch: pytest.MonkeyPatch, device: bool) -> tuple[list[Any], ConsumerPlan]:
    """What the service is told at once when a prompt's blocks are reserved, and the next step's plan."""
    told: list[Any] = []
    monkeypatch.setattr("tokenmesh.engine.consumer.EngineLink", lambda *_: SimpleNamespace(send=told.append))
    monkeypatch.setattr("tokenmesh.engine.consumer.CountsReporter", lambda _: SimpleNamespace(update=lambda _: None))
    half = ConsumerScheduler(settings(device), 16)
    half.kv_cache_manager = None  # type: ignore[assignment]
    request: Any = SimpleNamespace(
        request_id="r", num_prompt_tokens=40, num_tokens=40, kv_transfer_params={FetchFrom.KEY: "key"}
    )
    own = [SimpleNamespace(is_null=False)] * 3
    blocks: Any = SimpleNamespace(get_block_ids=lambda: ([7, 8, 9],), blocks=(own,))
    half.allocated(request, blocks, 40)
    output: Any = SimpleNamespace(total_num_scheduled_tokens=0)
    return told, half.plan_step(output)


def test_on_a_gpu_a_prompt_is_asked_for_when_earlier_steps_are_done(
    monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    want = WantKv("r", "key", 0, 40, [7, 8, 9])
    # (1) On CPUs the service is asked at once: no step is under way while the next is scheduled.
    told, plan = scheduled(monkeypatch, device=False)
    assert (told, plan.wanted) == ([want], [])
    # (2) On a GPU the next step's plan asks, ...
    told, plan = scheduled(monkeypatch, device=True)
    assert (told, plan.wanted) == ([], [want])
    # (3) ... behind what was launched before that step.
    heard = Heard()
    link = SimpleNamespace(send=heard.take, close=lambda: None, poll=lambda _: [])
    monkeypatch.setattr("tokenmesh.engine.consumer.EngineLink", lambda *_: link)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tensor_model_parallel_rank", lambda: 0)
    config: Any = SimpleNamespace()
    worker = ConsumerWorker(settings(device=True), config)
    worker.register({"layer": torch.zeros(4, 4)})
    worker.begin_step(plan)
    assert heard.messages == []
    device.finish(1)
    assert heard.wait(1) == [want]
    worker.close()


def test_only_prefill_engines_give_up_full_graphs() -> None:
    needs: Callable[[dict[str, Any]], bool] = TokenParallelKVConnector.requires_piecewise_for_cudagraph
    assert not needs(settings(device=True).to_extra_config())
    assert needs(ConnectorSettings("", "h", 0, "auto", 1, 1, [0], layerwise=True).to_extra_config())


async def test_blocks_of_a_rank_on_the_roots_gpu_lie_behind_the_roots() -> None:
    orders: list[Any] = []

    class Settling:
        async def open(self, hub: Any, asked: dict[int, Expect]) -> None:
            orders.append(asked)

    engine: Any = SimpleNamespace(device_blocks=[101, 100, 100], hub=None, shards=1)
    settling: Any = Settling()
    for rank, first in ((0, 0), (1, 101), (2, 201)):
        await RootOwner(engine, settling, rank).expect(b"t" * 16, [0, 5], "none")
        assert orders.pop() == {0: Expect(b"t" * 16, [first, first + 5], "none")}
