"""`kv_transfer.transport: none`: nothing moves, no mover runs, and prompts are computed where they are decoded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from services.decode.root.service import DecodeServicer
from services.decode.worker.processes import ShardProcesses
from tests.unit.small_kv import kv_config
from tokenmesh.config import ConfigError, DecodeConfig, DecodeWorkerConfig, GroupConfig, MeshConfig, PrefillConfig
from tokenmesh.engine.consumer import ConsumerWorker
from tokenmesh.engine.host import EngineHost, check_platform, ranks_on_device, token_parallel_args
from tokenmesh.engine.scheduler import UnsupportedModelError, root_part
from tokenmesh.engine.settings import ConnectorSettings
from tokenmesh.telemetry.metrics import Metrics
from tokenmesh.v1 import decode_pb2, sampling_pb2

NONE = {"transport": "none"}
LOCAL = {"exchange": "local"}
NCCL = {"exchange": "nccl"}


def test_what_needs_transfers_cannot_do_without() -> None:
    # 1. A prefill service that is to run, and a decode worker whose root has KV moved to it.
    for make in (lambda: PrefillConfig(kv_transfer=NONE), lambda: MeshConfig(decode_worker={"kv_transfer": NONE})):
        with pytest.raises(ValidationError, match="none"):
            make()
    # 2. A root alone, or with ranks inside it or elsewhere, and no prefill services, is a mesh.
    MeshConfig(decode_service={"kv_transfer": NONE}, decode_worker={"kv_transfer": NONE})
    MeshConfig(prefill_service={"replicas": 0}, decode_service={"kv_transfer": NONE, "token_parallel_size": 1})
    MeshConfig(decode_service={"kv_transfer": NONE, "token_parallel_size": 2, "group": LOCAL})


async def test_nobody_waits_for_movers_that_are_not_to_come() -> None:
    hub: Any = None
    # 1. Without movers an engine is ready as it is.
    await EngineHost(hub, 1, movers=False).movers_ready(timeout=0.1)
    # 2. With movers it is not.
    with pytest.raises(TimeoutError):
        await EngineHost(hub, 1).movers_ready(timeout=0.01)


def test_an_engine_worker_starts_no_mover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tensor_model_parallel_rank", lambda: 0)
    closed: list[bool] = []
    link = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr("tokenmesh.engine.consumer.EngineLink", lambda *_: link)
    config: Any = SimpleNamespace()
    # 1. A worker half is given its KV cache; its memory is not touched.
    half = ConsumerWorker(ConnectorSettings("", "h", 0, "none", 1, 1, [0]), config)
    cache = torch.zeros(4, 4)
    half.register({"layer": cache})
    assert not cache.is_shared()
    # 2. There is nothing to end but the link.
    half.close()
    assert closed == [True]


def test_prompts_are_local_and_the_reason_is_told() -> None:
    handoff: Any = SimpleNamespace(connected={"p:1"})
    config = DecodeConfig(kv_transfer=NONE, token_parallel_size=1)
    servicer = DecodeServicer(config, "m", ["p:1"], handoff, Metrics())
    # 1. A long prompt, with a prefill service at hand.
    request = decode_pb2.GenerateRequest(request_id="r", prompt_token_ids=range(500))
    request.prefill_candidates.add(address="p:1")
    assert servicer._prompt(request) is None
    # 2. The first response says that it was decoded where it was computed, as in mode decode.
    response = decode_pb2.GenerateResponse()
    servicer._decide(response, request, None)
    assert response.prefill_decision == sampling_pb2.PREFILL_DECISION_DECODE_ONLY
    assert servicer.decisions == {"PREFILL_DECISION_DECODE_ONLY": 1}


# GPUs, as far as they can be told without one.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM believes to be on a GPU."""
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: False), raising=False)


@pytest.mark.usefixtures("gpu")
def test_what_gpus_cannot_do_is_refused_with_what_they_can() -> None:
    # 1. Ways for KV that lead through host memory, of engines and of workers; others are fine.
    for transfer, why in (({"transport": "shm"}, "set it to auto"), ({"codec": "lossless"}, "set it to none")):
        with pytest.raises(ConfigError, match=why):
            check_platform(DecodeConfig(kv_transfer=transfer, token_parallel_size=1))
    hub: Any = None
    with pytest.raises(ConfigError, match="set it to auto"):
        ShardProcesses(DecodeWorkerConfig(kv_transfer={"transport": "shm"}), GroupConfig(**NCCL), 0, hub)
    for section in (PrefillConfig(), DecodeConfig(token_parallel_size=1, kv_transfer={"codec": "fp8"})):
        check_platform(section)
    # 2. Rows between hosts' memories, and shards that would have to notice a loss at the same step.
    with pytest.raises(ConfigError, match="set it to nccl"):
        check_platform(DecodeConfig(kv_transfer=NONE, token_parallel_size=2))
    with pytest.raises(ConfigError, match="set it to 1"):
        check_platform(DecodeConfig(kv_transfer=NONE, token_parallel_size=2, tensor_parallel_size=2, group=NCCL))
    # 3. A plain root, one with ranks on its GPU, and one with ranks on others.
    check_platform(DecodeConfig(kv_transfer=NONE, token_parallel_size=1, tensor_parallel_size=2))
    check_platform(DecodeConfig(kv_transfer=NONE, token_parallel_size=3, group=LOCAL))
    check_platform(DecodeConfig(kv_transfer=NONE, token_parallel_size=3, group=NCCL))


@pytest.mark.usefixtures("gpu")
def test_a_root_with_ranks_on_other_gpus_has_its_own_blocks_alone() -> None:
    section = DecodeConfig(kv_transfer=NONE, token_parallel_size=3, group={**NCCL, "kv_blocks": 300})
    assert ranks_on_device(section) == 1
    values = token_parallel_args(section)
    assert values["num_gpu_blocks_override"] == 101
    assert values["worker_cls"].endswith("TokenParallelGpuWorker")


@pytest.mark.usefixtures("gpu")
def test_a_root_with_ranks_on_its_gpu() -> None:
    section = DecodeConfig(kv_transfer=NONE, token_parallel_size=3, group={**LOCAL, "kv_blocks": 300})
    assert ranks_on_device(section) == 3
    # 1. All blocks are the root's to vLLM, and steps are scheduled ahead.
    values = token_parallel_args(section)
    assert values["num_gpu_blocks_override"] == 301
    assert values["scheduler_cls"].endswith("AsyncTokenParallelScheduler")
    # 2. The scheduler counts the root's share alone, and the block that vLLM sets aside.
    settings = ConnectorSettings("", "h", 0, "none", 1, 1, [0], device_ranks=3)
    config: Any = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=settings.to_extra_config()),
        cache_config=SimpleNamespace(block_size=16),
        model_config=SimpleNamespace(max_model_len=1600),
    )
    assert root_part(config, kv_config(300)).num_blocks == 101
    # 3. A sequence that no rank can hold would wait for ever, and all others behind it.
    config.model_config.max_model_len = 1601
    with pytest.raises(UnsupportedModelError, match="more than 1600 tokens"):
        root_part(config, kv_config(300))


@pytest.mark.usefixtures("gpu")
def test_what_is_said_of_attention_reaches_engines_with_ranks() -> None:
    # 1. All of it, with the backend that ranks know.
    given: dict[str, Any] = {"attention_config": {"flash_attn_version": 3}}
    section = DecodeConfig(kv_transfer=NONE, token_parallel_size=2, group=LOCAL, engine_args=given)
    assert token_parallel_args(section)["attention_config"] == {"flash_attn_version": 3, "backend": "FLASH_ATTN"}
    # 2. Another one is not passed over in silence.
    given = {"attention_config": {"backend": "FLASHINFER"}}
    section = DecodeConfig(kv_transfer=NONE, token_parallel_size=2, group=LOCAL, engine_args=given)
    with pytest.raises(ConfigError, match="FLASH_ATTN, not FLASHINFER"):
        token_parallel_args(section)


def test_on_cpus_ranks_have_tensors_of_their_own() -> None:
    assert ranks_on_device(DecodeConfig()) == 1
    check_platform(DecodeConfig())
