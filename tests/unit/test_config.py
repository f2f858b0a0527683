"""The configuration: defaults, files, overrides from the environment, and one clear line for everything unusable."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from tokenmesh.config import EMBEDDED_MODEL, ConfigError, MeshConfig
from tokenmesh.mesh_file import load_config

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "examples").glob("*.yaml"), *(ROOT / "deploy").rglob("mesh.yaml")])


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overrides of the caller's shell must not reach the files under test."""
    for key in [key for key in os.environ if key.upper().startswith("TOKENMESH_")]:
        monkeypatch.delenv(key)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a test writes its mesh."""
    return tmp_path / "mesh.yaml"


def refusal(path: Path | None) -> str:
    """The message that a file is refused with."""
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


# What is accepted.


def test_without_a_file_the_defaults_are_a_whole_mesh() -> None:
    # 1. Nothing is given.
    config = load_config(None)
    # 2. The model is the one that comes along, and clients call it by that name.
    assert config == MeshConfig()
    assert config.model_name == config.model == EMBEDDED_MODEL
    # 3. One replica of each kind, on its own port, reachable from this machine only.
    assert (config.gateway.port, config.gateway.grpc_port) == (8000, 9000)
    assert config.prefill_addresses() == ("127.0.0.1:9100",)
    assert config.decode_addresses() == ("127.0.0.1:9200",)
    assert config.gateway.host == "127.0.0.1"
    # 4. Prompts are prefilled remotely, by whichever transport is best.
    assert config.gateway.mode == "unified"
    assert config.prefill_service.kv_transfer.transport == "auto"
    # 5. Where services are is left to follow from the sections.
    assert config.gateway.decode_roots is config.gateway.prefills is config.decode_service.prefills is None


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_means_the_defaults(file: Path, text: str) -> None:
    # 1. A file without any key.
    file.write_text(text)
    # 2. It is as good as none.
    assert load_config(file) == MeshConfig()


def test_a_file_sets_what_it_names_and_nothing_else(file: Path) -> None:
    # 1. A file names keys at three depths.
    file.write_text(
        "served_model_name: small\n"
        "gateway: {port: 8080, api_keys: [a, b]}\n"
        "decode_service: {kv_transfer: {chunk_bytes: 1048576}, engine_args: {swap_space: 0}}\n"
    )
    config = load_config(file)
    # 2. They are all there, lists as tuples.
    assert config.model_name == "small"
    assert (config.gateway.port, config.gateway.api_keys) == (8080, ("a", "b"))
    assert config.decode_service.kv_transfer.chunk_bytes == 1 << 20
    assert config.decode_service.engine_args == {"swap_space": 0}
    # 3. Their neighbours and the other sections keep their defaults.
    assert config.gateway.grpc_port == 9000
    assert config.decode_service.port == 9200
    assert config.prefill_service == MeshConfig().prefill_service


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_mesh_file_of_the_repository_loads(path: Path) -> None:
    # 1. Read it as `tokenmesh up -c` would. The list has one of each folder at least.
    assert {path.parent.name for path in FILES} >= {"examples", "deploy", "base", "gpu"}
    config = load_config(path)
    # 2. It expects at least one service of each kind; none for prefill where no KV moves.
    assert bool(config.prefill_addresses()) == (config.decode_service.kv_transfer.transport != "none")
    assert config.decode_addresses()


# The environment.


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("MODEL", "/models/x", "model", "/models/x"),
        ("GATEWAY__PORT", "81", "gateway.port", 81),
        ("DECODE_SERVICE__MAX_NUM_SEQS", "7", "decode_service.max_num_seqs", 7),
        ("DECODE_SERVICE__ENFORCE_EAGER", "true", "decode_service.enforce_eager", True),
        ("DECODE_SERVICE__PREFILLS", '["a:1", "b:2"]', "decode_service.prefills", ("a:1", "b:2")),
        ("PREFILL_SERVICE__KV_TRANSFER__TRANSPORT", "tcp", "prefill_service.kv_transfer.transport", "tcp"),
        ("LOG__LEVEL", "debug", "log.level", "debug"),
    ],
)
def test_the_environment_overrides_any_key(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, path: str, expected: object
) -> None:
    # 1. One variable is set.
    monkeypatch.setenv(f"TOKENMESH_{name}", value)
    # 2. Its key has the value, in the key's type.
    found: object = load_config(None)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)


def test_the_environment_wins_over_the_file_key_by_key(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. File and environment both set one key; the file alone sets its neighbours.
    file.write_text("gateway: {port: 1111, grpc_port: 2222}\nprefill_service: {kv_transfer: {port: 3333, window: 2}}\n")
    monkeypatch.setenv("TOKENMESH_GATEWAY__PORT", "4444")
    monkeypatch.setenv("TOKENMESH_PREFILL_SERVICE__KV_TRANSFER__PORT", "5555")
    config = load_config(file)
    # 2. The environment has the key.
    assert (config.gateway.port, config.prefill_service.kv_transfer.port) == (4444, 5555)
    # 3. The file keeps the rest.
    assert (config.gateway.grpc_port, config.prefill_service.kv_transfer.window) == (2222, 2)


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [("GATEWAY__PORT", "many", "gateway.port"), ("GATEWAY__PRT", "1", "gateway.prt")],
)
def test_a_bad_override_is_refused_by_its_key(monkeypatch: pytest.MonkeyPatch, name: str, value: str, key: str) -> None:
    # 1. A variable whose value or whose key does not fit.
    monkeypatch.setenv(f"TOKENMESH_{name}", value)
    # 2. One line, and it names the key and where it came from.
    message = refusal(None)
    assert message.startswith(f"environment: {key}: ")
    assert "\n" not in message


@pytest.mark.parametrize(("name", "value"), [("GATEWAY", "no json"), ("GATEWAY__API_KEYS", "secret")])
def test_an_override_that_is_no_json_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    # 1. A section or list needs JSON, and gets something else.
    monkeypatch.setenv(f"TOKENMESH_{name}", value)
    # 2. One line that names the section.
    message = refusal(None)
    assert "gateway" in message
    assert "\n" not in message
    # 3. It does not quote the value, which may be a key.
    assert value not in message


def test_a_configuration_is_frozen_at_every_depth() -> None:
    # 1. Try to change a key of the mesh, of a section and of a section's section.
    config = load_config(None)
    for holder, key in ((config, "model"), (config.gateway, "host"), (config.decode_service.kv_transfer, "host")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(holder, key, "changed")
    # 2. Nothing has changed.
    assert config == load_config(None)


# What is refused.


@pytest.mark.parametrize(
    ("text", "key", "why"),
    [
        ("nonsense: 1", "nonsense", "not permitted"),
        ("gateway: {prt: 1}", "gateway.prt", "not permitted"),
        ("decode_service: {kv_transfer: {rank: 0}}", "decode_service.kv_transfer.rank", "not permitted"),
        ("gateway: {port: many}", "gateway.port", "valid integer"),
        ("gateway: {port: 80.5}", "gateway.port", "valid integer"),
        ("gateway: []", "gateway", "valid dictionary"),
        ("gateway: {port: 65536}", "gateway.port", "less than or equal to 65535"),
        ("prefill_service: {port: -1}", "prefill_service.port", "greater than or equal to 0"),
        ("gateway: {mode: both}", "gateway.mode", "'unified', 'prefill' or 'decode'"),
        ("gateway: {decode_roots: 'a:1'}", "gateway.decode_roots", "valid tuple"),
        ("decode_service: {max_num_seqs: 0}", "decode_service.max_num_seqs", "greater than or equal to 1"),
        ("prefill_service: {gpu_memory_utilization: 1.5}", "prefill_service.gpu_memory_utilization", "equal to 1"),
        ("model: ' '", "model", "must not be empty"),
        ("prefill_service: {kv_transfer: {role: kv_consumer}}", "prefill_service.kv_transfer.role", "kv_producer"),
        (
            "prefill_service: {kv_transfer: {codec: fp8}}",
            "prefill_service.kv_transfer.codec",
            "the owner of blocks asks",
        ),
        ("decode_worker: {kv_transfer: {codec: fp8}}", "decode_worker.kv_transfer.codec", "the root asks"),
        ("decode_service: {kv_transfer: {codec: zip}}", "decode_service.kv_transfer.codec", "'lossless'"),
        ("decode_service: {kv_transfer: {role: kv_producer}}", "decode_service.kv_transfer.role", "kv_consumer"),
        (
            "decode_service: {token_parallel_size: 0}",
            "decode_service.token_parallel_size",
            "greater than or equal to 1",
        ),
        ("decode_service: {group: {placement: random}}", "decode_service.group.placement", "'balance' or 'hash'"),
        ("decode_worker: {poll_s: -1}", "decode_worker.poll_s", "greater than or equal to 0"),
        ("model: a\nprefill_service: {model: b}", "prefill_service.model", "is 'b', but the mesh serves 'a'"),
        ("model: a\ndecode_service: {model: b}", "decode_service.model", "is 'b', but the mesh serves 'a'"),
    ],
)
def test_a_bad_key_or_value_is_named_in_one_line(file: Path, text: str, key: str, why: str) -> None:
    # 1. A file with one fault.
    file.write_text(text)
    # 2. One line that names the file, the whole path of the key, and what is wrong.
    message = refusal(file)
    assert message.startswith(f"{file}: ")
    assert f"{key}:" in message or f"{key} " in message
    assert why in message
    assert "\n" not in message


def test_several_faults_are_named_together(file: Path) -> None:
    # 1. Two faults in different sections.
    file.write_text("gateway: {port: x}\nlog: {level: loud}\n")
    # 2. Both are in the one line.
    message = refusal(file)
    assert "gateway.port: " in message
    assert "log.level: " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[1, 2]", "list"),
        ("just words", "str"),
        ("17", "int"),
        ("false", "bool"),
        ("0", "int"),
        ("[]", "list"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(file: Path, text: str, kind: str) -> None:
    # 1. Sound YAML, but no keys.
    file.write_text(text)
    # 2. The message says what it is instead.
    assert refusal(file) == f"{file} must hold a mapping of sections, not a {kind}"


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: [1", 1), ("model: x\n\tgateway: y", 2), ("model: x\n\ngateway: {port: 1\nlog: }}", 4)],
)
def test_broken_yaml_is_refused_with_its_line(file: Path, text: str, line: int) -> None:
    # 1. Text that YAML cannot parse.
    file.write_text(text)
    # 2. One line that names the file and the line in it.
    message = refusal(file)
    assert message.startswith(f"{file} is no YAML at line {line}: ")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    # 1. A path where there is no file, and one that is a folder.
    path = tmp_path / name
    # 2. One line with the path and the system's word for it.
    message = refusal(path)
    assert message.startswith(f"cannot read {path}: ")
    assert message.endswith(("No such file or directory", "Is a directory"))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"1: 2", id="key is no string"),
        pytest.param(b"\xff\xfe\x00", id="no UTF-8"),
        pytest.param(b"model: \x00", id="NUL"),
        pytest.param(b"_env_prefix: X_", id="keyword of pydantic-settings"),
        pytest.param(b'"a\\nb": 1', id="line break in a key"),
        pytest.param(b"model: 2024-99-99", id="date that is none"),
        pytest.param(b"[" * 5000, id="deep"),
    ],
)
def test_odd_content_is_refused_in_one_line(file: Path, content: bytes) -> None:
    # 1. A file that no editor would write, but a mistake might.
    file.write_bytes(content)
    # 2. Still one line that names the file.
    message = refusal(file)
    assert str(file) in message
    assert "\n" not in message


def test_replicas_have_consecutive_ports(file: Path) -> None:
    # 1. Three prefill services and two roots.
    file.write_text(
        "prefill_service: {host: p, port: 9100, replicas: 3}\ndecode_service: {host: d, port: 9200, replicas: 2}\n"
    )
    config = load_config(file)
    # 2. Each has the next port of its section's host.
    assert config.prefill_addresses() == ("p:9100", "p:9101", "p:9102")
    assert config.decode_addresses() == ("d:9200", "d:9201")


def test_no_replicas_have_no_addresses(file: Path) -> None:
    # 1. A mesh without prefill services.
    file.write_text("prefill_service: {replicas: 0}")
    # 2. There is nobody to ask.
    assert load_config(file).prefill_addresses() == ()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("TOKENMESH_GATEWAY_API_KEYS", "it is spelled TOKENMESH_GATEWAY__API_KEYS"),
        ("tokenmesh_decode_service_max_num_seqs", "it is spelled TOKENMESH_DECODE_SERVICE__MAX_NUM_SEQS"),
        ("TOKENMESH_DECODE__MAX_NUM_SEQS", "there is no section 'decode'"),
    ],
)
def test_a_misspelled_variable_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, problem: str) -> None:
    # 1. Ignored, it could leave a gateway without authentication. Its value is nobody's business.
    monkeypatch.setenv(name, '["secret"]')
    with pytest.raises(ConfigError, match=re.escape(f"{name}: {problem}")) as caught:
        load_config(None)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENMESH_CACHE", "/tmp"),
        ("TOKENMESH_GATEWAY_PORT", "tcp://10.0.0.7:8000"),
        ("TOKENMESH_GATEWAY_SERVICE_HOST", "10.0.0.7"),
    ],
)
def test_what_others_put_into_the_environment_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert load_config(None).gateway.port == 8000
