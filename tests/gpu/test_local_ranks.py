"""Ranks that share a GPU give the tokens of a plain engine, and their kernels do what is written down in torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.engine_tokens import agreement
from tokenmesh.model_store import resolve_model

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def test_kernels() -> None:
    # Imported late: their module needs Triton.
    from tests.gpu.kernel_checks import HEADS, RANKS, check_pack_and_unpack, check_split

    for ranks in RANKS:
        check_split(ranks)
    for heads, kv_heads, size in HEADS:
        check_pack_and_unpack(heads, kv_heads, size)


def in_process(model: str, ranks: int, eager: bool, folder: Path) -> tuple[list[list[int]], int]:
    """Greedy tokens, in a process that has the GPU for itself."""
    file = folder / f"{ranks}.json"
    command = [sys.executable, "-m", "tests.gpu.engine_tokens", model, str(ranks), str(int(eager)), str(file)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(command, check=True, timeout=300, env=env, cwd=ROOT)
    result = json.loads(file.read_text())
    return result["tokens"], result["most"]


@pytest.mark.timeout(700)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_two_ranks_give_the_tokens_of_a_plain_engine(eager: bool, tmp_path: Path) -> None:
    model = os.environ.get("TOKENMESH_TEST_MODEL") or resolve_model("smollm2-135m-instruct")
    # (1) A plain engine, then a root and a rank on the same GPU.
    plain, _ = in_process(model, 1, eager, tmp_path)
    spread, most = in_process(model, 2, eager, tmp_path)
    # (2) The rank had its part of the sequences.
    assert most >= 8
    # (3) bfloat16 rounds coarsely: a sum in another order may pick another token. Hence agreement, not equality.
    half = len(plain) // 2
    against_itself = agreement(plain[:half], plain[half:])
    equal, compared = agreement(plain, spread)
    print(f"plain against itself with prefix hits: {against_itself[0]} of {against_itself[1]} tokens")
    print(f"two ranks against plain: {equal} of {compared} tokens ({equal / compared:.2%}); {most} on rank 1 at once")
    assert equal / compared >= 0.99
