"""On CPUs, a row whose token will be thrown away leaves no trace in its request.

vLLM 0.32 samples for every row of a batch, those of prompts that are not computed to their end included. It then winds
the generators of seeded requests back, which a CPU's generators cannot do: the engine dies of one such request. So
their generators are put aside while the batch is sampled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

Sample = Callable[..., Any]


def put_aside_discards() -> None:
    """Does so in vLLM's CPU model runner. Idempotent."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if not hasattr(CPUModelRunner.sample_tokens, "puts_aside"):
        CPUModelRunner.sample_tokens = putting_aside(CPUModelRunner.sample_tokens)


def putting_aside(sample_tokens: Sample) -> Sample:
    """`sample_tokens` of a vLLM V1 model runner, so that `discard_request_mask` is obeyed before anything is drawn."""

    @functools.wraps(sample_tokens)
    def sample(runner: Any, *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        rows = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        generators = {row: batch.generators.pop(row) for row in rows if row in batch.generators}
        try:
            return sample_tokens(runner, *args, **kwargs)
        finally:
            batch.generators.update(generators)

    sample.puts_aside = True  # type: ignore[attr-defined]
    return sample
