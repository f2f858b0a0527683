"""What a root tells a rank on another GPU comes back as it was, and nothing else is taken for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmesh.parallel.device_step import STEP_BYTES, DeviceStep
from tokenmesh.parallel.exchange import PeerLostError

NUMBERS = st.integers(0, 2**32 - 1)


@given(st.builds(DeviceStep, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.booleans()))
def test_a_step_comes_back(step: DeviceStep) -> None:
    data = step.to_bytes()
    assert len(data) == STEP_BYTES
    assert DeviceStep.from_bytes(data) == step


@given(st.binary(min_size=STEP_BYTES, max_size=STEP_BYTES).filter(lambda data: data[:4] != b"GTKP"))
def test_other_bytes_are_no_step(data: bytes) -> None:
    with pytest.raises(PeerLostError):
        DeviceStep.from_bytes(data)
