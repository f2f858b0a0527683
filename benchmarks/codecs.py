"""What each KV codec gives on real KV of the embedded model: ratio, speed, and with --mesh what rounding costs.

    python -m benchmarks.codecs             ratio and GB/s, on the KV of a small engine run
    python -m benchmarks.codecs --mesh fp8  log-probability error and token agreement, through a mesh with that codec

Speeds are of one thread, on messages as large as the mover's; GB are those of the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np

from benchmarks.harness import commit, machine
from tokenmesh.cli.mesh import Mesh
from tokenmesh.config import EMBEDDED_MODEL, MeshConfig
from tokenmesh.kv.codecs import NAMES, NONE, make_codec
from tokenmesh.kv.codecs.choice import time_codec
from tokenmesh.kv.geometry import BlockGeometry
from tokenmesh.model_store import resolve_model
from tokenmesh.v1 import decode_pb2, decode_pb2_grpc, sampling_pb2

BLOCK = 128
TOKENS = 1024
NEW_TOKENS = 32
PROMPTS = 16
TOP = 5

TEXT = """The lighthouse stood at the end of the peninsula, where the river met the sea. Every evening the keeper went
up the stairs, lit the lamp and wrote the weather into a book: wind from the west, rain before midnight, a ship far out.
She had come here in the year of the great storm, and nobody in the village below could say what she had done before.
Children brought her bread and newspapers; in return they were allowed to look through the telescope at the islands.
"""


@dataclass(frozen=True)
class CodecCost:
    """A codec on one dtype's KV."""

    dtype: str
    codec: str
    ratio: float
    encode_gb_s: float
    decode_gb_s: float
    worst_error: float
    """Largest difference of an element, relative to the largest element of its layer."""


def prompts(count: int, tokens: int) -> list[list[int]]:
    """Prompts of about so many tokens: words in an order of their own, so that what follows is anything but certain."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(EMBEDDED_MODEL))
    words = TEXT.split()
    found = []
    for number in range(count):
        text = " ".join(random.Random(number).choices(words, k=tokens))
        found.append(list(tokenizer.encode(text))[: tokens - 37 * (number % 5)])
    return found


_ENGINE = """
import sys, msgspec, pathlib
def blocks_of(worker, path):
    import torch
    caches = list(worker.model_runner.kv_caches)
    used = torch.stack([layer[1 : 1 + {blocks}] for layer in caches]).contiguous()
    pathlib.Path(path).write_bytes(used.view(torch.uint8).numpy().tobytes())
if __name__ == "__main__":
    from vllm import LLM, SamplingParams, TokensPrompt
    llm = LLM({model!r}, dtype={dtype!r}, max_model_len=2048, enforce_eager=True, kv_cache_memory_bytes=256 << 20,
              block_size={block})
    prompt = msgspec.json.decode(pathlib.Path({source!r}).read_bytes())
    llm.generate([TokensPrompt(prompt_token_ids=prompt)], SamplingParams(max_tokens=1, detokenize=False))
    llm.collective_rpc(blocks_of, args=({target!r},))
"""


def real_kv(dtype: str) -> np.ndarray:
    """KV of one prompt, as the engine's cache holds it: bytes, [layers, blocks * bytes of a block]."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, target = folder / "prompt.json", folder / "kv"
        source.write_bytes(msgspec.json.encode(prompts(1, TOKENS)[0]))
        script = folder / "engine.py"
        script.write_text(
            _ENGINE.format(
                blocks=TOKENS // BLOCK,
                model=resolve_model(EMBEDDED_MODEL),
                dtype=dtype,
                block=BLOCK,
                source=str(source),
                target=str(target),
            )
        )
        env = {**os.environ, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_PLUGINS": ""}
        subprocess.run([sys.executable, str(script)], check=True, env=env, timeout=300)
        return np.frombuffer(bytearray(target.read_bytes()), dtype=np.uint8).reshape(30, -1)


def costs(dtype: str) -> list[CodecCost]:
    """Every codec on this dtype's KV."""
    import ml_dtypes

    kind: Any = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    width = np.dtype(kind).itemsize
    geometry = BlockGeometry(30, 3, 64, BLOCK, dtype, 3 * 2 * 64 * BLOCK * width, "cpu_attn/vec")
    layers = real_kv(dtype)
    found = []
    for name in NAMES:
        if name == NONE:
            continue
        codec = make_codec(name, geometry)
        assert codec is not None
        speed = time_codec(name, geometry, layers.reshape(-1)[: 8 << 20], rounds=5)
        wire, worst = 0, 0.0
        for layer in layers:
            payload = codec.encode(layer)
            wire += len(layer if payload is None else payload)
            got = layer if payload is None else codec.decode(payload, len(layer))
            had, has = (part.view(kind).astype(np.float32) for part in (layer, got))
            worst = max(worst, float(np.abs(has - had).max() / np.abs(had).max()))
        found.append(CodecCost(dtype, name, layers.size / wire, speed.encode / 1e9, speed.decode / 1e9, worst))
    return found


@dataclass(frozen=True)
class Accuracy:
    """Answers from KV that came under a codec, against those of the same root that computed its prompts itself."""

    codec: str
    tokens: int
    """Compared: of each answer those up to and including its first difference."""
    agreement: float
    """Share of them that are equal."""
    logprob_error_mean: float
    """Of the token that the root chooses itself, at positions with equal context; natural logarithm."""
    logprob_error_max: float
    kv_bytes: int


Answer = list[tuple[int, dict[int, float]]]
"""Per position: the token, and the log-probabilities of the likeliest ones."""


async def ask(address: str, all_prompts: Sequence[Sequence[int]], local: bool) -> list[Answer]:
    """Greedy answers of a decode root."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        answers = []
        for number, ids in enumerate(all_prompts):
            request = decode_pb2.GenerateRequest(
                request_id=f"codec-{local}-{number}",
                prompt_token_ids=ids,
                sampling_params=sampling_pb2.SamplingParams(
                    temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=TOP
                ),
            )
            if local:
                request.local_reason = sampling_pb2.PREFILL_DECISION_DECODE_ONLY
            answer: Answer = []
            async for response in stub.Generate(request, timeout=300):
                entries, place = response.logprobs, 0
                for token, width in zip(response.token_ids, entries.width, strict=True):
                    span = slice(place, place + width)
                    answer.append((token, dict(zip(entries.token_ids[span], entries.logprobs[span], strict=True))))
                    place += width
            answers.append(answer)
        return answers


def compare(codec: str, got: Sequence[Answer], want: Sequence[Answer], kv_bytes: int) -> Accuracy:
    """Answers against the truth, position by position while the contexts are equal."""
    equal, compared, errors = 0, 0, []
    for mine, truth in zip(got, want, strict=True):
        for (token, likely), (right, known) in zip(mine, truth, strict=True):
            compared += 1
            if right in likely:
                errors.append(abs(likely[right] - known[right]))
            if token != right:
                break
            equal += 1
    return Accuracy(codec, compared, equal / compared, statistics.mean(errors), max(errors), kv_bytes)


def mesh_of(codec: str) -> MeshConfig:
    """A prefill service and a decode root, float32, on one core each."""

    def port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    engine = {"kv_cache_memory_bytes": 256 << 20, "enforce_eager": True, "max_num_batched_tokens": 256}
    return MeshConfig.model_validate(
        {
            "dtype": "float32",
            "max_model_len": 2048,
            "gateway": {"port": port(), "grpc_port": port()},
            "prefill_service": {"port": port(), "cpu_omp_threads_bind": "1", **engine},
            "decode_service": {
                "port": port(),
                "cpu_omp_threads_bind": "0",
                "token_parallel_size": 1,
                "kv_transfer": {"codec": codec},
                **engine,
            },
        }
    )


async def accuracy(codec: str) -> Accuracy:
    """Through a mesh; the root's prefix cache is emptied in between."""
    from tokenmesh.v1 import admin_pb2, admin_pb2_grpc

    config = mesh_of(codec)
    root = config.decode_addresses()[0]
    some = prompts(PROMPTS, 600)
    with tempfile.TemporaryDirectory() as logs:
        async with Mesh(config, Path(logs)), grpc.aio.insecure_channel(root) as channel:
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            got = await ask(root, some, local=False)
            status = await admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=5)
            if status.kv_transfers != len(some):
                raise SystemExit(f"{status.kv_transfers} of {len(some)} prompts were prefilled remotely")
            await admin.ResetPrefixCache(admin_pb2.ResetPrefixCacheRequest(), timeout=5)
            want = await ask(root, some, local=True)
    return compare(codec, got, want, status.kv_bytes)


def main() -> None:
    """Prints a table, and writes build/bench/codecs*.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mesh", choices=NAMES, help="measure what this codec costs in accuracy instead")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="of the KV; both if absent")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    started_at = commit()
    runs: list[CodecCost] | list[Accuracy]
    if args.mesh:
        runs = [asyncio.run(accuracy(args.mesh))]
    else:
        runs = [cost for dtype in args.dtype or ("float32", "bfloat16") for cost in costs(dtype)]
    name = f"codecs-{args.mesh}" if args.mesh else "codecs"
    rows = [asdict(run) for run in runs]
    print("| " + " | ".join(rows[0]) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(_short(value) for value in row.values()) + " |")
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"name": name, "machine": machine(), "commit": started_at, "runs": rows}, indent=2)
    (args.out / f"{name}.json").write_text(text + "\n")


def _short(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.{3 if math.isfinite(value) else 0}f}"


if __name__ == "__main__":
    main()
