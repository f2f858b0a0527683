"""Which decode root serves a request, and which prefill services it may use.

Least load first; among services that are about equally loaded, the one that has seen the prompt's prefix, since its
cache may hold it. A service is usable while it answers load polls, which one that drains refuses.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
import xxhash

from tokenmesh.config import GatewayConfig, MeshConfig
from tokenmesh.rpc.channel import open_channel
from tokenmesh.rpc.errors import Reason, unavailable
from tokenmesh.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, sampling_pb2

log = structlog.get_logger()

POLL_S = 1.0
POLL_TIMEOUT_S = 2.0
AFFINITY_SLACK = 4
"""A service may have this many requests more than the idlest and still be preferred for its cache."""
AFFINITY_ENTRIES = 16_384


@dataclass
class Peer:
    """A service as the gateway sees it."""

    address: str
    channel: grpc.aio.Channel
    up: bool = False
    in_flight: int = 0
    """Requests of this gateway."""
    pending_tokens: int = 0
    """Prompt tokens of this gateway's requests that are being, or will be, computed there."""
    queued: int = 0
    """Requests waiting there, whoever sent them, when last polled."""
    details: Any = None
    """The last load response."""

    @property
    def load(self) -> int:
        """What routing balances: our requests there, or more if others keep it busy."""
        return max(self.in_flight, self.queued)


@dataclass
class Route:
    """Where a request goes."""

    entry: Peer
    candidates: list[str]
    """Prefill services to try, best first."""
    local_reason: sampling_pb2.PrefillDecision | None
    """Set if the entry service is to compute the prompt itself."""
    computing: Peer
    """Who is expected to compute the prompt."""
    prompt_tokens: int
    computed: bool = False

    def prompt_done(self) -> None:
        """Notes that the prompt is computed, and has left the prefill service. Idempotent."""
        if self.computed:
            return
        self.computed = True
        self.computing.pending_tokens -= self.prompt_tokens
        if self.computing is not self.entry:
            self.computing.in_flight -= 1


@dataclass
class Pool:
    """Services of one kind."""

    kind: str
    poll: Callable[[Peer], Awaitable[int]]
    """Asks a peer for its load; returns requests there."""
    peers: list[Peer]
    affinity: OrderedDict[int, str] = field(default_factory=OrderedDict)

    def usable(self) -> list[Peer]:
        """Peers that answer."""
        return [peer for peer in self.peers if peer.up]

    def kv_usage(self) -> float:
        """Share of their KV blocks that is held, 0 to 1, as of the last answers."""
        loads = [peer.details for peer in self.usable() if peer.details is not None]
        total = sum(load.blocks_total for load in loads)
        return 1 - sum(load.blocks_free for load in loads) / total if total else 0.0

    def ranked(self, prefix: int | None) -> list[Peer]:
        """Usable peers, best first."""
        peers = sorted(self.usable(), key=lambda peer: peer.load)
        if prefix is not None and peers:
            favourite = self.affinity.get(prefix)
            bound = peers[0].load + AFFINITY_SLACK
            peers.sort(key=lambda peer: (peer.address != favourite or peer.load > bound, peer.load))
        return peers

    def remember(self, prefix: int | None, address: str) -> None:
        """Notes who has seen a prefix; the oldest notes are forgotten."""
        if prefix is not None:
            self.affinity[prefix] = address
            self.affinity.move_to_end(prefix)
            if len(self.affinity) > AFFINITY_ENTRIES:
                self.affinity.popitem(last=False)

    async def keep_polling(self, peer: Peer) -> None:
        """Follows one peer until cancelled."""
        while True:
            try:
                peer.queued = await self.poll(peer)
                if not peer.up:
                    log.info("peer up", kind=self.kind, peer=peer.address)
                peer.up = True
            except grpc.aio.AioRpcError as error:
                if peer.up:
                    log.warning("peer down", kind=self.kind, peer=peer.address, error=error.details())
                peer.up = False
            await asyncio.sleep(POLL_S)


class Router:
    """All services behind a gateway. An async context: polls while it is open."""

    def __init__(self, mesh: MeshConfig) -> None:
        config = mesh.gateway
        self._config: GatewayConfig = config
        self._remote_min_tokens = mesh.decode_service.remote_prefill_min_tokens
        roots = mesh.decode_addresses() if config.decode_roots is None else config.decode_roots
        prefills = mesh.prefill_addresses() if config.prefills is None else config.prefills
        self.roots = Pool("decode-root", _poll_root, [Peer(a, open_channel(a)) for a in roots])
        self.prefills = Pool("prefill", _poll_prefill, [Peer(a, open_channel(a)) for a in prefills])
        self._polls: list[asyncio.Task[None]] = []

    @property
    def entry(self) -> Pool:
        """The services that requests go to first: decode roots, or prefill services in mode `prefill`."""
        return self.prefills if self._config.mode == "prefill" else self.roots

    async def __aenter__(self) -> Router:
        self._polls = [
            asyncio.create_task(pool.keep_polling(peer)) for pool in (self.roots, self.prefills) for peer in pool.peers
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._polls:
            task.cancel()
        await asyncio.gather(*self._polls, return_exceptions=True)
        for pool in (self.roots, self.prefills):
            for peer in pool.peers:
                await peer.channel.close()

    def _prefix(self, token_ids: Sequence[int], cache_salt: str) -> int | None:
        length = self._config.prefix_affinity_tokens
        if not length or len(token_ids) < length:
            return None
        return xxhash.xxh3_64_intdigest(repr((cache_salt, list(token_ids[:length]))).encode())

    @contextmanager
    def route(self, token_ids: Sequence[int], cache_salt: str, avoid: set[str]) -> Iterator[Route]:
        """Picks services for a request, and counts it there until the block ends.

        Raises MeshError UNAVAILABLE (NO_DECODE_ROOT) if nothing usable is left but `avoid`.
        """
        prefix = self._prefix(token_ids, cache_salt)
        choices = [peer for peer in self.entry.ranked(prefix) if peer.address not in avoid]
        if not choices:
            raise unavailable(Reason.NO_DECODE_ROOT, f"no {self.entry.kind} is available")
        entry = choices[0]
        self.entry.remember(prefix, entry.address)
        candidates, reason = self._prefill_plan(len(token_ids), entry, prefix)
        if candidates:
            self.prefills.remember(prefix, candidates[0].address)
        computing = candidates[0] if candidates else entry
        route = Route(entry, [c.address for c in candidates], reason, computing, len(token_ids))
        entry.in_flight += 1
        if computing is not entry:
            computing.in_flight += 1
        computing.pending_tokens += route.prompt_tokens
        try:
            yield route
        finally:
            route.prompt_done()
            entry.in_flight -= 1

    def _prefill_plan(
        self, tokens: int, root: Peer, prefix: int | None
    ) -> tuple[list[Peer], sampling_pb2.PrefillDecision | None]:
        """Prefill services to try, best first; or none, with the reason where it is the gateway that decided."""
        if self._config.mode == "prefill" or tokens < self._remote_min_tokens:
            return [], None
        if self._config.mode == "decode":
            return [], sampling_pb2.PREFILL_DECISION_DECODE_ONLY
        candidates = self.prefills.ranked(prefix)
        if candidates and self._config.local_prefill_penalty:
            worth = self._config.local_prefill_penalty * (root.pending_tokens + tokens) - tokens
            if candidates[0].pending_tokens > worth:
                # More than its cache is worth; another may have less to do.
                candidates.sort(key=lambda peer: peer.pending_tokens)
            if candidates[0].pending_tokens > worth:
                return [], sampling_pb2.PREFILL_DECISION_PREFILL_BUSY
        return candidates, None


async def _poll_root(peer: Peer) -> int:
    load = await decode_pb2_grpc.DecodeServiceStub(peer.channel).GetLoad(
        decode_pb2.GetLoadRequest(), timeout=POLL_TIMEOUT_S
    )
    peer.details = load
    return int(load.waiting + load.running)


async def _poll_prefill(peer: Peer) -> int:
    load = await prefill_pb2_grpc.PrefillServiceStub(peer.channel).GetPrefillLoad(
        prefill_pb2.GetPrefillLoadRequest(), timeout=POLL_TIMEOUT_S
    )
    peer.details = load
    return int(load.waiting + load.running)
