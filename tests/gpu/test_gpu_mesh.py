"""A whole mesh on GPUs gives the tokens of a plain engine, its KV moved from GPU to GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.engine_tokens import agreement, in_process, prompts

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    pytest.mark.timeout(700),
]


def test_passes_of_kernel_and_torch_agree() -> None:
    from tokenmesh.kv.device.digest import reference
    from tokenmesh.kv.device.passes import Places, Tally, digest, gather, scatter

    generator, tally = torch.Generator("cuda").manual_seed(3), Tally(torch.device("cuda"))
    # (1) Of bytes in place, of all lengths, one after the other.
    for words in (1, 2, 4095, 4096, 4097, 1 << 20, (1 << 20) + 3):
        payload = torch.randint(0, 256, (8 * words,), dtype=torch.uint8, device="cuda", generator=generator)
        digest(payload, tally)
        torch.cuda.synchronize()
        assert int(tally.answer) == int(reference(payload)), words
    # (2) Of cells of two layers out of three, of sizes that thread blocks do and do not share: gathered, and back.
    bases = torch.tensor([0, 100, 200], device="cuda")
    for words in (1, 7, 512, 1024, 5000, 8192):
        cells = torch.randint(-(1 << 62), 1 << 62, (300, words), device="cuda", generator=generator)
        places = Places(cells, bases, range(1, 3), torch.randperm(100, device="cuda", generator=generator)[:51])
        out = torch.zeros(2 * 102 * words, dtype=torch.int64, device="cuda")
        part = out[: 102 * words].view(torch.uint8)
        gather(places, part, tally)
        torch.cuda.synchronize()
        assert torch.equal(out[: 102 * words].view(102, words), cells[places.numbers])
        assert not out[102 * words :].any()
        assert int(tally.answer) == int(reference(part)), words
        want = cells.clone()
        want[places.numbers] = -want[places.numbers]
        scatter(places, (-out[: 102 * words]).view(torch.uint8), tally)
        assert torch.equal(cells, want), words
    assert not tally.state.any()


@pytest.fixture(scope="module")
def plain(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """A plain engine's tokens."""
    tokens, _ = in_process(model, 1, "local", False, tmp_path_factory.mktemp("plain"))
    return tokens


@pytest.mark.parametrize("case", ["root", "local", "nccl", "fp8"])
def test_kv_that_was_moved_gives_the_same_tokens(case: str, model: str, plain: list[list[int]], tmp_path: Path) -> None:
    # Imported late: it takes a mesh's clients.
    from tests.gpu.mesh_tokens import MIN_REMOTE, mesh_tokens

    if case == "nccl" and torch.cuda.device_count() == 1:
        pytest.skip("NCCL wants two GPUs")
    # (1) Long prompts were prefilled elsewhere, in the first wave all of them.
    result = mesh_tokens(model, case, tmp_path)
    remote = [len(ids) >= MIN_REMOTE for ids in prompts(model)]
    moved = [decision == "PREFILL_DECISION_DISAGGREGATED" for decision in result["decisions"][0]]
    assert sum(moved) >= 0.8 * sum(remote)
    assert result["kv_transfers"] >= sum(moved)
    # (2) Their KV came from GPU to GPU, where there are ranks to each of them, and nothing is held in the end.
    assert "cuda_ipc" in result["kv_transport"]
    assert result["kv_bytes"] > 0
    if case in ("local", "nccl"):
        assert result["most"] >= 8
    if case == "nccl":
        assert 0 < result["kv_bytes_to_workers"] < result["kv_bytes"]
    assert not any(result["held"].values())
    # (3) bfloat16 rounds coarsely: a sum in another order may pick another token. Hence agreement, not equality.
    equal, compared = agreement(plain, result["tokens"])
    print(f"{case}: {equal} of {compared} tokens ({equal / compared:.2%}), {result['kv_bytes']} bytes moved")
    assert equal / compared >= (0.9 if case == "fp8" else 0.99)
