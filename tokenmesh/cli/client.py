"""Commands that talk to running services: generate, health, drain."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from tokenmesh.cli.status import check_health, one_line, operator
from tokenmesh.config import GatewayConfig, MeshConfig
from tokenmesh.rpc.channel import dial, open_channel
from tokenmesh.rpc.errors import MeshError
from tokenmesh.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc, sampling_pb2


@dataclass
class StreamTimer:
    """When a stream was asked for and when its tokens came."""

    started: float = field(default_factory=time.perf_counter)
    chunks: int = 0
    _first: float = 0.0
    _last: float = 0.0

    def note(self) -> None:
        """A chunk with tokens has come."""
        self._last = time.perf_counter()
        if not self.chunks:
            self._first = self._last
        self.chunks += 1

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first chunk; None if there was none."""
        return self._first - self.started if self.chunks else None

    @property
    def itl_s(self) -> float | None:
        """Mean seconds between chunks; None for fewer than two."""
        return (self._last - self._first) / (self.chunks - 1) if self.chunks > 1 else None

    def __str__(self) -> str:
        times = {"TTFT": self.ttft_s, "ITL": self.itl_s}
        return ", ".join(f"{name} " + ("-" if t is None else f"{t * 1e3:.1f} ms") for name, t in times.items())


@dataclass
class Answer:
    """A streamed answer, as far as it has come."""

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    timer: StreamTimer = field(default_factory=StreamTimer)

    def __str__(self) -> str:
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        return f"{self.prompt_tokens} prompt tokens{cached}, {self.completion_tokens} generated, {self.timer}"


def chat(text: str) -> inference_pb2.Prompt:
    """A user's first message."""
    messages = [inference_pb2.ChatMessage(role="user", content=text)]
    return inference_pb2.Prompt(chat=inference_pb2.Conversation(messages=messages))


def authorization(gateway: GatewayConfig) -> dict[str, str]:
    """Header or metadata that the gateway wants."""
    return {"authorization": f"Bearer {gateway.api_keys[0]}"} if gateway.api_keys else {}


async def stream(
    config: MeshConfig,
    prompt: inference_pb2.Prompt,
    params: sampling_pb2.SamplingParams,
    on_text: Callable[[str], None] = lambda _: None,
) -> Answer:
    """Asks the gateway over gRPC; `on_text` gets the text as it comes. Raises grpc.aio.AioRpcError."""
    gateway = config.gateway
    request = inference_pb2.StreamGenerateRequest(prompt=prompt, sampling_params=params)
    async with open_channel(dial(gateway.host, gateway.grpc_port)) as channel:
        answer = Answer()
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        metadata = tuple(authorization(gateway).items())
        call = stub.StreamGenerate(request, timeout=gateway.request_timeout_s, metadata=metadata)
        async for part in call:
            if part.token_ids:
                answer.timer.note()
            if part.text:
                answer.text += part.text
                on_text(part.text)
            if part.HasField("finish_reason"):
                name = sampling_pb2.FinishReason.Name(part.finish_reason)
                answer.finish_reason = name.removeprefix("FINISH_REASON_").lower()
                answer.prompt_tokens = part.usage.prompt_tokens
                answer.completion_tokens = part.usage.completion_tokens
                answer.cached_tokens = part.usage.cached_tokens
    return answer


def generate(config: MeshConfig, prompt: str, max_tokens: int, temperature: float | None, raw: bool) -> int:
    """Prints an answer as it comes, and figures to standard error. Returns the exit status."""
    params = sampling_pb2.SamplingParams(max_tokens=max_tokens, temperature=temperature)
    message = inference_pb2.Prompt(text=prompt) if raw else chat(prompt)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        answer = asyncio.run(stream(config, message, params, write))
    except grpc.aio.AioRpcError as error:
        return refused("generate", error)
    print()
    print(f"{answer}, finished by {answer.finish_reason or 'the end of the stream'}", file=sys.stderr)
    return 0


def health(address: str, timeout: float) -> int:
    """Prints a server's health. Returns 0 if it is SERVING, 1 if not, 2 for an address that is none."""
    if not _is_address(address):
        return 2
    try:
        status = asyncio.run(check_health(address, timeout))
    except grpc.aio.AioRpcError as error:
        return refused(address, error)
    print(f"{address}: {status}")
    return 0 if status == "SERVING" else 1


def drain(config: MeshConfig, address: str, timeout: float) -> int:
    """Stops a service from taking work and waits for the rest of it. A gateway wants its own operator's key.

    Returns 0 when all work is done, 1 if some remained or the service did not answer, 2 for an address that is none.
    """
    if not _is_address(address):
        return 2

    async def ask() -> int:
        async with open_channel(address) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            reply = await stub.Drain(admin_pb2.DrainRequest(), timeout=timeout, metadata=operator(config.gateway))
        return int(reply.remaining)

    try:
        remaining = asyncio.run(ask())
    except grpc.aio.AioRpcError as error:
        return refused(address, error)
    if remaining:
        print(f"tokenmesh: {address}: {remaining} requests still run after {timeout:g} s", file=sys.stderr)
        return 1
    print(f"{address}: drained")
    return 0


def refused(what: str, error: grpc.aio.AioRpcError) -> int:
    """Prints why a call failed, as one line. Returns the exit status."""
    failure = MeshError.from_rpc(error)
    line = f"tokenmesh: {what}: {failure.code.name} ({failure.reason.value}): {one_line(failure.message)}"
    print(line, file=sys.stderr)
    return 1


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    if host and port.isdecimal():
        return True
    # gRPC would take anything as a name to be resolved.
    print(f"tokenmesh: an address is host:port, not {text!r}", file=sys.stderr)
    return False
