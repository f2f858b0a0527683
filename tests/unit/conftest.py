"""What tests without engines share."""

from __future__ import annotations

import pytest
from vllm.config import VllmConfig
from vllm.usage.usage_lib import UsageContext

from tokenmesh.config import MeshConfig
from tokenmesh.engine.host import engine_args
from tokenmesh.model_store import resolve_model


@pytest.fixture(scope="session")
def vllm_config() -> VllmConfig:
    """As a gateway makes it."""
    mesh = MeshConfig(max_model_len=4096)
    arguments = engine_args(mesh, mesh.decode_service, resolve_model(mesh.model), tensor_parallel_size=1)
    return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
