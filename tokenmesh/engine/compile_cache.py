"""What vLLM compiled for a CPU is found again at the next start.

vLLM 0.32 saves it and loads it, and then asks it to finish loading, which only what was compiled for a GPU knows how to
do. So it compiles anew at every start: for one to three minutes, of a model of 30 layers, on a core. Nor does vLLM know
what CPU it was compiled for; code for another could give wrong results. So engines name theirs in the cache's key, and
what was saved under a key without a CPU is compiled anew as before.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import xxhash

KEY = "compiled_for_cpu"
"""Of an engine's additional_config, all of which vLLM makes part of its compile cache's key."""


def this_cpu() -> str:
    """Its instructions, and how many cores we have."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    # Named so on x86 and on Arm.
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{xxhash.xxh3_64_hexdigest(instructions.encode())}-{len(os.sched_getaffinity(0))}"


def find_it_again() -> None:
    """Lets there be nothing to finish. Idempotent."""
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Compiled

    if not hasattr(Compiled, "finalize_loading"):
        Compiled.finalize_loading = _finish


def _finish(compiled: Any, vllm_config: Any) -> None:
    named = vllm_config.additional_config
    if not isinstance(named, dict) or KEY not in named:
        # What vLLM meets without us; it then compiles.
        raise AttributeError("compiled for an unknown CPU")
