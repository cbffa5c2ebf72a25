"""Commands about retrieval: index, retrieve, serve-retriever."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .app import FormatOption, OnError, OnErrorOption, OutputOption, QuietOption, app

RetrieverName = Enum("RetrieverName", {"bm25": "bm25"})
CorpusOption = Annotated[
    Path,
    typer.Option(help="Passages: a file (psgs_w100.tsv, FlashRAG, BEIR, id/title/text), or a folder of drorl index."),
]


def searcher(corpus: Path, retriever: RetrieverName):
    """Returns what searches a corpus; one in a file is indexed once, in the cache."""
    from ..retrieval.bm25 import BM25
    from ..retrieval.run import corpus_of

    made = corpus_of(corpus)
    folder = made.folder / retriever.value
    return BM25(made, folder) if corpus.is_dir() else BM25.build(made, folder)


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
    from ..retrieval.bm25 import BM25, BM25Settings
    from ..retrieval.corpus import Corpus

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
    from ..retrieval.run import retrieve_rows

    retrieved = retrieve_rows(searcher(corpus, retriever), queries, output, top_k, format, on_error.value, quiet)
    if not quiet:
        typer.echo(retrieved, err=True)


@app.command()
def serve_retriever(
    corpus: CorpusOption,
    retriever: Annotated[RetrieverName, typer.Option(help="What searches.")] = RetrieverName.bm25,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any that is free.", min=0, max=65535)] = 8000,
) -> None:
    """Serve a corpus over the /retrieve protocol of Search-R1, until SIGTERM."""
    from ..retrieval.bm25 import BM25
    from ..retrieval.run import corpus_of
    from ..retrieval.server import listen, serve

    sock = listen(host, port)  # first: who asks while the index is made is answered when it is
    made = corpus_of(corpus)
    folder = made.folder / retriever.value
    searcher = BM25(made, folder) if corpus.is_dir() else BM25.build(made, folder)
    typer.echo(f"{len(made):,} passages on http://{host}:{sock.getsockname()[1]}", err=True)
    serve(searcher, sock)
