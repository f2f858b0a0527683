"""Ranks on GPUs give the tokens of a plain engine, and kernels do what is written down in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.engine_tokens import agreement, in_process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def test_kernels() -> None:
    # Imported late: their module needs Triton.
    from tests.gpu.kernel_checks import HEADS, RANKS, check_pack_and_unpack, check_place, check_split

    for ranks in RANKS:
        check_split(ranks)
    for heads, kv_heads, size in HEADS:
        check_pack_and_unpack(heads, kv_heads, size)
        check_place(heads, kv_heads, size)


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "graphs"])
def eager(request: pytest.FixtureRequest) -> bool:
    """Whether CUDA graphs are off."""
    return bool(request.param)


@pytest.fixture(scope="module")
def plain(model: str, eager: bool, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """A plain engine's tokens."""
    tokens, _ = in_process(model, 1, "local", eager, tmp_path_factory.mktemp("plain"))
    half = len(tokens) // 2
    equal, compared = agreement(tokens[:half], tokens[half:])
    print(f"plain against itself with prefix hits: {equal} of {compared} tokens")
    return tokens


@pytest.mark.timeout(700)
@pytest.mark.parametrize("exchange", ["local", "nccl"])
def test_two_ranks_give_the_tokens_of_a_plain_engine(
    model: str, eager: bool, plain: list[list[int]], exchange: str, tmp_path: Path
) -> None:
    # (1) A root and a rank have the same sequences, and the rank has its part of them.
    spread, most = in_process(model, 2, exchange, eager, tmp_path)
    assert most >= 8
    # (2) bfloat16 rounds coarsely: a sum in another order may pick another token. Hence agreement, not equality.
    equal, compared = agreement(plain, spread)
    print(f"two ranks against plain: {equal} of {compared} tokens ({equal / compared:.2%}); {most} on rank 1 at once")
    assert equal / compared >= 0.99


@pytest.mark.timeout(700)
def test_a_killed_rank_costs_no_token(model: str, eager: bool, plain: list[list[int]], tmp_path: Path) -> None:
    # (1) The worker is killed while sequences decode there; the root computes them again.
    spread, _ = in_process(model, 2, "nccl", eager, tmp_path, kill=True)
    # (2) All have all their tokens, and the same.
    assert [len(tokens) for tokens in spread] == [len(tokens) for tokens in plain]
    equal, compared = agreement(plain, spread)
    assert equal / compared >= 0.99
