"""The header and its checksum: whatever the wire does to a message, it is noticed."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmesh.kv.checksum import SLICE_BYTES, checksum
from tokenmesh.kv.wire import HEADER_BYTES, Header, Kind, WireError

headers = st.builds(
    Header,
    kind=st.sampled_from(Kind),
    transfer_id=st.binary(min_size=16, max_size=16),
    sequence=st.integers(0, 2**32 - 1),
    layer=st.integers(0, 2**16 - 1),
    first=st.integers(0, 2**32 - 1),
    blocks=st.integers(0, 2**32 - 1),
    length=st.integers(0, 2**40),
)
payloads = st.binary(min_size=1, max_size=512).map(lambda b: np.frombuffer(bytearray(b), dtype=np.uint8))


@given(headers, payloads)
def test_what_was_sent_arrives(header: Header, payload: np.ndarray) -> None:
    sealed = header.sealed(payload)
    arrived = Header.from_buffer(sealed.to_buffer())
    assert arrived == sealed
    assert arrived.intact(payload)


@given(headers, payloads, st.data())
def test_a_flipped_bit_is_noticed(header: Header, payload: np.ndarray, data: st.DataObject) -> None:
    # (1) One bit of header or payload flips on the way.
    raw, body = header.sealed(payload).to_buffer(), payload.copy()
    target = data.draw(st.sampled_from((raw, body)))
    position = data.draw(st.integers(0, len(target) - 1))
    target[position] ^= 1 << data.draw(st.integers(0, 7))
    # (2) Either it is no header any more, or its checksum is wrong.
    try:
        arrived = Header.from_buffer(raw)
    except WireError:
        return
    assert not arrived.intact(body)


@given(headers, headers, payloads)
def test_a_payload_cannot_move_under_another_header(one: Header, other: Header, payload: np.ndarray) -> None:
    if one == other:
        return
    stolen = other.sealed(payload).checksum
    forged = Header(one.kind, one.transfer_id, one.sequence, one.layer, one.first, one.blocks, one.length, stolen)
    assert not forged.intact(payload)


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_is_no_header(noise: bytes) -> None:
    with pytest.raises(WireError):
        Header.from_buffer(np.frombuffer(bytearray(b"\0\0\0\0" + noise[4:]), dtype=np.uint8))


async def test_a_checksum_in_slices_is_the_same_as_in_one_go() -> None:
    random = np.random.default_rng(2)
    for size in (1, SLICE_BYTES - 1, SLICE_BYTES, SLICE_BYTES + 1, 3 * SLICE_BYTES):
        payload = random.integers(0, 256, size, dtype=np.uint8)
        header = Header(Kind.DATA, b"t" * 16, 1, 2, 3, 4, size)
        assert await checksum(payload, header.seed) == header.sealed(payload).checksum


async def test_others_have_a_turn_between_slices() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await checksum(np.zeros(8 * SLICE_BYTES, dtype=np.uint8), 0)
    counting.cancel()
    assert turns >= 7
