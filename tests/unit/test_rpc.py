"""What every service's server promises: errors a program can read, nothing of our insides, health, request context."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from tests.unit.fake_service import free_ports
from tokenmesh.context import REQUEST_ID, TRACEPARENT, TRACESTATE, WorkContext, current, outgoing_metadata
from tokenmesh.rpc import channel as channel_module
from tokenmesh.rpc import server as server_module
from tokenmesh.rpc.channel import open_channel
from tokenmesh.rpc.errors import DOMAIN, MeshError, Reason, invalid
from tokenmesh.rpc.server import LIVE, PortInUseError, RpcServer
from tokenmesh.v1 import admin_pb2, admin_pb2_grpc, decode_pb2, decode_pb2_grpc

ADMIN = "tokenmesh.v1.AdminService"
PARENT = f"00-{'a' * 32}-{'b' * 16}-01"
VALID_PARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-01")
SECRET = "password=hunter2"

Served = tuple[RpcServer, grpc.aio.Channel]
Call = Callable[..., Awaitable[object]]


class Fake(admin_pb2_grpc.AdminServiceServicer, decode_pb2_grpc.DecodeServiceServicer):
    """Raises or waits as it is told, and notes the context that its handlers saw."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.wait: asyncio.Event | None = None
        self.entered = asyncio.Event()
        self.cancelled = False
        self.seen: list[tuple[WorkContext | None, list[tuple[str, str]]]] = []

    async def act(self) -> None:
        self.seen.append((current(), outgoing_metadata()))
        self.entered.set()
        try:
            if self.wait is not None:
                await self.wait.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.error is not None:
            raise self.error

    async def GetStatus(self, request: Any, context: Any) -> admin_pb2.GetStatusResponse:
        await self.act()
        return admin_pb2.GetStatusResponse(instance_id="fake")

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.GenerateResponse]:
        yield decode_pb2.GenerateResponse(token_ids=[7])
        await self.act()


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
async def served(fake: Fake) -> AsyncIterator[Served]:
    """A server of both services, not ready, and a channel to it."""
    server = RpcServer("127.0.0.1", free_ports(1)[0])
    admin_pb2_grpc.add_AdminServiceServicer_to_server(fake, server.server)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(fake, server.server)
    server.add(ADMIN)
    await server.start()
    async with open_channel(server.address) as channel:
        yield server, channel
    await server.stop(0)


@pytest.fixture
async def channel(served: Served) -> grpc.aio.Channel:
    return served[1]


async def unary(channel: grpc.aio.Channel, **options: Any) -> object:
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    return await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=10, **options)


async def stream(channel: grpc.aio.Channel, request_id: str = "", **options: Any) -> object:
    """Takes the whole stream, whose first message comes before anything can go wrong."""
    stub = decode_pb2_grpc.DecodeServiceStub(channel)
    messages = aiter(stub.Generate(decode_pb2.GenerateRequest(request_id=request_id), timeout=10, **options))
    assert list((await anext(messages)).token_ids) == [7]
    return [message async for message in messages]


both_kinds = pytest.mark.parametrize("call", [unary, stream])


async def failure(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@both_kinds
async def test_a_refusal_arrives_as_it_was_raised(fake: Fake, channel: grpc.aio.Channel, call: Call) -> None:
    # 1. A handler refuses, with a message that no ASCII header could hold as it is.
    fake.error = invalid(Reason.BAD_SAMPLING_PARAMS, "top_p ≤ 1\nplease", param="top_p", value="2")
    error = await failure(call(channel))
    # 2. Any gRPC client sees the canonical code and the message.
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "top_p ≤ 1\nplease")
    # 3. A program sees one ErrorInfo of our domain.
    info = error_details_pb2.ErrorInfo()
    (detail,) = rpc_status.from_call(error).details  # type: ignore[arg-type, union-attr]
    assert detail.Unpack(info)
    assert (info.domain, info.reason) == (DOMAIN, "BAD_SAMPLING_PARAMS")
    assert dict(info.metadata) == {"param": "top_p", "value": "2"}
    # 4. Our own services get the error back.
    again = MeshError.from_rpc(error)
    assert (again.code, again.reason, again.message) == (fake.error.code, fake.error.reason, fake.error.message)
    assert again.metadata == {"param": "top_p", "value": "2"}


@both_kinds
async def test_an_unexpected_exception_tells_nothing(fake: Fake, channel: grpc.aio.Channel, call: Call) -> None:
    # 1. A handler has a bug, and the exception quotes a secret.
    fake.error = RuntimeError(SECRET)
    error = await failure(call(channel))
    # 2. The caller learns that it is our fault, and no more.
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    assert MeshError.from_rpc(error).reason is Reason.INTERNAL
    # 3. Not even in what a debugger would look at.
    everything = repr(error) + str(error.trailing_metadata())
    assert SECRET not in everything
    assert "RuntimeError" not in everything


async def test_half_a_character_in_a_message_does_not_change_the_code(fake: Fake, channel: grpc.aio.Channel) -> None:
    # 1. JSON may hold it, and a refusal may quote it.
    fake.error = invalid(Reason.BAD_REQUEST, "no word: \ud800", value="\ud800")
    error = MeshError.from_rpc(await failure(unary(channel)))
    # 2. The rest arrives.
    assert (error.reason, error.message, error.metadata) == (Reason.BAD_REQUEST, "no word: ?", {"value": "?"})


@pytest.mark.parametrize("text", ["x", "≤", "\U0001f9f5"])
async def test_a_long_message_does_not_change_the_code(fake: Fake, channel: grpc.aio.Channel, text: str) -> None:
    # 1. A refusal quotes what the client sent, and that is long.
    fake.error = invalid(Reason.BAD_SAMPLING_PARAMS, text * 20_000, param="top_p", value=text * 20_000)
    error = MeshError.from_rpc(await failure(unary(channel)))
    # 2. Cut short or not, it is the same refusal.
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.BAD_SAMPLING_PARAMS)
    assert error.metadata["param"] == "top_p"
    # 3. What is left is its beginning.
    assert error.message.rstrip("…") == text * (len(error.message) - 1)


async def test_a_peer_that_is_down_is_unavailable() -> None:
    # 1. Nobody listens.
    async with open_channel(f"127.0.0.1:{free_ports(1)[0]}") as channel:
        error = MeshError.from_rpc(await failure(unary(channel)))
    # 2. The code says so; there is no reason of ours to pass on.
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.INTERNAL)


async def test_a_passed_deadline_has_a_reason(fake: Fake, channel: grpc.aio.Channel) -> None:
    # 1. The handler waits for longer than the caller.
    fake.wait = asyncio.Event()
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    error = MeshError.from_rpc(await failure(stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=0.2)))
    # 2. Code and reason agree.
    assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED)


@pytest.mark.parametrize(
    ("domain", "reason", "code"),
    [
        ("else.where", "BUSY", code_pb2.ABORTED),
        (DOMAIN, "FROM_THE_FUTURE", code_pb2.ABORTED),
        pytest.param(DOMAIN, "BUSY", code_pb2.NOT_FOUND, id="contradicts its code"),
    ],
)
def test_details_that_are_not_ours_are_not_believed(domain: str, reason: str, code: int) -> None:
    # 1. A call ends with ABORTED, and a proxy or a newer service has added details.
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(domain=domain, reason=reason))
    rich = rpc_status.to_status(status_pb2.Status(code=code, message="m", details=[packed]))
    trailers = grpc.aio.Metadata(*rich.trailing_metadata)
    # 2. The code and the message are kept, the reason is not.
    error = MeshError.from_rpc(grpc.aio.AioRpcError(grpc.StatusCode.ABORTED, grpc.aio.Metadata(), trailers, "m"))
    assert (error.code, error.message, error.reason) == (grpc.StatusCode.ABORTED, "m", Reason.INTERNAL)


def test_details_that_are_no_message_are_not_believed() -> None:
    # 1. A proxy has cut the details short.
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(domain=DOMAIN, reason="BUSY"))
    whole = status_pb2.Status(code=code_pb2.ABORTED, message="m", details=[packed]).SerializeToString()
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", whole[:-3]))
    # 2. The code and the message are kept.
    error = MeshError.from_rpc(grpc.aio.AioRpcError(grpc.StatusCode.ABORTED, grpc.aio.Metadata(), trailers, "m"))
    assert (error.code, error.message, error.reason) == (grpc.StatusCode.ABORTED, "m", Reason.INTERNAL)


async def test_a_port_in_use_is_refused_in_one_line(served: Served) -> None:
    # 1. A second server wants the address of the first.
    first, channel = served
    host, _, port = first.address.rpartition(":")
    second = RpcServer(host, int(port))
    with pytest.raises(PortInUseError) as caught:
        await second.start()
    # 2. One line that names the address; the first still answers.
    assert first.address in str(caught.value)
    assert "\n" not in str(caught.value)
    assert await unary(channel)
    await second.stop(0)


@pytest.mark.parametrize("name", ["", ADMIN])
async def test_health_follows_readiness(served: Served, name: str) -> None:
    server, channel = served
    stub, request = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest(service=name)
    states = health_pb2.HealthCheckResponse
    # 1. Started is not ready: models load for minutes.
    assert (await stub.Check(request, timeout=10)).status == states.NOT_SERVING
    # 2. Ready, and not ready again while it drains.
    await server.ready()
    assert (await stub.Check(request, timeout=10)).status == states.SERVING
    await server.not_ready()
    assert (await stub.Check(request, timeout=10)).status == states.NOT_SERVING


async def test_a_drain_is_for_good(served: Served) -> None:
    server, channel = served
    stub, states = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckResponse

    async def told(name: str) -> int:
        return int((await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)).status)

    # 1. Alive from the start, ready or not.
    assert (await told(""), await told(LIVE)) == (states.NOT_SERVING, states.SERVING)
    await server.ready()
    await server.not_ready()
    assert (await told(""), await told(LIVE)) == (states.NOT_SERVING, states.SERVING)
    # 2. Drained: neither, even if what it was waiting for is there again.
    await server.drain()
    await server.ready()
    assert (await told(""), await told(LIVE)) == (states.NOT_SERVING, states.NOT_SERVING)


async def test_an_ipv6_address_is_listened_on() -> None:
    (port,) = free_ports(1)
    server = RpcServer("::1", port)
    assert server.address == f"[::1]:{port}"
    await server.start()
    await server.stop(0)


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    # 1. Ask as grpcurl does.
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
    reply = await call.read()
    # 2. What was added is there, and so are health and reflection.
    names = {service.name for service in reply.list_services_response.service}
    assert names == {ADMIN, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


@both_kinds
async def test_stop_cancels_what_outlives_its_grace(fake: Fake, served: Served, call: Call) -> None:
    # 1. A handler that would never end is at work.
    fake.wait = asyncio.Event()
    pending = asyncio.create_task(failure(call(served[1])))
    await fake.entered.wait()
    # 2. The server stops in about its grace; handler and caller both hear of it.
    async with asyncio.timeout(5):
        await served[0].stop(grace=0.1)
        assert (await pending).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert fake.cancelled


async def test_stop_lets_a_call_end_within_its_grace(fake: Fake, served: Served) -> None:
    # 1. A handler is at work, and will end soon.
    fake.wait = asyncio.Event()
    pending = asyncio.create_task(unary(served[1]))
    await fake.entered.wait()
    asyncio.get_running_loop().call_later(0.1, fake.wait.set)
    # 2. Its answer arrives although the server stops.
    await served[0].stop(grace=5)
    assert await pending
    assert not fake.cancelled


@both_kinds
async def test_request_and_trace_reach_the_handler(fake: Fake, channel: grpc.aio.Channel, call: Call) -> None:
    # 1. A caller says on whose behalf it calls.
    sent = [(REQUEST_ID, "r-1"), (TRACEPARENT, PARENT), (TRACESTATE, "vendor=1")]
    await call(channel, metadata=sent)
    # 2. The handler works in that context, and its own calls would carry it on.
    ((context, outgoing),) = fake.seen
    assert context == WorkContext("r-1", PARENT, "vendor=1")
    assert sorted(outgoing) == sorted(sent)
    # 3. Here, where nobody works for a request, there is none.
    assert (current(), outgoing_metadata()) == (None, [])


async def test_the_messages_own_request_id_wins(fake: Fake, channel: grpc.aio.Channel) -> None:
    # 1. Metadata and message disagree.
    await stream(channel, request_id="of the message", metadata=[(REQUEST_ID, "of the header")])
    # 2. The message knows better, as one call's header may serve many sequences.
    assert fake.seen[0][0].request_id == "of the message"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "parent",
    [
        *("", "nonsense", PARENT[:-1], PARENT + "-x", PARENT.upper(), f"00-{'0' * 32}-{'b' * 16}-01"),
        *(f"00-{'a' * 32}-{'0' * 16}-01", f"0x-{'a' * 32}-{'b' * 16}-01", f" {PARENT}"),
        *(f"{PARENT}\n", f"ff{PARENT[2:]}"),
    ],
)
def test_a_malformed_trace_is_begun_anew(parent: str) -> None:
    # 1. What came cannot be continued.
    context = WorkContext.from_headers({TRACEPARENT: parent, TRACESTATE: "vendor=1"})
    # 2. A valid trace of our own, without the state of the other.
    assert VALID_PARENT.fullmatch(context.traceparent)
    assert context.trace_id != "a" * 32
    assert TRACESTATE not in dict(context.to_metadata())
    assert re.fullmatch("[0-9a-f]{32}", context.request_id)


@pytest.mark.parametrize("value", ["café", "a\nb", " a", "a ", "x" * 20_000])
async def test_any_request_id_and_trace_state_can_be_passed_on(
    fake: Fake, channel: grpc.aio.Channel, value: str
) -> None:
    # 1. A REST client may send any header, a gRPC client any string as request_id.
    context = WorkContext.from_headers({TRACEPARENT: PARENT, TRACESTATE: value}, value)
    # 2. The next hop can be called in that context, and sees what this one saw.
    assert await unary(channel, metadata=context.to_metadata())
    assert fake.seen[0][0] == context
    # 3. An id of our own, and the trace without its state.
    assert context == WorkContext(context.request_id, PARENT)
    assert re.fullmatch("[0-9a-f]{32}", context.request_id)


def test_a_messages_unusable_request_id_leaves_the_headers() -> None:
    # 1. The gateway's id grew beyond all bounds on its way to a sequence's id.
    context = WorkContext.from_headers({REQUEST_ID: "of the header"}, "x" * 20_000)
    # 2. The request can still be followed.
    assert context.request_id == "of the header"


async def test_a_call_may_be_silent_for_longer_than_pings_go_unpunished(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1. Twenty times as fast as in earnest: a ping each second, and a server that allows one each half second.
    for module, name in ((channel_module, "CHANNEL_OPTIONS"), (server_module, "SERVER_OPTIONS")):
        often = [
            (key, value // 20 if key.endswith("keepalive_time_ms") or "ping_interval" in key else value)
            for key, value in getattr(module, name)
        ]
        monkeypatch.setattr(module, name, often)
    server = RpcServer("127.0.0.1", free_ports(1)[0])
    admin_pb2_grpc.add_AdminServiceServicer_to_server(fake, server.server)
    await server.start()
    # 2. The handler says nothing for many of them. A server that took offence would end the call at the fourth.
    fake.wait = asyncio.Event()
    asyncio.get_running_loop().call_later(8, fake.wait.set)
    async with open_channel(server.address) as channel:
        assert await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=60)
    await server.stop(0)
