"""Environment variables that look like configuration and are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import BaseModel
from pydantic_settings import BaseSettings


def near_misses(settings: type[BaseSettings], environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong with it) of each variable that was meant for `settings` and would be ignored.

    Those are names with "__" whose section does not exist, and names of a section's key with one underscore for two.
    Others with the prefix are not ours to judge: Kubernetes makes some of its own.
    """
    prefix = settings.model_config.get("env_prefix", "")
    known = {
        f"{prefix}{section}_{key}".upper(): f"{prefix}{section}__{key}".upper()
        for section, field in settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
    }
    for name, value in environment.items():
        upper = name.upper()
        section, nested, _ = upper.removeprefix(prefix).lower().partition("__")
        if not upper.startswith(prefix):
            continue
        if nested and section not in settings.model_fields:
            yield name, f"there is no section {section!r}"
        # Kubernetes tells of a Service in such names, with values like this.
        elif upper in known and not value.startswith(("tcp://", "udp://")):
            yield name, f"it is spelled {known[upper]}"
