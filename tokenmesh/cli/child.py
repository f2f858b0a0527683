"""One service process of a mesh: started, watched and ended with everything that it starts itself."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from rich.text import Text

from tokenmesh.cli.status import Endpoint, ServiceState, ServiceStatus

STOP_GRACE_S = 20.0
"""For a service that was told to stop."""
GROUP_GRACE_S = 2.0
"""For what a service started, once the service itself has ended."""
KILL_WAIT_S = 5.0
"""How long killed processes may take to vanish."""

_TAIL_BYTES = 64 << 10
_TAIL_LINES = 5


class Child:
    """A service process in a session of its own, so that its members can be told from all other processes."""

    def __init__(
        self, endpoint: Endpoint, command: Sequence[str], log_path: Path, env: Mapping[str, str] | None = None
    ) -> None:
        """Starts it, with `env` besides the parent's; its output goes to a fresh log. Raises OSError."""
        self.endpoint = endpoint
        self.log_path = log_path
        self.ready = False
        """Its health has been SERVING."""
        self.exit_code: int | None = None
        self._strays: set[psutil.Process] = set()
        self._reaped = False
        with log_path.open("wb") as log:
            # The session also keeps the terminal's Ctrl-C away from it: only the parent decides who ends when.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit code, negative for a signal, or None while it runs.

        The dead process is not reaped: until stop() does that, no other process can get its id or its group's.
        """
        if self.exit_code is None:
            info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is not None:
                self.exit_code = info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
        return self.exit_code

    def last_lines(self) -> list[str]:
        """Why it ended: the line that a service prints when it cannot start, else the end of its log."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
        lines = [line for raw in text.splitlines() if (line := Text.from_ansi(raw).plain.rstrip())]
        # Helpers of the service may have complained after it.
        told = [line for line in lines if line.startswith("tokenmesh: ")]
        return told[-1:] or lines[-_TAIL_LINES:]

    def seen(self, status: ServiceStatus) -> ServiceStatus:
        """What the service said of itself, corrected by what its parent knows."""
        state, error = status.state, status.error
        if self.poll() is not None:
            state, error = ServiceState.EXITED, ""
        elif state is ServiceState.UNREACHABLE and not self.ready:
            state, error = ServiceState.STARTING, ""
        return dataclasses.replace(status, state=state, error=error, pid=self.pid, exit_code=self.exit_code)

    async def stop(self, hurry: asyncio.Event) -> list[str]:
        """SIGTERM, a grace that `hurry` ends, then SIGKILL for every process left. Idempotent.

        Returns the processes that survived even that, by name and id.
        """
        if self._reaped:
            return []
        if self.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._strays.update(psutil.Process(self.pid).children(recursive=True))
            os.kill(self.pid, signal.SIGTERM)
            await _until(lambda: self.poll() is not None, STOP_GRACE_S, hurry)
        if self.poll() is not None:
            await _until(lambda: not self.survivors(), GROUP_GRACE_S, hurry)
        await _until(self._kill, KILL_WAIT_S)
        left = [f"{self.endpoint.name}: {process.name()} (pid {process.pid})" for process in self.survivors()]
        if not left:
            self.exit_code = self._process.wait()
            self._reaped = True
        return left

    def survivors(self) -> list[psutil.Process]:
        """Its processes that run: itself, members of its session, and descendants known to stop() that left it."""
        found = []
        for process in {*_session(self.pid), *self._strays}:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _kill(self) -> bool:
        left = self.survivors()
        if left:
            # The group at once, so that nobody in it can start more; then those who are in other groups.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return not left


def _session(leader: int) -> list[psutil.Process]:
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(pid) == leader:
                members.append(psutil.Process(pid))
    return members


async def _until(condition: Callable[[], bool], timeout: float, hurry: asyncio.Event | None = None) -> None:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        if hurry is not None and hurry.is_set():
            return
        await asyncio.sleep(0.05)
