"""Movers as their service sees them: known by a file descriptor of the process, which a recycled number cannot fool."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import structlog

log = structlog.get_logger()


@dataclass
class _Life:
    pidfd: int
    """-1: gone."""


class MoverLives:
    """Which movers live, by shard. Used in an event loop."""

    def __init__(self, on_gone: Callable[[int], None]) -> None:
        """`on_gone(shard)` is called when a mover has ended, by itself or not: it writes nothing any more."""
        self._on_gone = on_gone
        self._lives: dict[int, _Life] = {}

    def watch(self, shard: int, pid: int) -> None:
        """Knows a mover from now on, in the place of one that had its number before."""
        old = self._lives.pop(shard, None)
        if old is not None:
            self._forget(old)
        try:
            life = self._lives[shard] = _Life(os.pidfd_open(pid))
        except ProcessLookupError:
            self._lives[shard] = _Life(-1)
            return
        except OSError as error:
            # Some sandboxes have no pidfd; then a mover that is silent is taken for dead.
            log.warning("movers cannot be watched here", error=str(error))
            return
        asyncio.get_running_loop().add_reader(life.pidfd, self._ended, shard, life)

    def _ended(self, shard: int, life: _Life) -> None:
        self._forget(life)
        self._on_gone(shard)

    @staticmethod
    def _forget(life: _Life) -> None:
        if life.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(life.pidfd)
            os.close(life.pidfd)
            life.pidfd = -1

    def gone(self, shard: int) -> bool:
        """Whether a mover is known to have ended."""
        return shard in self._lives and self._lives[shard].pidfd < 0

    def kill(self, shard: int) -> bool:
        """Ends a mover, even one that is stopped; `on_gone` follows. False for one that is not known."""
        life = self._lives.get(shard)
        if life is None:
            return False
        if life.pidfd >= 0:
            signal.pidfd_send_signal(life.pidfd, signal.SIGKILL)
        return True
