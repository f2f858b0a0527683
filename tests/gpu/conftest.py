"""What tests on GPUs share."""

from __future__ import annotations

import os

import pytest

from tokenmesh.model_store import resolve_model


@pytest.fixture(scope="session")
def model() -> str:
    """Folder of SmolLM2."""
    return os.environ.get("TOKENMESH_TEST_MODEL") or resolve_model("smollm2-135m-instruct")
