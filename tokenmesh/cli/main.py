"""The command `tokenmesh`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tokenmesh import __version__
from tokenmesh.cli.serve import ServiceRole
from tokenmesh.cli.serve import serve as run_service
from tokenmesh.config import ConfigError, MeshConfig
from tokenmesh.mesh_file import load_config

# Modules of other commands are imported by those commands: a health probe must not wait for what it does not use.

app = typer.Typer(help="An LLM serving mesh on stock vLLM.", no_args_is_help=True, pretty_exceptions_enable=False)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Mesh file (YAML). Without one, the defaults.")
]
LogDirOption = Annotated[Path, typer.Option("--log-dir", help="Folder for one log per service.")]
StartOption = Annotated[
    float, typer.Option("--timeout", help="Seconds that the whole mesh may take to get ready.", min=1)
]
AddressArgument = Annotated[str, typer.Argument(help="host:port of a service's gRPC listener.")]

_LOG_DIR = Path("build/logs")


def _load(path: Path | None) -> MeshConfig:
    """The mesh file; ends the command with status 2 and one line if it is unusable."""
    try:
        return load_config(path)
    except ConfigError as error:
        print(f"tokenmesh: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


@app.command()
def serve(
    role: Annotated[ServiceRole, typer.Argument(help="Which service to run.")],
    config: ConfigOption = None,
    replica: Annotated[int, typer.Option(help="Number of this replica; shifts its port.", min=0)] = 0,
) -> None:
    """Run one service in this process until SIGTERM."""
    raise typer.Exit(run_service(role, config, replica))


@app.command()
def up(config: ConfigOption = None, log_dir: LogDirOption = _LOG_DIR, timeout: StartOption = 300) -> None:
    """Run a whole mesh on this machine until Ctrl-C. Ends with status 1 if a service does."""
    from tokenmesh.cli import mesh

    raise typer.Exit(mesh.run_until_signal(mesh.up(_load(config), log_dir, timeout)))


@app.command()
def status(
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show what every service of a mesh says of itself. Ends with status 1 unless all are ready."""
    from tokenmesh.cli.status import status as show

    raise typer.Exit(show(_load(config), as_json))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    config: ConfigOption = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="Softmax temperature; 0 is greedy. Absent: 1.", min=0)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, with no chat template.")] = False,
) -> None:
    """Ask a running mesh over gRPC and print the answer as it comes."""
    from tokenmesh.cli import client

    raise typer.Exit(client.generate(_load(config), prompt, max_tokens, temperature, raw))


@app.command()
def trace(
    request_id: Annotated[str, typer.Argument(help="Id of a recent request, as in X-Request-Id, or a trace id.")],
    config: ConfigOption = None,
) -> None:
    """Show where the time of a request went, service by service. Needs telemetry.traces: on."""
    from tokenmesh.cli import trace as command

    raise typer.Exit(command.trace(_load(config), request_id))


@app.command()
def health(
    address: AddressArgument,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.", min=0.1)] = 5,
) -> None:
    """Ask a service for its grpc health. Ends with status 0 if it is SERVING, else 1."""
    from tokenmesh.cli import client

    raise typer.Exit(client.health(address, timeout))


@app.command()
def drain(
    address: AddressArgument,
    config: ConfigOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds that running work may take to finish.", min=1)] = 300,
) -> None:
    """Stop a service from taking work and wait until it has none. Ends with status 1 if some remains.

    A gateway with keys wants one: it is taken from the mesh file or the environment.
    """
    from tokenmesh.cli import client

    raise typer.Exit(client.drain(_load(config), address, timeout))


@app.command()
def demo(config: ConfigOption = None, log_dir: LogDirOption = _LOG_DIR, timeout: StartOption = 300) -> None:
    """Start a mesh, ask it over REST and gRPC, show what moved between the services, and stop it again.

    Without a mesh file it uses examples/mesh.yaml where that exists. Where dtype is auto, and bfloat16 would be slow
    because this host has neither a GPU nor CPU instructions for it, the demo computes in float32.
    """
    from tokenmesh.cli import demo as command
    from tokenmesh.cli.mesh import run_until_signal

    mesh = command.quick_dtype(_load(config or command.example_config()))
    raise typer.Exit(run_until_signal(command.demo(mesh, log_dir, timeout)))


@app.command()
def version() -> None:
    """Print the version."""
    print(f"tokenmesh {__version__}")


@app.callback()
def main() -> None:
    """An LLM serving mesh on stock vLLM."""


if __name__ == "__main__":
    app()
