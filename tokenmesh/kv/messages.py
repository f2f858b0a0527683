"""Messages between a service and its local engine processes and movers, named by receiver.

They never leave the host; typed with msgspec so that both ends agree on them by construction.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tokenmesh.kv.geometry import BlockGeometry

# To the mover, from its engine worker (first three) or its service.


class Destination(msgspec.Struct, frozen=True, gc=False):
    """One owner shard of a transfer, and the heads that it is sent."""

    host: str
    port: int
    source: int = 0
    """Place of the first head in the sender's shard."""
    target: int = 0
    """Place of the first head in the owner's shard."""
    heads: int = 0
    """How many; 0: all of the sender's shard."""


class OpenSend(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Prepare to send: connect if need be. Without destinations, this shard has nothing that others do not send."""

    transfer_id: bytes
    destinations: list[Destination]
    codec: str = "none"


class Push(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Send blocks of one layer. `blocks` are local ids; `first` is the place of the first in the target's list."""

    transfer_id: bytes
    layer: int
    first: int
    blocks: list[int]


class Commit(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Everything was pushed: ask for the owner's receipt and report it."""

    transfer_id: bytes


class CancelSend(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Stop sending. SendDone follows, after which the source blocks may be reused; a done transfer is left alone."""

    transfer_id: bytes


class Connect(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Connect to a peer before the first request needs it. Answered by Connected."""

    host: str
    port: int


class Expect(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Accept writes into these local blocks under this ticket."""

    transfer_id: bytes
    blocks: list[int]
    codec: str = "none"
    """How payloads may be encoded; as cached is always accepted."""


class Relay(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Pass messages of this ticket on to its owner instead of applying them; until Settle."""

    transfer_id: bytes
    host: str
    port: int


class Sync(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Answered by Synced when all that was sent before is in effect: a ticket, above all, must be open before its
    holder is told of it."""

    transfer_id: bytes


class Settle(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Close a ticket. Answered by Settled; later messages that name it are dropped."""

    transfer_id: bytes


# To the service.


class MoverReady(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A mover listens."""

    shard: int
    host: str
    port: int
    geometry: BlockGeometry
    pid: int = 0
    """The mover's process; 0: not to be watched."""


class Connected(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A pair is connected, or (with an error) is not."""

    host: str
    port: int
    error: str
    transport: str
    goodput: float
    """Measured bytes per second; 0 if not measured."""
    shard: int
    """The sender's."""


class SendDone(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A send has ended; its source blocks are no longer read."""

    transfer_id: bytes
    error: str
    """Empty if the owner acknowledged everything."""
    nbytes: int
    block_layers: int
    seconds: float
    exposed_seconds: float
    transport: str
    shard: int


class Synced(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The answer to Sync."""

    transfer_id: bytes
    shard: int


class Settled(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A ticket is closed; its blocks are no longer written."""

    transfer_id: bytes
    shard: int
    complete: bool
    error: str
    nbytes: int
    block_layers: int
    seconds: float
    transport: str
    bad_messages: int
    dropped: dict[str, int] = {}
    """Messages that the mover dropped since it last said so, by reason; those of no ticket are among them."""


class WantKv(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The scheduler reserved blocks for a prompt and asks for its KV."""

    request_id: str
    """The engine's internal id."""
    key: str
    """The request id that the service gave it."""
    start_token: int
    num_tokens: int
    """Prompt tokens wanted from start_token on."""
    blocks: list[int]
    cached_tokens: int = 0
    """Prompt tokens that the rank's own cache has."""


class DropKv(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The scheduler gave a request up while its KV was awaited."""

    request_id: str


class RankCounts(msgspec.Struct, frozen=True, gc=False):
    """Blocks of one rank, and what lives in them."""

    rank: int
    blocks_total: int
    blocks_free: int
    context_tokens: int
    sequences: int


class EngineCounts(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Blocks of a scheduler, sent when they change."""

    blocks_total: int
    blocks_free: int
    ranks: list[RankCounts] = []
    """Per rank, the root first; empty where there is no group."""


class RankDetached(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The scheduler has taken a rank out of the group."""

    rank: int
    epoch: int
    reason: str
    recomputed: int
    """Running sequences that have to be computed again."""


class StepTimes(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Where the time of recent steps with several ranks went, as one engine worker measured it."""

    steps: int
    step_seconds: float
    attention_phase_seconds: float
    """From sending rows to having everybody's attention, all layers."""
    attention_seconds: dict[int, float]
    """Rank → time in its kernel."""
    exchange_us: list[float]
    """Per layer and step: the phase less the slowest rank's kernel."""


# To the scheduler.


class AttachRank(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A rank is connected to every engine worker and takes sequences from the next step on."""

    rank: int
    epoch: int
    """Counts the attachments of a service; tells a rank from one that had its number before."""
    blocks: int


class DetachRank(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A rank is gone or wants to go."""

    rank: int
    epoch: int
    reason: str


# To a shard of a decode worker.


class OpenShard(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Allocate blocks and listen for the root."""

    spec: bytes
    """A RankSpec, encoded: this module must not need what it is made of."""
    geometry: BlockGeometry
    blocks: int
    token: bytes
    """What the root will show."""


class CloseShard(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Give the root up and free the blocks. Answered by ShardClosed."""


class ZeroShard(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Overwrite the blocks with zeros, between steps. Answered by ShardZeroed."""

    until: float
    """By time.monotonic(), which one host's processes share: later, somebody may have blocks there."""


# From a shard of a decode worker.


class ShardUp(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The process has loaded its kernels and waits for OpenShard."""

    shard: int


class ShardOpen(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The exchange listens, or (with an error) does not."""

    shard: int
    port: int
    error: str


class ShardState(msgspec.Struct, frozen=True, tag=True, gc=False):
    """What a shard does; sent now and then."""

    shard: int
    transport: str
    steps: int
    context_tokens: int
    attention_seconds: float


class ShardZeroed(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The blocks are zero; not ok: a step was under way."""

    shard: int
    ok: bool


class ShardClosed(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The blocks are free: as asked, or because the root went away."""

    shard: int
    reason: str


NOT_OPEN = "not open"
"""The reason in an answer to CloseShard that crossed with the shard's own report."""


# To an engine worker.


class KvArrived(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The blocks of a waiting request are in place, or (ok false) will not be."""

    request_id: str
    ok: bool


class KvSent(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The blocks of a finished prefill may be freed."""

    transfer_id: bytes


class Roused(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A request is about to be submitted: an idle engine must not sleep on."""


ToMover = OpenSend | Push | Commit | CancelSend | Connect | Expect | Relay | Sync | Settle
FromMover = MoverReady | Connected | SendDone | Synced | Settled
FromEngine = WantKv | DropKv | EngineCounts | RankDetached | StepTimes
FromShard = ShardUp | ShardOpen | ShardState | ShardZeroed | ShardClosed
ToService = FromMover | FromEngine | FromShard
ToScheduler = AttachRank | DetachRank
ToWorker = KvArrived | KvSent | Roused
ToShard = OpenShard | CloseShard | ZeroShard
ToEngine = ToScheduler | ToWorker | ToShard

_encoder = msgspec.msgpack.Encoder()


def encode(message: Any) -> bytes:
    """One message as bytes."""
    return _encoder.encode(message)


_decoders = {kind: msgspec.msgpack.Decoder(kind) for kind in (ToMover, ToService, ToEngine)}


def to_mover(data: bytes) -> ToMover:
    """Decodes what a mover receives. Raises msgspec.ValidationError for anything else."""
    return _decoders[ToMover].decode(data)  # type: ignore[no-any-return]


def to_service(data: bytes) -> ToService:
    """Decodes what a service receives. Raises msgspec.ValidationError for anything else."""
    return _decoders[ToService].decode(data)  # type: ignore[no-any-return]


def to_engine(data: bytes) -> ToEngine:
    """Decodes what schedulers and engine workers receive. Raises msgspec.ValidationError for anything else."""
    return _decoders[ToEngine].decode(data)  # type: ignore[no-any-return]
