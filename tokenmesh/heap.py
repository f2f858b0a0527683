"""Keeps Python's garbage collector from stopping a service that serves."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Takes what lives now out of the collector's sight; to be called once a service has started.

    vLLM and torch leave 600,000 objects behind on import. Going through them all, as a collection of the oldest
    generation does, stops the process for half a second and more, streams and status calls included. Objects are
    freed as before when the last reference goes; only cycles among what lives now would stay.
    """
    gc.collect()
    gc.freeze()
