"""Codecs: exact ones give back every bit, the others stay within their bounds, and nothing forged gets through."""

from __future__ import annotations

import asyncio
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.unit.memory_wire import Cache, MemoryWorker, OwningEnd, SendingEnd
from tests.unit.memory_wire import wire_settings as wire_settings
from tokenmesh.kv.codecs import NAMES, CodecError, check_codec, codec_label, codec_name, make_codec
from tokenmesh.kv.codecs.choice import Speed, choose, measure
from tokenmesh.kv.codecs.links import LinkCodecs
from tokenmesh.kv.geometry import BlockGeometry, GeometryMismatchError
from tokenmesh.kv.messages import Commit, Destination, Push, SendDone, Settled
from tokenmesh.v1 import kv_pb2

LAYERS, BLOCKS, HEADS, TOKENS, HEAD = 2, 8, 3, 16, 8
GROUP = TOKENS * HEAD
ELEMENTS = 2 * GROUP
"""Of one head of one block."""
TYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SOURCE, TARGET = [1, 2, 6], [4, 0, 7]
TICKET = b"c" * 16


def geometry(dtype: str) -> BlockGeometry:
    size = HEADS * ELEMENTS * np.dtype(TYPES[dtype]).itemsize
    return BlockGeometry(LAYERS, HEADS, HEAD, TOKENS, dtype, size, "cpu_attn/vec")


def codec(name: str, dtype: str) -> Any:
    made = make_codec(name, geometry(dtype))
    assert made is not None
    return made


def kv(dtype: str, seed: int = 0, blocks: int = 4) -> np.ndarray:
    """Bytes that look like KV: normal, heads of different size. [blocks * heads * elements of a head]"""
    source = np.random.default_rng(seed)
    values = source.standard_normal((blocks * HEADS, ELEMENTS)) * source.lognormal(0, 2, (blocks * HEADS, 1))
    return values.astype(TYPES[dtype]).reshape(-1).view(np.uint8)


def crossed(name: str, raw: np.ndarray, sender: str, owner: str) -> np.ndarray:
    """What the owner has of bytes that the sender had; elements as float32."""
    payload = codec(name, sender).encode(raw)
    assert payload is not None
    nbytes = len(raw) // np.dtype(TYPES[sender]).itemsize * np.dtype(TYPES[owner]).itemsize
    return codec(name, owner).decode(payload, nbytes).view(TYPES[owner]).astype(np.float32)  # type: ignore[no-any-return]


raws = st.sampled_from(sorted(TYPES)).flatmap(
    lambda dtype: st.tuples(
        st.just(dtype), arrays.arrays(np.uint8, ELEMENTS * np.dtype(TYPES[dtype]).itemsize, fill=st.integers(0, 255))
    )
)


@given(raws)
def test_lossless_gives_back_any_bits(case: tuple[str, np.ndarray]) -> None:
    dtype, raw = case
    payload = codec("lossless", dtype).encode(raw)
    # What would not get smaller is left alone.
    if payload is not None:
        assert len(payload) < len(raw)
        assert (codec("lossless", dtype).decode(payload, len(raw)) == raw).all()


@pytest.mark.parametrize(("dtype", "ratio"), [("float32", 1.1), ("bfloat16", 1.3)])
def test_lossless_makes_kv_smaller(dtype: str, ratio: float) -> None:
    raw = kv(dtype, blocks=64)
    payload = codec("lossless", dtype).encode(raw)
    assert len(raw) / len(payload) > ratio
    assert (codec("lossless", dtype).decode(payload, len(raw)) == raw).all()


def test_lossless_leaves_noise_alone() -> None:
    noise = np.random.default_rng(1).integers(0, 256, 1 << 16, dtype=np.uint8)
    assert codec("lossless", "float32").encode(noise) is None


@pytest.mark.parametrize("sender", sorted(TYPES))
@pytest.mark.parametrize("owner", sorted(TYPES))
@pytest.mark.parametrize(("name", "bits"), [("bf16", 8), ("fp16", 11)])
def test_casts_round_to_nearest(sender: str, owner: str, name: str, bits: int) -> None:
    raw = kv(sender)
    had = raw.view(TYPES[sender]).astype(np.float32)
    # Rounded once on the wire and once in the owner's cache; below fp16's normal numbers the step is 2 ** -24.
    steps = {"float32": 24, "bfloat16": 8, "float16": 11}
    bound = np.abs(had) * (2.0**-bits + 2.0 ** -steps[owner]) + 2.0**-24
    assert (np.abs(crossed(name, raw, sender, owner) - had) <= bound).all()


def test_casts_are_exact_where_nothing_is_to_round() -> None:
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        raw = kv(dtype)
        assert (crossed(name, raw, dtype, dtype) == raw.view(TYPES[dtype]).astype(np.float32)).all()
        assert (crossed(name, raw, dtype, "float32") == raw.view(TYPES[dtype]).astype(np.float32)).all()


def test_fp16_bounds_what_is_too_large() -> None:
    raw = np.full(ELEMENTS, 1e30, dtype=np.float32).view(np.uint8)
    assert (crossed("fp16", raw, "float32", "float32") == 65504).all()


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.floats(1e-20, 1e20), st.sampled_from(["float32", "bfloat16"]))
def test_fp8_stays_within_a_16th_of_each_element(seed: int, size: float, dtype: str) -> None:
    raw = (kv("float32", seed).view(np.float32) * np.float32(size)).astype(TYPES[dtype]).view(np.uint8)
    had = raw.view(TYPES[dtype]).astype(np.float32)
    got = crossed("fp8", raw, dtype, dtype)
    # 3 bits of mantissa, rounded: 2 ** -4 of the element, a little more for the rounding on the way; the smallest step
    # is 2 ** -9 of the scale, which is the largest of the head's keys or values over 448.
    peaks = np.abs(had.reshape(-1, GROUP)).max(axis=1).repeat(GROUP)
    assert (np.abs(got - had) <= np.abs(had) * (2.0**-4 + 2.0**-7) + peaks / 448 * 2.0**-9).all()


def test_fp8_scales_heads_keys_and_values_apart() -> None:
    # (1) One head's values are huge; its keys, and other heads, do not suffer.
    values = np.random.default_rng(2).standard_normal((2 * HEADS, 2, GROUP)).astype(np.float32)
    values[1, 1] *= 1e6
    got = crossed("fp8", values.reshape(-1).view(np.uint8), "float32", "float32").reshape(values.shape)
    rest = np.ones(values.shape[:2], dtype=bool)
    rest[1, 1] = False
    assert np.abs(got[rest] - values[rest]).max() < 0.3
    # (2) The unwritten end of a block may hold anything: it becomes 0 and spoils nothing.
    values[0, 0, -3:] = np.nan, np.inf, -np.inf
    got = crossed("fp8", values.reshape(-1).view(np.uint8), "float32", "float32").reshape(values.shape)
    assert (got[0, 0, -3:] == 0).all()
    assert np.abs(got[0, 0, :-3] - values[0, 0, :-3]).max() < 0.3
    # (3) Zeros stay zeros.
    assert not crossed("fp8", np.zeros(ELEMENTS * 4, dtype=np.uint8), "float32", "float32").any()


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_forged_payload_is_refused(name: str) -> None:
    raw = kv("float32")
    payload = codec(name, "float32").encode(raw)
    for forged in (payload[:-1], np.concatenate([payload, payload[:7]]), payload[:0]):
        with pytest.raises(CodecError):
            codec(name, "float32").decode(forged, len(raw))


def test_what_a_codec_cannot_bridge_is_refused() -> None:
    wide, narrow = geometry("float32"), geometry("bfloat16")
    for name in NAMES:
        check_codec(name, wide, wide)
        if name in ("bf16", "fp16", "fp8"):
            check_codec(name, wide, narrow)
            check_codec(name, narrow, wide)
        else:
            with pytest.raises(GeometryMismatchError, match="dtype"):
                check_codec(name, wide, narrow)
    quantised = msgspec.structs.replace(wide, dtype="uint8", block_bytes=wide.block_bytes // 4)
    for name in NAMES[1:]:
        with pytest.raises(GeometryMismatchError, match="uint8"):
            check_codec(name, quantised, quantised)
    mixed = msgspec.structs.replace(wide, packing="row_major")
    with pytest.raises(GeometryMismatchError, match="row_major"):
        check_codec("fp8", mixed, mixed)


def test_names_are_those_of_grpc() -> None:
    for name in NAMES:
        assert codec_name(kv_pb2.KvTarget(codec=codec_label(name)).codec) == name
    assert codec_name(kv_pb2.KV_CODEC_UNSPECIFIED) == "none"
    with pytest.raises(GeometryMismatchError, match="99"):
        codec_name(99)  # type: ignore[arg-type]


async def transfer(
    name: str, sender: str, owner: str, asked: str | None = None, raw: np.ndarray | None = None
) -> tuple[SendDone, Settled, Cache, Cache]:
    """All layers of some blocks through a real sender and receiver; ends by proving that nothing is left."""
    worker = MemoryWorker()
    source, target = Cache(geometry(sender), BLOCKS), Cache(geometry(owner), BLOCKS)
    for layer in range(LAYERS):
        source.data[layer] = (kv(sender, layer, BLOCKS) if raw is None else raw).reshape(BLOCKS, -1)
    # Two blocks in a message.
    sending = SendingEnd(worker, source, 2 * source.geometry.block_bytes)
    owning = OwningEnd(worker, target, 2 * source.geometry.block_bytes)
    owning.expect(TICKET, TARGET, asked or name)
    sending.sender.start(TICKET, [Destination(*owning.address)], name)
    for layer in range(LAYERS):
        sending.sender.add(Push(TICKET, layer, 0, SOURCE))
    sending.sender.add(Commit(TICKET))
    done = await sending.done()
    settled = await owning.settle(TICKET)
    await sending.close()
    async with asyncio.timeout(10):
        while not owning.idle():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    worker.close()
    return done, settled, source, target


@pytest.mark.parametrize(
    ("name", "sender", "owner"),
    [
        ("lossless", "float32", "float32"),
        ("lossless", "bfloat16", "bfloat16"),
        ("bf16", "float32", "float32"),
        ("bf16", "float32", "bfloat16"),
        ("fp16", "float32", "bfloat16"),
        ("fp8", "bfloat16", "bfloat16"),
        ("fp8", "bfloat16", "float32"),
    ],
)
async def test_blocks_arrive_under_a_codec(name: str, sender: str, owner: str) -> None:
    done, settled, source, target = await transfer(name, sender, owner)
    # (1) Complete, in fewer bytes than the cache has of them, unless there is nothing to save.
    assert (done.error, settled.error) == ("", "")
    assert done.nbytes == settled.nbytes < LAYERS * len(SOURCE) * source.geometry.block_bytes
    # (2) Each block is what the codec makes of it, and no other block is touched.
    for layer in range(LAYERS):
        had = source.data[layer, SOURCE].reshape(-1)
        got = target.data[layer, TARGET].reshape(-1).view(TYPES[owner]).astype(np.float32)
        assert (got == crossed(name, had, sender, owner)).all()
    assert not target.data[:, [block for block in range(BLOCKS) if block not in TARGET]].any()


async def test_what_does_not_get_smaller_travels_as_it_is() -> None:
    noise = np.random.default_rng(4).integers(0, 256, BLOCKS * geometry("float32").block_bytes, dtype=np.uint8)
    done, settled, source, target = await transfer("lossless", "float32", "float32", raw=noise)
    assert settled.complete
    assert done.nbytes == LAYERS * len(SOURCE) * source.geometry.block_bytes
    assert (target.data[:, TARGET] == source.data[:, SOURCE]).all()


async def test_a_codec_that_was_not_asked_for_is_refused() -> None:
    done, settled, _, target = await transfer("fp8", "float32", "float32", asked="lossless")
    assert "refused" in done.error
    assert "outside its ticket" in settled.error
    assert settled.dropped.get("out_of_range", 0) > 0
    assert not target.data.any()


def test_auto_weighs_the_link_against_the_codec() -> None:
    speeds = {"lossless": Speed(ratio=1.4, encode=0.5e9, decode=1e9)}
    # (1) On a slow link smaller is faster; on a fast one the codec is the bottleneck.
    assert choose(0.1e9, speeds).codec == "lossless"
    assert choose(1.0e9, speeds).codec == "none"
    # (2) A gain that is not worth it is left alone, and so is a link that was not measured.
    assert choose(0.47e9, speeds).codec == "none"
    assert choose(0.0, {}).codec == "none"
    # (3) It says why.
    assert "0.10 GB/s; lossless would give 0.14 GB/s (ratio 1.40" in choose(0.1e9, speeds).why


async def test_auto_measures_once_and_never_rounds() -> None:
    shape = geometry("bfloat16")
    assert set(measure(shape)) == {"lossless"}
    links = LinkCodecs("auto")
    # (1) Until a link is known, blocks go as they are.
    assert links.of("slow:1") == "none"
    await links.learn("slow:1", 1e6, shape)
    await links.learn("fast:1", 1e12, shape)
    assert (links.of("slow:1"), links.of("fast:1"), links.of("new:1")) == ("lossless", "none", "none")
    # (2) A choice stands.
    await links.learn("slow:1", 1e12, shape)
    assert links.of("slow:1") == "lossless"
    # (3) What was configured is not second-guessed.
    assert LinkCodecs("fp8").of("slow:1") == "fp8"
