"""A root and a rank in two processes over UCX: what is sent arrives, and a rank that dies or stops is noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tokenmesh.parallel.exchange import PeerLostError
from tokenmesh.parallel.ucx_exchange import TOKEN_BYTES, UcxExchange, UcxLoop

TOKEN = bytes(range(TOKEN_BYTES))
DEADLINE_S = 1.5
SIZES = [1, 16, 17, 1000, 4096, 8192, 65_535, 65_536, 1 << 18, 1 << 20]

pytestmark = pytest.mark.timeout(120)


class Rank:
    """The other process."""

    def __init__(self, transport: str, sizes: list[int]) -> None:
        arguments = [transport, TOKEN.hex(), ",".join(map(str, sizes))]
        command = [sys.executable, "-m", "tests.unit.ucx_rank", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.says())

    def says(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


Start = Callable[..., Rank]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts ranks, and ends them."""
    ranks: list[Rank] = []

    def one(sizes: list[int], transport: str = "auto") -> Rank:
        ranks.append(Rank(transport, sizes))
        return ranks[-1]

    yield one
    for rank in ranks:
        rank.stop()


@pytest.fixture(scope="module")
def loop() -> Iterator[UcxLoop]:
    """This process's; UCX takes its settings once."""
    made = UcxLoop("auto")
    yield made
    made.close()


def connect(loop: UcxLoop, rank: Rank, deadline_s: float = 30.0, token: bytes = TOKEN) -> UcxExchange:
    pair = loop.connect("127.0.0.1", rank.port, token, deadline_s)
    assert rank.says() == "accepted"
    return pair


def echo(pair: UcxExchange, size: int, seed: int = 1) -> None:
    """A round trip, from and to the same buffers as a step's layers are."""
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    answer = torch.zeros(size, dtype=torch.uint8)
    pair.send(data)
    pair.receive(answer)
    assert torch.equal(answer, data + 1)


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_messages_of_all_sizes_arrive_whole_and_in_order(loop: UcxLoop, start: Start, transport: str) -> None:
    rank = start(SIZES, transport)
    pair = connect(loop, rank)
    # (1) One after the other, growing from a byte to a mebibyte.
    for number, size in enumerate(SIZES):
        echo(pair, size, seed=number)
    assert rank.says() == "echoed"
    # (2) UCX says what carried them.
    assert pair.transport not in ("", "unknown")
    assert transport != "tcp" or pair.transport == "tcp"
    # (3) The other end notices that we leave, and goes.
    pair.close()
    assert rank.says() == "left"
    assert rank.process.wait(10) == 0


def test_a_wrong_token_is_turned_away_and_the_right_one_still_gets_in(loop: UcxLoop, start: Start) -> None:
    rank = start([4])
    # (1) Wrong, and empty.
    for token in (bytes(TOKEN_BYTES), TOKEN[:-1] + b"\0"):
        with pytest.raises(PeerLostError, match="did not take us in"):
            loop.connect("127.0.0.1", rank.port, token, 10)
    # (2) Right.
    pair = connect(loop, rank)
    echo(pair, 4)
    pair.close()
    assert rank.says() == "echoed"
    assert rank.says() == "left"


def test_a_killed_rank_is_noticed_within_a_second(loop: UcxLoop, start: Start) -> None:
    rank = start([1, 1])
    pair = connect(loop, rank)
    echo(pair, 1)
    # (1) It dies while we wait for it.
    rank.process.kill()
    rank.process.wait()
    begin = time.monotonic()
    with pytest.raises(PeerLostError) as error:
        pair.receive(torch.zeros(1, dtype=torch.uint8))
    assert time.monotonic() - begin < 1
    # (2) By its death, not by its silence.
    assert "silent" not in str(error.value)
    # (3) Giving it up is quick, and may be done twice.
    begin = time.monotonic()
    pair.close()
    pair.close()
    assert time.monotonic() - begin < 2
    with pytest.raises(PeerLostError, match="closed"):
        pair.send(torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(PeerLostError, match="closed"):
        pair.receive(torch.zeros(1, dtype=torch.uint8))


def test_a_stopped_rank_is_lost_at_the_deadline(loop: UcxLoop, start: Start) -> None:
    rank = start([1, 1, 1])
    pair = connect(loop, rank, DEADLINE_S)
    echo(pair, 1)
    # (1) It stops: nothing says so but its silence.
    rank.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, rank.process.pid, os.WSTOPPED)
    pair.send(torch.zeros(1, dtype=torch.uint8))
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match=r"silent for 1\.5 s"):
        pair.receive(torch.zeros(1, dtype=torch.uint8))
    assert DEADLINE_S <= time.monotonic() - begin < DEADLINE_S + 0.5
    # (2) Giving it up does not wait for it.
    begin = time.monotonic()
    pair.close()
    assert time.monotonic() - begin < 2
    # (3) Others are not held up by it.
    other = start([100])
    second = connect(loop, other)
    echo(second, 100)
    # (4) When it goes on, it finds itself left.
    rank.process.send_signal(signal.SIGCONT)
    assert rank.says() == "left"
    second.close()
    assert other.says() == "echoed"
    assert other.says() == "left"


def test_a_rank_that_pauses_for_less_than_the_deadline_is_not_lost(loop: UcxLoop, start: Start) -> None:
    rank = start([1, 1])
    pair = connect(loop, rank)
    echo(pair, 1)
    rank.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, rank.process.pid, os.WSTOPPED)
    pair.send(torch.tensor([41], dtype=torch.uint8))
    rank.process.send_signal(signal.SIGCONT)
    answer = torch.zeros(1, dtype=torch.uint8)
    pair.receive(answer)
    assert answer.item() == 42
    pair.close()
    assert rank.says() == "echoed"
    assert rank.says() == "left"


def test_nobody_there(loop: UcxLoop, start: Start) -> None:
    rank = start([1])
    rank.stop()
    with pytest.raises(PeerLostError):
        loop.connect("127.0.0.1", rank.port, TOKEN, 2)


def test_nobody_comes(loop: UcxLoop) -> None:
    loop.listen(0)
    begin = time.monotonic()
    assert loop.accept(TOKEN, 0.3) is None
    assert 0.3 <= time.monotonic() - begin < 1


def test_a_loop_leaves_no_settings_behind() -> None:
    # A mover that its process starts later would take them for an operator's, and a GPU's could not reach its memory.
    before = dict(os.environ)
    UcxLoop("tcp").close()
    assert dict(os.environ) == before
