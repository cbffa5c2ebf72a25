"""Commands about retrieval: index, retrieve, serve-retriever."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..retrieval.retrievers import RETRIEVERS, Place, open_retriever
from .app import FormatOption, OnError, OnErrorOption, OutputOption, QuietOption, app, show_log

RetrieverName = Enum("RetrieverName", {name: name for name in RETRIEVERS})
BM25 = RetrieverName["bm25"]
RetrieverOption = Annotated[RetrieverName, typer.Option(help="What searches.")]
SearchedOption = Annotated[Path | None, typer.Option(help="Passages: a file, or a folder of drorl index.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of the retriever, as often as needed. bm25: k1, b, stemmer (a language, or none), stop_words. "
        "dense: model, index (flat, ivfpq, hnsw), query_prefix, passage_prefix, probes, refine. hybrid: of "
        "(bm25,dense), constant, depth, and those of its retrievers, such as bm25.k1. http: url, timeout, batch_size, "
        "tries. milvus: url, model, query_prefix, passage_prefix. colbert: model, device.",
    ),
]


@app.command()
def index(
    corpus: Annotated[Path, typer.Option(help="Passages: psgs_w100.tsv, FlashRAG, BEIR, or id, title, text.")],
    output: Annotated[Path, typer.Option(help="Folder of the corpus and its indexes.")],
    retriever: RetrieverOption = BM25,
    set_: SetOption = None,
    format: FormatOption = "auto",
    on_error: OnErrorOption = OnError.fail,
    quiet: QuietOption = False,
) -> None:
    """Index a corpus; a run that was killed goes on where it was. Several retrievers can share a folder."""
    show_log(quiet)
    place = Place(corpus, output, format, on_error.value)
    open_retriever(retriever.value, place, given(set_))
    if not quiet:
        typer.echo(f"{len(place.corpus):,} passages in {output}", err=True)


@app.command()
def retrieve(
    queries: Annotated[Path, typer.Option(help="Questions in any format that drorl prepare reads.")],
    output: OutputOption,
    corpus: SearchedOption = None,
    retriever: RetrieverOption = BM25,
    top_k: Annotated[int, typer.Option(help="Candidates of each question.", min=1)] = 20,
    set_: SetOption = None,
    format: FormatOption = "auto",
    on_error: OnErrorOption = OnError.fail,
    quiet: QuietOption = False,
) -> None:
    """Find candidates for questions. A corpus in a file is indexed once, in the cache."""
    from ..retrieval.run import retrieve_rows

    show_log(quiet)
    searcher = open_retriever(retriever.value, Place(corpus, on_error=on_error.value), given(set_))
    retrieved = retrieve_rows(searcher, queries, output, top_k, format, on_error.value, quiet)
    if not quiet:
        typer.echo(retrieved, err=True)


@app.command()
def serve_retriever(
    corpus: SearchedOption = None,
    retriever: RetrieverOption = BM25,
    set_: SetOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any that is free.", min=0, max=65535)] = 8000,
    quiet: QuietOption = False,
) -> None:
    """Serve a retriever over the /retrieve protocol of Search-R1, until SIGTERM."""
    from ..retrieval.server import listen, serve

    show_log(quiet)
    sock = listen(host, port)  # first: who asks while the index is made is answered when it is
    searcher = open_retriever(retriever.value, Place(corpus), given(set_))
    if not quiet:
        typer.echo(f"{retriever.value} on http://{host}:{sock.getsockname()[1]}", err=True)
    serve(searcher, sock)


def given(settings: list[str] | None) -> dict[str, str]:
    """Returns what was set, by name."""
    pairs = [setting.partition("=") for setting in settings or []]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise typer.BadParameter(f"--set {wrong[0]}: write a name, =, and a value")
    return {name: value for name, _, value in pairs}
