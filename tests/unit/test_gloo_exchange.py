"""A root and a rank in two processes over Gloo."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from tokenmesh.parallel.exchange import PeerLostError
from tokenmesh.parallel.gloo_exchange import GlooExchange

pytestmark = pytest.mark.timeout(120)

SIZES = [1, 17, 4096, 65_536, 1 << 20]
DEADLINE_S = 3.0

RANK = """
import sys
from datetime import timedelta
import torch
from torch.distributed import TCPStore
from tokenmesh.parallel.exchange import PeerLostError
from tokenmesh.parallel.gloo_exchange import GlooExchange
store = TCPStore("127.0.0.1", int(sys.argv[1]), 2, False, timedelta(seconds=60))
pair = GlooExchange(store, False, None)
try:
    for size in [int(size) for size in sys.argv[2].split(",")]:
        data = torch.zeros(size, dtype=torch.uint8)
        pair.receive(data)
        pair.send(data + 1)
    print("echoed", flush=True)
    pair.receive(torch.zeros(1, dtype=torch.uint8))
except PeerLostError:
    print("left", flush=True)
"""


class Pair:
    """The root's end, and the process at the other."""

    def __init__(self) -> None:
        store = TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=60), wait_for_workers=False)
        command = [sys.executable, "-c", RANK, str(store.port), ",".join(map(str, SIZES))]
        self.rank = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.root = GlooExchange(store, True, 30.0)
        self.root._deadline = timedelta(seconds=DEADLINE_S)

    def says(self) -> str:
        """The rank's next line."""
        assert self.rank.stdout is not None
        return self.rank.stdout.readline().strip()

    def echo(self, size: int, value: int) -> None:
        """One message there and back."""
        self.root.send(torch.full((size,), value, dtype=torch.uint8))
        answer = torch.zeros(size, dtype=torch.uint8)
        self.root.receive(answer)
        assert (answer == value + 1).all()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.root.close()
    made.rank.send_signal(signal.SIGCONT)
    made.rank.kill()
    made.rank.wait()
    assert made.rank.stdout is not None
    made.rank.stdout.close()


def test_messages_arrive_whole_and_in_order(pair: Pair) -> None:
    for value, size in enumerate(SIZES):
        pair.echo(size, value)
    assert pair.says() == "echoed"
    # A root that leaves is noticed by the rank, which waits without a deadline.
    pair.root.close()
    assert pair.says() == "left"
    with pytest.raises(PeerLostError, match="closed"):
        pair.root.send(torch.zeros(1, dtype=torch.uint8))


def test_a_rank_that_is_killed_is_lost_at_once(pair: Pair) -> None:
    pair.echo(SIZES[0], 5)
    pair.rank.kill()
    begun = time.monotonic()
    with pytest.raises(PeerLostError):
        pair.root.receive(torch.zeros(16, dtype=torch.uint8))
    assert time.monotonic() - begun < DEADLINE_S


def test_a_rank_that_is_silent_is_lost_at_the_deadline(pair: Pair) -> None:
    pair.echo(SIZES[0], 5)
    pair.rank.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(PeerLostError):
        pair.root.receive(torch.zeros(16, dtype=torch.uint8))
    assert DEADLINE_S * 0.9 < time.monotonic() - begun < DEADLINE_S + 3
