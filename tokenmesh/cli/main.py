"""The command `tokenmesh`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenmesh.cli.serve import ServiceRole
from tokenmesh.cli.serve import serve as run_service

app = typer.Typer(help="An LLM serving mesh on stock vLLM.", no_args_is_help=True, pretty_exceptions_enable=False)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Mesh file (YAML). Without one, the defaults.")
]


@app.command()
def serve(
    role: Annotated[ServiceRole, typer.Argument(help="Which service to run.")],
    config: ConfigOption = None,
    replica: Annotated[int, typer.Option(help="Number of this replica; shifts its port.", min=0)] = 0,
) -> None:
    """Run one service in this process until SIGTERM."""
    raise typer.Exit(run_service(role, config, replica))


@app.callback()
def main() -> None:
    """An LLM serving mesh on stock vLLM."""
