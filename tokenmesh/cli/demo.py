"""Brings a mesh up, asks it three questions, shows what went over the wires, and takes everything down again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx

import tokenmesh
from tokenmesh.cli.client import Answer, authorization, chat, refused, stream
from tokenmesh.cli.mesh import (
    CommandFactory,
    Mesh,
    MeshStartError,
    check_ports,
    report,
    report_leftovers,
    serve_command,
)
from tokenmesh.cli.serve import ServiceRole
from tokenmesh.cli.status import Screen, one_line, showing
from tokenmesh.config import MeshConfig
from tokenmesh.engine.host import computes_bfloat16
from tokenmesh.rpc.channel import dial
from tokenmesh.v1 import sampling_pb2

EXAMPLE = Path(tokenmesh.__file__).parents[1] / "examples" / "mesh.yaml"
"""Fits a laptop; present in a checkout, not in an installed package."""

LONG_PROMPT_TOKENS = 1500
MAX_TOKENS = 48
REST_WAIT_S = 10.0


class DemoError(Exception):
    """The mesh did not do what the demo shows; the message is one line."""


def example_config() -> Path | None:
    """The mesh file to use when none is given; None: the defaults."""
    return EXAMPLE if EXAMPLE.is_file() else None


def quick_dtype(config: MeshConfig) -> MeshConfig:
    """The same in float32, if `auto` may mean a type for which this host has neither a GPU nor CPU instructions."""
    import torch

    if config.dtype != "auto" or torch.cuda.is_available() or computes_bfloat16():
        return config
    return config.model_copy(update={"dtype": "float32"})


def long_text(sentences: int = 120) -> str:
    """A text in which no two sentences are equal, of about 20 tokens each."""
    lines = ["The keeper's log of the harbour, one entry for each ship."]
    for i in range(sentences):
        ships, crates, fathoms = 3 + 7 * i % 41, 120 + 37 * i % 811, 2 + 5 * i % 29
        lines.append(
            f"On day {i + 1}, ship {ships} came in with {crates} crates and moored in {fathoms} fathoms of water."
        )
    return " ".join(lines)


def read_event(line: str, answer: Answer) -> None:
    """Takes one line of a server-sent stream. Raises DemoError if it reports an error."""
    data = line.removeprefix("data:").strip()
    if data == line.strip() or data in ("", "[DONE]"):
        return
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        raise DemoError(one_line(str(event["error"].get("message", event["error"]))))
    usage = event.get("usage") or {}
    answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
    answer.completion_tokens = usage.get("completion_tokens", answer.completion_tokens)
    for choice in event.get("choices", ()):
        piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
        if piece:
            answer.timer.note()
            answer.text += piece
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


async def ask_rest(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> Answer:
    """Asks with streaming. Raises DemoError, httpx.HTTPError."""
    wanted = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": MAX_TOKENS, "temperature": 0}
    answer = Answer()
    async with client.stream("POST", path, json={**wanted, **body}) as response:
        if response.status_code != httpx.codes.OK:
            text = (await response.aread()).decode(errors="replace")
            raise DemoError(f"{path} answered {response.status_code}: {one_line(text)[:300]}")
        async for line in response.aiter_lines():
            read_event(line, answer)
    return answer


async def long_prompt(client: httpx.AsyncClient, model: str) -> list[int]:
    """Token ids of a long text, as the gateway's tokenizer has them. Raises DemoError, httpx.HTTPError."""
    response = await client.post("/tokenize", json={"model": model, "prompt": long_text()})
    if response.status_code != httpx.codes.OK:
        raise DemoError(f"/tokenize answered {response.status_code}: {one_line(response.text)[:300]}")
    reply = response.json()
    room = min(LONG_PROMPT_TOKENS, reply["max_model_len"] - MAX_TOKENS)
    return [int(token) for token in reply["tokens"][:room]]


class Demo:
    """The questions, and what is said about their answers."""

    def __init__(self, config: MeshConfig, console: Screen) -> None:
        self._config = config
        self._console = console
        self.empty: list[str] = []
        """Questions that got no text."""

    def say(self, text: str = "") -> None:
        """Prints text that may have anything in it."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, title: str, answer: Answer) -> None:
        """Prints an answer and its figures."""
        self._console.print(f"\n{title}", style="bold", markup=False, highlight=False)
        self.say(answer.text.strip() or "(nothing)")
        self._console.print(f"  {answer}", style="dim", markup=False, highlight=False, soft_wrap=True)
        if not answer.text.strip():
            self.empty.append(title)

    async def ask(self) -> None:
        """Asks all three. Raises DemoError, httpx.HTTPError, grpc.aio.AioRpcError."""
        config, gateway = self._config, self._config.gateway
        base = f"http://{dial(gateway.host, gateway.port)}"
        timeout = httpx.Timeout(gateway.request_timeout_s, connect=5.0)
        async with httpx.AsyncClient(base_url=base, timeout=timeout, headers=authorization(gateway)) as client:
            await self._wait_for_rest(client)
            question = "What is the capital of France? Answer in one sentence."
            body: dict[str, Any] = {"model": config.model_name, "messages": [{"role": "user", "content": question}]}
            self.show(f"REST chat: {question}", await ask_rest(client, "/v1/chat/completions", body))
            ids = await long_prompt(client, config.model_name)
            body = {"model": config.model_name, "prompt": ids}
            title = f"REST completion of a text of {len(ids)} tokens:"
            self.show(title, await ask_rest(client, "/v1/completions", body))
        question = "Name three colours of the rainbow."
        params = sampling_pb2.SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
        self.show(f"gRPC chat: {question}", await stream(config, chat(question), params))

    async def _wait_for_rest(self, client: httpx.AsyncClient) -> None:
        """REST may come a moment after gRPC, whose health was waited for."""
        for _ in range(int(REST_WAIT_S / 0.2)):
            with contextlib.suppress(httpx.ConnectError):
                if (await client.get("/health")).status_code == httpx.codes.OK:
                    return
            await asyncio.sleep(0.2)
        raise DemoError(f"{client.base_url}health is not OK after {REST_WAIT_S:g} s")

    async def show_transfers(self, mesh: Mesh) -> int:
        """Prints what decode roots received. Returns the bytes."""
        roots = [s for s in await mesh.statuses() if s.role is ServiceRole.DECODE_ROOT]
        counters = sum((Counter(root.counters) for root in roots), Counter[str]())
        decisions = [
            f"{name.removeprefix('PREFILL_DECISION_').lower().replace('_', ' ')} {count}"
            for name, count in sorted(counters.items())
            if name.startswith("PREFILL_DECISION_")
        ]
        moved, seconds = sum(root.kv_bytes for root in roots), sum(root.kv_seconds for root in roots)
        transports = ", ".join(sorted({root.kv_transport for root in roots if root.kv_transport}))
        speed = f" at {moved / seconds / 1e9:.2f} GB/s" if seconds else ""
        self.say(f"\nprefill decisions: {', '.join(decisions) or 'none'}")
        self.say(f"KV received: {moved:,} bytes{speed}, UCX transport {transports or '-'}")
        return moved


async def demo(config: MeshConfig, log_dir: Path, timeout: float, command: CommandFactory = serve_command) -> int:
    """Runs the demo. Returns 0 if every answer had text, KV was moved and nothing is left, else 1."""
    console = Screen()
    mesh = Mesh(config, log_dir, timeout, command)
    show = Demo(config, console)
    problems: list[str] = []
    show.say(f"starting {config.model_name}, dtype {config.dtype}, logs in {log_dir}")
    try:
        async with showing(mesh.statuses, console, live=False), mesh:
            await show.ask()
            if not await show.show_transfers(mesh):
                problems.append("no KV was moved from a prefill service to a decode root")
            show.say("\nstopping")
    except MeshStartError as error:
        report(error)
        report_leftovers(mesh)
        return 1
    except grpc.aio.AioRpcError as error:
        problems.append("the question over gRPC failed")
        refused("demo", error)
    except (DemoError, httpx.HTTPError) as error:
        problems.append(one_line(str(error)) or type(error).__name__)
    problems += [f"no answer: {title}" for title in show.empty]
    if report_leftovers(mesh):
        problems.append("processes are left")
    try:
        check_ports(config)
    except MeshStartError as error:
        problems.append(f"a port is not free again: {error}")
    else:
        if not mesh.leftovers:
            show.say(f"nothing is left: {len(mesh.children)} services and all that they started are gone")
    for problem in problems:
        print(f"tokenmesh: demo: {problem}", file=sys.stderr)
    return 1 if problems else 0
