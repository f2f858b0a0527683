"""Runs a whole mesh as child processes of this one, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc
import yaml

from tokenmesh.cli.child import Child
from tokenmesh.cli.serve import ServiceRole
from tokenmesh.cli.status import Endpoint, Screen, ServiceStatus, check_health, collect, local_endpoints, showing
from tokenmesh.config import MeshConfig
from tokenmesh.rpc.channel import dial

POLL_S = 0.2
CONNECT_S = 15.0

CommandFactory = Callable[[Endpoint, Path], Sequence[str]]
"""From a service and the mesh file to the command that runs it."""


class MeshStartError(Exception):
    """The mesh cannot run; the message is one line fit for an operator. `details` are lines of a service's log."""

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


def serve_command(endpoint: Endpoint, config_file: Path) -> Sequence[str]:
    """Runs the service in an interpreter like this one."""
    serve = [sys.executable, "-m", "tokenmesh.cli.main", "serve", endpoint.role.value]
    return [*serve, "-c", str(config_file), "--replica", str(endpoint.replica)]


class Mesh:
    """A mesh on this machine. An async context: inside it every service is ready, after it every process is gone."""

    def __init__(
        self,
        config: MeshConfig,
        log_dir: Path,
        start_timeout: float = 300.0,
        command: CommandFactory = serve_command,
    ) -> None:
        """`log_dir` gets one log per service, and the configuration that all of them read."""
        self.config = config
        self.children: list[Child] = []
        self.serving = False
        """Every service has been ready."""
        self.leftovers: list[str] = []
        """Processes that stop() could not end."""
        self._log_dir = log_dir
        self._start_timeout = start_timeout
        self._command = command
        self._hurry = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Mesh:
        """Starts all services and waits for their health.

        Raises MeshStartError, with nothing left running: a port is taken, a service exits, or the time is up.
        """
        try:
            self._start()
            await self._wait_ready()
        except BaseException:
            await self.stop()
            raise
        self.serving = True
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _start(self) -> None:
        check_ports(self.config)
        file = self._log_dir / "mesh.yaml"
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            # All services read one file that nobody edits meanwhile. It may hold API keys.
            file.unlink(missing_ok=True)
            file.touch(mode=0o600)
            file.write_text(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))
            for endpoint in local_endpoints(self.config):
                command = self._command(endpoint, file)
                self.children.append(Child(endpoint, command, self._log_dir / f"{endpoint.name}.log"))
        except OSError as error:
            raise MeshStartError(f"cannot start: {error}") from error

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while waiting := [child for child in self.children if not child.ready]:
            self._check_alive()
            if time.monotonic() > deadline:
                names = ", ".join(child.endpoint.name for child in waiting)
                raise MeshStartError(
                    f"not ready after {self._start_timeout:g} s: {names} (logs: {self._log_dir})",
                    waiting[0].last_lines(),
                )
            for child, ready in zip(waiting, await asyncio.gather(*map(_is_serving, waiting)), strict=True):
                child.ready = ready
            await asyncio.sleep(POLL_S)
        await self._wait_connected()

    def _check_alive(self) -> None:
        for child in self.children:
            if child.poll() is not None:
                raise exited(child)

    async def _wait_connected(self) -> None:
        """Waits until the services have found each other, so that the first request is served as later ones are.

        Not for ever: a mesh that cannot move KV still answers, and its status says what is missing.
        """
        ours = {child.endpoint.address for child in self.children}
        deadline = time.monotonic() + CONNECT_S
        while time.monotonic() < deadline:
            self._check_alive()
            missing = {address for status in await self.statuses() for address in status.missing_peers}
            if not missing & ours:
                return
            await asyncio.sleep(POLL_S)

    async def statuses(self) -> list[ServiceStatus]:
        """What each service says of itself, with process ids, and exit codes of those that ended."""
        children = list(self.children)
        reports = await collect([child.endpoint for child in children], self.config.gateway)
        return [child.seen(report) for child, report in zip(children, reports, strict=True)]

    async def watch(self) -> Child:
        """Waits until a service ends by itself, and returns it. The others go on until stop()."""
        while True:
            for child in self.children:
                if child.poll() is not None:
                    return child
            await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """Ends the gateway, then decode roots, then prefill services and workers: work ends before what it needs.

        Idempotent. Cancelling it makes it kill at once; it still returns only when all is done, and then raises
        CancelledError.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        cancelled: asyncio.CancelledError | None = None
        while not self._stopping.done():
            try:
                await asyncio.shield(self._stopping)
            except asyncio.CancelledError as error:
                cancelled = error
                self._hurry.set()
                # An event loop that is being closed cancels every task, but processes must end even then.
                if self._stopping.cancelled():
                    self._stopping = asyncio.create_task(self._stop())
        self._stopping.result()
        if cancelled is not None:
            raise cancelled

    async def _stop(self) -> None:
        order = [
            {ServiceRole.GATEWAY},
            {ServiceRole.DECODE_ROOT},
            {ServiceRole.PREFILL, ServiceRole.DECODE_WORKER},
        ]
        leftovers: list[str] = []
        # A mesh that never served has no work to finish.
        for roles in order if self.serving else [set(ServiceRole)]:
            children = [child for child in self.children if child.endpoint.role in roles]
            for left in await asyncio.gather(*(child.stop(self._hurry) for child in children)):
                leftovers += left
        self.leftovers = leftovers


def exited(child: Child) -> MeshStartError:
    """The end of a service that should have gone on, as told to an operator."""
    lines = child.last_lines()
    reason = f": {lines[-1].removeprefix('tokenmesh: ')}" if lines else ""
    return MeshStartError(
        f"{child.endpoint.name} exited (code {child.poll()}){reason} (log: {child.log_path})", lines[:-1]
    )


async def _is_serving(child: Child) -> bool:
    try:
        return await check_health(child.endpoint.address, timeout=1.0) == "SERVING"
    except grpc.aio.AioRpcError:
        return False


def check_ports(config: MeshConfig) -> None:
    """Raises MeshStartError naming the first port that the mesh needs and cannot have."""
    gateway = config.gateway
    ports = [("gateway REST", gateway.host, gateway.port), ("gateway gRPC", gateway.host, gateway.grpc_port)]
    for role, section in (("prefill", config.prefill_service), ("decode-root", config.decode_service)):
        for i in range(section.replicas):
            ports.append((f"{role}-{i}", section.host, section.port + i))
            if section.metrics_port:
                ports.append((f"{role}-{i} metrics", section.host, section.metrics_port + i))
            if section.kv_transfer.port:
                # UCX listens on every address.
                first = section.kv_transfer.port + i * section.tensor_parallel_size
                shards = range(section.tensor_parallel_size)
                ports += [(f"{role}-{i} KV", "0.0.0.0", first + shard) for shard in shards]
    ports += _worker_ports(config)
    taken: dict[int, str] = {}
    with contextlib.ExitStack() as held:
        for name, host, port in ports:
            if port == 0:
                raise MeshStartError(f"the port of {name} is 0, but the others must know it")
            listener = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                # Held while the others are tried, so that two of our own services cannot pass with one port.
                listener.listen()
            except (OSError, OverflowError) as error:
                why = f"{taken[port]} has it too" if port in taken else getattr(error, "strerror", None) or str(error)
                raise MeshStartError(f"cannot listen on {host}:{port} for {name}: {why}") from error
            taken[port] = name


def _worker_ports(config: MeshConfig) -> list[tuple[str, str, int]]:
    worker, shards = config.decode_worker, config.decode_service.tensor_parallel_size
    ports = []
    for i in range(config.workers_per_root * config.decode_service.replicas):
        ports.append((f"decode-worker-{i}", worker.host, worker.port + i))
        if worker.metrics_port:
            ports.append((f"decode-worker-{i} metrics", worker.host, worker.metrics_port + i))
        for first, name in ((worker.kv_transfer.port, "KV"), (worker.exchange_port, "rows")):
            # UCX listens on every address.
            numbers = range(i * shards, (i + 1) * shards) if first else ()
            ports += [(f"decode-worker-{i} {name}", "0.0.0.0", first + number) for number in numbers]
    return ports


def report(error: MeshStartError) -> None:
    """Prints one line to standard error, and the log's lines below it."""
    print(f"tokenmesh: {error}", file=sys.stderr)
    for line in error.details:
        print(f"  {line}", file=sys.stderr)


def report_leftovers(mesh: Mesh) -> bool:
    """Prints which processes a stopped mesh could not end; False if there are none."""
    if mesh.leftovers:
        print(f"tokenmesh: still running after SIGKILL: {', '.join(mesh.leftovers)}", file=sys.stderr)
    return bool(mesh.leftovers)


async def up(config: MeshConfig, log_dir: Path, timeout: float, command: CommandFactory = serve_command) -> int:
    """Runs a mesh until it is cancelled or a service ends. Returns the exit status.

    Raises CancelledError if it is cancelled before the mesh has served.
    """
    console = Screen()
    mesh = Mesh(config, log_dir, timeout, command)
    code = 0
    try:
        async with showing(mesh.statuses, console), mesh:
            gateway = config.gateway
            rest, rpc = dial(gateway.host, gateway.port), dial(gateway.host, gateway.grpc_port)
            line = f"{config.model_name} is served: http://{rest}/v1, gRPC {rpc}, logs in {log_dir}; Ctrl-C stops it"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            raise exited(await mesh.watch())
    except MeshStartError as error:
        report(error)
        code = 1
    except asyncio.CancelledError:
        if not mesh.serving:
            raise
    finally:
        if report_leftovers(mesh):
            code = 1
    return code


def run_until_signal(main: Coroutine[Any, Any, int]) -> int:
    """Runs `main` and returns its exit status; SIGINT, SIGTERM and SIGHUP cancel it, each time they come.

    Returns 128 + the signal's number if `main` lets the cancellation through.
    """
    caught: list[signal.Signals] = []

    async def run() -> int:
        task = asyncio.ensure_future(main)

        def cancel(number: signal.Signals) -> None:
            caught.append(number)
            # The terminal may be what has gone.
            with contextlib.suppress(OSError):
                print("tokenmesh: stopping; once more kills", file=sys.stderr)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, cancel, number)
        try:
            return await task
        except asyncio.CancelledError:
            if not caught:
                raise
            return 128 + caught[0]

    return asyncio.run(run())
