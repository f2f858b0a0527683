"""Tickets: what may be written, once, by whom, and until when."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tokenmesh.kv.geometry import BlockGeometry, LayerSpan
from tokenmesh.kv.memory import KvMemory
from tokenmesh.kv.messages import Expect, Settled
from tokenmesh.kv.receiver import Receiver
from tokenmesh.kv.wire import Header, Kind

LAYERS, BLOCKS, SIZE = 3, 16, 64
GEOMETRY = BlockGeometry(LAYERS, 1, 4, 8, "float32", SIZE, "test")
TICKET = b"t" * 16
WANTED = [5, 6, 2, 9]


class Owner:
    """A receiver over plain memory, and what it reported."""

    def __init__(self) -> None:
        self.data = np.zeros(LAYERS * BLOCKS * SIZE, dtype=np.uint8)
        spans = [LayerSpan(layer * BLOCKS * SIZE, SIZE) for layer in range(LAYERS)]
        self.reports: list[Settled] = []
        self.receiver = Receiver(0, KvMemory(self.data, GEOMETRY, spans), 1024, 2, self.reports.append)

    def block(self, layer: int, block: int) -> np.ndarray:
        return self.data.reshape(LAYERS, BLOCKS, SIZE)[layer, block]

    def deliver(self, header: Header, payload: np.ndarray) -> None:
        self.receiver._apply(header, payload, header.intact(payload), "test")

    def settle(self, transfer_id: bytes = TICKET) -> Settled:
        self.receiver.settle(transfer_id)
        return self.reports[-1]


def message(layer: int, first: int, blocks: int, transfer_id: bytes = TICKET) -> tuple[Header, np.ndarray]:
    """Blocks whose bytes say which they are."""
    payload = np.repeat(np.arange(first, first + blocks, dtype=np.uint8) + 10 * layer + 1, SIZE)
    return Header(Kind.DATA, transfer_id, 0, layer, first, blocks, blocks * SIZE).sealed(payload), payload


@pytest.fixture
def owner() -> Owner:
    owner = Owner()
    owner.receiver.expect(Expect(TICKET, WANTED))
    return owner


def everything() -> list[tuple[Header, np.ndarray]]:
    return [message(layer, first, 2) for layer in range(LAYERS) for first in (0, 2)]


def test_a_whole_transfer_lands_in_its_blocks_and_nowhere_else(owner: Owner) -> None:
    # (1) All messages, in any order.
    messages = everything()
    random.Random(1).shuffle(messages)
    for header, payload in messages:
        owner.deliver(header, payload)
    # (2) Complete, and counted.
    settled = owner.settle()
    assert settled.complete
    assert settled.error == ""
    assert settled.nbytes == LAYERS * len(WANTED) * SIZE
    assert settled.block_layers == LAYERS * len(WANTED)
    # (3) Each block holds its own bytes; all others are untouched.
    for layer in range(LAYERS):
        for block in range(BLOCKS):
            expected = WANTED.index(block) + 10 * layer + 1 if block in WANTED else 0
            assert (owner.block(layer, block) == expected).all()


def test_one_missing_block_makes_it_incomplete(owner: Owner) -> None:
    for header, payload in everything()[:-1]:
        owner.deliver(header, payload)
    settled = owner.settle()
    assert not settled.complete
    assert settled.error == "2 of 12 block layers did not arrive"


def test_a_late_message_writes_nothing(owner: Owner) -> None:
    # (1) The ticket is settled while a message is still on its way.
    messages = everything()
    for header, payload in messages[:-1]:
        owner.deliver(header, payload)
    owner.settle()
    # (2) The blocks are given to somebody else.
    owner.data[:] = 77
    # (3) The late message arrives, and so does a repeat of an early one.
    for header, payload in (messages[-1], messages[0]):
        owner.deliver(header, payload)
    assert (owner.data == 77).all()
    assert owner.receiver.counts["stray"] == 2


def test_a_stranger_writes_nothing(owner: Owner) -> None:
    owner.deliver(*message(0, 0, 2, transfer_id=b"x" * 16))
    assert not owner.data.any()
    assert owner.receiver.counts["stray"] == 1


def test_a_repeat_is_dropped_and_harmless(owner: Owner) -> None:
    messages = everything()
    for header, payload in [*messages, *messages]:
        owner.deliver(header, payload)
    settled = owner.settle()
    assert settled.complete
    assert settled.bad_messages == len(messages)
    assert settled.nbytes == LAYERS * len(WANTED) * SIZE


@pytest.mark.parametrize(
    "header",
    [
        Header(Kind.DATA, TICKET, 0, LAYERS, 0, 2, 2 * SIZE),
        Header(Kind.DATA, TICKET, 0, 0, 3, 2, 2 * SIZE),
        Header(Kind.DATA, TICKET, 0, 0, 0, 1, 2 * SIZE),
        Header(Kind.DATA, TICKET, 0, 0, 2**31, 2, 2 * SIZE),
        Header(Kind.DATA, TICKET, 0, LAYERS - 1, 0, 1, 2 * SIZE, layers=2),
        Header(Kind.DATA, TICKET, 0, 0, 0, 2, 2 * SIZE, layers=2),
        Header(Kind.DATA, TICKET, 0, 0, 0, 2, 2 * SIZE, layers=0),
        Header(Kind.DATA, TICKET, 0, 1, 0, 2, 2 * SIZE, layers=2**16 - 1),
    ],
    ids=["layer", "place", "length", "overflow", "layers", "length of layers", "no layer", "overflow of layers"],
)
def test_a_message_outside_its_ticket_fails_the_transfer(owner: Owner, header: Header) -> None:
    payload = np.ones(2 * SIZE, dtype=np.uint8)
    owner.deliver(header.sealed(payload), payload)
    assert not owner.data.any()
    assert owner.receiver.counts["out_of_range"] == 1
    assert "outside" in owner.settle().error


def test_random_damage_is_never_served(owner: Owner) -> None:
    # 10,000 messages with one random bit flipped: none is written, all are counted.
    rng = random.Random(3)
    for _ in range(10_000):
        header, payload = message(rng.randrange(LAYERS), rng.choice((0, 2)), 2)
        payload = payload.copy()
        payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
        owner.deliver(header, payload)
    assert not owner.data.any()
    assert owner.receiver.counts["corrupt"] == 10_000
    # And the transfer is refused even if everything arrives whole afterwards.
    for header, payload in everything():
        owner.deliver(header, payload)
    assert not owner.settle().complete


def test_settling_twice_reports_an_unknown_ticket(owner: Owner) -> None:
    owner.settle()
    assert owner.settle().error == "unknown transfer"
    assert owner.receiver.open == 0


def test_what_was_dropped_is_told_once(owner: Owner) -> None:
    # (1) A stranger's message and a repeat; both are told with the next ticket that is settled, ...
    first = everything()[0]
    for header, payload in (first, first, message(0, 0, 2, transfer_id=b"x" * 16)):
        owner.deliver(header, payload)
    settled = owner.settle()
    assert settled.dropped == {"duplicate": 1, "stray": 1}
    assert settled.bad_messages == 1
    # (2) ... and not again.
    owner.deliver(*first)
    assert owner.settle(b"y" * 16).dropped == {"stray": 1}
    assert owner.settle(b"y" * 16).dropped == {}
