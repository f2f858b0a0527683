"""Steps that compute nothing: how long they wait, and what ends that."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tokenmesh.engine import idle
from tokenmesh.engine.idle import LONGEST_S, SHORTEST_S, IdleLink
from tokenmesh.kv.hub import EngineLink, LinkHub
from tokenmesh.kv.messages import KvArrived, Roused, ToEngine


class SilentLink(EngineLink):
    """Keeps how long it was asked to wait."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.news: list[ToEngine] = []

    def poll(self, wait_s: float = 0.0) -> list[ToEngine]:
        self.waits.append(wait_s)
        news, self.news = self.news, []
        return news


def steps(link: IdleLink, *idle: bool) -> None:
    for one in idle:
        link.begin_step(one)
        link.poll()


def test_the_longer_nothing_comes_the_longer_it_waits_up_to_a_bound() -> None:
    silent = SilentLink()
    steps(IdleLink(silent), *[True] * 12)
    assert silent.waits[0] == SHORTEST_S
    assert silent.waits == sorted(silent.waits)
    assert silent.waits[-2:] == [LONGEST_S, LONGEST_S]


def test_a_step_that_computes_never_waits_and_makes_the_next_wait_short() -> None:
    silent = SilentLink()
    steps(IdleLink(silent), True, True, True, False, True)
    assert silent.waits[3:] == [0.0, SHORTEST_S]


@pytest.mark.parametrize("news", [Roused(), KvArrived("a", True)])
def test_news_make_the_next_wait_short(news: ToEngine) -> None:
    silent = SilentLink()
    link = IdleLink(silent)
    steps(link, True, True, True)
    silent.news = [news]
    steps(link, True, True)
    assert silent.waits[-1] == SHORTEST_S


def test_being_roused_is_all_there_is_to_it() -> None:
    silent = SilentLink()
    link = IdleLink(silent)
    silent.news = [Roused(), KvArrived("a", True), Roused()]
    link.begin_step(True)
    assert link.poll() == [KvArrived("a", True)]


async def test_a_service_ends_the_wait_of_a_real_link(monkeypatch: pytest.MonkeyPatch) -> None:
    async with LinkHub(lambda _: None) as hub:
        link = EngineLink(hub.address, "worker-0")
        news = IdleLink(link)
        try:
            await asyncio.to_thread(steps, news, *[True] * 7)
            # Longer than a busy machine may take to start a thread.
            monkeypatch.setattr(idle, "LONGEST_S", 10.0)
            news._wait_s = idle.LONGEST_S
            waited: list[float] = []

            def wait() -> None:
                began = time.monotonic()
                steps(news, True)
                waited.append(time.monotonic() - began)

            waiting = threading.Thread(target=wait)
            waiting.start()
            hub.send("worker-0", Roused())
            await asyncio.to_thread(waiting.join)
            assert waited[0] < idle.LONGEST_S
        finally:
            link.close()
