"""The application, and the options that several commands share."""

import logging
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Retrieval-augmented generation, trained with DRO.")

OnError = Enum("OnError", {name: name for name in ("fail", "skip")})
OnErrorOption = Annotated[OnError, typer.Option(help="Stop at a broken record, or leave it out and count it.")]
FormatOption = Annotated[str, typer.Option(help="A format's name; auto goes by the first record.")]
OutputOption = Annotated[Path, typer.Option(help="Rows as JSON lines; packed if the name ends in .gz or .zst.")]
RunArgument = Annotated[Path, typer.Argument(help="A trained run: a folder with drorl.json, or its name on the hub.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Nothing on stderr but errors.")]


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def show_log(quiet: bool) -> None:
    """Puts what drorl has to say while it works on stderr; of a quiet command warnings only."""
    log = logging.getLogger("drorl")
    log.handlers = [_ToStderr()]
    log.setLevel(logging.WARNING if quiet else logging.INFO)


def _version(show: bool) -> None:
    if show:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
