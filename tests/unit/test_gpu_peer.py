"""The watch over ranks on other GPUs, with UCX as it is and without GPUs: who is lost, when, and what is told."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tokenmesh.engine.gpu import peer as peers
from tokenmesh.engine.gpu.pair import ID_BYTES
from tokenmesh.engine.gpu.peer import ANSWER_BYTES, PeerWatch
from tokenmesh.parallel.device_step import STEP_BYTES, DeviceStep
from tokenmesh.parallel.exchange import PeerLostError
from tokenmesh.parallel.ucx_exchange import UcxLoop

DEADLINE_S = 0.6
STEP = (4, 4, 1, 100, 8, True)


class FakePair:
    """Stands in for NCCL: notes what is sent."""

    def __init__(self, *_: Any) -> None:
        self.sent: list[tuple[torch.Tensor, ...]] = []
        self.aborted = False
        self.closed = False

    def send(self, *tensors: torch.Tensor) -> None:
        if self.aborted:
            raise PeerLostError("aborted")
        self.sent.append(tensors)

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed = True


class FakeRank:
    """A rank's host in a thread: hears of steps and answers, until it is told to fall silent or to go."""

    def __init__(self) -> None:
        self.steps: list[DeviceStep] = []
        self.token = secrets.token_bytes(16)
        self.mute = threading.Event()
        self.go = threading.Event()
        self.port = 0
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._listening.wait(10)

    def _run(self) -> None:
        loop = UcxLoop("tcp")
        self.port = loop.listen(0)
        self._listening.set()
        pair = None
        while pair is None:
            pair = loop.accept(self.token, 0.1)
        pair.receive(torch.zeros(ID_BYTES, dtype=torch.uint8))
        head = torch.zeros(STEP_BYTES, dtype=torch.uint8)
        while not self.go.is_set():
            request = pair.start_receive(head)
            while not request.completed and not self.go.is_set():
                loop.sleep(0.02)
            if self.go.is_set():
                break
            try:
                pair.finish(request)
            except PeerLostError:  # The root has let it go.
                break
            self.steps.append(DeviceStep.from_bytes(head.numpy().tobytes()))
            if not self.mute.is_set():
                pair.send(torch.zeros(ANSWER_BYTES, dtype=torch.uint8))
                pair.flush()
        pair.close()
        loop.close()

    def end(self) -> None:
        self.go.set()
        self._thread.join(5)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[PeerWatch]:
    monkeypatch.setattr(peers, "NcclPair", FakePair)
    monkeypatch.setattr(peers, "new_id", lambda: bytes(ID_BYTES))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    watch = PeerWatch(torch.device("cpu"), "tcp", DEADLINE_S)
    yield watch
    watch.close()


@pytest.fixture
def rank(watch: PeerWatch) -> Iterator[FakeRank]:
    rank = FakeRank()
    assert "tcp" in watch.connect(1, 7, ("127.0.0.1", rank.port), rank.token)
    yield rank
    rank.end()


def soon(happens: Callable[[], bool], seconds: float = 3.0) -> bool:
    """Whether it happens within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not happens():
        time.sleep(0.01)
    return happens()


def pair_of(watch: PeerWatch) -> FakePair:
    """What stands in for the pair of rank 1."""
    pair: Any = watch.peers[1].pair
    assert isinstance(pair, FakePair)
    return pair


def test_a_rank_that_answers_stays(watch: PeerWatch, rank: FakeRank) -> None:
    # (1) Three steps are announced, and what kernels need is sent with each.
    plan = torch.arange(4)
    for _ in range(3):
        watch.announce(1, STEP, plan)
    assert soon(lambda: len(rank.steps) == 3)
    assert rank.steps == [DeviceStep(version, *STEP) for version in (1, 2, 3)]
    assert len(pair_of(watch).sent) == 3
    # (2) Nobody is lost, however long nothing more comes.
    time.sleep(2 * DEADLINE_S)
    assert not watch.stale
    assert watch.lost() == {}


def test_a_rank_that_goes_is_lost_at_once(watch: PeerWatch, rank: FakeRank) -> None:
    pair = pair_of(watch)
    rank.end()
    # (1) Its connection ends, and with it whatever kernels wait for.
    assert soon(lambda: pair.aborted)
    assert list(watch.lost()) == [(1, 7)]
    # (2) It is taken out when the model's thread asks for it, and told of with every step until it is dropped: that of
    # a step which is under way already, too.
    assert watch.stale
    watch.announce(1, STEP)
    assert [peer.rank for peer in watch.retire()] == [1]
    assert not watch.peers
    watch.drop(1, 6)
    assert list(watch.lost()) == [(1, 7)]
    watch.drop(1, 7)
    assert watch.lost() == {}


def test_a_rank_lost_under_a_capture_does_not_stop_it(watch: PeerWatch, rank: FakeRank) -> None:
    # (1) Graphs are captured under the lock, and a verb within fails.
    with watch.lock:
        (peer,) = watch.peers.values()
        watch.lose(peer, "aborted")
    # (2) Noted, as at any other time.
    assert list(watch.lost()) == [(1, 7)]


def test_a_silent_rank_is_lost_at_the_deadline(watch: PeerWatch, rank: FakeRank) -> None:
    rank.mute.set()
    watch.announce(1, STEP)
    started = time.monotonic()
    assert soon(lambda: pair_of(watch).aborted)
    assert time.monotonic() - started > DEADLINE_S / 2
    assert watch.lost() == {(1, 7): f"silent for {DEADLINE_S:g} s"}


def test_a_dropped_rank_keeps_its_pair_until_it_is_taken_out(watch: PeerWatch, rank: FakeRank) -> None:
    # (1) Another epoch's end is not this one's.
    watch.drop(1, 6)
    assert not watch.stale
    # (2) The step under way may still wait for it, so nothing is aborted.
    watch.drop(1, 7)
    assert watch.stale
    assert not pair_of(watch).aborted
    # (3) Nobody needs to be told: whoever dropped it knows.
    assert watch.lost() == {}
    pair = pair_of(watch)
    watch.bury(watch.retire())
    assert pair.closed
    assert not watch.peers


def test_a_dropped_rank_that_dies_is_aborted_all_the_same(watch: PeerWatch, rank: FakeRank) -> None:
    pair = pair_of(watch)
    watch.drop(1, 7)
    rank.end()
    assert soon(lambda: pair.aborted)


def test_a_rank_that_nccl_does_not_find_is_let_go(watch: PeerWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PeerLostError("no NCCL pair")

    monkeypatch.setattr(peers, "NcclPair", refuse)
    rank = FakeRank()
    with pytest.raises(PeerLostError, match="no NCCL pair"):
        watch.connect(1, 7, ("127.0.0.1", rank.port), rank.token)
    assert not watch.peers
    rank.end()


def test_a_rank_that_dies_before_nccl_has_found_it_is_let_go(watch: PeerWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    # (1) NCCL waits for a rank that answered, and has gone since.
    came, made = threading.Event(), []

    def find(*_: Any) -> FakePair:
        assert came.wait(10)
        made.append(FakePair())
        return made[0]

    monkeypatch.setattr(peers, "NcclPair", find)
    rank = FakeRank()
    threading.Timer(0.2, rank.end).start()
    started = time.monotonic()
    with pytest.raises(PeerLostError):
        watch.connect(1, 7, ("127.0.0.1", rank.port), rank.token)
    assert time.monotonic() - started < 5
    assert not watch.peers
    # (2) What it makes all the same is not kept.
    came.set()
    assert soon(lambda: bool(made) and made[0].closed)


def test_a_rank_that_nccl_does_not_find_in_time_is_let_go(watch: PeerWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    def find(*_: Any) -> FakePair:
        never.wait(5)
        return FakePair()

    monkeypatch.setattr(peers, "NcclPair", find)
    monkeypatch.setattr(peers, "MEET_S", 0.3)
    rank = FakeRank()
    with pytest.raises(PeerLostError, match="within"):
        watch.connect(1, 7, ("127.0.0.1", rank.port), rank.token)
    assert not watch.peers
    rank.end()
    never.set()
