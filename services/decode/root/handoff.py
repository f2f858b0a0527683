"""Remote prefill as the decode root drives it: ticket, call, settle, next candidate, tell the engine.

One task per prompt. Whatever happens, the engine's workers hear exactly once what became of a prompt's KV, and only
after its ticket is closed: until then vLLM keeps the blocks, and after that nobody can write them.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import structlog

from tokenmesh.config import DecodeConfig
from tokenmesh.context import WorkContext, bind, outgoing_metadata
from tokenmesh.engine.host import EngineHost
from tokenmesh.kv.messages import DropKv, Expect, KvArrived, Settle, Settled, ToService, WantKv
from tokenmesh.rpc.channel import open_channel
from tokenmesh.rpc.errors import MeshError, Reason
from tokenmesh.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc

log = structlog.get_logger()

SETTLE_TIMEOUT_S = 5.0
"""A mover answers at once; one that does not is dead, and writes nothing any more."""

CONNECT_TIMEOUT_S = 10.0

RECONNECT_S = 0.5

RETRY_AFTER_S = 2.0
"""A prefill service that was unreachable is tried last for this long."""

_OUR_FAULT = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


@dataclass
class Prompt:
    """What the hand-off must know of a request."""

    request_id: str
    token_ids: Sequence[int]
    candidates: Sequence[str]
    work: WorkContext
    cache_salt: str = ""
    priority: int = 0
    receipt: kv_pb2.KvReceipt | None = None
    """Set when the KV has arrived."""
    cached_tokens: int = 0
    """Prompt tokens that nobody had to compute, once the KV has arrived."""
    failed: bool = False
    """Set when every candidate has failed."""
    on_wait: Callable[[], None] = field(default=lambda: None)
    """Called when the engine starts to wait for this prompt's KV."""


class HandOff:
    """All prompts of a decode root that are being prefilled elsewhere."""

    def __init__(self, config: DecodeConfig, root_id: str) -> None:
        self._config = config
        self._root_id = root_id
        self._engine: EngineHost | None = None
        self._prompts: dict[str, Prompt] = {}
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._settling: dict[bytes, dict[int, asyncio.Future[Settled]]] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._down_since: dict[str, float] = {}
        self.connected: set[str] = set()
        """Prefill services that were reachable, and connected to our shards, when last asked."""
        self.bytes = 0
        self.transfers = 0
        self.seconds = 0.0
        self.transport = ""
        self.failures: Counter[str] = Counter()

    @property
    def open(self) -> int:
        """Prompts whose KV is awaited."""
        return len(self._fetches)

    def attach(self, engine: EngineHost) -> None:
        """Gives the hand-off its engine."""
        self._engine = engine

    @property
    def engine(self) -> EngineHost:
        """The engine; messages arrive only once it exists."""
        assert self._engine is not None
        return self._engine

    @contextmanager
    def registered(self, request_id: str, prompt: Prompt | None) -> Iterator[None]:
        """Keeps a prompt known for the length of the block, in which the engine may ask for it; None: nothing."""
        if prompt is None:
            yield
            return
        self._prompts[request_id] = prompt
        try:
            yield
        finally:
            del self._prompts[request_id]

    def handle(self, message: ToService) -> None:
        """Takes what the scheduler wants and what movers report."""
        match message:
            case WantKv():
                task = asyncio.create_task(self._fetch(message))
                self._fetches[message.request_id] = task
                task.add_done_callback(lambda _: self._fetches.pop(message.request_id, None))
            case DropKv(request_id):
                if request_id in self._fetches:
                    self._fetches[request_id].cancel()
            case Settled():
                waiting = self._settling.get(message.transfer_id, {})
                future = waiting.get(message.shard)
                if future is not None and not future.done():
                    future.set_result(message)
            case _:
                log.warning("unexpected message", message=type(message).__name__)

    async def _fetch(self, want: WantKv) -> None:
        prompt = self._prompts.get(want.key)
        arrived = False
        try:
            if prompt is not None:
                prompt.on_wait()
                with bind(prompt.work):
                    arrived = await self._try_candidates(want, prompt)
                prompt.failed = not arrived
        except asyncio.CancelledError:
            log.info("remote prefill cancelled", engine_request=want.request_id)
        except Exception:
            # The prompt is computed here instead; the fault must not take other requests along.
            log.exception("remote prefill failed unexpectedly", engine_request=want.request_id)
            if prompt is not None:
                prompt.failed = True
        finally:
            for shard in range(self.engine.shards):
                self.engine.hub.send(f"worker-{shard}", KvArrived(want.request_id, arrived))

    async def _try_candidates(self, want: WantKv, prompt: Prompt) -> bool:
        deadline = time.monotonic() + self._config.kv_transfer.timeout_s
        for address in sorted(prompt.candidates, key=self._recently_down):
            left = deadline - time.monotonic()
            if left <= 0:
                log.warning("remote prefill out of time", after_s=self._config.kv_transfer.timeout_s)
                self.failures[Reason.DEADLINE_EXCEEDED.value] += 1
                return False
            try:
                prompt.receipt = await self._attempt(want, prompt, address, left)
                return True
            except MeshError as error:
                self.failures[error.reason.value] += 1
                if error.code is grpc.StatusCode.UNAVAILABLE:
                    self._down_since[address] = time.monotonic()
                log.warning("remote prefill failed", prefill=address, reason=error.reason.value, error=error.message)
                if error.code in _OUR_FAULT:
                    return False
        return False

    def _recently_down(self, address: str) -> bool:
        return time.monotonic() - self._down_since.get(address, -RETRY_AFTER_S) < RETRY_AFTER_S

    async def _attempt(self, want: WantKv, prompt: Prompt, address: str, timeout: float) -> kv_pb2.KvReceipt:
        """One ticket, one call. Returns what arrived; raises MeshError, and in every case leaves the ticket closed."""
        engine = self.engine
        transfer_id = secrets.token_bytes(16)
        movers = [engine.movers[shard] for shard in range(engine.shards)]
        request = prefill_pb2.PrefillRequest(
            request_id=prompt.request_id,
            prompt_token_ids=prompt.token_ids,
            target=kv_pb2.KvTarget(
                transfer_id=transfer_id,
                shards=[kv_pb2.KvShard(host=m.host, port=m.port) for m in movers],
                geometry=movers[0].geometry.to_proto(),
                start_token=want.start_token,
                block_ids=want.blocks,
                codec=kv_pb2.KV_CODEC_NONE,
            ),
            cache_salt=prompt.cache_salt,
            decode_root_id=self._root_id,
            priority=prompt.priority,
        )
        for mover in movers:
            engine.hub.send(f"mover-{mover.shard}", Expect(transfer_id, want.blocks))
        call: MeshError | None = None
        reply: prefill_pb2.PrefillResponse | None = None
        try:
            stub = prefill_pb2_grpc.PrefillServiceStub(self._channel(address))
            reply = await stub.Prefill(request, timeout=timeout, metadata=outgoing_metadata())
        except grpc.aio.AioRpcError as error:
            call = MeshError.from_rpc(error)
        finally:
            # Shielded: a cancelled request must not leave its ticket open.
            settled = await asyncio.shield(self._settle(transfer_id))
        if call is not None:
            raise call
        problem = next((s.error or "incomplete" for s in settled if not s.complete), "")
        if problem:
            raise MeshError(grpc.StatusCode.INTERNAL, Reason.KV_TRANSFER_FAILED, problem)
        receipt = kv_pb2.KvReceipt(
            bytes=sum(s.nbytes for s in settled),
            block_layers=sum(s.block_layers for s in settled),
            seconds=max(s.seconds for s in settled),
            transport=settled[0].transport,
            exposed_seconds=reply.receipt.exposed_seconds if reply is not None else 0.0,
        )
        prompt.cached_tokens = max(want.start_token, reply.cached_tokens if reply is not None else 0)
        self.bytes += receipt.bytes
        self.transfers += 1
        self.seconds += receipt.seconds
        self.transport = receipt.transport
        log.info(
            "kv arrived",
            prefill=address,
            bytes=receipt.bytes,
            seconds=round(receipt.seconds, 4),
            exposed_s=round(receipt.exposed_seconds, 4),
            transport=receipt.transport,
        )
        return receipt

    async def _settle(self, transfer_id: bytes) -> list[Settled]:
        """Closes the ticket on every shard and returns what each received."""
        loop = asyncio.get_running_loop()
        waiting = self._settling[transfer_id] = {s: loop.create_future() for s in range(self.engine.shards)}
        try:
            for shard in waiting:
                self.engine.hub.send(f"mover-{shard}", Settle(transfer_id))
            return await asyncio.wait_for(asyncio.gather(*waiting.values()), SETTLE_TIMEOUT_S)
        except TimeoutError:
            log.error("a mover does not answer")  # noqa: TRY400 - the traceback would say nothing more
            return [Settled(transfer_id, 0, False, "a mover does not answer", 0, 0, 0.0, "", 0)]
        finally:
            del self._settling[transfer_id]

    async def keep_connected(self, address: str) -> None:
        """Connects a prefill service to our shards, now and whenever it comes back. Runs until cancelled."""
        engine = self.engine
        request = prefill_pb2.ConnectOwnerRequest(
            shards=[kv_pb2.KvShard(host=m.host, port=m.port) for _, m in sorted(engine.movers.items())],
            geometry=engine.movers[0].geometry.to_proto(),
            decode_root_id=self._root_id,
        )
        told = ""
        while True:
            try:
                stub = prefill_pb2_grpc.PrefillServiceStub(self._channel(address))
                reply = await stub.ConnectOwner(request, timeout=CONNECT_TIMEOUT_S)
                if address not in self.connected:
                    log.info(
                        "prefill connected",
                        prefill=address,
                        transport=reply.transport,
                        gb_per_s=round(reply.goodput / 1e9, 2),
                    )
                self.connected.add(address)
                self.transport = self.transport or reply.transport
                told = ""
            except grpc.aio.AioRpcError as error:
                self.connected.discard(address)
                failure = MeshError.from_rpc(error)
                if told != failure.reason.value:
                    log.warning(
                        "prefill not connected", prefill=address, reason=failure.reason.value, error=failure.message
                    )
                told = failure.reason.value
            await asyncio.sleep(RETRY_AFTER_S if address in self.connected else RECONNECT_S)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]

    async def close(self) -> None:
        """Cancels what is under way and closes the channels."""
        for task in list(self._fetches.values()):
            task.cancel()
        await asyncio.gather(*self._fetches.values(), return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
