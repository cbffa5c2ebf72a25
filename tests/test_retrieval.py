"""Retrieval: scores by the formula, the same candidates always, indexes that survive being killed."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from processes import kill_once
from typer.testing import CliRunner

from drorl.cli import app
from drorl.data.rows import RowError, validate_rows
from drorl.errors import InvalidInputError
from drorl.retrieval import bm25, corpus
from drorl.retrieval.bm25 import BM25, BM25Settings, terms_of
from drorl.retrieval.corpus import Corpus
from drorl.retrieval.retrievers import Place, open_retriever, settings_of
from drorl.retrieval.run import retrieve_rows

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


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRORL_CACHE", str(tmp_path_factory.mktemp("cache")))


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


def test_lists_that_are_not_read_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 passages of words that are rare or everywhere: the same as adding all lists up, to the last bit."""
    monkeypatch.setattr(corpus, "SHARD_PASSAGES", 700)
    monkeypatch.setattr(bm25, "SHARD_PASSAGES", 700)
    draw, words = random.Random(5), [f"word{i}" for i in range(300)]
    weights = [1 / (i + 1) for i in range(300)]
    lines = [
        {"id": f"{i}", "title": "", "text": " ".join(draw.choices(words, weights, k=draw.randint(2, 40)))}
        for i in range(3000)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = BM25.build(Corpus.build(tmp_path / "p.jsonl", tmp_path / "c"), tmp_path / "i", BM25Settings(stemmer=None))
    queries = [
        " ".join(draw.choices(words, k=draw.randint(1, 5)) + draw.choices(words, weights, k=5)) for _ in range(99)
    ]
    looked_up: list[int] = []
    real = np.searchsorted
    monkeypatch.setattr(np, "searchsorted", lambda where, what: (looked_up.append(len(what)), real(where, what))[1])
    for k in (1, 5, 20, 200):
        found = index.search(queries, k)
        for query, candidates in zip(queries, found, strict=True):
            scores = np.zeros(3000, dtype=np.float32)
            postings = [index._postings(*term) for term in index._known_terms(query)]
            for passages, added, _ in sorted(postings, key=lambda pair: len(pair[0])):
                scores[passages] += added
            wanted = [i for i in np.lexsort((range(3000), -scores))[:k].tolist() if scores[i] > 0]
            assert [(int(c["id"]), c["score"]) for c in candidates] == [(i, float(scores[i])) for i in wanted]
        assert BM25(index.corpus, tmp_path / "i", threads=1).search(queries, k) == found
        assert BM25(index.corpus, tmp_path / "i", threads=7).search(queries, k) == found
    assert len(looked_up) > 300 and np.median(looked_up) < 300  # it is done, and for few passages


def test_a_query_as_long_as_a_text_may_be(tmp_path: Path) -> None:
    """100,000 different terms, and 100,000 times one: time in proportion. The limit, 20 s of the processor, is several
    times what one core takes, and a tenth of what it is where each term adds up the bounds of all others."""
    words = [f"w{i:06}" for i in range(100_000)]
    lines = [{"id": "all", "text": " ".join(words)}, *({"id": f"{i}", "text": words[i]} for i in range(4))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = BM25Settings(stemmer=None)
    index = BM25.build(Corpus.build(tmp_path / "p.jsonl", tmp_path / "c"), tmp_path / "i", settings)
    start = time.process_time()
    [every] = index.search([" ".join(words)], 2)
    [one] = index.search([" ".join(["w000001"] * 100_000)], 2)
    assert time.process_time() - start < 20
    assert [c["id"] for c in every] == ["all", "0"] and [c["id"] for c in one] == ["1", "all"]
    [once] = index.search(["w000001"], 2)
    assert [c["score"] for c in one] == pytest.approx([100_000 * c["score"] for c in once], rel=1e-5)


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
    with pytest.raises(InvalidInputError, match="was made with BM25Settings.k1=0.9"):
        BM25(other, tmp_path / "i", BM25Settings(k1=2.0))
    with monkeypatch.context() as patched:
        patched.setattr(corpus, "VERSION", corpus.VERSION + 1)
        with pytest.raises(InvalidInputError, match="no corpus of this version"):
            Corpus(tmp_path / "c")
    with pytest.raises(InvalidInputError, match="holds no corpus"):
        Corpus(tmp_path / "none")
    with pytest.raises(InvalidInputError, match="holds no BM25 index"):
        BM25(other, tmp_path / "none")


DAMAGED = ["passages.jsonl", "offsets.npy"]
DAMAGED += [f"i/{name}" for name in ("data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy")]
DAMAGED += ["i/vocab.index.json", "i/largest.npy", "i/params.index.json"]


@pytest.mark.parametrize("left", [0, 0.5, 1], ids=["emptied", "cut", "gone"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_line(tmp_path: Path, name: str, left: float) -> None:
    """A file of a corpus or an index that is cut, emptied or missing is said when it is opened, not in a search."""
    folder = tmp_path / "c"
    BM25.build(Corpus.build(passages(tmp_path / "p.jsonl", 30), folder), folder / "i")
    path = folder / name
    if left == 1:
        path.unlink()
    else:
        os.truncate(path, int(path.stat().st_size * left))
    with pytest.raises(InvalidInputError, match=r"is damaged \(.*\): delete it, and make it again") as said:
        BM25(Corpus(folder), folder / "i")
    assert "\n" not in str(said.value)


def test_a_corpus_is_looked_at(tmp_path: Path) -> None:
    """No passages, an id that occurs twice (wherever), a text that is missing."""
    source = passages(tmp_path / "p.jsonl", 10)
    lines = source.read_text().splitlines()
    source.write_text("\n".join([*lines, lines[3]]))
    with pytest.raises(RowError, match=r"p\.jsonl, row 11, field 'id': equal to that of row 4"):
        Corpus.build(source, tmp_path / "c")
    (tmp_path / "p.tsv").write_text('id\ttext\ttitle\n\n1\tOne.\tA\n2\t"Two\nlines."\tB\n1\tThree.\tC\n')
    with pytest.raises(RowError, match=r"p\.tsv, row 6, field 'id': equal to that of row 3"):
        Corpus.build(tmp_path / "p.tsv", tmp_path / "table")
    with pytest.raises(InvalidInputError, match="holds no corpus"):
        Corpus(tmp_path / "c")
    source.write_text(lines[0] + '\n{"id": "x", "title": "T", "text": " "}\n')
    with pytest.raises(RowError, match="row 2, field 'text': empty text"):
        Corpus.build(source, tmp_path / "c")
    skipping = Corpus.build(source, tmp_path / "c", on_error="skip")
    assert len(skipping) == 1 and skipping.skipped == {"empty text": 1}
    source.write_text("")
    with pytest.raises(InvalidInputError, match="has no passages"):
        Corpus.build(source, tmp_path / "c")


def test_equal_ids_are_left_out_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of equal ids stays, wherever the others are; how many went is kept with the corpus."""
    monkeypatch.setattr(corpus, "SHARD_PASSAGES", 4)
    source = passages(tmp_path / "p.jsonl", 10)
    lines = source.read_text().splitlines()
    source.write_text("\n".join([lines[0], *lines, lines[3], "{}", lines[0]]) + "\n")
    for _ in range(2):
        store = Corpus.build(source, tmp_path / "c", on_error="skip")
        assert [store[i]["id"] for i in range(len(store))] == [f"p{i}" for i in range(10)]
        assert store.skipped == {"equal ids": 3, "no text": 1}
    whole = Corpus.build(passages(tmp_path / "whole.jsonl", 10), tmp_path / "whole")
    assert whole.key == store.key and not whole.skipped


def test_a_long_passage(tmp_path: Path) -> None:
    """A passage of 1 MB is found; a longer one is refused with its number."""
    line = {"id": "x", "title": "T", "text": "river " * 166_000 + "zebra"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"id": "y", "text": "river"}) + "\n")
    index = BM25.build(Corpus.build(tmp_path / "p.jsonl", tmp_path / "c"), tmp_path / "i")
    assert [c["id"] for c in index.search(["zebra river"], 2)[0]] == ["x", "y"]
    line["text"] += " lake" * 10_000
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(RowError, match="row 1, field 'text': a text of more than 1,000,000 characters"):
        Corpus.build(tmp_path / "p.jsonl", tmp_path / "c")


def test_who_searches_keeps_the_old_index(tmp_path: Path) -> None:
    """An index that is open answers as before while another takes its place."""
    store = Corpus.build(passages(tmp_path / "p.jsonl", 300), tmp_path / "c")
    index = BM25.build(store, tmp_path / "i")
    before = index.search(["river king", "lake"], 10)
    newer = Corpus.build(passages(tmp_path / "p.jsonl", 200, seed=3), tmp_path / "c")
    assert BM25.build(newer, tmp_path / "i").search(["river king", "lake"], 10) != before
    assert index.search(["river king", "lake"], 10) == before


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
    parts = tmp_path / "killed" / "i" / "shards"
    kill_once((parts / "000004.npz").exists, [*command, "0.002", "killed"], 60)
    finished = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.npz")}
    assert 5 <= len(finished) < 20
    subprocess.run([*command, "0", "killed"], check=True)
    assert folders(tmp_path / "whole") == folders(tmp_path / "killed")


def test_two_processes_that_index(tmp_path: Path) -> None:
    """The second waits, says so, and finds the index made."""
    passages(tmp_path / "p.jsonl", 300)
    command = [sys.executable, "-c", BUILD, str(tmp_path), "0.003", "both"]
    first = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not (tmp_path / "both" / "i" / "shards").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # until the other one has come
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as second:
        assert second.stderr is not None
        waits = any("another process is making" in line for line in second.stderr)
        first.send_signal(signal.SIGCONT)
        assert waits and first.wait() == second.wait() == 0
    subprocess.run([*command[:-2], "0", "alone"], check=True)
    assert folders(tmp_path / "both") == folders(tmp_path / "alone")


@pytest.mark.parametrize("limit", [30_000, 60_000])
def test_no_space_left(tmp_path: Path, limit: int) -> None:
    """While the corpus is written, and its index: an error of the system, and nothing that passes for whole."""
    passages(tmp_path / "p.jsonl", 500)
    command = [sys.executable, "-c", BUILD, str(tmp_path), "0", "full"]
    full = subprocess.run(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "File too large" in full.stderr, full.stderr[-2000:]
    assert not (tmp_path / "full" / "i" / "bm25.json").exists()
    subprocess.run(command, check=True)
    subprocess.run([*command[:-1], "alone"], check=True)
    assert folders(tmp_path / "full") == folders(tmp_path / "alone")


ASK = """
import sys, time
from pathlib import Path
from drorl.retrieval import bm25, corpus, run
run.SHARD_CANDIDATES = 100
real, searches = bm25.BM25.search, []
def slow(self, queries, k):
    time.sleep(float(sys.argv[2]))
    searches.append(len(queries))
    return real(self, queries, k)
bm25.BM25.search = slow
folder = Path(sys.argv[1])
index = bm25.BM25.build(corpus.Corpus.build(folder / "p.jsonl", folder / "c"), folder / "i")
run.retrieve_rows(index, folder / "q.jsonl", folder / sys.argv[3], 20)
print(searches)
"""


def test_killed_while_retrieving(tmp_path: Path) -> None:
    """kill -9 in the middle: the second run keeps the finished shards, of fewer questions for more candidates."""
    passages(tmp_path / "p.jsonl", 100)
    lines = (json.dumps({"question": f"river {WORDS[i % 16]} {i}?", "golden_answers": ["x"]}) for i in range(200))
    (tmp_path / "q.jsonl").write_text("".join(f"{line}\n" for line in lines))
    command = [sys.executable, "-c", ASK, str(tmp_path)]
    parts = tmp_path / ".killed.jsonl.shards"
    kill_once((parts / "000003.json").exists, [*command, "0.1", "killed.jsonl"], 60)
    finished = len(list(parts.glob("*.json")))
    assert 4 <= finished < 40
    again = subprocess.run([*command, "0", "killed.jsonl"], check=True, stdout=subprocess.PIPE, text=True)
    assert json.loads(again.stdout) == [5] * (40 - finished)  # 5 questions of 20 candidates each
    subprocess.run([*command, "0", "whole.jsonl"], check=True)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same questions, corpus and settings are not searched again, whatever files are called and dated; anything
    that has changed is: a question, a passage, a setting, k, the output itself."""
    searches: list[int] = []
    real = BM25.search
    monkeypatch.setattr(BM25, "search", lambda self, q, k: (searches.append(k), real(self, q, k))[1])
    source, queries, output = passages(tmp_path / "p.jsonl", 60), tmp_path / "q.jsonl", tmp_path / "rows.jsonl"
    queries.write_text(json.dumps({"question": "river?", "golden_answers": ["x"]}) + "\n")

    def retrieve(k: int = 5, settings: BM25Settings | None = None, output: Path = output) -> int:
        """How often it searched."""
        index = BM25.build(Corpus.build(source, tmp_path / "c"), tmp_path / "i", settings)
        before = len(searches)
        retrieve_rows(index, queries, output, k, quiet=True)
        return len(searches) - before

    assert (retrieve(), retrieve()) == (1, 0)
    os.utime(queries, (0, 0))
    os.utime(source, (0, 0))
    first, queries = output.read_bytes(), queries.rename(tmp_path / "other.jsonl")
    assert retrieve() == 0
    assert (retrieve(k=6), retrieve()) == (1, 1) and output.read_bytes() == first
    assert (retrieve(settings=BM25Settings(b=0.5)), retrieve(settings=BM25Settings(b=0.5)), retrieve()) == (1, 0, 1)
    assert retrieve(output=tmp_path / "rows.jsonl.gz") == 1
    output.write_bytes(first[:-10])
    assert retrieve() == 1 and output.read_bytes() == first
    stat = queries.stat()
    queries.write_text(queries.read_text().replace("river?", "castle"))  # as long as before
    os.utime(queries, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert retrieve() == 1 and output.read_bytes() != first
    source.write_text(source.read_text().replace("Castle", "Castel"))
    assert retrieve() == 1


def test_settings_are_read_by_their_types() -> None:
    """Numbers, words, yes or no, none; over what an index was made with, over the defaults; else it is said."""
    read = settings_of(BM25Settings, {"k1": "2", "stemmer": "none", "stop_words": "false"}, {"settings": {"b": 0.1}})
    assert read == BM25Settings(2.0, 0.1, None, False)
    assert settings_of(BM25Settings, {}) == BM25Settings()
    for given, said in (
        ({"k": "1"}, "no setting 'k'; there are k1, b, stemmer, stop_words"),
        ({"k1": "x"}, "k1='x' is no float"),
        ({"stop_words": "1"}, "stop_words='1' is no bool"),
        ({"b": "7"}, "b=7.0 lies between"),
        ({"b": "nan"}, "b=nan lies between"),
        ({"k1": "inf"}, "k1=inf is a number that is not negative"),
        ({"stemmer": "latin"}, "no stemmer 'latin'"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            settings_of(BM25Settings, given)
    with pytest.raises(InvalidInputError, match="no retriever 'x'; there are bm25, "):
        open_retriever("x", Place(None))
    with pytest.raises(InvalidInputError, match="searches a corpus: name one"):
        open_retriever("bm25", Place(None))


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

    done = run(app, ["index", "--corpus", str(source), "--output", str(tmp_path / "c")])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", f"200 passages in {tmp_path / 'c'}\n")
    done = run(app, ["retrieve", "--corpus", str(tmp_path / "c"), *arguments, str(tmp_path / "b.jsonl")])
    assert done.exit_code == 0
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    assert (
        run(app, ["index", "--corpus", str(source), "--output", str(tmp_path / "c"), "--set", "b=0.9"]).exit_code == 0
    )
    run(app, ["retrieve", "--corpus", str(tmp_path / "c"), *arguments, str(tmp_path / "b.jsonl")])
    assert (tmp_path / "b.jsonl").read_bytes() != (tmp_path / "a.jsonl").read_bytes()  # of the other index
    done = run(
        app, ["retrieve", "--corpus", str(tmp_path / "c"), "--set", "b=0.4", *arguments, str(tmp_path / "b.jsonl")]
    )
    assert "was made with BM25Settings(k1=0.9, b=0.9" in str(done.exception)  # and nobody makes it anew by searching

    with source.open("a") as file:
        file.write('{"id": "p0", "text": "river"}\n{"id": "x"}\n')
    for command in (["index", "--output", str(tmp_path / "c")], ["retrieve", *arguments, str(tmp_path / "b.jsonl")]):
        assert isinstance(run(app, [*command, "--corpus", str(source)]).exception, RowError)
        done = run(app, [*command, "--corpus", str(source), "--on-error", "skip"])
        said = [f"{source}: left out 1: no text", f"{source}: left out 1: equal ids"]
        assert done.exit_code == 0 and set(said) <= set(done.stderr.splitlines()), done.stderr
        assert run(app, [*command, "--corpus", str(source), "--on-error", "skip", "--quiet"]).stderr == ""
