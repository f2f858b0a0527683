"""Every span, event and attribute of ours, declared once.

Attributes follow OpenTelemetry's conventions where these say anything (HTTP, RPC, and for ``gen_ai.*``
semantic-conventions-genai 0.1); the rest is ``tokenmesh.*``. Times are seconds, sizes bytes. Nothing of a prompt or an
answer is recorded but its length.
"""

from __future__ import annotations

from typing import Final

# Spans. Calls are named by their method, HTTP requests by method and route, sequences "text_completion MODEL".

ROUTE: Final = "tokenmesh.route"
"""Gateway: which root and which prefill services, and why."""
QUEUE: Final = "tokenmesh.queue"
"""Root and prefill: from acceptance until the engine reserves blocks (root) or computes."""
REMOTE_PREFILL: Final = "tokenmesh.remote_prefill"
"""Root: all attempts to have one prompt prefilled elsewhere."""
PREFILL_ATTEMPT: Final = "tokenmesh.prefill_attempt"
"""Root: one candidate, one ticket."""
PREFILL_COMPUTE: Final = "tokenmesh.prefill_compute"
"""Prefill: the prompt's steps."""
KV_PUSH: Final = "tokenmesh.kv_push"
"""Prefill: from the first layer to the owner's receipt."""
KV_RECEIVE: Final = "tokenmesh.kv_receive"
"""The owning rank: from the opening of a ticket to its settlement."""
FIRST_TOKEN: Final = "tokenmesh.first_token"
"""Root: from its first step to its first token: a whole prompt, or the last token of one whose KV has arrived."""
DECODE: Final = "tokenmesh.decode"
"""Root: from the first token to the end."""
STEPS: Final = "tokenmesh.steps"
"""Root: half a second of shared steps, in a trace of its own, linked to the sequences in them. On their decode spans
the same is an event."""
RANK_LOST: Final = "tokenmesh.rank_lost"
"""Event of every decode span that was open: a rank has left the group, and its sequences are computed again."""

# Attributes: who and what.

SERVICE_ROLE: Final = "tokenmesh.role"
REQUEST_ID: Final = "tokenmesh.request_id"
OUTCOME: Final = "tokenmesh.outcome"
"""``cancelled``: the caller went away, which is nobody's fault. Failures have error.type instead."""
CANCELLED: Final = "cancelled"
ERROR_TYPE: Final = "error.type"
"""A reason of rpc/errors.py, an HTTP status, or an exception's class."""

RPC_SYSTEM: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
RPC_STATUS: Final = "rpc.response.status_code"
SERVER_ADDRESS: Final = "server.address"
HTTP_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"

GEN_AI_OPERATION: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER: Final = "gen_ai.provider.name"
GEN_AI_MODEL: Final = "gen_ai.request.model"
GEN_AI_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
GEN_AI_TEMPERATURE: Final = "gen_ai.request.temperature"
GEN_AI_TOP_P: Final = "gen_ai.request.top_p"
GEN_AI_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
GEN_AI_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"

# Attributes: why and where.

DECISION: Final = "tokenmesh.prefill_decision"
"""Where the prompt's KV came from, as in the metric's label."""
ROOT: Final = "tokenmesh.decode_root"
CANDIDATES: Final = "tokenmesh.prefill_candidates"
PREFILL: Final = "tokenmesh.prefill"
ATTEMPT: Final = "tokenmesh.attempt"
"""From 1."""
RANK: Final = "tokenmesh.rank"

# Attributes: KV.

TRANSFER_ID: Final = "tokenmesh.kv.transfer_id"
"""First half of the ticket, in hexadecimal: enough to find both ends, not enough to write with."""
KV_BLOCKS: Final = "tokenmesh.kv.blocks"
KV_BYTES: Final = "tokenmesh.kv.bytes"
KV_TRANSPORT: Final = "tokenmesh.kv.transport"
KV_CODEC: Final = "tokenmesh.kv.codec"
KV_WIRE_SECONDS: Final = "tokenmesh.kv.wire_seconds"
KV_EXPOSED_SECONDS: Final = "tokenmesh.kv.exposed_seconds"

# Attributes: steps with several ranks.

LOSS_REASON: Final = "tokenmesh.rank_lost.reason"
STEP_COUNT: Final = "tokenmesh.steps.count"
STEP_SECONDS: Final = "tokenmesh.steps.seconds"
STEP_RANKS: Final = "tokenmesh.steps.ranks"
STEP_ATTENTION_SECONDS: Final = "tokenmesh.steps.attention_seconds"
"""One value per rank of STEP_RANKS."""
STEP_EXCHANGE_P50: Final = "tokenmesh.steps.exchange_p50_seconds"
STEP_EXCHANGE_P99: Final = "tokenmesh.steps.exchange_p99_seconds"


def transfer_name(transfer_id: bytes) -> str:
    """See TRANSFER_ID."""
    return transfer_id[:8].hex()
