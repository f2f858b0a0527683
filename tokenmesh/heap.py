"""Keeps Python's garbage collector from stopping a service that serves, and from holding up one that ends."""

from __future__ import annotations

import atexit
import gc


def freeze_heap() -> None:
    """Takes what lives now out of the collector's sight; to be called once a service has started.

    vLLM and torch leave 600,000 objects behind on import. Going through them all, as a collection of the oldest
    generation does, stops the process for half a second and more, streams and status calls included. Objects are
    freed as before when the last reference goes; only cycles among what lives now would stay.
    """
    gc.collect()
    gc.freeze()


def leave_heap_at_exit() -> None:
    """Spares this process the collections with which an interpreter ends: the system takes its memory back at once.

    They take as long as a collection of the oldest generation, several times over. An engine has two processes, one
    of which waits for the other, and vLLM kills both after 5 s.
    """
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
