"""A light streaming client for OpenAI completions: the same for every server that is compared.

It shares the machine with the servers, so while a load runs it does nothing but keep what arrives and when; events are
parsed afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.harness import quantile

TIMEOUT = aiohttp.ClientTimeout(total=600, sock_read=120)


class LoadError(Exception):
    """A request was refused, broke off, or did not get what it asked for."""


@dataclass(frozen=True)
class Stream:
    """One request. Times are seconds of time.perf_counter()."""

    sent: float
    chunks: tuple[tuple[float, int], ...]
    """When each chunk with tokens arrived, and how many it had; at least one."""
    cached_tokens: int
    """Prompt tokens that the server says it had in a cache."""

    @property
    def tokens(self) -> int:
        """Output tokens."""
        return sum(count for _, count in self.chunks)

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first chunk with a token."""
        return self.chunks[0][0] - self.sent

    @property
    def end(self) -> float:
        """When the last token arrived."""
        return self.chunks[-1][0]

    def gaps(self) -> Iterator[float]:
        """Seconds between tokens, one value for each token after the first chunk.

        A chunk of n tokens that comes after a gap counts as n gaps of an n-th.
        """
        for (before, _), (now, count) in zip(self.chunks, self.chunks[1:], strict=False):
            yield from [(now - before) / count] * count


@dataclass(frozen=True)
class LoadResult:
    """All requests of a load."""

    streams: tuple[Stream, ...]
    client_cpu_s: float
    """CPU seconds that this process used meanwhile."""

    @property
    def tokens(self) -> int:
        """Output tokens."""
        return sum(stream.tokens for stream in self.streams)

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(stream.end for stream in self.streams) - min(stream.sent for stream in self.streams)

    @property
    def tok_s(self) -> float:
        """Output tokens per second, time to first token included."""
        return self.tokens / self.seconds

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed."""
        return sum(stream.cached_tokens for stream in self.streams)

    def ttft_ms(self, q: float = 0.5) -> float:
        """Quantile over requests of the time to first token, milliseconds."""
        return 1e3 * quantile([stream.ttft for stream in self.streams], q)

    def itl_ms(self, q: float = 0.5) -> float:
        """Quantile over all tokens of all requests of the time between tokens, milliseconds."""
        return 1e3 * quantile([gap for stream in self.streams for gap in stream.gaps()], q)

    def summary(self) -> dict[str, Any]:
        """For a report; names end with units."""
        gaps = [gap for stream in self.streams for gap in stream.gaps()]
        chunks = sum(len(stream.chunks) for stream in self.streams)
        return {
            "requests": len(self.streams),
            "output_tokens": self.tokens,
            "seconds": self.seconds,
            "tok_s": self.tok_s,
            "ttft_ms_p50": self.ttft_ms(),
            "ttft_ms_p99": self.ttft_ms(0.99),
            "itl_ms_p50": self.itl_ms(),
            "itl_ms_p99": self.itl_ms(0.99),
            "itl_ms_mean": 1e3 * sum(gaps) / len(gaps),
            "tokens_per_chunk": self.tokens / chunks,
            "cached_tokens": self.cached_tokens,
            "client_cpu_s": self.client_cpu_s,
        }


async def run_load(
    url: str, model: str, prompts: Sequence[Sequence[int]], concurrency: int, output_tokens: int
) -> LoadResult:
    """Streams a completion of exactly `output_tokens` tokens for every prompt, `concurrency` of them at a time.

    `url` has no path; prompts are token ids. A new request starts as soon as one has ended. Raises LoadError.
    """
    bodies = iter([_body(model, prompt, output_tokens) for prompt in prompts])
    raw: list[tuple[float, list[tuple[float, bytes]]]] = []
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(connector=connector, timeout=TIMEOUT) as session:

        async def work() -> None:
            for body in bodies:
                raw.append(await _post(session, f"{url}/v1/completions", body))

        cpu = time.process_time()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        except ExceptionGroup as errors:
            # The first failure has ended all the others.
            raise errors.exceptions[0] from None
        cpu = time.process_time() - cpu
    return LoadResult(tuple(_parse(sent, reads, output_tokens) for sent, reads in raw), cpu)


def _body(model: str, prompt: Sequence[int], output_tokens: int) -> bytes:
    request = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    return json.dumps(request).encode()


async def _post(session: aiohttp.ClientSession, url: str, body: bytes) -> tuple[float, list[tuple[float, bytes]]]:
    reads = []
    sent = time.perf_counter()
    try:
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
            if response.status != 200:
                raise LoadError(f"{url} answers {response.status}: {(await response.text())[:500]}")
            async for data in response.content.iter_any():
                reads.append((time.perf_counter(), data))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise LoadError(f"{url}: {type(error).__name__}: {error}") from error
    return sent, reads


def _parse(sent: float, reads: Sequence[tuple[float, bytes]], output_tokens: int) -> Stream:
    chunks = []
    cached, done = 0, False
    for at, data in _events(reads):
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            raise LoadError(f"a stream broke off: {event['error']}")
        # The last event has usage and no choices.
        count = sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
        if count:
            chunks.append((at, count))
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens") or cached
    stream = Stream(sent, tuple(chunks), cached)
    if not done or stream.tokens != output_tokens:
        how = "" if done else ", unfinished"
        raise LoadError(f"a stream ended with {stream.tokens} of {output_tokens} tokens{how}")
    return stream


def _events(reads: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each event, and when the last byte of it arrived."""
    rest = b""
    for at, data in reads:
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            yield at, event.removeprefix(b"data: ")
