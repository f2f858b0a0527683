"""What tests of exactness compare: prompts, what a plain vLLM engine answers, and what the mesh does."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
import msgspec

from tests.conftest import KV_BYTES, RunningMesh
from tokenmesh.model_store import resolve_model
from tokenmesh.v1 import decode_pb2, decode_pb2_grpc, sampling_pb2

NEW_TOKENS = 12
MOST_NEW_TOKENS = 24
BLOCK = 128

TEXT = """The lighthouse stood at the end of the peninsula, where the river met the sea. Every evening the keeper went
up the stairs, lit the lamp and wrote the weather into a book: wind from the west, rain before midnight, a ship far out.
"""


def prompts() -> list[list[int]]:
    """66 prompts of 1 to 2,000 tokens of real text: all lengths around block edges, shared prefixes, repeats."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m-instruct"))
    rng = random.Random(7)
    words = TEXT.split()

    def text(length: int, seed: int) -> list[int]:
        # Shuffled words, so that prompts share no prefix unless a test wants them to.
        local = random.Random(seed)
        ids: list[int] = tokenizer.encode(" ".join(local.choice(words) for _ in range(length + 8)))
        return ids[:length]

    lengths = [1, 2, 17, 127, 128, 129, 130, 255, 256, 257, 384, 511, 512, 513, 640, 1000, 1024, 2000]
    lengths += [rng.randint(3, 420) for _ in range(30)]
    result = [text(length, seed) for seed, length in enumerate(lengths)]
    # Prefix hits: the same 256 or 384 tokens with different ends, and exact repeats.
    for i in range(14):
        shared = text(256 + BLOCK * (i % 2), 1000 + i % 2)
        result.append(shared + text(rng.randint(1, 200), 2000 + i))
    result += [result[12], result[7], result[50], result[3]]
    return result


def plain_engine(
    all_prompts: Sequence[Sequence[int]],
    dtype: str,
    folder: Path,
    new_tokens: int = NEW_TOKENS,
    model: str = "smollm2-135m-instruct",
) -> list[list[int]]:
    """Greedy tokens of a plain vLLM engine with the mesh's settings and no connector, in a process of its own."""
    source, target = folder / "prompts.json", folder / "tokens.json"
    source.write_bytes(msgspec.json.encode(all_prompts))
    code = f"""
import msgspec, pathlib
if __name__ == "__main__":
    from vllm import LLM, SamplingParams, TokensPrompt
    llm = LLM({resolve_model(model)!r}, dtype={dtype!r}, max_model_len=4096, enforce_eager=True,
              kv_cache_memory_bytes={KV_BYTES}, max_num_batched_tokens=256, enable_prefix_caching=True)
    params = SamplingParams(temperature=0, max_tokens={new_tokens}, ignore_eos=True, detokenize=False)
    prompts = msgspec.json.decode(pathlib.Path({str(source)!r}).read_bytes())
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    pathlib.Path({str(target)!r}).write_bytes(msgspec.json.encode(tokens))
"""
    script = folder / "plain.py"
    script.write_text(code)
    # In one process and with no core of its own: three would import all of vLLM one after the other.
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_PLUGINS": "",
    }
    subprocess.run([sys.executable, str(script)], check=True, env=env, timeout=500)
    tokens: list[list[int]] = msgspec.json.decode(target.read_bytes())
    return tokens


async def through_mesh(
    mesh: RunningMesh,
    all_prompts: Sequence[Sequence[int]],
    concurrent: int,
    new_tokens: int = NEW_TOKENS,
    local: bool = False,
) -> list[tuple[list[int], int]]:
    """(greedy tokens, prefill decision) of each prompt, straight from the decode root."""
    limit = asyncio.Semaphore(concurrent)
    async with grpc.aio.insecure_channel(mesh.root_address) as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)

        async def one(number: int, ids: Sequence[int]) -> tuple[list[int], int]:
            request = decode_pb2.GenerateRequest(
                request_id=f"exact-{concurrent}-{number}-{random.random()}",
                prompt_token_ids=ids,
                sampling_params=sampling_pb2.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True),
            )
            if local:
                request.local_reason = sampling_pb2.PREFILL_DECISION_DECODE_ONLY
            tokens: list[int] = []
            decision = 0
            async with limit:
                async for response in stub.Generate(request, timeout=300):
                    tokens += response.token_ids
                    if response.HasField("prefill_decision"):
                        decision = response.prefill_decision
            return tokens, decision

        return await asyncio.gather(*(one(i, ids) for i, ids in enumerate(all_prompts)))


class Truth:
    """What a plain engine answers in float32. It is started once: starting takes longer than answering."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens: dict[tuple[int, ...], list[int]] = {}

    def of(self, some: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
        """The first greedy tokens, up to MOST_NEW_TOKENS, of prompts that are among `prompts()`."""
        if not self._tokens:
            everything = prompts()
            answers = plain_engine(everything, "float32", self._folder, MOST_NEW_TOKENS)
            self._tokens = {tuple(ids): tokens for ids, tokens in zip(everything, answers, strict=True)}
        return [self._tokens[tuple(ids)][:new_tokens] for ids in some]
