"""The command line, against fake services: nothing here starts an engine."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

from services.gateway.keys import Keys
from tests.unit import fake_service
from tests.unit.fake_service import serving
from tokenmesh.cli import child, main, status
from tokenmesh.cli.demo import LONG_PROMPT_TOKENS, long_text, quick_dtype
from tokenmesh.cli.mesh import Mesh, MeshStartError, serve_command
from tokenmesh.cli.serve import ServiceRole
from tokenmesh.cli.status import Endpoint, ServiceState
from tokenmesh.config import GatewayConfig, MeshConfig
from tokenmesh.lifecycle import LiveRequest
from tokenmesh.mesh_file import load_config

pytestmark = pytest.mark.timeout(120)

COMMANDS: dict[str, Any] = typer.main.get_command(main.app).commands  # type: ignore[attr-defined]


@pytest.fixture
def mesh_file(tmp_path: Path) -> Path:
    rest, rpc, prefill, decode, worker = fake_service.free_ports(5)
    sections = {
        "gateway": {"port": rest, "grpc_port": rpc, "api_keys": ["secret"]},
        "prefill_service": {"port": prefill},
        "decode_service": {"port": decode},
        "decode_worker": {"port": worker},
    }
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture
def config(mesh_file: Path) -> MeshConfig:
    return load_config(mesh_file)


async def run(*args: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `tokenmesh ARGS`."""
    command = [sys.executable, "-m", "tokenmesh.cli.main", *map(str, args)]
    process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-1)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def over_fakes(name: str, *args: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`tokenmesh NAME` over fake services; it is told to stop when the test fails before it has ended."""
    command = [sys.executable, fake_service.__file__, name, *map(str, args)]
    process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-1, env={**os.environ, "COLUMNS": "20"})
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            await process.communicate()


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_parameter(name: str) -> None:
    # 1. Every option and argument has an explanation, and is shown.
    result = CliRunner().invoke(main.app, [name, "--help"], terminal_width=200, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{name} {parameter.name} has no help"
        assert parameter.help in result.output
        for option in parameter.opts if parameter.param_type_name == "option" else ():
            assert option in result.output
    # 2. So has the command itself, and the list of commands names it.
    assert COMMANDS[name].help
    assert name in CliRunner().invoke(main.app, ["--help"]).output
    # 3. The commands are these.
    assert set(COMMANDS) == {"serve", "up", "status", "generate", "trace", "health", "drain", "demo", "version"}


async def test_bad_configuration_is_one_line(tmp_path: Path) -> None:
    # 1. Every command that reads a mesh file refuses a bad one in the same way.
    (tmp_path / "bad.yaml").write_text("gateway: {prot: 8000}")
    for command in (["status"], ["up"], ["demo"], ["generate", "x"], ["serve", "gateway"]):
        code, out, err = await run(*command, "-c", tmp_path / "bad.yaml")
        assert (code, out) == (2, "")
        assert re.fullmatch(r"tokenmesh: .*gateway\.prot: .*\n", err)


async def test_status_of_one_up_and_three_unreachable(mesh_file: Path, config: MeshConfig) -> None:
    # 1. One service of four is up: lines for a pipe, JSON for programs, status 1 for both.
    [root] = config.decode_addresses()
    async with serving("decode-root", root):
        code, out, _ = await run("status", "-c", mesh_file)
        assert code == 1
        lines = out.splitlines()
        services = ["gateway-0", "prefill-0", "decode-root-0", "decode-worker-0"]
        assert [line.split()[0] for line in lines] == [*services, "decode-root-0/rank-0", "decode-root-0/rank-1"]
        assert lines[5].split("  ")[1:5] == ["w:9300", "attached", "blocks 71/91", "context 2400"]
        assert "unreachable (Connection refused)" in lines[0]
        assert f"{root}  ready  running 3  waiting 2" in lines[2]
        code, out, _ = await run("status", "-c", mesh_file, "--json")
        assert code == 1
        told = json.loads(out)
        assert not told["ready"]
        assert [service["state"] for service in told["services"]] == [
            "unreachable",
            "unreachable",
            "ready",
            "unreachable",
        ]
        assert told["services"][2]["kv_bytes"] == 30_000_000
        assert told["services"][2]["ranks"][1]["step_share"] == 0.25
        assert told["services"][2]["gb_per_s"] == pytest.approx(3)
        # 2. A terminal gets a table with the same.
        screen = io.StringIO()
        statuses = await status.collect(status.endpoints(config), config.gateway)
        Console(file=screen, force_terminal=True, width=200).print(status.to_table(statuses))
        assert "free/all" in screen.getvalue()
        assert re.search(r"decode-root-0 .*ready.* 3 +2 +- +sysv +30.0 MB +3.00", screen.getvalue())
        assert re.search(r"decode-root-0 / 1 +w:9300 .*attached.* 71/91 +2400 +3 +25 % +sysv", screen.getvalue())
        # 3. With the others up, all is ready.
        gateway = status.endpoints(config)[0].address
        [worker] = config.worker_addresses(0)
        async with (
            serving("prefill", config.prefill_addresses()[0]),
            serving("gateway", gateway),
            serving("decode-worker", worker),
        ):
            assert (await run("status", "-c", mesh_file))[0] == 0


async def test_health_and_drain(config: MeshConfig) -> None:
    address = config.prefill_addresses()[0]
    # 1. Nobody there; no address at all.
    code, _, err = await run("health", address)
    assert code == 1
    assert re.fullmatch(rf"tokenmesh: {address}: UNAVAILABLE .*Connection refused\n", err)
    assert (await run("health", "nowhere"))[0] == 2
    async with serving("prefill", address) as (server, requests):
        # 2. Serving, and not.
        assert await run("health", address) == (0, f"{address}: SERVING\n", "")
        await server.not_ready()
        assert await run("health", address, "--timeout", 2) == (1, f"{address}: NOT_SERVING\n", "")
        # 3. Work remains when the time is up.
        with requests.admit(LiveRequest("long")):
            code, _, err = await run("drain", address, "--timeout", 1)
        assert (code, err) == (1, f"tokenmesh: {address}: 1 requests still run after 1 s\n")
        # 4. It is done.
        assert await run("drain", address) == (0, f"{address}: drained\n", "")
        assert requests.draining
        found = await status.collect([Endpoint(ServiceRole.PREFILL, 0, address)], config.gateway)
        assert found[0].state is ServiceState.DRAINING
        assert "draining  running" in status.to_line(found[0])
    # 5. Nobody there any more.
    assert (await run("drain", address))[0] == 1


@pytest.mark.timeout(300)
async def test_a_service_that_is_told_to_stop_while_it_starts_ends_at_once(mesh_file: Path) -> None:
    # 1. A real prefill service has begun to start its engine, which takes a minute and cannot be interrupted.
    command = [sys.executable, "-m", "tokenmesh.cli.main", "serve", "prefill", "-c", str(mesh_file)]
    process = await asyncio.create_subprocess_exec(*command, stdout=-3, stderr=-3)
    service = psutil.Process(process.pid)
    async with asyncio.timeout(200):
        while len(service.children(recursive=True)) < 2:  # noqa: ASYNC110 - processes send no events
            await asyncio.sleep(0.1)
    begun = service.children(recursive=True)
    # 2. SIGTERM ends it and them.
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 15) == 0
    assert psutil.wait_procs(begun, timeout=5)[1] == []


async def test_listed_workers_are_part_of_the_mesh(config: MeshConfig) -> None:
    listed = config.decode_service.model_copy(
        update={"group": config.decode_service.group.model_copy(update={"workers": ("w:1", "w:2")})}
    )
    found = status.endpoints(config.model_copy(update={"decode_service": listed}))
    assert [e.address for e in found if e.role is ServiceRole.DECODE_WORKER] == ["w:1", "w:2"]


async def test_a_gateway_with_keys_is_not_drained_by_anybody(
    config: MeshConfig, mesh_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = status.endpoints(config)[0].address
    keys = Keys.of_operators(GatewayConfig(api_keys=("client",), admin_key="operator"))
    async with serving("gateway", address, check=keys.check) as (_, requests):
        # 1. Without a key, and with a client's.
        for key in ("", '["client"]'):
            if key:
                monkeypatch.setenv("TOKENMESH_GATEWAY__API_KEYS", key)
            code, _, err = await run("drain", address)
            assert (code, "UNAUTHENTICATED (BAD_API_KEY)" in err, requests.draining) == (1, True, False)
        # 2. An operator's, from the environment, as containers have it.
        monkeypatch.setenv("TOKENMESH_GATEWAY__ADMIN_KEY", "operator")
        statuses = await status.collect(status.endpoints(load_config(mesh_file)), load_config(mesh_file).gateway)
        assert statuses[0].state is ServiceState.READY
        assert await run("drain", "-c", mesh_file, address) == (0, f"{address}: drained\n", "")
        assert requests.draining


async def test_generate(mesh_file: Path, config: MeshConfig) -> None:
    async with serving("gateway", status.endpoints(config)[0].address):
        # 1. A chat; figures go to standard error.
        code, out, err = await run("generate", "what is up", "-c", mesh_file)
        assert (code, out) == (0, "chat: what is up \n")
        assert re.fullmatch(r"7 prompt tokens, 4 generated, TTFT [\d.]+ ms, ITL [\d.]+ ms, finished by length\n", err)
        # 2. Raw text, and a limit.
        code, out, _ = await run("generate", "--raw", "what is up", "-c", mesh_file, "--max-tokens", 2)
        assert (code, out) == (0, "raw: what \n")
        # 3. A refusal is one line with its reason.
        code, _, err = await run("generate", "bad", "-c", mesh_file)
        reason = "INVALID_ARGUMENT (BAD_SAMPLING_PARAMS): temperature is out of range"
        assert (code, err) == (1, f"tokenmesh: generate: {reason}\n")
    # 4. So is a gateway that is down.
    code, _, err = await run("generate", "hello", "-c", mesh_file)
    assert code == 1
    assert err.startswith("tokenmesh: generate: UNAVAILABLE")
    assert err.count("\n") == 1


async def test_mesh_refuses_ports_in_use(config: MeshConfig, tmp_path: Path) -> None:
    # 1. Somebody has the prefill service's port: the line names both, and nothing was started.
    mesh = Mesh(config, tmp_path, command=fake_service.command())
    with socket.create_server(("127.0.0.1", config.prefill_service.port)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MeshStartError, match=rf"^cannot listen on 127.0.0.1:{port} for prefill-0: Address .* use$"):
            await mesh.__aenter__()
    assert not mesh.children
    # 2. A mesh that needs one port twice is told so.
    decode = config.decode_service.model_copy(update={"port": config.prefill_service.port})
    twice = Mesh(config.model_copy(update={"decode_service": decode}), tmp_path, command=fake_service.command())
    with pytest.raises(MeshStartError, match="for decode-root-0: prefill-0 has it too"):
        await twice.__aenter__()


async def test_mesh_starts_and_stops_in_order(config: MeshConfig, tmp_path: Path) -> None:
    # 1. All services get ready, with a configuration that is the given one.
    async with Mesh(config, tmp_path / "logs", 60, fake_service.command(prefill="family")) as mesh:
        assert load_config(tmp_path / "logs" / "mesh.yaml") == config
        assert (tmp_path / "logs" / "mesh.yaml").stat().st_mode & 0o777 == 0o600
        statuses = await mesh.statuses()
        assert [s.state for s in statuses] == ["ready"] * 4
        pids = [s.pid for s in statuses if s.pid is not None]
        family = [int(pid) for pid in re.findall(r"grandchild (\d+)", (tmp_path / "logs/prefill-0.log").read_text())]
        assert len(running(pids + family)) == 6
    # 2. After it all are gone: also grandchildren that ignore SIGTERM, in their parent's session and in their own.
    assert running(pids + family) == []
    assert mesh.leftovers == []
    # 3. The gateway went first, then the root, then those that it needs.
    names = ("gateway", "decode-root", "prefill", "decode-worker")
    logs = [(tmp_path / "logs" / f"{name}-0.log").read_text() for name in names]
    gateway, root, *needed = (float(log.rpartition("stopped at ")[2]) for log in logs)
    assert gateway <= root <= min(needed)
    # 4. Stopping again does nothing.
    await mesh.stop()
    assert [s.described_state for s in await mesh.statuses()] == ["exited (code 0)"] * 4
    # 5. The real services would have been started like this.
    command = serve_command(mesh.children[1].endpoint, Path("mesh.yaml"))
    assert command[1:] == ["-m", "tokenmesh.cli.main", "serve", "prefill", "-c", "mesh.yaml", "--replica", "0"]


@pytest.mark.parametrize(
    ("habit", "timeout", "message", "details"),
    [
        ("refuses", 60, r"prefill-0 exited \(code 1\): prefill: no model named nothing \(log: .*prefill-0.log\)", ()),
        ("crashes", 60, r"prefill-0 exited \(code 3\): line 9 \(log: .*\)", ("line 5", "line 6", "line 7", "line 8")),
        ("mute", 5, r"not ready after 5 s: .*prefill-0.* \(logs: .*\)", ()),
    ],
)
async def test_mesh_that_cannot_start(
    config: MeshConfig, tmp_path: Path, habit: str, timeout: float, message: str, details: tuple[str, ...]
) -> None:
    # 1. The service's own last words are the error.
    mesh = Mesh(config, tmp_path, timeout, fake_service.command(prefill=habit))
    with pytest.raises(MeshStartError) as caught:
        await mesh.__aenter__()
    assert re.fullmatch(message, str(caught.value))
    assert caught.value.details == details
    # 2. The others are gone.
    assert running([c.pid for c in mesh.children]) == []


async def test_stubborn_service_is_killed(config: MeshConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. One that ignores SIGTERM is killed when its grace is over.
    monkeypatch.setattr(child, "STOP_GRACE_S", 5.0)
    async with Mesh(config, tmp_path, 60, fake_service.command(decode_root="stubborn")) as mesh:
        pass
    assert [c.exit_code for c in mesh.children] == [0, 0, -signal.SIGKILL, 0]
    # 2. Cancelling the stop makes it kill at once, and stop all the same.
    monkeypatch.setattr(child, "STOP_GRACE_S", 50.0)
    mesh = Mesh(config, tmp_path, 60, fake_service.command(gateway="stubborn"))
    await mesh.__aenter__()
    stopping = asyncio.create_task(mesh.stop())
    await asyncio.sleep(0.3)
    begun = time.monotonic()
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert time.monotonic() - begun < child.STOP_GRACE_S / 2
    assert running([c.pid for c in mesh.children]) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_up_until_a_signal_or_a_death(mesh_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    async with over_fakes("up", mesh_file, tmp_path) as process:
        # 1. Without a terminal, each change of state is a line.
        assert process.stdout is not None
        output, found = "", {}
        while " is served: http://127.0.0.1:" not in output or len(found) < 4:
            output += (line := (await process.stdout.readline()).decode())
            assert line, "it ended early"
            found = dict(re.findall(r"^(\S+): (?:starting|ready), .*, pid (\d+)$", output, re.MULTILINE))
        pids = [int(pid) for pid in found.values()]
        assert len(running(pids)) == 4
        # 2. A signal ends the mesh in order. SIGKILL goes to one service instead: that ends the mesh with an error.
        if number == signal.SIGKILL:
            os.kill(int(found["decode-root-0"]), number)
        else:
            process.send_signal(number)
        out, err = (stream.decode() for stream in await process.communicate())
        killed = number == signal.SIGKILL
        assert process.returncode == (1 if killed else 0)
        assert ("tokenmesh: decode-root-0 exited (code -9)" in err) == killed
        assert len(re.findall(r"exited \(code 0\)", out)) == (3 if killed else 4)
        # 3. Nothing is left.
        assert running(pids) == []


async def test_demo(mesh_file: Path, tmp_path: Path) -> None:
    # 1. Three answers with their figures, what was moved, and nothing left.
    async with over_fakes("demo", mesh_file, tmp_path) as process:
        out, err = (stream.decode() for stream in await process.communicate())
    assert (process.returncode, err) == (0, "")
    assert "Paris." in out
    assert f"I read {LONG_PROMPT_TOKENS} tokens, truly." in out
    assert "chat: Name three colours" in out
    assert out.count("TTFT") == 3
    assert "prefill decisions: disaggregated 1, too short 2" in out
    assert "KV received: 30,000,000 bytes at 3.00 GB/s, UCX transport sysv" in out
    assert out.endswith("nothing is left: 4 services and all that they started are gone\n")
    # 2. The long text is long enough for every tokenizer that makes no more than a word of a token.
    assert len(long_text().split()) > LONG_PROMPT_TOKENS


@pytest.mark.parametrize(
    ("asked", "gpu", "instructions", "computed"),
    [
        ("auto", False, False, "float32"),
        ("auto", False, True, "auto"),
        ("auto", True, False, "auto"),
        ("bfloat16", False, False, "bfloat16"),
    ],
)
def test_the_demo_computes_in_what_this_host_computes_quickly(
    monkeypatch: pytest.MonkeyPatch, asked: str, gpu: bool, instructions: bool, computed: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("tokenmesh.cli.demo.computes_bfloat16", lambda: instructions)
    config = MeshConfig(dtype=asked)
    assert quick_dtype(config) == MeshConfig(dtype=computed)
