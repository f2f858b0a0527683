"""Which GPUs a replica sees, and which settings a host without any refuses."""

from __future__ import annotations

import os

import pytest
from pydantic import ValidationError

from tokenmesh.config import ConfigError, MeshConfig
from tokenmesh.engine.host import check_platform
from tokenmesh.gpus import show_gpus


@pytest.mark.parametrize(
    ("text", "count", "replica", "seen"),
    [("0", 1, 0, "0"), ("1-3", 1, 2, "3"), ("0-3,8-11", 4, 1, "8,9,10,11"), ("4,2", 1, 0, "2")],
)
def test_a_replica_sees_its_part(
    monkeypatch: pytest.MonkeyPatch, text: str, count: int, replica: int, seen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    show_gpus(text, count, replica)
    assert seen == os.environ["CUDA_VISIBLE_DEVICES"]


def test_without_a_list_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    show_gpus(None, 4, 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.parametrize(("text", "replica"), [("0-2", 1), ("0", 0), ("none", 0)])
def test_too_few_are_an_error(monkeypatch: pytest.MonkeyPatch, text: str, replica: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match=text):
        show_gpus(text, 2, replica)


def test_nccl_needs_gpus() -> None:
    mesh = MeshConfig(decode_service={"group": {"exchange": "nccl"}})
    with pytest.raises(ConfigError, match="set it to ucx"):
        check_platform(mesh.decode_service)
    # Alone, a root exchanges nothing.
    check_platform(MeshConfig(decode_service={"token_parallel_size": 1, "group": {"exchange": "nccl"}}).decode_service)


def test_kv_cannot_be_moved_to_workers_that_take_none() -> None:
    with pytest.raises(ValidationError, match="set both"):
        MeshConfig(decode_worker={"kv_transfer": {"transport": "none"}})
    MeshConfig(
        prefill_service={"replicas": 0},
        decode_service={"kv_transfer": {"transport": "none"}},
        decode_worker={"kv_transfer": {"transport": "none"}},
    )
