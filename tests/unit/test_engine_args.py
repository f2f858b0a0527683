"""What a service's engine is started with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from tokenmesh.config import ConfigError, MeshConfig
from tokenmesh.engine import host
from tokenmesh.engine.host import CPU_PREFILL_SEQS, CPU_STEP_TOKENS, STEP_SEQS, engine_args, warn_of_slow_dtype


def test_a_prefill_on_cpus_computes_one_prompt_at_a_time_and_a_root_decodes_many() -> None:
    mesh = MeshConfig()
    prefill = engine_args(mesh, mesh.prefill_service, "model")
    root = engine_args(mesh, mesh.decode_service, "model")
    assert (prefill.max_num_seqs, root.max_num_seqs) == (CPU_PREFILL_SEQS, STEP_SEQS)
    assert prefill.max_num_batched_tokens == root.max_num_batched_tokens == CPU_STEP_TOKENS


@pytest.mark.parametrize(("seqs", "tokens"), [(2, CPU_STEP_TOKENS), (300, 300)])
def test_what_is_configured_wins(seqs: int, tokens: int) -> None:
    mesh = MeshConfig(prefill_service={"max_num_seqs": seqs})
    args = engine_args(mesh, mesh.prefill_service, "model")
    assert args.max_num_seqs == seqs
    # vLLM takes no fewer tokens than sequences.
    assert args.max_num_batched_tokens == tokens


@pytest.mark.parametrize(
    ("dtype", "native", "warned"),
    [
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),
        (torch.float32, False, False),
        (torch.float16, False, False),
    ],
)
def test_a_dtype_that_the_cpu_lacks_is_warned_of(
    dtype: torch.dtype, native: bool, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "computes_bfloat16", lambda: native)
    config: Any = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    with capture_logs() as logs:
        warn_of_slow_dtype(config)
    assert [entry["log_level"] for entry in logs] == ["warning"] * warned


def test_what_the_mesh_sets_itself_is_not_ignored_where_an_operator_sets_it() -> None:
    # (1) Of what would be overwritten, the name.
    mesh = MeshConfig(decode_service={"engine_args": {"scheduler_cls": "mine", "seed": 7, "tensor_parallel_size": 2}})
    with pytest.raises(ConfigError, match=r"engine_args\.scheduler_cls is set by the mesh"):
        engine_args(mesh, mesh.decode_service, "model", scheduler_cls="ours")
    # (2) What nobody else sets is taken; the gateway, which has no engine, says how many shards it has.
    args = engine_args(mesh, mesh.decode_service, "model", tensor_parallel_size=1)
    assert (args.scheduler_cls, args.seed, args.tensor_parallel_size) == ("mine", 7, 1)
