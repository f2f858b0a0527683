"""ucx_perftest, as the libucx wheel brings it: what UCX itself moves between two processes."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from pathlib import Path

from benchmarks.servers import free_ports
from tokenmesh.kv import transports

SERVER_UP_S = 10.0
ATTEMPTS = 3


class PerftestError(Exception):
    """ucx_perftest is not there or does not run; the message says why."""


async def perftest(
    transport: str, message_bytes: int, window: int, messages: int, devices: tuple[int, ...] = ()
) -> float:
    """Bytes per second of tagged messages, a process on each core; it neither copies nor checks what arrives.

    `devices`: GPUs of the sender and the receiver, whose memory it is; none: host memory.

    Over shared memory it gets the settings of our movers. Over TCP it gets its own best: its endpoints are connected in
    another way than ours, for which put_zcopy and error handling would cost it most of its bandwidth.
    """
    program = _program()
    environment = dict(os.environ, LD_LIBRARY_PATH=str(program.parents[1] / "lib"), UCX_WARN_UNUSED_ENV_VARS="n")
    arguments: list[str] = []
    if transport == "tcp":
        environment["UCX_TLS"] = "tcp"
    else:
        environment.update(transports.environment(transport, device=bool(devices)))
        arguments.append("-e")
    if devices:
        arguments += ["-m", "cuda"]
    arguments += ["-c", "0", "-t", "tag_bw", "-f", "-v", "-s", str(message_bytes)]
    arguments += ["-O", str(window), "-n", str(messages), "-w", str(window)]
    for _ in range(ATTEMPTS - 1):
        try:
            return await _run(program, environment, arguments, devices)
        except PerftestError as error:
            # Another process may have taken the port.
            print(f"{error}; once more", flush=True)
    return await _run(program, environment, arguments, devices)


async def _run(program: Path, environment: dict[str, str], arguments: list[str], devices: tuple[int, ...]) -> float:
    [port] = free_ports(1)
    sees = [{**environment, "CUDA_VISIBLE_DEVICES": str(device)} for device in devices] or [environment, environment]
    # Client and server agree on nothing but the port.
    server = await asyncio.create_subprocess_exec(
        program,
        "-p",
        str(port),
        "-c",
        "1",
        env=sees[1],
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await _listening(port)
        client = await asyncio.create_subprocess_exec(
            program,
            "127.0.0.1",
            "-p",
            str(port),
            *arguments,
            env=sees[0],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await client.communicate()
        await asyncio.wait_for(server.wait(), SERVER_UP_S)
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()
    return _parse(out.decode(), err.decode())


def _program() -> Path:
    spec = importlib.util.find_spec("libucx")
    program = (
        Path(spec.submodule_search_locations[0]) / "bin" / "ucx_perftest"
        if spec and spec.submodule_search_locations
        else None
    )
    if program is None or not program.exists():
        raise PerftestError("no libucx wheel with ucx_perftest in this environment")
    return program


async def _listening(port: int) -> None:
    """Looks at the kernel's table: connecting would use up the server's one client."""
    for _ in range(int(SERVER_UP_S / 0.05)):
        rows = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        ]
        if any(row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port for row in rows):
            return
        await asyncio.sleep(0.05)
    raise PerftestError("the server of ucx_perftest does not listen")


def _parse(out: str, err: str) -> float:
    # CSV: iterations, latency (3), bandwidth average and overall in units of 2^20 bytes, message rate (2).
    fields = out.strip().rpartition("\n")[2].split(",")
    try:
        return float(fields[5]) * (1 << 20)
    except (IndexError, ValueError):
        raise PerftestError(f"ucx_perftest says {out[-300:]!r} {err[-300:]!r}") from None
