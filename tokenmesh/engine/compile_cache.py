"""What vLLM compiled for a CPU is found again at the next start.

vLLM 0.32 saves it and loads it, and then asks it to finish loading, which only what was compiled for a GPU knows how to
do. So it compiles anew at every start: for one to three minutes, of a model of 30 layers, on a core.
"""

from __future__ import annotations


def find_it_again() -> None:
    """Lets there be nothing to finish. Idempotent."""
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Compiled

    if not hasattr(Compiled, "finalize_loading"):
        Compiled.finalize_loading = lambda compiled, vllm_config: None
