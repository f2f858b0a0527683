"""The group's scheduler as vLLM makes it, driven by hand: no engine, no weights, no workers."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.unit.small_kv import BLOCK, MAX_LEN, kv_config, request
from tokenmesh.engine.consumer import ConsumerScheduler, RankReport
from tokenmesh.engine.plugin import register
from tokenmesh.engine.scheduler import AsyncTokenParallelScheduler, TokenParallelScheduler
from tokenmesh.engine.settings import ConnectorSettings, FetchFrom
from tokenmesh.kv.messages import AttachRank, DetachRank, EngineCounts, ToService
from tokenmesh.parallel.ids import split_owner

GARBAGE = 99
"""What a step samples for sequences whose attention has not come."""


def token_at(position: int) -> int:
    """What the model says at a position, whatever came before it."""
    return 2 + position % 50


def prompt(tokens: int) -> list[int]:
    return [token_at(i) for i in range(tokens)]


def write_model(folder: Path) -> Path:
    """The configuration of a tiny Llama; nobody looks for its weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 128,
        "max_position_embeddings": MAX_LEN,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def vllm_config(model: Path, root_blocks: int, ahead: bool, caching: bool) -> VllmConfig:
    register()
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=caching)
    cache.num_gpu_blocks = root_blocks + 1
    return VllmConfig(
        model_config=ModelConfig(model=str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=MAX_LEN),
        cache_config=cache,
        scheduler_config=SchedulerConfig(
            max_num_seqs=16,
            max_num_batched_tokens=64,
            max_model_len=MAX_LEN,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=ahead,
            watermark=0.0,
        ),
        kv_transfer_config=KVTransferConfig(
            kv_connector="TokenParallelKVConnector",
            kv_role="kv_consumer",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=ConnectorSettings("", "h", 0, "auto", 1, 1, [0]).to_extra_config(),
        ),
    )


class Engine:
    """The scheduler, a service that talks to it, and a model that knows every token by its position."""

    def __init__(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool, root: int, caching: bool, window: int = 0
    ) -> None:
        self._window = window
        self.inbox: list[AttachRank | DetachRank] = []
        self.sent: list[ToService] = []
        link = SimpleNamespace(poll=self._poll, send=self.sent.append, close=lambda: None)
        monkeypatch.setattr("tokenmesh.engine.consumer.EngineLink", lambda *_: link)
        config = vllm_config(model, root, ahead, caching)
        kind = AsyncTokenParallelScheduler if ahead else TokenParallelScheduler
        self.scheduler = kind(
            vllm_config=config,
            kv_cache_config=kv_config(root, window),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        self.ledger = self.scheduler.ledger
        self._depth = 2 if ahead else 1
        self._flying: deque[tuple[SchedulerOutput, dict[str, list[int]], dict[str, tuple[int, int]]]] = deque()
        self.requests: dict[str, Request] = {}
        self.arrived: set[str] = set()
        """Whose KV has come, or has failed to."""
        self.tokens: dict[str, list[int]] = {}
        self._tables: dict[str, list[int]] = {}

    def _poll(self) -> list[AttachRank | DetachRank]:
        messages, self.inbox = self.inbox, []
        return messages

    def attach(self, rank: int, blocks: int, epoch: int = 1) -> None:
        self.inbox.append(AttachRank(rank, epoch, blocks))

    def add(self, name: str, tokens: int, max_tokens: int = 8, fetch: bool = False) -> None:
        params = {"kv_transfer_params": {FetchFrom.KEY: f"key-{name}"}} if fetch else None
        self.requests[name] = request(name, prompt(tokens), max_tokens, params)
        self.tokens[name] = []
        self.scheduler.add_request(self.requests[name])

    @property
    def epochs(self) -> dict[int, int]:
        """Of the ranks that the scheduler has."""
        half = self.scheduler.connector.scheduler
        assert isinstance(half, ConsumerScheduler)
        return half.rank_epochs

    def rank(self, name: str) -> int:
        return split_owner(self.ledger.get_block_ids(name)[0])[0]

    def schedule(self) -> SchedulerOutput:
        """Plans a step and runs the model; `finish` takes what came of it."""
        output = self.scheduler.schedule()
        cached = output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        # Block tables as a model runner keeps them.
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            known = [] if name in cached.resumed_req_ids else self._tables[name]
            self._tables[name] = known + list(blocks[0] if blocks else [])
        sampled, owners = {}, {}
        for name, scheduled in output.num_scheduled_tokens.items():
            # What lies before a window has been given up, and is not in the ledger any more.
            held = [None if block.is_null else block.block_id for block in self.ledger.get_blocks(name).blocks[0]]
            assert len(self._tables[name]) == len(held)
            assert all(mine in (None, told) for told, mine in zip(self._tables[name], held, strict=True))
            assert self._window or None not in held
            rank = split_owner(self._tables[name])[0]
            assert rank in self.ledger.ranks
            owners[name] = (rank, self.epochs.get(rank, 0))
            position = computed[name] + scheduled
            sampled[name] = [token_at(position)] if position >= self.requests[name].num_tokens else []
        self._flying.append((output, sampled, owners))
        return output

    def finish(self, lost: dict[tuple[int, int], str] | None = None, **kv: set[str]) -> None:
        """Takes the oldest step's result. `lost`: ranks that failed in it, and with them what it sampled there."""
        output, sampled, owners = self._flying.popleft()
        for name, owner in owners.items():
            if sampled[name] and owner in (lost or ()):
                sampled[name] = [GARBAGE]
        self.arrived |= kv.get("finished_recving", set())
        names = list(sampled)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=list(sampled.values()),
            kv_connector_output=KVConnectorOutput(kv_connector_worker_meta=RankReport(lost) if lost else None, **kv),
        )
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                self.tokens[one.request_id] += one.new_token_ids

    def step(self, lost: dict[tuple[int, int], str] | None = None, **kv: set[str]) -> SchedulerOutput:
        while len(self._flying) < self._depth:
            output = self.schedule()
        self.finish(lost, **kv)
        return output

    def run(self, steps: int = 200) -> None:
        """Until nobody is left."""
        for _ in range(steps):
            if not self.scheduler.has_unfinished_requests() and not self._flying:
                break
            self.step()
        while self._flying:
            self.finish()

    def told(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]

    def all_is_well(self) -> None:
        """Everybody got every token once, in order, and nothing is left."""
        for name, req in self.requests.items():
            first = req.num_prompt_tokens
            assert self.tokens[name] == [token_at(i) for i in range(first, first + req.max_tokens)], name
        self.nothing_is_left()

    def nothing_is_left(self) -> None:
        self.run()
        for entry in self.ledger.ranks.values():
            assert entry.free_blocks == entry.blocks
            assert not entry.requests
        assert not self.scheduler.requests
        assert not self.scheduler.deferred_frees
        assert self.told(EngineCounts)[-1].blocks_free == self.told(EngineCounts)[-1].blocks_total
