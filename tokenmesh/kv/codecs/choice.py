"""Which codec a link is best served by: `auto` measures, chooses among the exact ones, and says why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenmesh.kv.codecs import EXACT, NONE, make_codec
from tokenmesh.kv.geometry import BlockGeometry

SAMPLE_BYTES = 2 << 20
WORTH = 1.1
"""A codec must promise this much more than plain bytes: what it costs in cores is not in the figures."""


@dataclass(frozen=True)
class Speed:
    """A codec on this machine. Bytes are those of the cache."""

    ratio: float
    """Bytes of the cache per byte on the wire."""
    encode: float
    """Bytes per second, one thread."""
    decode: float

    def goodput(self, link: float) -> float:
        """Bytes per second over a link, with encoding, sending and decoding of messages overlapped."""
        return min(self.encode, self.decode, self.ratio * link)


@dataclass(frozen=True)
class Choice:
    """A codec for a link, and the reason in one line."""

    codec: str
    why: str


def measure(geometry: BlockGeometry) -> dict[str, Speed]:
    """Times every exact codec that works on these blocks. About 0.1 s of one core."""
    from tokenmesh.kv.codecs.elements import float_type

    # Keys and values of a head are about normal, and heads differ in size; that is all that a lossless codec can use.
    elements = SAMPLE_BYTES // 4
    source = np.random.default_rng(0)
    sizes = source.lognormal(0.0, 1.0, elements // 64).repeat(64)
    values = (source.standard_normal(elements) * sizes).astype(float_type(geometry, "auto"))
    return {name: time_codec(name, geometry, values.view(np.uint8)) for name in EXACT if name != NONE}


def time_codec(name: str, geometry: BlockGeometry, raw: Any, rounds: int = 3) -> Speed:
    """Times one codec on these bytes, best of some rounds. Raises GeometryMismatchError."""
    codec = make_codec(name, geometry)
    assert codec is not None
    payload = codec.encode(raw)
    if payload is None:
        return Speed(1.0, _rate(lambda: codec.encode(raw), len(raw), rounds), float("inf"))
    encode = _rate(lambda: codec.encode(raw), len(raw), rounds)
    decode = _rate(lambda: codec.decode(payload, len(raw)), len(raw), rounds)
    return Speed(len(raw) / len(payload), encode, decode)


def _rate(work: Callable[[], object], nbytes: int, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return nbytes / best


def choose(link: float, speeds: Mapping[str, Speed]) -> Choice:
    """The codec that promises the most over a link of so many bytes per second; `none` unless another is worth it."""
    best, promised = NONE, link * WORTH
    for name, speed in speeds.items():
        if speed.goodput(link) > promised:
            best, promised = name, speed.goodput(link)
    figures = "; ".join(
        f"{name} would give {_gb(speed.goodput(link))} (ratio {speed.ratio:.2f}, encodes {_gb(speed.encode)},"
        f" decodes {_gb(speed.decode)})"
        for name, speed in speeds.items()
    )
    return Choice(best, f"the link gives {_gb(link)}; {figures}")


def _gb(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"
