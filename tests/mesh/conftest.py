"""Every test here runs against the session's mesh, and leaves it idle."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests, and has each prove that it left nothing behind."""
    for item in items:
        if "tests/mesh" in str(item.path):
            item.add_marker(pytest.mark.mesh)
            item.add_marker(pytest.mark.usefixtures("idle_after"))
