"""Which weights an engine has: KV of others has the same shape, and would be decoded into nonsense without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import structlog
import xxhash

if TYPE_CHECKING:
    from vllm.config import ModelConfig

log = structlog.get_logger()

_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
"""Of weights. Where there are several kinds they hold the same; the first counts."""
_SAMPLES = 16
_SAMPLE_BYTES = 4096
_NOT_OF_THE_MODEL = frozenset(("_name_or_path", "transformers_version", "torch_dtype", "dtype"))
"""Of config.json: who wrote it, and how it is to be loaded."""


def weights_id(model: ModelConfig) -> str:
    """A digest that differs between models and their fine-tunes; empty if their files are not found here.

    Sizes and samples of the files rather than all that is in them: hundreds of gigabytes are read once as it is.
    """
    try:
        return _digest(_folder(model))
    except (OSError, ValueError) as error:
        log.warning("these weights cannot be told from others of their shape", error=str(error))
        return ""


def _folder(model: ModelConfig) -> Path:
    here = Path(model.model)
    if here.exists():
        return here
    # A name on the hub, whose files vLLM has fetched by now.
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.name == "config.json":
            config = {k: v for k, v in json.loads(file.read_text()).items() if k not in _NOT_OF_THE_MODEL}
            digest.update(json.dumps(config, sort_keys=True).encode())
    kinds = ([file for file in files if file.suffix == suffix] for suffix in _SUFFIXES)
    for file in next(filter(None, kinds), []):
        with file.open("rb") as opened:
            _sample(opened, file.stat().st_size, digest)
    return digest.hexdigest()


def _sample(file: BinaryIO, size: int, digest: xxhash.xxh3_64) -> None:
    digest.update(str(size).encode())
    for number in range(_SAMPLES):
        file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
        digest.update(file.read(_SAMPLE_BYTES))
