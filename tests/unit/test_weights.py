"""Engines know their weights from others of the same shape."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tokenmesh.engine.weights import weights_id
from tokenmesh.kv.geometry import BlockGeometry, GeometryMismatchError


def write(folder: Path, seed: int = 0, shards: int = 2, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "rope_theta": 1e4, **config}))
    for shard in range(shards):
        data = np.random.default_rng(seed + shard).random(50_000 + shard, dtype=np.float32)
        (folder / f"model-{shard}.safetensors").write_bytes(data.tobytes())
    (folder / "tokenizer.json").write_text("{}")
    return folder


def known(path: Path | str) -> str:
    model: Any = SimpleNamespace(model=str(path), revision=None)
    return weights_id(model)


def test_copies_are_the_same_and_others_are_not(tmp_path: Path) -> None:
    whole = known(write(tmp_path / "whole"))
    assert whole
    # (1) A copy is the same, however it is to be loaded and whoever wrote it down.
    assert known(write(tmp_path / "copy", torch_dtype="bfloat16", transformers_version="9")) == whole
    # (2) Other values of the same shape, another number of layers' files, or another rotation are not.
    others = [
        write(tmp_path / "tuned", seed=7),
        write(tmp_path / "cut", shards=1),
        write(tmp_path / "turned", rope_theta=1e6),
    ]
    assert len({known(other) for other in others} | {whole}) == 4


def test_files_that_are_not_loaded_do_not_count(tmp_path: Path) -> None:
    whole, clone = write(tmp_path / "whole"), write(tmp_path / "clone")
    # A clone from the hub, where the same weights stand in another format, too.
    (clone / "pytorch_model.bin").write_bytes(b"1" * 9000)
    assert known(whole) == known(clone)
    # Where there is no other, that one counts.
    for folder in (whole, clone):
        for file in folder.glob("*.safetensors"):
            file.unlink()
    assert known(whole) != known(clone)


def test_the_end_of_a_file_counts_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    before = known(folder)
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert known(folder) != before


def test_weights_that_are_not_found_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert known("nobody/has-this") == ""


def test_kv_of_other_weights_is_refused() -> None:
    geometries = [BlockGeometry(1, 1, 8, 16, "uint8", 256, "test", weights) for weights in ("a", "b", "", "a")]
    first, other, unknown, same = geometries
    for owner in (unknown, same):
        first.check_reaches(owner)
        owner.check_reaches(first)
    with pytest.raises(GeometryMismatchError, match="same_weights"):
        first.check_reaches(other)
