"""The `drorl` command."""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Retrieval-augmented generation, trained with DRO.")


OnError = Enum("OnError", {name: name for name in ("fail", "skip")})
Preset = Enum("Preset", {name: name for name in ("kilt", "hotpot", "dro-official")})
RetrieverName = Enum("RetrieverName", {"bm25": "bm25"})
Punct = Enum("Punct", {name: name for name in ("delete", "space")})
OnErrorOption = Annotated[OnError, typer.Option(help="Stop at a broken record, or leave it out and count it.")]
FormatOption = Annotated[str, typer.Option(help="A format's name; auto goes by the first record.")]
OutputOption = Annotated[Path, typer.Option(help="Rows as JSON lines; packed if the name ends in .gz or .zst.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Nothing on stderr but errors.")]


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
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON, fractions.")] = False,
) -> None:
    """Score predictions: exact match and F1 against the best of all gold answers."""
    import json
    from dataclasses import replace

    from .metrics import PRESETS
    from .scoring import score_file

    switches = {"punct": punct and punct.value, "hotpot_yesno": hotpot_yesno, "first_answer_only": first_answer_only}
    settings = replace(PRESETS[preset.value], **{name: value for name, value in switches.items() if value is not None})
    scores = score_file(input, settings, on_error.value)
    if scores.skipped and not quiet:
        typer.echo(f"skipped {scores.skipped.total():,} rows: {dict(scores.skipped)}", err=True)
    if as_json:
        typer.echo(json.dumps({"exact_match": scores.exact_match, "f1": scores.f1, "n": scores.n}))
    else:
        shown = ["-" if mean is None else f"{100 * mean:.2f} %" for mean in (scores.exact_match, scores.f1)]
        typer.echo(f"exact match {shown[0]}, F1 {shown[1]}, {scores.n:,} predictions")


@app.command()
def prepare(
    input: Annotated[Path, typer.Option(help="Questions, in any format that people keep them in, or a BEIR folder.")],
    output: OutputOption,
    format: FormatOption = "auto",
    aliases: Annotated[Path | None, typer.Option(help="2Wiki's id_aliases.json.")] = None,
    keep_unanswerable: Annotated[bool, typer.Option("--keep-unanswerable", help="MuSiQue's other half.")] = False,
    split: Annotated[str, typer.Option(help="Of a BEIR folder.")] = "test",
    run: Annotated[Path | None, typer.Option(help="Candidates from a TREC run; needs --corpus.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="The passages of the run.")] = None,
    qrels: Annotated[Path | None, typer.Option(help="TREC's judgements: which candidates are gold.")] = None,
    top_k: Annotated[int, typer.Option(help="Candidates of each question, from the run.", min=1)] = 20,
    on_error: OnErrorOption = OnError.fail,
    quiet: QuietOption = False,
) -> None:
    """Turn any format into rows: id, query, answers, candidates, metadata."""
    from .data.prepare import write_rows
    from .data.reading import Reading, read_aliases
    from .data.trec import read_qrels, read_run
    from .retrieval.ranked import Ranked

    if (run is None) != (corpus is None):
        raise typer.BadParameter("a run names its passages by their ids, and the corpus holds their texts: give both")
    options = ({} if aliases is None else {"aliases": read_aliases(aliases)}) | (
        {"keep_unanswerable": True} if keep_unanswerable else {}
    )
    reading = Reading(input, format=format, on_error=on_error.value, options=options, split=split)
    change, depends = None, []
    if run is not None and corpus is not None:
        ranking, judged = read_run(run), None if qrels is None else read_qrels(qrels)
        change, depends = Ranked(ranking, corpus, judged, top_k), [ranking, str(corpus), judged, top_k]
    prepared = write_rows(reading, output, change, depends, quiet)
    if not quiet:
        typer.echo(prepared, err=True)


CorpusOption = Annotated[
    Path,
    typer.Option(help="Passages: a file (psgs_w100.tsv, FlashRAG, BEIR, id/title/text), or a folder of drorl index."),
]


@app.command()
def index(
    corpus: CorpusOption,
    output: Annotated[Path, typer.Option(help="Folder of the corpus and its index.")],
    retriever: Annotated[RetrieverName, typer.Option(help="What is to search it.")] = RetrieverName.bm25,
    format: FormatOption = "auto",
    on_error: OnErrorOption = OnError.fail,
    k1: Annotated[float, typer.Option(help="BM25: how soon further occurrences count less.")] = 0.9,
    b: Annotated[float, typer.Option(help="BM25: how much length counts, 0 to 1.", min=0, max=1)] = 0.4,
    stemmer: Annotated[str, typer.Option(help="BM25: a language of Snowball, or none.")] = "english",
) -> None:
    """Index a corpus; a run that was killed goes on where it was."""
    from .retrieval.bm25 import BM25, BM25Settings
    from .retrieval.corpus import Corpus

    settings = BM25Settings(k1, b, None if stemmer == "none" else stemmer)
    made = Corpus.build(corpus, output, format, on_error.value)
    BM25.build(made, output / retriever.value, settings)
    typer.echo(f"{len(made):,} passages in {output}", err=True)


@app.command()
def retrieve(
    corpus: CorpusOption,
    queries: Annotated[Path, typer.Option(help="Questions in any format that drorl prepare reads.")],
    output: OutputOption,
    retriever: Annotated[RetrieverName, typer.Option(help="What searches.")] = RetrieverName.bm25,
    top_k: Annotated[int, typer.Option(help="Candidates of each question.", min=1)] = 20,
    format: FormatOption = "auto",
    on_error: OnErrorOption = OnError.fail,
    quiet: QuietOption = False,
) -> None:
    """Find candidates for questions. A corpus in a file is indexed once, in the cache."""
    from .retrieval.bm25 import BM25
    from .retrieval.run import corpus_of, retrieve_rows

    made = corpus_of(corpus)
    folder = made.folder / retriever.value
    searcher = BM25(made, folder) if corpus.is_dir() else BM25.build(made, folder)
    retrieved = retrieve_rows(searcher, queries, output, top_k, format, on_error.value, quiet)
    if not quiet:
        typer.echo(retrieved, err=True)


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
        from .engines.server import serve as serve_with_vllm
    except ImportError as error:
        from .engines.vllm import import_error

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


def main() -> None:
    """Entry point of the `drorl` command: a user's mistake is answered by one line."""
    try:
        app()
    except (UserError, OSError) as error:  # such as a full disk
        sys.exit(f"drorl: {error}")
    except ModuleNotFoundError as error:
        if error.name not in ("bm25s", "Stemmer"):
            raise
        sys.exit(f"drorl: {error.name} is not installed: pip install 'drorl[retrieval]'")
