"""Other models than the embedded one decode on ranks as a plain engine does: small ones with random weights."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_group import engine_group
from tests.conftest import free_port
from tests.mesh.exact import plain_engine
from tokenmesh.config import MeshConfig

NEW_TOKENS = 12
SIZES: dict[str, Any] = {
    # Three shards share it evenly.
    "vocab_size": 768,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def save_model(kind: str, folder: Path) -> str:
    """A model of this kind with seeded random weights; returns its folder."""
    import torch
    import transformers

    torch.manual_seed(5)
    kinds: dict[str, Any] = {
        "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
    }
    config = kinds[kind]()
    config.initializer_range = 0.5
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    return str(folder)


def mesh_of(model: str, tensor_parallel: int, exchange: str, *, compiled: bool = False) -> MeshConfig:
    """A root and one other rank, no prefill service."""
    return MeshConfig(
        model=model,
        dtype="float32",
        max_model_len=2048,
        decode_service={
            "port": free_port(),
            "token_parallel_size": 2,
            "tensor_parallel_size": tensor_parallel,
            "cpu_omp_threads_bind": "|".join(str(shard % 2) for shard in range(tensor_parallel)),
            "enforce_eager": not compiled,
            "kv_cache_memory_bytes": 64 << 20,
            "max_num_batched_tokens": 256,
            "engine_args": {"skip_tokenizer_init": True},
            # More shards than cores: a rank may have to wait long for its turn.
            "group": {"exchange": exchange, "timeout_s": 30},
        },
        decode_worker={
            "port": free_port(),
            "poll_s": 0,
            "kv_cache_memory_bytes": 64 << 20,
        },
    )


def random_prompts(vocabulary: int) -> list[list[int]]:
    """Around block edges, longer than a step, and two that share a prefix."""
    source = random.Random(3)
    lengths = [1, 30, 127, 128, 129, 256, 300, 700]
    found = [source.choices(range(5, vocabulary), k=length) for length in lengths]
    return [*found, found[6][:256] + found[1], found[6][:256] + found[2]]


@dataclass(frozen=True)
class Small:
    """A small model, prompts, and what a plain engine with one shard answers."""

    model: str
    wave: list[list[int]]
    truth: list[list[int]]


@pytest.fixture(scope="module", params=["qwen3"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    model = save_model(request.param, folder / "model")
    wave = random_prompts(SIZES["vocab_size"])
    truth = plain_engine(wave, "float32", folder, NEW_TOKENS, model)
    assert len({tuple(tokens) for tokens in truth}) > 5
    return Small(model, wave, truth)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_another_architecture(small: Small, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiled here and now, not found in a cache.
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))

    # On two ranks, the second one inside the root's process.
    async def on_ranks() -> tuple[list[list[int]], int]:
        config = mesh_of(small.model, 1, "local", compiled=compiled)
        async with engine_group(config, tmp_path / "group") as group:
            streams = await group.generate(small.wave, NEW_TOKENS)
            await asyncio.sleep(0.6)
            await group.generate(small.wave[:2], 2)
            return [stream.tokens for stream in streams], group.group.stats.steps

    tokens, steps = asyncio.run(on_ranks())
    assert tokens == small.truth
    assert steps > 0
    assert any((tmp_path / "cache").rglob("rank_0_0")) == compiled


@pytest.mark.timeout(900)
def test_every_shard_of_the_root_has_a_shard_of_the_worker(small: Small, tmp_path: Path) -> None:
    # (1) Three shards at the root, one for each KV head, and a worker that learns from it that it needs three. On two
    # cores they mostly wait for each other, so there are few prompts.
    some = slice(1, 7, 2)

    async def on_ranks() -> tuple[list[list[int]], int, list[float]]:
        config = mesh_of(small.model, SIZES["num_key_value_heads"], "ucx")
        async with engine_group(config, tmp_path / "group") as group:
            streams = await group.generate(small.wave[some], 6)
            await asyncio.sleep(0.6)
            await group.generate(small.wave[:2], 2)
            await asyncio.sleep(0.6)
            attention = [times.attention_seconds.get(1, 0) for times in group.times]
            return [stream.tokens for stream in streams], group.group.stats.steps, attention

    tokens, steps, attention = asyncio.run(on_ranks())

    # (2) Token for token, and the worker's shards did their part.
    assert tokens == [answer[:6] for answer in small.truth[some]]
    assert steps > 0
    assert sum(attention) > 0
