"""Reads a mesh file: YAML, checked against the configuration that it describes, under the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import SettingsError

from tokenmesh.config import ConfigError, MeshConfig
from tokenmesh.environment import near_misses


def load_config(path: Path | None) -> MeshConfig:
    """Reads and validates a mesh file; without one, the defaults.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or has a key or value that does not fit. The message
            names the key.
    """
    data = {} if path is None else _read(path)
    for name, problem in near_misses(MeshConfig, os.environ):
        raise ConfigError(f"environment: {name}: {problem}")
    try:
        return MeshConfig(**data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in e['loc']) or 'mesh'}: {e['msg']}" for e in error.errors()[:5]
        )
        raise ConfigError(f"{path or 'environment'}: {problems}") from error
    except SettingsError as error:
        raise ConfigError(f"environment: {error}; sections and lists are given as JSON") from error


def _read(path: Path) -> dict[str, Any]:
    """The mapping that a file holds; nothing is an empty one. Raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path} is no YAML{where}: {getattr(error, 'problem', error)}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(data).__name__}")
    for key in data:
        # pydantic-settings takes names with an underscore for arguments of its own.
        if not isinstance(key, str) or key.startswith("_"):
            raise ConfigError(f"{path}: {key}: no such section or key")
    return data
