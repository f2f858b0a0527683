"""Every Prometheus metric of ours, declared once: name, kind, labels, meaning.

Names end in their unit: ``_seconds``, ``_bytes``, ``_tokens``, ``_ratio`` (1 is all); counters end in ``_total``.
Labels have few values each; nothing here is labelled with a request. Dashboards, rules and tests are made from this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MICROS = (1e-5, 2e-5, 3e-5, 5e-5, 7e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 1.0)
"""Buckets for what takes microseconds, in seconds."""
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BYTES_PER_SECOND = (1e7, 3e7, 1e8, 3e8, 1e9, 2e9, 3e9, 5e9, 7e9, 1e10, 2e10, 5e10, 1e11)


@dataclass(frozen=True)
class Metric:
    """One metric family."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, histograms only."""
    values: tuple[str, ...] = ()
    """Of the one label, where they are known: shown as 0 before they occur."""


# What every service has.

INFO = Metric("tokenmesh_info", "gauge", "Always 1; who this is.", ("role", "instance", "version"))
READY = Metric("tokenmesh_ready", "gauge", "1 while the service takes work.")
RUNNING = Metric("tokenmesh_requests_running", "gauge", "Requests at work.")
WAITING = Metric("tokenmesh_requests_waiting", "gauge", "Requests that wait: for blocks, for KV, for their turn.")
PEER_UP = Metric("tokenmesh_peer_up", "gauge", "1 while a service that this one uses can be reached.", ("role", "peer"))
RPC_SECONDS = Metric(
    "tokenmesh_rpc_server_duration_seconds",
    "histogram",
    "Calls served, by gRPC method and status code; their count is the rate, codes other than OK are the errors.",
    ("method", "code"),
    SECONDS,
)

_OUTCOMES = ("finished", "aborted", "failed")

# Requests, by where they are counted. Outcomes are those of lifecycle.RequestState.

GATEWAY_REQUESTS = Metric(
    "tokenmesh_gateway_requests_total", "counter", "Sequences of clients.", ("outcome",), values=_OUTCOMES
)
PREFILL_REQUESTS = Metric(
    "tokenmesh_prefill_requests_total", "counter", "Prompts of prefill services.", ("outcome",), values=_OUTCOMES
)
DECODE_REQUESTS = Metric(
    "tokenmesh_decode_requests_total", "counter", "Sequences of decode roots.", ("outcome",), values=_OUTCOMES
)
DECISIONS = Metric(
    "tokenmesh_prefill_decisions_total", "counter", "Sequences by where their prompt's KV came from.", ("reason",)
)

# Latencies and throughput.

QUEUE_SECONDS = Metric(
    "tokenmesh_queue_seconds", "histogram", "From the engine's acceptance to its first step.", buckets=SECONDS
)
PREFILL_SECONDS = Metric(
    "tokenmesh_prefill_compute_seconds",
    "histogram",
    "Prefill services: computing a prompt, without its queue.",
    buckets=SECONDS,
)
REMOTE_PREFILL_SECONDS = Metric(
    "tokenmesh_remote_prefill_seconds",
    "histogram",
    "Decode roots: one attempt to have a prompt prefilled, from its ticket to its settlement; OK, or why not.",
    ("outcome",),
    SECONDS,
)
TTFT_SECONDS = Metric(
    "tokenmesh_time_to_first_token_seconds",
    "histogram",
    "Decode roots: from the call to the first token.",
    buckets=SECONDS,
)
ITL_SECONDS = Metric(
    "tokenmesh_inter_token_seconds",
    "histogram",
    "Decode roots: between two messages with tokens of one sequence.",
    buckets=TOKEN_SECONDS,
)
PROMPT_TOKENS = Metric("tokenmesh_prompt_tokens_total", "counter", "Prompt tokens of requests that got a first token.")
CACHED_TOKENS = Metric("tokenmesh_cached_tokens_total", "counter", "Of these, those that nobody had to compute.")
GENERATED_TOKENS = Metric("tokenmesh_generated_tokens_total", "counter", "Tokens sampled and streamed.")

# Hand-off of KV.

KV_SECONDS = Metric(
    "tokenmesh_kv_transfer_duration_seconds",
    "histogram",
    "Time of a transfer during which KV was on the wire.",
    ("transport", "codec"),
    SECONDS,
)
KV_EXPOSED_SECONDS = Metric(
    "tokenmesh_kv_transfer_exposed_seconds",
    "histogram",
    "Time of a transfer that was not hidden behind its prompt's computation.",
    ("transport", "codec"),
    SECONDS,
)
KV_GOODPUT = Metric(
    "tokenmesh_kv_transfer_goodput_bytes_per_second",
    "histogram",
    "Payload of a transfer over its time on the wire.",
    ("transport", "codec"),
    BYTES_PER_SECOND,
)
KV_BYTES = Metric("tokenmesh_kv_transfer_bytes_total", "counter", "KV payload sent or received.")
KV_TRANSFERS = Metric("tokenmesh_kv_transfers_total", "counter", "Transfers that arrived whole.")
KV_FAILURES = Metric(
    "tokenmesh_kv_transfer_failures_total", "counter", "Attempts at a remote prefill that failed.", ("reason",)
)
KV_DROPPED = Metric(
    "tokenmesh_kv_messages_dropped_total",
    "counter",
    "Messages that an owner's movers did not take: damaged, repeated, late, or out of their ticket.",
    ("reason",),
    values=(*("stray", "duplicate", "corrupt", "out_of_range", "undecodable", "too_long", "stalled", "bad_header"),),
)
KV_OPEN = Metric("tokenmesh_kv_transfers_open", "gauge", "Transfers under way.")

# Ranks, as their root knows them. Rank 0 is the root; a prefill service and a root alone have only that one.

KV_BLOCKS = Metric(
    "tokenmesh_kv_blocks", "gauge", "KV blocks: held by a sequence (used) or not (free).", ("rank", "state")
)
KV_UTILIZATION = Metric("tokenmesh_kv_utilization_ratio", "gauge", "Used KV blocks over all.", ("rank",))
RANK_ATTACHED = Metric("tokenmesh_rank_attached", "gauge", "1 while the rank takes sequences.", ("rank",))
RANK_CONTEXT = Metric(
    "tokenmesh_rank_context_tokens", "gauge", "Tokens of the sequences that live on the rank.", ("rank",)
)
RANK_SEQUENCES = Metric("tokenmesh_rank_sequences", "gauge", "Sequences that live on the rank.", ("rank",))
RANK_SHARE = Metric(
    "tokenmesh_rank_attention_share_ratio",
    "gauge",
    "Part of recent steps' time that the rank spent in its attention kernel.",
    ("rank",),
)
EXCHANGE_SECONDS = Metric(
    "tokenmesh_exchange_seconds",
    "histogram",
    "Per layer of a shared step: the attention phase less the slowest rank's kernel.",
    buckets=MICROS,
)
SHARED_STEPS = Metric("tokenmesh_shared_steps_total", "counter", "Steps in which more than one rank took part.")
EFFICIENCY = Metric(
    "tokenmesh_token_parallel_efficiency",
    "gauge",
    "Recent steps' speed-up over what perfect sharing of attention would give, 0 to 1.",
)
SPEEDUP = Metric("tokenmesh_token_parallel_speedup", "gauge", "How many times faster recent steps were than one rank.")
IMBALANCE = Metric("tokenmesh_token_parallel_imbalance", "gauge", "Longest rank's context over the mean; 1 is even.")
RANKS_DETACHED = Metric("tokenmesh_ranks_detached_total", "counter", "Ranks lost or drained.")
RECOMPUTED = Metric("tokenmesh_recomputed_sequences_total", "counter", "Sequences computed again for that.")

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""All of them, in the order above."""
