"""How long a transfer really had bytes on the wire."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the time during which at least one of any number of overlapping messages was in flight."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._in_flight = 0
        self._since = 0.0

    @contextmanager
    def message(self) -> Iterator[None]:
        """Runs for the length of the block; blocks may overlap."""
        if not self._in_flight:
            self._since = time.monotonic()
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self.seconds += time.monotonic() - self._since
