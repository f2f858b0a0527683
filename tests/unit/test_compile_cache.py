"""An engine on CPUs that starts again loads what it compiled before, and computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

from tokenmesh.config import MeshConfig
from tokenmesh.engine.compile_cache import KEY, find_it_again, this_cpu
from tokenmesh.engine.host import compiled_apart
from tokenmesh.model_store import resolve_model

ENGINE = """
import json, sys
from tokenmesh.engine.compile_cache import KEY, this_cpu
from vllm import LLM, SamplingParams, TokensPrompt

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=256, max_num_batched_tokens=256, skip_tokenizer_init=True,
              hf_overrides={"num_hidden_layers": 2}, load_format="dummy", kv_cache_memory_bytes=1 << 26,
              additional_config={KEY: this_cpu()})
    prompts = [TokensPrompt(prompt_token_ids=list(range(100, 100 + n))) for n in (1, 7, 64)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    json.dump([list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)], open(sys.argv[2], "w"))
"""


@pytest.mark.timeout(400)
def test_a_second_start_loads_what_the_first_compiled(tmp_path: Path) -> None:
    script, model = tmp_path / "engine.py", str(resolve_model("smollm2-135m-instruct"))
    script.write_text(ENGINE)
    env = {
        **os.environ,
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }

    def tokens(name: str, **more: str) -> list[list[int]]:
        file = tmp_path / name
        command = [sys.executable, str(script), model, str(file)]
        subprocess.run(command, check=True, timeout=180, env={**env, **more}, capture_output=True)
        result: list[list[int]] = json.loads(file.read_text())
        return result

    # (1) The first start saves what it has compiled.
    first = tokens("first.json")
    assert list((tmp_path / "cache").glob("torch_compile_cache/torch_aot_compile/*/rank_0_0/model"))
    # (2) Told to fail where it cannot load, the second starts, and gives the same tokens.
    assert tokens("second.json", VLLM_FORCE_AOT_LOAD="1") == first


def test_what_was_compiled_for_who_knows_which_cpu_is_compiled_again() -> None:
    find_it_again()
    finish = BundledAOTAutogradSerializableCallable.finalize_loading
    finish(None, SimpleNamespace(additional_config={KEY: this_cpu()}))
    for named in ({}, {"other": 1}, object()):
        with pytest.raises(AttributeError, match="unknown CPU"):
            finish(None, SimpleNamespace(additional_config=named))


def test_engines_name_their_cpu_and_what_differs_in_their_code() -> None:
    group, alone = (MeshConfig(decode_service={"token_parallel_size": size}).decode_service for size in (2, 1))
    assert compiled_apart(alone) == {KEY: this_cpu()}
    assert compiled_apart(group) == {KEY: this_cpu(), "tokenmesh": "token_parallel"}
    more = MeshConfig(prefill_service={"engine_args": {"additional_config": {"a": 1}}}).prefill_service
    assert compiled_apart(more) == {KEY: this_cpu(), "a": 1}
