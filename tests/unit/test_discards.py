"""Rows whose tokens are thrown away draw nothing, on CPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from tokenmesh.engine.discards import put_aside_discards, putting_aside
from tokenmesh.engine.group import RankGroup
from tokenmesh.engine.worker import TokenParallelCpuWorker
from tokenmesh.parallel.exchange import PeerLostError


class Runner:
    """What of a model runner takes part: two seeded rows, drawn from and wound back as vLLM does."""

    def __init__(self, discarded: list[bool]) -> None:
        self.discard_request_mask = SimpleNamespace(np=np.array([*discarded, True]))
        generators = {row: torch.Generator().manual_seed(row) for row in range(len(discarded))}
        self.input_batch = SimpleNamespace(num_reqs=len(discarded), generators=generators, req_ids=["a", "b"])
        self.num_prompt_logprobs = {"a": 1, "b": 1}

    def sample_tokens(self) -> list[float]:
        """Draws for every seeded row, and rewinds those that were not to count."""
        generators = self.input_batch.generators
        drawn = [float(torch.rand(1, generator=generator)) for _, generator in sorted(generators.items())]
        for row in np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]):
            if (generator := generators.get(int(row))) is not None:
                generator.set_offset(generator.get_offset() - 4)
        self.num_prompt_logprobs.clear()
        return drawn


def test_a_discarded_row_keeps_its_generator_as_it_was() -> None:
    # (1) vLLM's way ends in an error, since a CPU's generator cannot be wound back.
    with pytest.raises(RuntimeError, match="offset"):
        Runner([False, True]).sample_tokens()
    # (2) Put aside, the row draws nothing, and the other one what it always draws.
    runner = Runner([False, True])
    kept = runner.input_batch.generators[1].get_state()
    assert putting_aside(Runner.sample_tokens)(runner) == [float(torch.rand(1, generator=torch.manual_seed(0)))]
    assert torch.equal(runner.input_batch.generators[1].get_state(), kept)
    # (3) It is back for the step in which its prompt ends.
    runner.discard_request_mask.np[:] = False
    assert len(putting_aside(Runner.sample_tokens)(runner)) == 2


def test_a_failed_step_gives_generators_back() -> None:
    runner = Runner([True, True])

    def fail(_: Any) -> None:
        assert not runner.input_batch.generators
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - there is nothing to match
        putting_aside(fail)(runner)
    assert sorted(runner.input_batch.generators) == [0, 1]


def test_engines_on_cpus_put_aside() -> None:
    put_aside_discards()
    once = CPUModelRunner.sample_tokens
    put_aside_discards()
    assert CPUModelRunner.sample_tokens is once
    assert once.__wrapped__ is not once


class Gone:
    """A rank that takes a step's plan and is lost before its first layer."""

    def plan(self, *_: object) -> None: ...

    def send(self, *_: object) -> None:
        raise PeerLostError("gone")

    def close(self) -> None: ...


def test_a_lost_rank_costs_its_requests_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    # (1) Two requests, the second of a rank that is lost within the step.
    group, runner = RankGroup(), Runner([False, False])
    plan = (np.array([1]), np.array([5]), np.array([[0]]))
    group.attach(1, 1, Gone())  # type: ignore[arg-type]
    group.begin([(1, slice(1, 2), np.array([1]))], [plan])
    rows = torch.zeros(2, 1, 4)
    group.send(0, rows, rows, rows)
    group.receive(0, rows)
    assert group.unanswered() == [1]
    # (2) It has drawn nothing and is still owed the log-probabilities of its prompt; the first has what it had coming.
    worker = object.__new__(TokenParallelCpuWorker)
    worker._group, worker.model_runner = group, runner
    worker.parallel_config = SimpleNamespace(tensor_parallel_size=1)
    sample = putting_aside(Runner.sample_tokens)
    monkeypatch.setattr(CPUWorker, "sample_tokens", lambda self: sample(self.model_runner), raising=False)
    kept = runner.input_batch.generators[1].get_state()
    assert len(worker.sample_tokens()) == 1
    assert torch.equal(runner.input_batch.generators[1].get_state(), kept)
    assert runner.num_prompt_logprobs == {"b": 1}
    # (3) Shards that may not all have lost the rank go on alike.
    runner.discard_request_mask.np[:] = False
    worker.parallel_config.tensor_parallel_size = 2
    assert len(worker.sample_tokens()) == 2
    assert runner.num_prompt_logprobs == {}
