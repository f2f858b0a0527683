"""A gateway's two front ends over decode roots that only say what roots would say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
from vllm import TokensPrompt
from vllm.config import VllmConfig

from services.gateway.engine_client import MeshEngineClient
from services.gateway.inference import InferenceServicer
from services.gateway.pulse import Pulse
from services.gateway.router import Router
from tests.unit.fake_service import free_ports
from tokenmesh.config import MeshConfig
from tokenmesh.lifecycle import RequestTable
from tokenmesh.rpc.errors import MeshError, abort
from tokenmesh.rpc.server import RpcServer
from tokenmesh.v1 import decode_pb2, decode_pb2_grpc, inference_pb2, inference_pb2_grpc, sampling_pb2

PROMPT = TokensPrompt(prompt_token_ids=[1, 2, 3])


class Root(decode_pb2_grpc.DecodeServiceServicer):
    """Refuses, or answers with one token."""

    def __init__(self, server: RpcServer) -> None:
        self.server = server
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server.server)
        self.refusal: MeshError | None = None
        self.requests: list[decode_pb2.GenerateRequest] = []
        self.endless: Iterable[int] = ()
        """Tokens before the last one."""
        self.prompt_logprobs: sampling_pb2.Logprobs | None = None
        self.before = 0.0
        """Seconds for which nothing is said."""
        self.serving = 0
        """Calls that have not ended."""
        self.load = decode_pb2.GetLoadResponse()

    async def GetLoad(self, request: Any, context: Any) -> decode_pb2.GetLoadResponse:
        return self.load

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.GenerateResponse]:
        self.requests.append(request)
        await asyncio.sleep(self.before)
        if self.refusal is not None:
            await abort(context, self.refusal)
        self.serving += 1
        try:
            for number, token in enumerate(self.endless):
                asked = self.prompt_logprobs if not number else None
                yield decode_pb2.GenerateResponse(token_ids=[token], prompt_logprobs=asked)
                await asyncio.sleep(0.01)
        finally:
            self.serving -= 1
        yield decode_pb2.GenerateResponse(
            token_ids=[5],
            prompt_logprobs=self.prompt_logprobs if not self.endless else None,
            finish_reason=sampling_pb2.FINISH_REASON_LENGTH,
            prefill_decision=sampling_pb2.PREFILL_DECISION_TOO_SHORT,
            usage=sampling_pb2.Usage(prompt_tokens=3),
        )


class Running(NamedTuple):
    """A gateway over a root."""

    root: Root
    client: MeshEngineClient
    channel: grpc.aio.Channel
    requests: RequestTable


@asynccontextmanager
async def serving_root() -> AsyncIterator[Root]:
    """A root that serves."""
    (port,) = free_ports(1)
    root = Root(RpcServer("127.0.0.1", port))
    await root.server.start()
    try:
        yield root
    finally:
        await root.server.stop(0)


@asynccontextmanager
async def gateway(vllm_config: VllmConfig, *more: Root, **config: Any) -> AsyncIterator[Running]:
    """Both, and a channel to the gateway's gRPC front. `more` roots serve, too; idle ones are chosen in their order."""
    async with serving_root() as root, _fronts(vllm_config, [root, *more], config) as running:
        yield running


@asynccontextmanager
async def _fronts(vllm_config: VllmConfig, roots: list[Root], config: dict[str, Any]) -> AsyncIterator[Running]:
    (port,) = free_ports(1)
    peers: dict[str, Any] = {"decode_roots": tuple(root.server.address for root in roots), "prefills": ()}
    mesh = MeshConfig(gateway={**peers, "grpc_port": port, **config})
    fronts = RpcServer("127.0.0.1", port)
    servicer = InferenceServicer(mesh.gateway, mesh.model_name)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, fronts.server)
    await fronts.start()
    async with Router(mesh) as router, grpc.aio.insecure_channel(fronts.address) as channel:
        table = RequestTable(10)
        client = MeshEngineClient(vllm_config, mesh.gateway, mesh.model_name, Pulse(), router, table)
        servicer.attach(client)
        async with asyncio.timeout(10):
            while len(router.roots.usable()) < len(roots):  # noqa: ASYNC110 - polls alone notice
                await asyncio.sleep(0.01)
        try:
            yield Running(roots[0], client, channel, table)
        finally:
            client.shutdown()
            await fronts.stop(0)


TOKENS = inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]))
CHAT = inference_pb2.Prompt(
    chat=inference_pb2.Conversation(messages=[inference_pb2.ChatMessage(role="user", content="Hello there")])
)


async def ask(channel: grpc.aio.Channel, prompt: inference_pb2.Prompt, max_tokens: int = 2) -> None:
    """As a gRPC client does."""
    params = sampling_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    request = inference_pb2.StreamGenerateRequest(prompt=prompt, sampling_params=params)
    async for _ in inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request, timeout=10):
        pass


async def read(stream: AsyncIterator[Any]) -> None:
    """To its end."""
    async for _ in stream:
        pass
