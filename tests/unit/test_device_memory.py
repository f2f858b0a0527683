"""KV memory as movers of GPUs see it, on CPU tensors: the same bytes move, and whole transfers are as exact."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
import torch
from hypothesis import given

from tests.unit.memory_wire import MemoryWorker, OwningEnd, SendingEnd
from tests.unit.memory_wire import wire_settings as wire_settings
from tests.unit.test_memory import BLOCKS, HEADS, LAYERS, places
from tokenmesh.kv.codecs import make_codec
from tokenmesh.kv.device.digest import reference
from tokenmesh.kv.device.memory import DeviceKvMemory, _Launched
from tokenmesh.kv.device.passes import Tally, digest
from tokenmesh.kv.geometry import HND, BlockGeometry, GeometryMismatchError, LayerSpan
from tokenmesh.kv.memory import Heads, KvMemory, Payload
from tokenmesh.kv.messages import Commit, Destination, Push
from tokenmesh.kv.peer import Peer
from tokenmesh.kv.wire import Header, Kind

TOKENS, HEAD = 4, 8
HEAD_BYTES = TOKENS * 2 * HEAD * 2
SIZE = HEADS * HEAD_BYTES
GEOMETRY = BlockGeometry(LAYERS, HEADS, HEAD, TOKENS, "bfloat16", SIZE, HND)
TICKET = b"d" * 16

pytestmark = pytest.mark.timeout(60)


def spans(interleaved: bool) -> list[LayerSpan]:
    """Layers one after the other, or side by side in every block."""
    if interleaved:
        return [LayerSpan(layer * SIZE, LAYERS * SIZE) for layer in range(LAYERS)]
    return [LayerSpan(layer * BLOCKS * SIZE, SIZE) for layer in range(LAYERS)]


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, LAYERS * BLOCKS * SIZE, dtype=np.uint8)


@given(places)
def test_a_device_finds_the_bytes_that_a_host_finds(place: tuple[bool, range, list[int], tuple[int, int]]) -> None:
    interleaved, layers, ids, (first, count) = place
    ours, theirs = noise(1), noise(1)
    device = DeviceKvMemory(torch.from_numpy(ours), GEOMETRY, spans(interleaved))
    host = KvMemory(theirs, GEOMETRY, spans(interleaved))
    blocks, heads = np.array(ids), Heads(first, count)
    # (1) Copied out, and in place.
    out = np.zeros(len(layers) * len(ids) * count * HEAD_BYTES, dtype=np.uint8)
    staged = device.gather(layers, blocks, heads, device.buffers(1, 2 * len(out))[0])
    assert (staged.numpy() == host.gather(layers, blocks, heads, out)).all()
    one, two = device.view(layers.start, blocks, heads), host.view(layers.start, blocks, heads)
    assert (one is None) == (two is None)
    if one is not None and two is not None:
        assert (one.numpy() == two).all()
        assert (
            one.data_ptr() - torch.from_numpy(ours).data_ptr()
            == two.__array_interface__["data"][0] - (theirs.__array_interface__["data"][0])
        )
    # (2) Copied in, and nothing else is touched.
    device.scatter(layers, blocks, heads, torch.from_numpy(255 - out))
    host.scatter(layers, blocks, heads, 255 - out)
    assert (ours == theirs).all()


@pytest.mark.parametrize("block", [-1, BLOCKS * LAYERS])
def test_a_block_that_is_not_there_is_an_error(block: int) -> None:
    memory = DeviceKvMemory(torch.from_numpy(noise(1)), GEOMETRY, spans(False))
    for move in (memory.gather, memory.scatter):
        with pytest.raises(IndexError):
            move(range(1), np.array([block]), memory.all_heads, torch.zeros(SIZE, dtype=torch.uint8))


def test_a_digest_sees_every_flip_and_every_exchange() -> None:
    payload = torch.from_numpy(noise(2)[:4096].copy())
    whole, rng = int(reference(payload)), random.Random(4)
    # (1) Of one bit anywhere; of two words, wherever they are.
    for _ in range(2000):
        changed = payload.clone()
        changed[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
        assert int(reference(changed)) != whole
        words = payload.clone().view(torch.int64)
        a, b = rng.sample(range(len(words)), 2)
        words[[a, b]] = words[[b, a]]
        assert int(reference(words.view(torch.uint8))) != whole
    # (2) Of the same bit in several words: what a bad line does.
    for bit in range(64):
        for count in (2, 16):
            words = payload.clone().view(torch.int64)
            flipped = rng.sample(range(len(words)), count)
            words[flipped] ^= torch.tensor(1 << bit if bit < 63 else -(1 << 63), dtype=torch.int64)
            assert int(reference(words.view(torch.uint8))) != whole
    # (3) Zeros count by their number, and digests add up.
    zeros = [int(reference(torch.zeros(8 * n, dtype=torch.uint8))) for n in range(1, 50)]
    assert len(set(zeros)) == len(zeros)
    tally = Tally(payload.device)
    digest(payload, tally)
    assert int(tally.answer) == whole


class DeviceCache:
    """A shard's KV memory of tensors; `data` is [layers, blocks, bytes of a block]."""

    def __init__(self, seed: int) -> None:
        self.geometry = GEOMETRY
        flat = noise(seed)
        self.data = flat.reshape(LAYERS, BLOCKS, SIZE)
        self.memory = DeviceKvMemory(torch.from_numpy(flat), GEOMETRY, spans(False))


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("target", [[4, 5, 6, 7], [8, 2, 9, 3]], ids=["adjacent", "scattered"])
async def test_a_transfer_arrives_whole_and_touches_nothing_else(
    target: list[int], joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, send = list[int](), Peer.send

    async def counted(peer: Peer, header: Header, payload: Payload | None = None) -> None:
        if header.kind is Kind.DATA and header.transfer_id == TICKET:
            sent.append(header.layers)
        await send(peer, header, payload)

    monkeypatch.setattr(Peer, "send", counted)
    worker, source, owner = MemoryWorker(), DeviceCache(1), DeviceCache(2)
    before, blocks = owner.data.copy(), [7, 1, 2, 5]
    chunk = (len(blocks) * LAYERS if joined else 2) * SIZE
    sending = SendingEnd(worker, source, chunk)  # type: ignore[arg-type]
    owning = OwningEnd(worker, owner, chunk)  # type: ignore[arg-type]
    # (1) A transfer of all layers, in messages of two blocks, or in as few as the layers that have piled up make.
    owning.expect(TICKET, target)
    sending.sender.start(TICKET, [Destination(*owning.address)])
    for layer in range(LAYERS):
        sending.sender.add(Push(TICKET, layer, 0, blocks))
    sending.sender.add(Commit(TICKET))
    assert (await sending.done()).error == ""
    settled = await owning.settle(TICKET)
    assert settled.complete
    assert settled.nbytes == LAYERS * len(blocks) * SIZE
    assert sent == ([LAYERS] if joined else [1] * (2 * LAYERS))
    # (2) Block by block, and nothing else.
    before[:, target] = source.data[:, blocks]
    assert (owner.data == before).all()
    await sending.close()
    worker.close()


async def test_a_damaged_payload_fails_its_transfer() -> None:
    owner = DeviceCache(2)
    owning = OwningEnd(worker := MemoryWorker(), owner, 2 * SIZE)  # type: ignore[arg-type]
    owning.expect(TICKET, [4, 5])
    before = owner.data.copy()
    endpoint = await worker.connect(*owning.address)
    payload = torch.from_numpy(noise(3)[: 2 * SIZE].copy())
    header = Header(Kind.DATA, TICKET, blocks=2, length=2 * SIZE)
    checksum = await owner.memory.checksum(payload, header.seed)
    payload[77] ^= 4
    sealed = Header(Kind.DATA, TICKET, blocks=2, length=2 * SIZE, checksum=checksum)
    endpoint.send(sealed.to_buffer(), 1)
    await endpoint.send(payload, 2)  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    settled = await owning.settle(TICKET)
    assert not settled.complete
    assert "corrupt" in settled.error
    assert (owner.data == before).all()
    worker.close()


def test_codecs_of_devices_round_as_those_of_hosts() -> None:
    values = torch.randn(5 * SIZE // 2, generator=torch.Generator().manual_seed(1)) * 3
    raw = values.to(torch.bfloat16).view(torch.uint8)
    # (1) To 8 bits: within half a step of the largest of 16, of each head's keys and of its values.
    codec = make_codec("fp8", GEOMETRY)
    assert codec is not None
    encoded = codec.encode(raw)
    assert len(encoded) == len(raw) // 2 + 5 * HEADS * 8
    back = codec.decode(encoded, len(raw)).view(torch.bfloat16).float().view(-1, TOKENS, 2, HEAD)
    exact = raw.view(torch.bfloat16).float().view(-1, TOKENS, 2, HEAD)
    assert ((back - exact).abs() <= exact.abs() / 15 + exact.abs().amax(dim=(1, 3), keepdim=True) / 448 / 8).all()
    # (2) What is not finite is sent as 0, and spoils nothing around it.
    spoiled = raw.clone()
    spoiled.view(torch.bfloat16)[3] = float("nan")
    spoiled.view(torch.bfloat16)[4] = float("inf")
    cured = codec.decode(codec.encode(spoiled), len(raw)).view(torch.bfloat16)
    assert cured[3] == cured[4] == 0
    assert (cured[5:] == back.view(-1)[5:].to(torch.bfloat16)).all()
    # (3) To 16 bits: as torch rounds, within float16's range.
    cast = make_codec("fp16", GEOMETRY)
    assert cast is not None
    assert torch.equal(cast.encode(raw).view(torch.float16), raw.view(torch.bfloat16).half())
    huge = torch.full((4,), 1e30).to(torch.bfloat16).view(torch.uint8)
    assert (cast.encode(huge).view(torch.float16) == 65504).all()
    # (4) What makes no sense is refused.
    for name in ("lossless", "zip"):
        with pytest.raises(GeometryMismatchError, match=name):
            make_codec(name, GEOMETRY)


async def test_the_device_is_waited_for_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    done = 0

    class Event:
        """One of a device that has done `done` things."""

        made = 0

        def record(self) -> None:
            Event.made += 1
            self._number = Event.made

        def query(self) -> bool:
            return self._number <= done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    launched, order = _Launched(), list[int]()

    async def wait(number: int) -> None:
        await launched.done()
        order.append(number)

    # (1) Four wait; one gives up; nothing is done yet.
    tasks = [asyncio.create_task(wait(number)) for number in range(4)]
    await asyncio.sleep(0.01)
    assert order == []
    tasks[1].cancel()
    # (2) They go on as the device does, and who comes later does not wait for who has gone.
    done = 3
    await asyncio.sleep(0.01)
    assert order == [0, 2]
    done = 4
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 2, 3]
    done = 5
    await launched.done()
