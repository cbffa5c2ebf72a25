"""Retrieval: scores by the formula, the same candidates always, indexes that survive being killed."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from drorl.cli import app
from drorl.data.rows import RowError, validate_rows
from drorl.errors import InvalidInputError
from drorl.retrieval import bm25, corpus
from drorl.retrieval.bm25 import BM25, BM25Settings, terms_of
from drorl.retrieval.corpus import Corpus

run = CliRunner().invoke
WORDS = "river mountain lake city king war music train bridge castle forest island poet novel treaty harbour".split()


def passages(path: Path, count: int, seed: int = 0) -> Path:
    """A file of made-up passages, some of which are equal but for their ids."""
    draw = random.Random(seed)
    lines = []
    for i in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(2, 30)))
        lines.append({"id": f"p{i}", "title": draw.choice(WORDS).title(), "text": f"{text} the Rivers, {i % 7}x."})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def folders(path: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("settings", [BM25Settings(), BM25Settings(1.2, 0.75, None, False)], ids=["stemmed", "plain"])
def test_scores_are_lucenes(tmp_path: Path, settings: BM25Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 passages: each score is the formula's, written out here in float64, within 1e-5; in any number of shards."""
    monkeypatch.setattr(corpus, "SHARD_PASSAGES", 17)
    monkeypatch.setattr(bm25, "SHARD_PASSAGES", 17)
    store = Corpus.build(passages(tmp_path / "p.jsonl", 100), tmp_path / "c")
    index = BM25.build(store, tmp_path / "i", settings)
    documents = [terms_of(f"{store[i]['title']} {store[i]['text']}", settings) for i in range(len(store))]
    mean = sum(map(len, documents)) / len(documents)
    df = Counter(term for document in documents for term in set(document))
    for query in ("rivers of the king", "a bridge, a bridge to the island", "treaty"):
        wanted = {}
        for i, document in enumerate(documents):
            tf, score = Counter(document), 0.0
            for term in terms_of(query, settings):
                idf = math.log(1 + (100 - df[term] + 0.5) / (df[term] + 0.5))
                norm = settings.k1 * (1 - settings.b + settings.b * len(document) / mean)
                score += idf * tf[term] / (tf[term] + norm)
            if score > 0:
                wanted[f"p{i}"] = score
        [found] = index.search([query], 100)
        assert {c["id"] for c in found} == wanted.keys()
        assert max(abs(c["score"] - wanted[c["id"]]) for c in found) < 1e-5
        assert [c["rank"] for c in found] == list(range(1, len(found) + 1))
        order = sorted(found, key=lambda c: (-c["score"], int(c["id"][1:])))
        assert found == order  # equal ones in the corpus' order
        for k in (1, 5, 20):
            assert index.search([query], k) == [found[:k]]


def test_queries_that_find_nothing(tmp_path: Path) -> None:
    """Stop words alone, unknown words, nothing; and more candidates than there are passages."""
    index = BM25.build(Corpus.build(passages(tmp_path / "p.jsonl", 5), tmp_path / "c"), tmp_path / "i")
    assert index.search(["the of and", "zebra", "", "river"], 0) == [[], [], [], []]
    found = index.search(["the of and", "zebra", "", "river"], 50)
    assert [len(f) for f in found] == [0, 0, 0, 5]


def test_an_index_is_used_only_for_its_own_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus that has changed is made again, and so is its index; nothing old is ever searched."""
    source = passages(tmp_path / "p.jsonl", 30)
    store = Corpus.build(source, tmp_path / "c")
    index = BM25.build(store, tmp_path / "i")
    before = index.search(["river"], 3)
    made = (tmp_path / "i" / "data.csc.index.npy").stat().st_mtime_ns
    assert BM25.build(Corpus.build(source, tmp_path / "c"), tmp_path / "i").search(["river"], 3) == before
    assert (tmp_path / "i" / "data.csc.index.npy").stat().st_mtime_ns == made  # not made twice
    with monkeypatch.context() as patched:  # nor what an older drorl has indexed
        patched.setattr(bm25, "VERSION", bm25.VERSION + 1)
        with pytest.raises(InvalidInputError, match="or version"):
            BM25(store, tmp_path / "i")
    other = Corpus.build(passages(tmp_path / "p.jsonl", 31, seed=1), tmp_path / "c")
    assert len(other) == 31
    with pytest.raises(InvalidInputError, match="of another corpus or version"):
        BM25(other, tmp_path / "i")
    assert BM25.build(other, tmp_path / "i").search(["river"], 3) != before
    with pytest.raises(InvalidInputError, match="holds no corpus"):
        Corpus(tmp_path / "none")
    with pytest.raises(InvalidInputError, match="holds no BM25 index"):
        BM25(other, tmp_path / "none")


def test_a_corpus_is_looked_at(tmp_path: Path) -> None:
    """No passages, an id that occurs twice (wherever), a text that is missing."""
    source = passages(tmp_path / "p.jsonl", 10)
    lines = source.read_text().splitlines()
    source.write_text("\n".join([*lines, lines[3]]))
    with pytest.raises(RowError, match="row 11, field 'id': equal to that of passage 4"):
        Corpus.build(source, tmp_path / "c")
    with pytest.raises(InvalidInputError, match="holds no corpus"):
        Corpus(tmp_path / "c")
    source.write_text(lines[0] + '\n{"id": "x", "title": "T", "text": " "}\n')
    with pytest.raises(RowError, match="row 2, field 'text': empty text"):
        Corpus.build(source, tmp_path / "c")
    assert len(Corpus.build(source, tmp_path / "c", on_error="skip")) == 1
    source.write_text("")
    with pytest.raises(InvalidInputError, match="has no passages"):
        Corpus.build(source, tmp_path / "c")


BUILD = """
import sys, time
from pathlib import Path
from drorl.retrieval import bm25, corpus
corpus.SHARD_PASSAGES = bm25.SHARD_PASSAGES = 50
slow = bm25.terms_of
def terms_of(*arguments):
    time.sleep(float(sys.argv[2]))
    return slow(*arguments)
bm25.terms_of = terms_of
folder = Path(sys.argv[1])
bm25.BM25.build(corpus.Corpus.build(folder / "p.jsonl", folder / sys.argv[3] / "c"), folder / sys.argv[3] / "i")
"""


def test_killed_while_indexing(tmp_path: Path) -> None:
    """kill -9 in the middle: the second run keeps the finished shards, and the index is the same to the byte."""
    passages(tmp_path / "p.jsonl", 1000)
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    subprocess.run([*command, "0", "whole"], check=True)
    process = subprocess.Popen([*command, "0.002", "killed"])
    parts = tmp_path / "killed" / "i" / "shards"
    deadline = time.monotonic() + 60
    while not (parts / "000004.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.npz")}
    assert 5 <= len(finished) < 20
    subprocess.run([*command, "0", "killed"], check=True)
    assert folders(tmp_path / "whole") == folders(tmp_path / "killed")


def test_the_index_is_bm25s(tmp_path: Path) -> None:
    """bm25s opens what was built here, and finds the same."""
    import bm25s

    store = Corpus.build(passages(tmp_path / "p.jsonl", 60), tmp_path / "c")
    index = BM25.build(store, tmp_path / "i")
    theirs = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    theirs.index([terms_of(f"{p['title']} {p['text']}", index.settings) for b in store.blocks(0, 7) for p in b])
    for query in ("river king", "novel treaty harbour"):
        terms = terms_of(query, index.settings)
        own = bm25s.BM25.load(tmp_path / "i").get_scores(terms)
        np.testing.assert_allclose(own, theirs.get_scores(terms), rtol=1e-5)


def test_the_commands_from_files_to_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus in a file is indexed once, in the cache; one in a folder by drorl index; both give the same rows."""
    monkeypatch.setenv("DRORL_CACHE", str(tmp_path / "cache"))
    source = passages(tmp_path / "p.jsonl", 200)
    questions = [
        {"question": "river king?", "golden_answers": ["x"], "metadata": {"gold_ids": ["p3", "p4"]}},
        {"question": "the of", "golden_answers": ["x"]},
        {"question": "treaty harbour?", "golden_answers": ["x"]},
        {"question": "lake?", "golden_answers": ["x"], "metadata": {"gold_titles": ["Lake", "Kin"]}},
    ]
    queries = tmp_path / "q.jsonl"
    queries.write_text("".join(json.dumps(question) + "\n" for question in questions))
    arguments = ["--queries", str(queries), "--top-k", "150", "--output"]
    done = run(app, ["retrieve", "--corpus", str(source), *arguments, str(tmp_path / "a.jsonl")])
    assert (done.exit_code, done.stdout) == (0, ""), done.exception
    assert "4 rows (flashrag)" in done.stderr and "1 rows have no candidates" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    gold = {c["id"] for c in rows[0]["candidates"] if c["is_gold"]}
    assert gold == {c["id"] for c in rows[0]["candidates"]} & {"p3", "p4"}
    assert not any("is_gold" in c for c in rows[2]["candidates"])
    assert {c["title"] for c in rows[3]["candidates"] if c["is_gold"]} == {"Lake"}  # whole titles, and no others
    assert {c["title"] for c in rows[3]["candidates"] if not c["is_gold"]}.isdisjoint({"Lake"})
    assert [c["rank"] for c in rows[2]["candidates"]] == list(range(1, len(rows[2]["candidates"]) + 1))
    validate_rows([rows[0], rows[2]], 5, require_scores=True)

    assert run(app, ["index", "--corpus", str(source), "--output", str(tmp_path / "c")]).exit_code == 0
    done = run(app, ["retrieve", "--corpus", str(tmp_path / "c"), *arguments, str(tmp_path / "b.jsonl")])
    assert done.exit_code == 0
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    assert run(app, ["index", "--corpus", str(source), "--output", str(tmp_path / "c"), "--b", "0.9"]).exit_code == 0
    run(app, ["retrieve", "--corpus", str(tmp_path / "c"), *arguments, str(tmp_path / "b.jsonl")])
    assert (tmp_path / "b.jsonl").read_bytes() != (tmp_path / "a.jsonl").read_bytes()  # of the other index
