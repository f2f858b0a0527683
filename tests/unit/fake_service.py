"""Stands in for services: their gRPC side, health, REST and bad habits, without engines.

fake_service.py serve ROLE HOST:PORT MESH_FILE HABIT     one service
fake_service.py up|demo MESH_FILE LOG_DIR ROLE=HABIT...  the command of that name, over fake services
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc

from tokenmesh.cli import demo, mesh
from tokenmesh.cli.mesh import CommandFactory
from tokenmesh.cli.serve import ServiceRole
from tokenmesh.config import GatewayConfig
from tokenmesh.lifecycle import RequestTable
from tokenmesh.mesh_file import load_config
from tokenmesh.rpc.admin import AdminServicer
from tokenmesh.rpc.errors import MeshError, Reason, invalid
from tokenmesh.rpc.server import RpcServer
from tokenmesh.v1 import admin_pb2, inference_pb2, inference_pb2_grpc, sampling_pb2

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
STATUS = {
    "gateway": admin_pb2.GetStatusResponse(role=admin_pb2.ROLE_GATEWAY, ready=True),
    "prefill": admin_pb2.GetStatusResponse(role=admin_pb2.ROLE_PREFILL, ready=True, blocks_total=90, blocks_free=80),
    "decode-root": admin_pb2.GetStatusResponse(
        role=admin_pb2.ROLE_DECODE_ROOT,
        ready=True,
        running=3,
        waiting=2,
        kv_transport="sysv",
        kv_bytes=30_000_000,
        kv_seconds=0.01,
        counters={"PREFILL_DECISION_DISAGGREGATED": 1, "PREFILL_DECISION_TOO_SHORT": 2},
        ranks=[
            admin_pb2.RankStatus(rank=0, attached=True, blocks_total=90, blocks_free=70, context_tokens=2500),
            admin_pb2.RankStatus(
                rank=1,
                address="w:9300",
                attached=True,
                blocks_total=91,
                blocks_free=71,
                context_tokens=2400,
                sequences=3,
                step_share=0.25,
                exchange_transport="sysv",
            ),
        ],
    ),
    "decode-worker": admin_pb2.GetStatusResponse(role=admin_pb2.ROLE_DECODE_WORKER, ready=True, blocks_total=91),
}


def command(**habits: str) -> CommandFactory:
    """Runs this file instead of a service. Habits go by role, with _ for -."""

    def make(endpoint: Any, config_file: Path) -> list[str]:
        role = endpoint.role.value
        habit = habits.get(role.replace("-", "_"), "")
        return [sys.executable, __file__, "serve", role, endpoint.address, str(config_file), habit]

    return make


class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    """Says the prompt's words back, one in each message; refuses the prompt "bad"."""

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        chat = request.prompt.WhichOneof("prompt") == "chat"
        text = f"chat: {request.prompt.chat.messages[0].content}" if chat else f"raw: {request.prompt.text}"
        if text.endswith("bad"):
            raise invalid(Reason.BAD_SAMPLING_PARAMS, "temperature\nis out of range", param="temperature")
        if ("authorization", "Bearer secret") not in tuple(context.invocation_metadata()):
            raise MeshError(grpc.StatusCode.UNAUTHENTICATED, Reason.BAD_API_KEY, "the API key is missing or wrong")
        words = text.split(" ")[: request.sampling_params.max_tokens]
        for i, word in enumerate(words):
            yield inference_pb2.StreamGenerateResponse(text=word + " ", token_ids=[i])
            await asyncio.sleep(0.01)
        yield inference_pb2.StreamGenerateResponse(
            finish_reason=sampling_pb2.FINISH_REASON_LENGTH,
            usage=sampling_pb2.Usage(prompt_tokens=7, completion_tokens=len(words)),
        )


class FakeRest(BaseHTTPRequestHandler):
    """What the demo asks for."""

    def do_GET(self) -> None:
        self.reply("text/plain", "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.headers["authorization"] == "Bearer secret"
        if self.path == "/tokenize":
            tokens = list(range(4 * len(body["prompt"].split())))
            self.reply("application/json", json.dumps({"tokens": tokens, "max_model_len": 4096}))
            return
        count = len(body.get("prompt", []))
        pieces = [f"I read {count} tokens,", " truly."] if count else ["Paris", "."]
        events: list[Any] = [{"choices": [{"text": p} if count else {"delta": {"content": p}}]} for p in pieces]
        events.append({"choices": [], "usage": {"prompt_tokens": count, "completion_tokens": 2}})
        self.reply("text/event-stream", "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n")

    def reply(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def fake(role: str, address: str, check: Callable[[Any], None] = lambda _: None) -> tuple[RpcServer, RequestTable]:
    """A server of a role, not started."""
    host, _, port = address.rpartition(":")
    server, requests = RpcServer(host, int(port)), RequestTable(10)

    def describe() -> Any:
        status = admin_pb2.GetStatusResponse()
        status.CopyFrom(STATUS[role])
        return status

    AdminServicer(server, requests, describe, check=check)
    if role == "gateway":
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(FakeInference(), server.server)
    return server, requests


@asynccontextmanager
async def serving(
    role: str, address: str, check: Callable[[Any], None] = lambda _: None
) -> AsyncIterator[tuple[RpcServer, RequestTable]]:
    """A healthy server of a role; `check` as for AdminServicer."""
    server, requests = fake(role, address, check)
    await server.start()
    await server.ready()
    try:
        yield server, requests
    finally:
        await server.stop(0)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def grow_family() -> None:
    """Starts two processes that ignore SIGTERM, one of them in another session."""
    for session in (False, True):
        process = subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=session)
        print("grandchild", process.pid, flush=True)


async def serve(role: str, address: str, config_file: str, habit: str) -> int:
    """One service until SIGTERM."""
    if habit == "refuses":
        print("loading\n\x1b[31mtokenmesh: prefill: no model named nothing\x1b[0m\nleaked 1 object", flush=True)
        return 1
    if habit == "crashes":
        print("\n".join(f"line {i}" for i in range(1, 10)), flush=True)
        return 3
    if habit == "family":
        grow_family()
    stop = asyncio.Event()
    ends = (lambda: None) if habit == "stubborn" else stop.set
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ends)
    config: GatewayConfig = load_config(Path(config_file)).gateway
    if role == "gateway":
        rest = ThreadingHTTPServer((config.host, config.port), FakeRest)
        threading.Thread(target=rest.serve_forever, daemon=True).start()
    server, _ = fake(role, address)
    await server.start()
    if habit != "mute":
        await server.ready()
    await stop.wait()
    print("stopped at", time.monotonic(), flush=True)
    await server.stop(0)
    return 0


def main() -> int:
    """See above."""
    kind, *rest = sys.argv[1:]
    if kind == "serve":
        return asyncio.run(serve(*rest))
    config_file, log_dir, *habits = rest
    fakes = command(**dict(habit.split("=") for habit in habits))
    run = {"up": mesh.up, "demo": demo.demo}[kind]
    return mesh.run_until_signal(run(load_config(Path(config_file)), Path(log_dir), 60, fakes))


if __name__ == "__main__":
    assert {role.value for role in ServiceRole} == set(STATUS)
    code = main()
    sys.stdout.flush()
    # No daemon thread of the REST stand-in may hold the process up.
    os._exit(code)
