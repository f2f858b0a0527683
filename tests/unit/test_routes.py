"""Tensor parallelism that differs: every owner shard gets its heads, each once, from whoever holds them."""

from __future__ import annotations

import asyncio
from itertools import product

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.memory_wire import Cache, MemoryWorker, OwningEnd, SendingEnd, receive_in_place
from tests.unit.memory_wire import wire_settings as wire_settings
from tokenmesh.kv.geometry import BlockGeometry, GeometryMismatchError
from tokenmesh.kv.messages import Commit, Destination, Push
from tokenmesh.kv.routes import Route, check_routes, plan_routes, shard_heads
from tokenmesh.kv.ucx import UcxWorker

LAYERS, BLOCKS, TOKENS, HEAD = 2, 12, 8, 4
HEAD_BYTES = 2 * TOKENS * HEAD * 2
SOURCE, TARGET = [3, 4, 9, 1, 7], [5, 6, 0, 2, 11]
TICKET = b"t" * 16


def geometry(total: int, shards: int) -> BlockGeometry:
    heads = len(shard_heads(total, shards, 0))
    return BlockGeometry(LAYERS, heads, HEAD, TOKENS, "bfloat16", heads * HEAD_BYTES, "cpu_attn/vec")


def divides(total: int, shards: int) -> bool:
    return total % shards == 0 or shards % total == 0


@given(st.integers(1, 16), st.integers(1, 32), st.integers(1, 32))
def test_every_head_of_every_owner_comes_once(total: int, senders: int, owners: int) -> None:
    if not (divides(total, senders) and divides(total, owners)):
        with pytest.raises(GeometryMismatchError, match="divide"):
            plan_routes(total, senders, owners)
        return
    seen: dict[tuple[int, int], int] = {}
    for sender, routes in enumerate(plan_routes(total, senders, owners)):
        held = shard_heads(total, senders, sender)
        for route in routes:
            wanted = shard_heads(total, owners, route.owner)
            for number in range(route.heads):
                # The same head of the model at both ends.
                assert held[route.source + number] == wanted[route.target + number]
                place = (route.owner, route.target + number)
                seen[place] = seen.get(place, 0) + 1
    assert seen == {(o, h): 1 for o in range(owners) for h in range(len(shard_heads(total, owners, o)))}


def test_equal_shards_keep_to_themselves() -> None:
    for total, shards in ((3, 1), (3, 3), (3, 6), (8, 4), (2, 8)):
        heads = len(shard_heads(total, shards, 0))
        assert plan_routes(total, shards, shards) == [[Route(n, 0, 0, heads)] for n in range(shards)]


def test_what_cannot_be_exchanged_is_refused() -> None:
    three, one = geometry(3, 1), geometry(3, 3)
    assert check_routes(3, three, 1, one, 3)
    # (1) Heads that do not divide, and shards of another model.
    with pytest.raises(GeometryMismatchError, match="3 KV heads do not divide over 2 shards"):
        check_routes(3, three, 1, one, 2)
    with pytest.raises(GeometryMismatchError, match="1 KV heads at the owner, not 3"):
        check_routes(3, three, 1, one, 1)
    # (2) Blocks of another size: the message says why.
    smaller = msgspec.structs.replace(three, block_size=TOKENS // 2, block_bytes=three.block_bytes // 2)
    with pytest.raises(GeometryMismatchError, match="block_size: 8 here, 4 at the owner; keys lie transposed"):
        check_routes(3, three, 1, smaller, 1)
    # (3) A packing that mixes the heads of a block moves whole blocks only.
    mixed = [msgspec.structs.replace(shape, packing="row_major") for shape in (three, one)]
    assert check_routes(3, mixed[0], 1, mixed[0], 1)
    assert check_routes(3, mixed[1], 3, mixed[1], 6)
    with pytest.raises(GeometryMismatchError, match="row_major"):
        check_routes(3, mixed[0], 1, mixed[1], 3)


class Side:
    """Shards of one cache; `whole` is the model's, [layers, blocks, heads, bytes of a head]."""

    def __init__(self, total: int, shards: int) -> None:
        self.total = total
        self.caches = [Cache(geometry(total, shards), BLOCKS) for _ in range(shards)]

    def heads(self, shard: int) -> np.ndarray:
        """A shard's memory, [layers, blocks, heads, bytes of a head]."""
        return self.caches[shard].data.reshape(LAYERS, BLOCKS, -1, HEAD_BYTES)

    def fill(self, whole: np.ndarray) -> None:
        for shard in range(len(self.caches)):
            self.heads(shard)[:] = whole[:, :, list(shard_heads(self.total, len(self.caches), shard))]


async def exchange(
    worker: UcxWorker | MemoryWorker, total: int, senders: int, owners: int, codec: str = "none", large: bool = True
) -> None:
    # (1) A model's KV, spread over the sender's shards.
    whole = np.random.default_rng(7).integers(1, 256, (LAYERS, BLOCKS, total, HEAD_BYTES), dtype=np.uint8)
    # Numbers of about one size, so that there is something to compress.
    whole[..., 1::2] = 0x3F
    source, target = Side(total, senders), Side(total, owners)
    source.fill(whole)
    # Two blocks of the largest shard in a message, so that all are cut; or as few of the sender's as it can send.
    chunk = 2 * HEAD_BYTES * max(len(shard_heads(total, n, 0)) for n in (senders, owners)) if large else HEAD_BYTES
    sending = [SendingEnd(worker, cache, chunk) for cache in source.caches]
    owning = [OwningEnd(worker, cache, chunk, shard) for shard, cache in enumerate(target.caches)]
    # (2) Every shard sends what the plan says, in two pushes a layer as chunked prefill does.
    for end in owning:
        end.expect(TICKET, TARGET, codec)
    routes = check_routes(total, source.caches[0].geometry, senders, target.caches[0].geometry, owners, codec)
    for end, ways in zip(sending, routes, strict=True):
        there = [Destination(*owning[way.owner].address, way.source, way.target, way.heads) for way in ways]
        end.sender.start(TICKET, there, codec)
        for first, blocks in ((0, SOURCE[:2]), (2, SOURCE[2:])):
            for layer in range(LAYERS):
                end.sender.add(Push(TICKET, layer, first, blocks))
        end.sender.add(Commit(TICKET))
    done = await asyncio.gather(*(end.done() for end in sending))
    assert [report.error for report in done] == [""] * senders
    # (3) Each owner shard is complete, and holds its heads of the model's blocks and nothing else.
    expected = Side(total, owners)
    moved = np.zeros_like(whole)
    moved[:, TARGET] = whole[:, SOURCE]
    expected.fill(moved)
    for shard, end in enumerate(owning):
        settled = await end.settle(TICKET)
        assert settled.complete
        assert settled.block_layers == LAYERS * len(SOURCE)
        assert (target.heads(shard) == expected.heads(shard)).all()
    # (4) Each byte travelled once, and nothing is left.
    sent = sum(report.nbytes for report in done)
    assert sent == sum(end.reports[0].nbytes for end in owning)
    in_cache = owners * LAYERS * len(SOURCE) * target.caches[0].geometry.block_bytes
    assert sent == in_cache if codec == "none" else sent < in_cache
    for end in sending:
        await end.close()
    async with asyncio.timeout(10):
        while not all(end.idle() for end in owning):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


SIZES = (1, 2, 3, 6)
# SmolLM2's 3 KV heads (with 6 shards each is held twice), and 6.
CASES = [case for case in product((3, 6), SIZES, SIZES) if divides(case[0], case[1]) and divides(case[0], case[2])]


@pytest.mark.parametrize(("total", "senders", "owners"), CASES)
async def test_blocks_arrive(total: int, senders: int, owners: int) -> None:
    worker = MemoryWorker()
    await exchange(worker, total, senders, owners)
    worker.close()


@pytest.mark.parametrize(("senders", "owners"), [(1, 3), (3, 1), (2, 3)])
async def test_heads_are_cut_under_a_codec_too(senders: int, owners: int) -> None:
    worker = MemoryWorker()
    await exchange(worker, 6, senders, owners, "lossless")
    worker.close()


@pytest.mark.parametrize(("total", "senders", "owners"), CASES)
async def test_heads_are_received_in_place(
    total: int, senders: int, owners: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = receive_in_place(monkeypatch, 0)
    worker = MemoryWorker()
    # Heads of one block lie next to each other at any owner.
    await exchange(worker, total, senders, owners, large=False)
    worker.close()
    assert claims[True] > 0


@pytest.mark.parametrize("smallest", [None, 0], ids=["staged", "in place"])
@pytest.mark.parametrize(("senders", "owners"), [(1, 3), (3, 1)])
async def test_the_same_over_ucx(
    senders: int, owners: int, smallest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = receive_in_place(monkeypatch, smallest)
    worker = UcxWorker()
    await exchange(worker, 3, senders, owners, large=False)
    worker.close()
    assert (claims[True] > 0) == (smallest == 0)


async def test_one_shard_that_fails_spoils_the_transfer() -> None:
    # (1) Three sender shards for one owner; one of them never sends.
    worker = MemoryWorker()
    source, target = Side(3, 3), Cache(geometry(3, 1), BLOCKS)
    source.fill(np.ones((LAYERS, BLOCKS, 3, HEAD_BYTES), dtype=np.uint8))
    sending = [SendingEnd(worker, cache, 4096) for cache in source.caches]
    owning = OwningEnd(worker, target, 4096)
    owning.expect(TICKET, TARGET)
    for shard in (0, 2):
        end = sending[shard]
        end.sender.start(TICKET, [Destination(*owning.address, 0, shard, 1)])
        for layer in range(LAYERS):
            end.sender.add(Push(TICKET, layer, 0, SOURCE))
        end.sender.add(Commit(TICKET))
        # (2) The others are told that their own part is complete, ...
        assert (await end.done()).error == ""
    # (3) ... and the owner, that the whole is not.
    settled = await owning.settle(TICKET)
    assert settled.error == f"{LAYERS * len(SOURCE)} of {LAYERS * len(SOURCE)} block layers did not arrive"
    for end in sending:
        await end.close()
    worker.close()
