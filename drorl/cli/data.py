"""Commands about data: setup, prepare, score."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .app import FormatOption, OnError, OnErrorOption, OutputOption, QuietOption, app

Preset = Enum("Preset", {name: name for name in ("kilt", "wow", "hotpot", "2wiki", "musique", "dro-official")})
Punct = Enum("Punct", {name: name for name in ("delete", "space")})


@app.command()
def setup() -> None:
    """Build the embedded model and data sets into the cache (DRORL_CACHE) and print what they hold."""
    from rich.console import Console

    from ..data import vitalhop, vitalqa
    from ..models import build_smollm2

    vitalqa.load_vitalqa()
    vitalhop.load_vitalhop()
    typer.echo(f"model: {build_smollm2()}")
    for data in (vitalqa, vitalhop):
        data.print_facts(Console())


@app.command()
def prepare(
    input: Annotated[Path, typer.Option(help="Questions in any format, a BEIR folder, or a data set of the hub.")],
    output: OutputOption,
    format: FormatOption = "auto",
    aliases: Annotated[Path | None, typer.Option(help="2Wiki's id_aliases.json.")] = None,
    keep_unanswerable: Annotated[bool, typer.Option("--keep-unanswerable", help="MuSiQue's other half.")] = False,
    split: Annotated[str, typer.Option(help="Of a BEIR folder or a data set.")] = "test",
    run: Annotated[Path | None, typer.Option(help="Candidates from a TREC run; needs --corpus.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="A file with the passages of the run; none of them may be broken.")
    ] = None,
    qrels: Annotated[Path | None, typer.Option(help="TREC's judgements: which candidates are gold.")] = None,
    top_k: Annotated[int, typer.Option(help="Candidates of each question; with --run.", min=1)] = 20,
    on_error: OnErrorOption = OnError.fail,
    quiet: QuietOption = False,
) -> None:
    """Turn any format into rows: id, query, answers, candidates, metadata."""
    from ..data.packages import sha256_of
    from ..data.prepare import write_rows
    from ..data.reading import Reading, read_aliases
    from ..data.trec import read_qrels, read_run
    from ..retrieval.ranked import Ranked

    if (run is None) != (corpus is None):
        raise typer.BadParameter("a run names its passages by their ids, and the corpus holds their texts: give both")
    if qrels is not None and run is None:
        raise typer.BadParameter("--qrels marks the candidates of a run: give --run")
    options = ({} if aliases is None else {"aliases": read_aliases(aliases)}) | (
        {"keep_unanswerable": True} if keep_unanswerable else {}
    )
    reading = Reading(input, format=format, on_error=on_error.value, options=options, split=split)
    change, depends = None, []
    if run is not None and corpus is not None:
        ranking, judged = read_run(run), None if qrels is None else read_qrels(qrels)
        change, depends = Ranked(ranking, corpus, judged, top_k), [ranking, sha256_of(corpus), judged, top_k]
    prepared = write_rows(reading, output, change, depends, quiet)
    if not quiet:
        typer.echo(prepared, err=True)


@app.command()
def score(
    input: Annotated[Path, typer.Option(help='JSON lines or an array of {"prediction": str, "answers": [str, ...]}.')],
    preset: Annotated[Preset, typer.Option(help="Whose meaning of the metrics.")] = Preset.kilt,
    punct: Annotated[Punct | None, typer.Option(help="Punctuation is deleted, or becomes a space.")] = None,
    hotpot_yesno: Annotated[
        bool | None, typer.Option(help="F1 is 0 where yes, no or noanswer meets anything else.")
    ] = None,
    first_answer_only: Annotated[bool | None, typer.Option(help="Only the first gold answer counts.")] = None,
    on_error: OnErrorOption = OnError.fail,
    quiet: QuietOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON, fractions; what else there is stands above the last line.")
    ] = False,
) -> None:
    """Score predictions: exact match and F1 against the best of all gold answers, and whatever else the rows carry."""
    import json
    from dataclasses import replace

    from ..metrics import PRESETS
    from ..scoring import score_file

    switches = {"punct": punct and punct.value, "hotpot_yesno": hotpot_yesno, "first_answer_only": first_answer_only}
    settings = replace(PRESETS[preset.value], **{name: value for name, value in switches.items() if value is not None})
    scores = score_file(input, settings, on_error.value)
    if scores.skipped and not quiet:
        typer.echo(f"skipped {scores.skipped.total():,} rows: {dict(scores.skipped)}", err=True)
    if as_json and scores.more:
        typer.echo(json.dumps(scores.more))
    if as_json:
        typer.echo(json.dumps({"exact_match": scores.exact_match, "f1": scores.f1, "n": scores.n}))
    else:
        shown = ["-" if mean is None else f"{100 * mean:.2f} %" for mean in (scores.exact_match, scores.f1)]
        typer.echo(f"exact match {shown[0]}, F1 {shown[1]}, {scores.n:,} predictions")
        for name, mean in scores.more.items():
            typer.echo(f"{name} {100 * mean:.2f} %")
