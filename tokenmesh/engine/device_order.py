"""Messages that must not overtake the GPU: sent once the device has done what was launched before them.

vLLM launches kernels and goes on; a hook that runs behind a layer's attention runs long before it. Whoever reads a
layer's KV, or is given blocks that a step under way may still write to, must hear of it in the device's time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import structlog
import torch

log = structlog.get_logger()


class InDeviceOrder:
    """A queue of messages, each behind an event of the stream that its sender computes on, and the thread that waits.

    `send` costs the computing thread some microseconds, and the waiting thread sleeps without the interpreter lock.
    """

    def __init__(self, deliver: Callable[[Any], None]) -> None:
        """`deliver` is called in the waiting thread alone, in the order of `send`."""
        self._deliver = deliver
        self._queue: queue.SimpleQueue[tuple[Any, Any] | None] = queue.SimpleQueue()
        self._device = torch.cuda.current_device()
        self._thread = threading.Thread(target=self._run, name="device-order", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        """Delivers a message when everything launched so far on the current stream is done. Never waits."""
        event: Any = torch.cuda.Event(blocking=True)
        event.record()
        self._queue.put((event, message))

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while (item := self._queue.get()) is not None:
            event, message = item
            event.synchronize()
            self._deliver(message)

    def close(self) -> None:
        """Delivers what is queued and ends the thread."""
        self._queue.put(None)
        self._thread.join(timeout=5)
        if self._thread.is_alive():
            log.warning("the device does not get done")
