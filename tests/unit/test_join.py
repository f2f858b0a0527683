"""What engine workers answer when a rank joins."""

from __future__ import annotations

import pytest

from tokenmesh.engine.join import joined
from tokenmesh.parallel.exchange import PeerLostError


@pytest.mark.parametrize(
    ("error", "said"),
    [(PeerLostError("silent for 30 s"), "silent for 30 s"), (MemoryError(), "MemoryError"), (OSError(" "), "OSError")],
)
def test_a_worker_that_cannot_take_a_rank_in_says_so_and_does_not_raise(error: Exception, said: str) -> None:
    def connect() -> str:
        raise error

    assert joined(connect) == ("", said)


def test_a_worker_that_takes_a_rank_in_names_the_transport() -> None:
    assert joined(lambda: "sysv") == ("sysv", "")
