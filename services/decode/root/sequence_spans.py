"""One sequence's time on the root as spans: queue, first token, decode. Told from what vLLM timed."""

from __future__ import annotations

import numpy as np
from vllm.outputs import RequestOutput

from tokenmesh.kv.messages import RankDetached, StepTimes
from tokenmesh.telemetry import span_names as names
from tokenmesh.telemetry.tracing import Span, Value, enabled, record, start

MOST_REPORTS = 64
"""Events of one span about its steps. OpenTelemetry keeps 128 and drops the oldest; what happens once must stay."""


class StepSpans:
    """Shared steps, which belong to all sequences that were decoding."""

    def __init__(self) -> None:
        self.decoding: dict[Span, int] = {}
        """Open decode spans, and how many reports each has had."""

    def note(self, times: StepTimes, now: float) -> None:
        """Takes a report that ends now, a time of time.monotonic()."""
        if not enabled() or not self.decoding:
            return
        ranks = sorted(times.attention_seconds)
        p50, p99 = np.percentile(times.exchange_us, (50, 99)) / 1e6 if times.exchange_us else (0.0, 0.0)
        attributes: dict[str, Value] = {
            names.STEP_COUNT: times.steps,
            names.STEP_SECONDS: times.step_seconds,
            names.STEP_RANKS: ranks,
            names.STEP_ATTENTION_SECONDS: [times.attention_seconds[rank] for rank in ranks],
            names.STEP_EXCHANGE_P50: float(p50),
            names.STEP_EXCHANGE_P99: float(p99),
        }
        links = [span.link for span in self.decoding]
        start(
            names.STEPS, attributes, at=now - times.step_seconds, links=[link for link in links if link is not None]
        ).end(at=now)
        for span, reports in self.decoding.items():
            if reports < MOST_REPORTS:
                self.decoding[span] = reports + 1
                span.event(names.STEPS, attributes)

    def lost(self, message: RankDetached) -> None:
        """A rank has left. Which sequences were its own only the scheduler knows."""
        for span in self.decoding:
            span.event(names.RANK_LOST, {names.RANK: message.rank, names.LOSS_REASON: message.reason})


class SequenceSpans:
    """Of one sequence, from its admission on. A context; may be held across a yield."""

    def __init__(self, steps: StepSpans) -> None:
        self._steps = steps
        self._phase = start(names.QUEUE)
        self._decode: Span | None = None

    def waits_for_kv(self) -> None:
        """Blocks are reserved; the hand-off has spans of its own."""
        self._phase.end()

    def first_token(self, output: RequestOutput, attributes: dict[str, Value]) -> None:
        """The first message is there."""
        stats = output.metrics
        if not enabled() or stats is None:
            return
        self._phase.end(at=stats.scheduled_ts or None)
        record(names.FIRST_TOKEN, stats.scheduled_ts, stats.first_token_ts, attributes)
        self._phase = self._decode = start(names.DECODE, at=stats.first_token_ts or None)
        self._steps.decoding[self._decode] = 0

    def finished(self, finish_reason: str, tokens: int) -> None:
        """The last message is there."""
        self._phase.set({names.GEN_AI_FINISH_REASONS: [finish_reason], names.GEN_AI_OUTPUT_TOKENS: tokens})

    def __enter__(self) -> SequenceSpans:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._decode is not None:
            self._steps.decoding.pop(self._decode, None)
        self._phase.end(error)
