"""Commands about runs: train, report, serve."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .app import app


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train: the recipe nq.py, with its own options (--config FILE --setting VALUE ..., --help), in this process.

    On several devices: accelerate launch recipes/nq.py, with the same options.
    """
    import runpy
    import sys

    package = Path(__file__).parents[1]
    # In an installed drorl the recipe is inside it, in a checkout beside it.
    places = [package / "recipes" / "nq.py", package.parent / "recipes" / "nq.py"]
    recipe = next((str(path) for path in places if path.is_file()), None)
    if recipe is None:
        raise UserError(f"the recipe is not at {places[0]}: this drorl was not installed from its wheel or a checkout")
    sys.argv = [recipe, *context.args]
    runpy.run_path(recipe, run_name="__main__")


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run's output directory, with summary.json.")]) -> None:
    """Write report.html of a finished run again."""
    from ..report import write_report

    typer.echo(write_report(run_dir))


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
