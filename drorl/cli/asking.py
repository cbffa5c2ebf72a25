"""Commands that ask a trained run: evaluate, answer, chat, inspect."""

import sys
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInputError
from ..retrieval.retrievers import Place, open_retriever
from .app import FormatOption, OnError, OnErrorOption, QuietOption, RunArgument, app, show_log
from .data import Preset
from .retrieval import BM25, RetrieverName, RetrieverOption, SearchedOption, SetOption, given

if TYPE_CHECKING:
    from ..data.reading import Reading
    from ..pipeline import RAGPipeline

SHOWN_ROWS = 3
AnswerTarget = Enum("AnswerTarget", {name: name for name in ("surface", "first", "marginal")})
DtypeOption = Annotated[str, typer.Option(help="Of the models; auto measures on a CPU.")]
TargetOption = Annotated[AnswerTarget, typer.Option(help="The gold answer whose likelihood is asked.")]


def _load(run_dir: Path, dtype: str) -> "RAGPipeline":
    from transformers.utils import logging

    from ..pipeline import RAGPipeline

    logging.disable_progress_bar()
    return RAGPipeline.from_pretrained(run_dir, dtype)


def _reading(path: Path, format: str, on_error: OnError, pipeline: "RAGPipeline", **needs: Any) -> "Reading":
    """The rows of a file; each has what a run needs."""
    from ..data.reading import Reading

    settings = pipeline.settings
    needs = {"num_selected": settings.num_selected, "need_scores": settings.retrieval_prior_weight != 0} | needs
    return Reading(path, format=format, on_error=on_error.value, **needs)


def _say_skipped(skipped: Counter[str], quiet: bool) -> None:
    if skipped and not quiet:
        typer.echo(f"skipped {skipped.total():,} rows: {dict(skipped)}", err=True)


@app.command()
def evaluate(
    run_dir: RunArgument,
    input: Annotated[Path, typer.Option(help="Rows with candidates and answers, in any format.")],
    output: Annotated[
        Path | None, typer.Option(help="Keeps the predictions, for drorl score; begun again, it goes on.")
    ] = None,
    format: FormatOption = "auto",
    preset: Annotated[Preset, typer.Option(help="Whose meaning of the metrics.")] = Preset.kilt,
    answer_target: TargetOption = AnswerTarget.surface,
    num_samples: Annotated[int, typer.Option(help="Permutations of iw_elbo.", min=1)] = 8,
    dtype: DtypeOption = "auto",
    on_error: OnErrorOption = OnError.fail,
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON: mean, ci95 and n of each score.")] = False,
) -> None:
    """Evaluate a run on held-out rows, greedily: means with 95 % bootstrap intervals over questions."""
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from ..metrics import PRESETS
    from ..pipeline import run_folder
    from ..predictions import as_json as scores_as_json
    from ..predictions import measure_file, predict_file
    from ..terminal import scores_view

    run_dir = run_folder(run_dir)
    pipeline = _load(run_dir, dtype)
    reading = _reading(input, format, on_error, pipeline, need_answers=True)
    with TemporaryDirectory() as aside:
        output = output or Path(aside) / "predictions.jsonl"
        made = predict_file(pipeline, run_dir, reading, output, answer_target.value, num_samples, quiet)
        scores = measure_file(output, pipeline.settings.num_candidates, PRESETS[preset.value])
    _say_skipped(made.skipped, quiet)
    if as_json:
        typer.echo(scores_as_json(*scores))
    else:
        Console().print(scores_view(*scores))


@app.command()
def answer(
    run_dir: RunArgument,
    query: Annotated[str | None, typer.Option(help="One question.")] = None,
    input: Annotated[
        Path | None, typer.Option(help="Many, in any format; with candidates, or to be searched.")
    ] = None,
    corpus: SearchedOption = None,
    retriever: Annotated[RetrieverName | None, typer.Option(help="What searches; of a corpus bm25.")] = None,
    set_: SetOption = None,
    format: FormatOption = "auto",
    dtype: DtypeOption = "auto",
    on_error: OnErrorOption = OnError.fail,
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each question.")] = False,
) -> None:
    """Answer questions: the passages as the run ranks them, the answer, and what it was taken from."""
    import json

    from rich.console import Console

    from ..terminal import answer_record, answer_view, shown

    if (query is None) == (input is None):
        raise typer.BadParameter("give one question, --query, or a file of them, --input")
    if searches := corpus is not None or retriever is not None:
        show_log(quiet)
    elif query is not None:
        raise typer.BadParameter("a question alone has no passages to answer from: give --corpus or --retriever")
    elif set_:
        raise typer.BadParameter("--set is for a retriever: give --corpus or --retriever")
    if query is not None and not query.isprintable():
        raise typer.BadParameter(f"the question holds what is no text: {query!r}")
    search = open_retriever((retriever or BM25).value, Place(corpus), given(set_)) if searches else None
    pipeline, console = _load(run_dir, dtype), Console()
    if input is None:
        rows: Iterator[dict] = iter([{"id": None, "query": query, "candidates": _found(pipeline, search, str(query))}])
    else:
        needs = {} if search is None else {"num_selected": 0, "need_scores": False}
        rows = _with_candidates(_reading(input, format, on_error, pipeline, **needs), pipeline, search, quiet)
    for row in rows:
        answered = pipeline.answer(row["query"], row["candidates"])
        if as_json:
            typer.echo(json.dumps(answer_record(row, answered), ensure_ascii=False))
        else:
            console.print(shown(row["query"], "bold"))
            console.print(answer_view(answered))


def _found(pipeline: "RAGPipeline", search: Any, query: str) -> list[dict]:
    """The N passages that are found for a query.

    Raises:
        InvalidInputError: there are fewer than K.
    """
    [found] = search.search([query], pipeline.settings.num_candidates)
    if len(found) < (least := pipeline.settings.num_selected):
        raise InvalidInputError(f"{len(found)} passages were found for {query[:80]!r}, and the run selects {least}")
    return found


def _with_candidates(reading: "Reading", pipeline: "RAGPipeline", search: Any, quiet: bool) -> Iterator[dict]:
    """Rows with their candidates, searched for or as they are; a file without any is refused."""
    for row in reading:
        try:
            yield row if search is None else {**row, "candidates": _found(pipeline, search, row["query"])}
        except InvalidInputError as error:
            if reading.on_error == "fail":
                raise
            reading.skipped[str(error)] += 1
    _say_skipped(reading.skipped, quiet)
    if not reading.number:
        raise InvalidInputError(f"{reading.path} has no questions")


@app.command()
def chat(
    run_dir: RunArgument,
    corpus: SearchedOption = None,
    retriever: RetrieverOption = BM25,
    set_: SetOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Try a run by hand: a question a line; Ctrl-D or Ctrl-C ends it."""
    from io import TextIOWrapper

    from rich.console import Console

    from ..terminal import answer_view

    show_log(False)
    search = open_retriever(retriever.value, Place(corpus), given(set_))
    pipeline, console = _load(run_dir, dtype), Console()
    prompt = "question> " if sys.stdin.isatty() else ""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is piped in may be anything
    try:
        while True:
            if query := input(prompt).strip():
                try:
                    console.print(answer_view(pipeline.answer(query, _found(pipeline, search, query))))
                except InvalidInputError as error:
                    console.print(str(error), markup=False)
    except (EOFError, KeyboardInterrupt):
        console.print()


@app.command()
def inspect(
    rows: Annotated[Path, typer.Argument(help="Rows, in any format.")],
    run: Annotated[Path | None, typer.Option(help="A trained run: what its E-step makes of them.")] = None,
    row: Annotated[int | None, typer.Option(help="The number of one, from 1. Default: the first few.", min=1)] = None,
    num_generations: Annotated[int, typer.Option(help="Permutations drawn of each query.", min=1)] = 8,
    proposal_temperature: Annotated[float, typer.Option(help="Of what they are drawn from.", min=0.01)] = 1.0,
    answer_target: TargetOption = AnswerTarget.surface,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    format: FormatOption = "auto",
    dtype: DtypeOption = "auto",
    on_error: OnErrorOption = OnError.fail,
    quiet: QuietOption = False,
) -> None:
    """Show rows: query, answers, candidates (✓ holds an answer, ★ gold); with a run, what each permutation got."""
    from rich.console import Console

    from ..data.reading import Reading
    from ..inspection import weigh_row
    from ..terminal import row_view, weights_view

    console, pipeline = Console(), None
    reading = Reading(rows, format=format, on_error=on_error.value)
    if run is not None:
        pipeline = _load(run, dtype)
        reading = _reading(rows, format, on_error, pipeline, need_answers=True)
    chosen = (found for found in reading if row in (None, reading.number))
    count = 0
    for found in islice(chosen, SHOWN_ROWS if row is None else 1):
        count += 1
        console.rule(f"row {reading.number}")
        console.print(row_view(found, None if pipeline is None else pipeline.settings.num_candidates))
        if pipeline is not None:
            drawing = answer_target.value, seed, proposal_temperature
            console.print(weights_view(weigh_row(pipeline, found, num_generations, *drawing)))
    _say_skipped(reading.skipped, quiet)
    if not count:
        raise InvalidInputError(f"{rows} has no rows" if row is None else f"{rows} has no row {row}")
