"""How long an engine with nothing to compute waits for news.

While a transfer is pending vLLM steps about once a millisecond even if there is nothing to compute. Each such step
wakes four processes, on hosts with few cores at the cost of those who compute. So a worker half sleeps within it, the
longer the less happens. KV that arrives ends the sleep, and so does a service that is about to submit a request, which
vLLM itself would look at only after the step.
"""

from __future__ import annotations

from tokenmesh.kv.hub import EngineLink
from tokenmesh.kv.messages import Roused, ToEngine

SHORTEST_S = 0.001
LONGEST_S = 0.05
"""What an abort may have to wait for: nobody announces it."""


class IdleLink:
    """A worker half's link, listened to once a step."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self._wait_s = SHORTEST_S
        self._idle = False

    def begin_step(self, idle: bool) -> None:
        """`idle`: the step computes nothing."""
        self._idle = idle

    def poll(self) -> list[ToEngine]:
        """What has arrived, without waiting if the step had something to compute.

        After news, and after a step that computed, waits begin short again: the request that the news announced comes
        by another way, and may be later.
        """
        messages = self._link.poll(self._wait_s if self._idle else 0.0)
        if messages or not self._idle:
            self._wait_s = SHORTEST_S
        else:
            self._wait_s = min(2 * self._wait_s, LONGEST_S)
        return [message for message in messages if not isinstance(message, Roused)]
