"""The `drorl` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Retrieval-augmented generation, trained with DRO.")


def _version(show: bool) -> None:
    if show:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def setup() -> None:
    """Build the embedded model and data set into the cache (DRORL_CACHE) and print what they hold."""
    from rich.console import Console

    from .data.vitalqa import load_vitalqa, print_facts
    from .models import build_smollm2

    load_vitalqa()
    typer.echo(f"model: {build_smollm2()}")
    print_facts(Console())


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run's output directory, with summary.json.")]) -> None:
    """Write report.html of a finished run again."""
    from .report import write_report

    typer.echo(write_report(run_dir))


def main() -> None:
    """Entry point of the `drorl` command: a user's mistake is answered by one line."""
    try:
        app()
    except UserError as error:
        sys.exit(f"drorl: {error}")
