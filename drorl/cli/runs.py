"""Commands about runs: train, reproduce, report, export, serve."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .app import RunArgument, app

Role = Enum("Role", {name: name for name in ("selector", "generator")})


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train: the recipe nq.py, with its own options (--config FILE --setting VALUE ..., --help), in this process.

    On several devices: accelerate launch recipes/nq.py, with the same options.
    """
    import runpy
    import sys

    recipe = _recipe()
    sys.argv = [str(recipe), *context.args]
    runpy.run_path(str(recipe), run_name="__main__")


def _recipe() -> Path:
    """The recipe: in an installed drorl it is inside it, in a checkout beside it."""
    package = Path(__file__).parents[1]
    places = [package / "recipes" / "nq.py", package.parent / "recipes" / "nq.py"]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"the recipe is not at {places[0]}: this drorl was not installed from its wheel or a checkout")
    return found


@app.command()
def reproduce(
    run_dir: Annotated[Path, typer.Argument(help="A finished run, with run.json.")],
    output: Annotated[
        Path | None, typer.Option(help="Directory of the repeated run. Default: beside it, with .repeated.")
    ] = None,
) -> None:
    """Repeat a run and compare the results: 0 equal, 1 different, 2 cannot be repeated are the exit codes.

    Adapters are compared bit for bit, then the log, metrics and predictions. Settings, versions, code, data, threads
    that are no longer the same are named before it starts.
    """
    import json
    import os

    try:
        recorded = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["machine"]["threads"]
    except (OSError, ValueError, KeyError) as error:
        typer.echo(f"drorl: {run_dir} has no run.json that can be read: {error}", err=True)
        raise typer.Exit(2) from error
    os.environ.setdefault("OMP_NUM_THREADS", str(recorded))  # which torch reads when it is imported, below

    from .. import reproduction

    output = output or run_dir.with_name(f"{run_dir.resolve().name}.repeated")
    try:
        run = reproduction.read_run(run_dir)
        for change in reproduction.changes(run, _recipe()):
            typer.echo(f"changed since the run: {change}", err=True)
        reproduction.repeat(run, _recipe(), run_dir, output)
        found = reproduction.compare(run_dir, output)
    except (UserError, OSError) as error:
        typer.echo(f"drorl: {error}", err=True)
        raise typer.Exit(2) from error
    for line in found or [f"equal, bit for bit: {run_dir} and {output}"]:
        typer.echo(line)
    raise typer.Exit(int(bool(found)))


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="Output directories of runs, finished or not.")],
    output: Annotated[
        Path | None, typer.Option(help="The page. Default: report.html in the run; of several comparison.html here.")
    ] = None,
) -> None:
    """Write a page about a run; about several, a page that compares them with the first.

    Metrics with intervals, paired differences where the questions are the same, settings that differ, curves. It needs
    nothing but itself to be read.
    """
    from ..report import write_report

    typer.echo(write_report(*run_dirs, output=output))


@app.command()
def export(
    run_dir: RunArgument,
    output: Annotated[Path, typer.Option(help="Directory of the models: each role's is a folder in it.")],
    role: Annotated[list[Role] | None, typer.Option(help="One of them; default: both.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the written weights; default: the base's own.")] = None,
) -> None:
    """Merge a run's adapters into their bases: models that transformers, vLLM and others load without PEFT."""
    from transformers.utils import logging

    from ..export import export_role

    logging.disable_progress_bar()
    for name in [one.value for one in role or Role]:
        export_role(run_dir, name, output / name, dtype)
        typer.echo(output / name)


@app.command()
def serve(
    source: Annotated[
        str, typer.Argument(help="A trained run, or the base model of a trainer with vllm_mode=server.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    dtype: Annotated[str, typer.Option(help="As the trainer's; auto measures on a CPU.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence, tokens; default: the model's.")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU's memory for vLLM.")] = 0.9,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="Largest rank of a trainer's adapters; default: 64.")
    ] = None,
    native_lora: Annotated[
        bool | None, typer.Option(help="Adapters as they are, not merged; default: on a GPU, and for a run.")
    ] = None,
    max_passages: Annotated[int, typer.Option(help="Most candidates of a request.")] = 200,
    max_body_mib: Annotated[float, typer.Option(help="Longest request, MiB.")] = 4.0,
) -> None:
    """Serve a run (POST /select, /answer, /v1/...), or a base model from which a trainer samples, with vLLM."""
    try:
        from ..engines.server import serve as serve_with_vllm
    except ImportError as error:
        from ..engines.vllm import import_error

        raise import_error(error) from error
    serve_with_vllm(
        source,
        host,
        port,
        dtype,
        max_model_len,
        gpu_memory_utilization,
        max_lora_rank,
        max_passages,
        max_body_mib,
        native_lora,
    )
