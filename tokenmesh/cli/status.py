"""What the services of a mesh say about themselves, and how that is shown."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokenmesh.cli import ranks
from tokenmesh.cli.ranks import RankLine, ranks_of
from tokenmesh.cli.serve import ServiceRole
from tokenmesh.config import GatewayConfig, MeshConfig
from tokenmesh.rpc.channel import dial, open_channel
from tokenmesh.rpc.errors import MeshError
from tokenmesh.v1 import admin_pb2, admin_pb2_grpc

REFRESH_S = 1.0
"""Between two looks at a mesh that is shown."""


class ServiceState(enum.StrEnum):
    """How a service looks from outside."""

    STARTING = "starting"
    """It runs and takes no work yet."""
    READY = "ready"
    DRAINING = "draining"
    """It finishes what it has and takes nothing new."""
    UNREACHABLE = "unreachable"
    EXITED = "exited"


_STYLES = {ServiceState.STARTING: "yellow", ServiceState.DRAINING: "yellow", ServiceState.READY: "green"}


@dataclass(frozen=True)
class Endpoint:
    """A service and where its AdminService and health are."""

    role: ServiceRole
    replica: int
    address: str

    @property
    def name(self) -> str:
        """As in tables and log files, e.g. ``prefill-0``."""
        return f"{self.role.value}-{self.replica}"


@dataclass(frozen=True)
class ServiceStatus:
    """One service at one moment. What it did not tell is 0 or empty."""

    name: str
    role: ServiceRole
    address: str
    state: ServiceState
    pid: int | None = None
    """Known for processes that this one started."""
    exit_code: int | None = None
    """Negative: the signal that ended it."""
    running: int = 0
    waiting: int = 0
    blocks_free: int = 0
    blocks_total: int = 0
    kv_transport: str = ""
    kv_bytes: int = 0
    kv_seconds: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)
    missing_peers: tuple[str, ...] = ()
    """Services that it uses and cannot reach."""
    error: str = ""
    """Why it is unreachable."""
    ranks: tuple[RankLine, ...] = ()
    """Decode roots with a group: its ranks."""

    @property
    def gb_per_s(self) -> float | None:
        """KV payload per second of transfer; None before the first one."""
        return self.kv_bytes / self.kv_seconds / 1e9 if self.kv_seconds > 0 else None

    @property
    def described_state(self) -> str:
        """The state, and what is known about its cause."""
        if self.state is ServiceState.EXITED:
            return f"exited (code {self.exit_code})"
        # gRPC's messages end with the cause, after everything that it tried.
        return f"{self.state.value} ({self.error.rpartition(': ')[2]})" if self.error else self.state.value


class Screen(Console):
    """Standard output. When its reader goes away, what follows is dropped: a mesh must not end for that."""

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own version ends the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def local_endpoints(config: MeshConfig) -> list[Endpoint]:
    """The services of one configuration, all on this machine, in the order in which they are started."""
    found = [Endpoint(ServiceRole.GATEWAY, 0, dial(config.gateway.host, config.gateway.grpc_port))]
    for role, section in (
        (ServiceRole.PREFILL, config.prefill_service),
        (ServiceRole.DECODE_ROOT, config.decode_service),
    ):
        found += [Endpoint(role, i, dial(section.host, section.port + i)) for i in range(section.replicas)]
    worker, count = config.decode_worker, config.workers_per_root * config.decode_service.replicas
    found += [Endpoint(ServiceRole.DECODE_WORKER, i, dial(worker.host, worker.port + i)) for i in range(count)]
    return found


def endpoints(config: MeshConfig) -> list[Endpoint]:
    """The services that a mesh consists of; where addresses are listed, those count, as for the gateway."""
    listed = {
        ServiceRole.PREFILL: config.gateway.prefills,
        ServiceRole.DECODE_ROOT: config.gateway.decode_roots,
        ServiceRole.DECODE_WORKER: config.decode_service.group.workers,
    }
    if listed[ServiceRole.PREFILL] is None:
        listed[ServiceRole.PREFILL] = config.decode_service.prefills
    found = [endpoint for endpoint in local_endpoints(config) if listed.get(endpoint.role) is None]
    for role, addresses in listed.items():
        found += [Endpoint(role, i, address) for i, address in enumerate(addresses or ())]
    return found


async def check_health(address: str, timeout: float) -> str:
    """A server's overall grpc health, e.g. SERVING. Raises grpc.aio.AioRpcError if it does not answer in time."""
    async with open_channel(address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def operator(gateway: GatewayConfig) -> list[tuple[str, str]]:
    """Metadata that a gateway wants from those who look at the mesh, or drain it."""
    key = gateway.admin_key or next(iter(gateway.api_keys), None)
    return [("authorization", f"Bearer {key}")] if key else []


async def collect(services: Sequence[Endpoint], gateway: GatewayConfig, timeout: float = 1.0) -> list[ServiceStatus]:
    """Asks all services at once; returns after `timeout` seconds at the latest. No service's silence is an error."""
    keys = {ServiceRole.GATEWAY: operator(gateway)}
    return await asyncio.gather(*(_ask(endpoint, keys.get(endpoint.role, []), timeout) for endpoint in services))


async def _ask(endpoint: Endpoint, metadata: list[tuple[str, str]], timeout: float) -> ServiceStatus:
    async with open_channel(endpoint.address) as channel:
        try:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            reply = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=timeout, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            problem = MeshError.from_rpc(error)
            return ServiceStatus(
                endpoint.name,
                endpoint.role,
                endpoint.address,
                ServiceState.UNREACHABLE,
                error=one_line(problem.message),
            )
    return ServiceStatus(
        name=endpoint.name,
        role=endpoint.role,
        address=endpoint.address,
        state=_state(reply),
        missing_peers=tuple(peer.address for peer in reply.peers if not peer.ready),
        running=reply.running,
        waiting=reply.waiting,
        blocks_free=reply.blocks_free,
        blocks_total=reply.blocks_total,
        kv_transport=reply.kv_transport,
        kv_bytes=reply.kv_bytes,
        kv_seconds=reply.kv_seconds,
        counters=dict(reply.counters),
        ranks=ranks_of(reply.ranks),
    )


def _state(reply: admin_pb2.GetStatusResponse) -> ServiceState:
    if reply.ready:
        return ServiceState.READY
    return ServiceState.DRAINING if reply.draining else ServiceState.STARTING


def one_line(text: str) -> str:
    """Any text as one line."""
    return " ".join(text.split())


def to_table(statuses: Iterable[ServiceStatus]) -> Group:
    """For terminals: the services, and below them the ranks of decode groups."""
    # Narrow enough for 80 columns, or nearly so where process ids are known.
    statuses = list(statuses)
    with_pid = any(s.pid is not None for s in statuses)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("service", "address", "pid") if with_pid else ("service", "address"):
        table.add_column(name, no_wrap=True)
    table.add_column("state", overflow="fold")
    for name in ("run", "wait", "blocks\nfree/all"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("UCX", overflow="fold")
    for name in ("KV moved", "GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for s in statuses:
        told = s.state in (ServiceState.READY, ServiceState.DRAINING, ServiceState.STARTING)
        # Reasons are left to lines and JSON, which have room for them.
        state = Text(dataclasses.replace(s, error="").described_state, style=_STYLES.get(s.state, "red"))
        pid = ["-" if s.pid is None else str(s.pid)] if with_pid else []
        table.add_row(Text(s.name), Text(s.address), *pid, state, *(_figures(s) if told else ["-"] * 6))
    groups = [(s.name, s.ranks) for s in statuses if s.ranks]
    return Group(table, "", ranks.to_table(groups)) if groups else Group(table)


def _figures(s: ServiceStatus) -> list[str]:
    return [
        str(s.running),
        str(s.waiting),
        f"{s.blocks_free}/{s.blocks_total}" if s.blocks_total else "-",
        s.kv_transport or "-",
        decimal(s.kv_bytes) if s.kv_bytes else "-",
        "-" if s.gb_per_s is None else f"{s.gb_per_s:.2f}",
    ]


def to_line(s: ServiceStatus) -> str:
    """For pipes and logs: the same, one service per line."""
    parts = [s.name, s.address, *([] if s.pid is None else [f"pid {s.pid}"]), s.described_state]
    if s.state in (ServiceState.READY, ServiceState.DRAINING):
        names = ("running", "waiting", "blocks", "transport", "moved", "GB/s")
        parts += [f"{name} {value}" for name, value in zip(names, _figures(s), strict=True)]
    return "  ".join(parts)


def to_json(statuses: Sequence[ServiceStatus]) -> str:
    """For programs: ``{"ready": bool, "services": [...]}``."""
    services = [{**dataclasses.asdict(s), "gb_per_s": s.gb_per_s} for s in statuses]
    return json.dumps({"ready": all_ready(statuses), "services": services}, indent=2)


def all_ready(statuses: Sequence[ServiceStatus]) -> bool:
    """Whether every service takes work."""
    return all(s.state is ServiceState.READY for s in statuses)


def status(config: MeshConfig, as_json: bool) -> int:
    """Prints the state of a mesh once. Returns 0 if all of it is ready, else 1."""
    statuses = asyncio.run(collect(endpoints(config), config.gateway))
    console = Screen()
    if as_json:
        print(to_json(statuses))
    elif console.is_terminal:
        console.print(to_table(statuses))
    else:
        print("\n".join(map(to_line, statuses)))
        for s in statuses:
            for line in s.ranks:
                print(ranks.to_line(s.name, line))
    return 0 if all_ready(statuses) else 1


Source = Callable[[], Awaitable[list[ServiceStatus]]]


@asynccontextmanager
async def showing(source: Source, console: Console, live: bool = True) -> AsyncIterator[None]:
    """Shows a mesh while the block runs and once more when it ends, also if it fails.

    A terminal gets a table that is refreshed every second. Anything else, or with `live` off, gets one line for each
    change of a service's state.
    """
    show = _show_table if live and console.is_terminal else _show_changes
    done = asyncio.Event()
    task = asyncio.create_task(show(source, console, done))
    try:
        yield
    finally:
        done.set()
        # The terminal may be gone by now, which is no reason to fail.
        with suppress(OSError):
            await task


async def _next_look(done: asyncio.Event) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(done.wait(), REFRESH_S)


async def _show_table(source: Source, console: Console, done: asyncio.Event) -> None:
    with Live(console=console, auto_refresh=False) as live:
        ended = False
        while not ended:
            ended = done.is_set()
            live.update(to_table(await source()), refresh=True)
            await _next_look(done)


async def _show_changes(source: Source, console: Console, done: asyncio.Event) -> None:
    known: dict[str, str] = {}
    ended = False
    while not ended:
        ended = done.is_set()
        for s in await source():
            if known.get(s.name) != s.state:
                known[s.name] = s.state
                line = f"{s.name}: {s.described_state}, {s.address}" + ("" if s.pid is None else f", pid {s.pid}")
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        await _next_look(done)
