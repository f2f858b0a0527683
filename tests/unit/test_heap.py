"""What lives when a service has started is not gone through again, neither while it serves nor when it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import gc, weakref
from tokenmesh.heap import freeze_heap

class Node:
    pass

def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)

gc.disable()
early = cycle()
kept = [[] for _ in range(10_000)]
freeze_heap()
print(early() is None, gc.get_freeze_count() > 10_000, len(gc.get_objects()) < 1000)
late = cycle()
print(late() is not None, gc.collect() > 0, late() is None)
"""


def test_what_lived_is_set_aside_and_garbage_is_not() -> None:
    # In a process of its own: it cannot be undone.
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 6


ENDING = """
import gc
from tokenmesh.heap import leave_heap_at_exit

class Node:
    def __del__(self):
        print("collected")

node = Node()
node.itself = node
"""


@pytest.mark.parametrize(("last", "said"), [("", "collected"), ("leave_heap_at_exit()", "")])
def test_a_process_ends_without_a_collection(last: str, said: str) -> None:
    # vLLM's engine core unfreezes its heap before it ends.
    program = f"{ENDING}{last}\ngc.unfreeze()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said
