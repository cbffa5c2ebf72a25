"""Dense retrieval: exact against brute force, near to it where it is not, the same always, and resumed."""

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from processes import kill_once
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from drorl.cli import app
from drorl.errors import InvalidInputError
from drorl.retrieval import corpus as corpora
from drorl.retrieval import encoder as encoders
from drorl.retrieval import vectors
from drorl.retrieval.corpus import Corpus
from drorl.retrieval.dense import Dense, DenseSettings, memory_of
from drorl.retrieval.encoder import Encoder, build_wordllama

DIMENSION, WORDS = 32, [f"w{i}" for i in range(500)]
QUERIES = [" ".join(random.Random(i).choices(WORDS, k=4)) for i in range(40)]
TABLE = np.random.default_rng(0).standard_normal((len(WORDS) + 1, DIMENSION), dtype=np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder of 500 words with random vectors, of which a text has the mean."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0} | {w: i for i, w in enumerate(WORDS, 1)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    static = StaticEmbedding(tokenizer, embedding_weights=TABLE.copy())
    folder = tmp_path_factory.mktemp("encoder") / "e5-small-v2"
    SentenceTransformer(modules=[static], device="cpu").save(str(folder), create_model_card=False)
    return str(folder)


def passages(path: Path, count: int) -> Path:
    """Passages of random words; every seventh has the text of the one before."""
    draw = random.Random(count)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(count)]
    lines = [{"id": f"p{i}", "title": "w0", "text": texts[i - (i % 7 == 6)]} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def corpus_of(tmp_path: Path, count: int) -> Corpus:
    return Corpus.build(passages(tmp_path / f"{count}.jsonl", count), tmp_path / f"c{count}")


def plain(model: str, index: str = "flat", **more: int) -> DenseSettings:
    """Without prefixes."""
    return DenseSettings(model, index, "", "", **more)


def vector_of(text: str) -> np.ndarray:
    """The mean of the words' vectors, in float64, of length 1, rounded as those on disk."""
    mean = np.mean([TABLE[WORDS.index(word) + 1] for word in text.split()], axis=0, dtype=np.float64)
    return (mean / np.linalg.norm(mean)).astype(np.float16).astype(np.float64)


def test_flat_is_brute_force(tmp_path: Path, model: str) -> None:
    """The best k by products of vectors written out here in float64; equal passages in the corpus' order; any k."""
    corpus = corpus_of(tmp_path, 200)
    index = Dense.build(corpus, tmp_path / "i", plain(model))
    matrix = np.stack([vector_of(f"{corpus[i]['title']} {corpus[i]['text']}") for i in range(200)])
    for query, found in zip(QUERIES, index.search(QUERIES, 200), strict=True):
        wanted = matrix @ vector_of(query)
        assert sorted(c["id"] for c in found) == sorted(f"p{i}" for i in range(200))
        np.testing.assert_allclose([c["score"] for c in found], np.sort(wanted)[::-1], atol=1e-3)
        np.testing.assert_allclose([c["score"] for c in found], [wanted[int(c["id"][1:])] for c in found], atol=1e-3)
        assert found == sorted(found, key=lambda c: (-c["score"], int(c["id"][1:])))
        assert [c["rank"] for c in found] == list(range(1, 201))
        assert index.search([query], 5) == [found[:5]] and index.search([query], 1000) == [found]
    assert index.search(["w3", "w4"], 0) == [[], []] and index.search([], 3) == []
    assert index.search(["", "w3"], 3)[0] == []  # the mean of no words is no vector


@pytest.mark.parametrize("kind", ["ivfpq", "hnsw"])
def test_indexes_find_what_flat_finds(tmp_path: Path, model: str, kind: str) -> None:
    """Nearly all of the best 20, with scores that are the same to the last bit; more probes find more."""
    corpus = corpus_of(tmp_path, 3000)
    exact = Dense.build(corpus, tmp_path / "i", plain(model)).search(QUERIES, 20)
    encoded = (tmp_path / "i" / "vectors.npy").stat().st_mtime_ns
    recall = {}
    for probes in (2, 40):
        found = Dense.build(corpus, tmp_path / "i", plain(model, kind, probes=probes)).search(QUERIES, 20)
        pairs = [({c["id"]: c["score"] for c in e}, f) for e, f in zip(exact, found, strict=True)]
        assert all(scores.get(c["id"], c["score"]) == c["score"] for scores, f in pairs for c in f)
        recall[probes] = np.mean([c["id"] in scores for scores, f in pairs for c in f])
    assert recall[40] > 0.95 and (kind == "hnsw" or recall[2] < 0.5)
    assert (tmp_path / "i" / "vectors.npy").stat().st_mtime_ns == encoded  # one encoding serves all


@pytest.mark.parametrize("kind", [pytest.param("ivfpq", marks=pytest.mark.slow), "hnsw"])
def test_the_same_with_any_number_of_threads(tmp_path: Path, model: str, kind: str) -> None:
    """The index to the byte, and what is found, whether queries come alone or together."""
    corpus, threads, made = corpus_of(tmp_path, 2000), faiss.omp_get_max_threads(), []
    try:
        for number in (1, 4):
            faiss.omp_set_num_threads(number)
            index = Dense.build(corpus, tmp_path / str(number), plain(model, kind))
            alone = [index.search([query], 20)[0] for query in QUERIES]
            assert index.search(QUERIES, 20) == alone
            made.append(((tmp_path / str(number) / f"{kind}.faiss").read_bytes(), alone))
    finally:
        faiss.omp_set_num_threads(threads)
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", [pytest.param("ivfpq", marks=pytest.mark.slow), "hnsw"])
def test_memory_is_as_stated(tmp_path: Path, model: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is said before building is what the files then hold, within 5 %."""
    with caplog.at_level("INFO", logger="drorl"):
        Dense.build(corpus_of(tmp_path, 3000), tmp_path / "i", plain(model, kind))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("drorl")]
    assert said[0].startswith("dense: 3,000 passages of 32 dimensions take encoder 0 MB, vectors on disk 0 MB, ")
    assert said[1] == "3,000 of 3,000 passages encoded"
    stated = memory_of(kind, 3000, DIMENSION)
    assert (tmp_path / "i" / "vectors.npy").stat().st_size == pytest.approx(stated["vectors on disk"], rel=0.05)
    assert (tmp_path / "i" / f"{kind}.faiss").stat().st_size == pytest.approx(stated[kind], rel=0.05)


def test_prefixes(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those a model is known for, unless others are given; another one before passages is another encoding."""
    asked: list[tuple[list[str], str]] = []
    real = SentenceTransformer.encode

    def encode(self: SentenceTransformer, texts: list[str], prompt: str, **more: object) -> np.ndarray:
        asked.append((texts, prompt))
        return real(self, texts, prompt=prompt, **more)

    monkeypatch.setattr(SentenceTransformer, "encode", encode)
    corpus = corpus_of(tmp_path, 3)
    index = Dense.build(corpus, tmp_path / "i", DenseSettings(model))  # its folder is called e5-small-v2
    index.search(["w1"], 1)
    assert asked == [([f"w0\n{corpus[i]['text']}" for i in range(3)], "passage: "), (["w1"], "query: ")]
    other = Dense.build(corpus, tmp_path / "i", DenseSettings(model, query_prefix="w5 "))
    assert len(asked) == 2 and other.key != index.key  # not encoded again
    with pytest.raises(InvalidInputError, match="no whole vectors of this corpus and encoder"):
        Dense(corpus, tmp_path / "i", DenseSettings(model, passage_prefix="w6 "))
    Dense.build(corpus, tmp_path / "i", DenseSettings(model, passage_prefix="w6 "))
    assert asked[-1][1] == "w6 "
    for name, wanted in {
        "BAAI/bge-base-en-v1.5": ("Represent this sentence for searching relevant passages: ", ""),
        "intfloat/multilingual-e5-large": ("query: ", "passage: "),
        "intfloat/e5-mistral-7b-instruct": ("", ""),
    }.items():
        monkeypatch.setattr(encoders, "SentenceTransformer", lambda path, **_: SentenceTransformer(model))
        encoder = Encoder(name)
        assert (encoder.query_prefix, encoder.passage_prefix) == wanted


def test_vectors_are_used_only_for_their_own(tmp_path: Path, model: str) -> None:
    """Not for another corpus, nor for an encoder with other weights at the same place; what has no index says so."""
    corpus = corpus_of(tmp_path, 300)
    Dense.build(corpus, tmp_path / "i", plain(model))
    with pytest.raises(InvalidInputError, match="holds no ivfpq of its vectors"):
        Dense(corpus, tmp_path / "i", plain(model, "ivfpq"))
    with pytest.raises(InvalidInputError, match="no whole vectors"):
        Dense(corpus_of(tmp_path, 301), tmp_path / "i", plain(model))
    changed = SentenceTransformer(model)
    changed[0].embedding.weight.data[3, 3] += 0.5
    changed.save(str(tmp_path / "changed"), create_model_card=False)
    with pytest.raises(InvalidInputError, match="no whole vectors"):
        Dense(corpus, tmp_path / "i", plain(str(tmp_path / "changed")))


def test_bad_settings(tmp_path: Path, model: str) -> None:
    """A model that is none, an index that is none, too few passages for codes, a vector that is no number."""
    corpus = corpus_of(tmp_path, 20)
    with pytest.raises(InvalidInputError, match="is no model of sentence-transformers"):
        Dense.build(corpus, tmp_path / "i", DenseSettings(str(tmp_path / "none")))
    with pytest.raises(InvalidInputError, match="no index 'annoy'; there are flat, ivfpq, hnsw"):
        DenseSettings(model, "annoy")
    with pytest.raises(InvalidInputError, match="1 at least"):
        DenseSettings(model, probes=0)
    with pytest.raises(InvalidInputError, match="ivfpq needs 256 passages, and there are 20: use flat"):
        Dense.build(corpus, tmp_path / "i", plain(model, "ivfpq"))
    broken = SentenceTransformer(model)
    broken[0].embedding.weight.data[:] = float("nan")
    broken.save(str(tmp_path / "broken"), create_model_card=False)
    with pytest.raises(InvalidInputError, match="no numbers"):
        Dense.build(corpus, tmp_path / "i", plain(str(tmp_path / "broken")))


BUILD = """
import sys, time
from pathlib import Path
from drorl.retrieval import corpus, encoder, vectors
from drorl.retrieval.dense import Dense, DenseSettings
vectors.SHARD_PASSAGES = 50
real = encoder.Encoder.passages
def slow(*arguments):
    time.sleep(float(sys.argv[3]))
    return real(*arguments)
encoder.Encoder.passages = slow
folder = Path(sys.argv[1])
Dense.build(corpus.Corpus(folder / "c1000"), folder / "i", DenseSettings(sys.argv[2], "hnsw", "", ""))
"""


def test_killed_while_encoding(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in the middle: the second run keeps the finished shards, and all files are the same to the byte."""
    corpus = corpus_of(tmp_path, 1000)
    facts = tmp_path / "i" / "vectors.json"

    def reached() -> bool:
        return facts.exists() and json.loads(facts.read_text())["done"] >= 200

    kill_once(reached, [sys.executable, "-c", BUILD, tmp_path, model, "0.1"], 120)
    done = json.loads(facts.read_text())["done"]
    assert 200 <= done < 1000
    with pytest.raises(InvalidInputError, match="no whole vectors"):
        Dense(corpus, tmp_path / "i", plain(model, "hnsw"))
    encoded: list[str] = []
    real = Encoder.passages
    monkeypatch.setattr(
        Encoder, "passages", lambda self, block: (encoded.append(block[0]["id"]), real(self, block))[1]
    )
    monkeypatch.setattr(vectors, "SHARD_PASSAGES", 50)
    Dense.build(corpus, tmp_path / "i", plain(model, "hnsw"))
    assert encoded[0] == f"p{done}"
    Dense.build(corpus, tmp_path / "whole", plain(model, "hnsw"))
    killed, whole = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("i", "whole"))
    assert killed == whole


@pytest.mark.parametrize("limit", [20_000, 100_000])
def test_no_space_left(tmp_path: Path, model: str, limit: int) -> None:
    """While encoding, and while the index is written: an error of the system, and nothing that passes for whole."""
    corpus = corpus_of(tmp_path, 1000)
    full = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path), model, "0"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "OSError" in full.stderr and "File too large" in full.stderr, full.stderr[-2000:]
    with pytest.raises(InvalidInputError, match="no whole vectors" if limit == 20_000 else "holds no hnsw"):
        Dense(corpus, tmp_path / "i", plain(model, "hnsw"))
    assert Dense.build(corpus, tmp_path / "i", plain(model, "hnsw")).search(["w3"], 3)[0]


def test_finished_shards_are_not_encoded_again(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in the third shard goes on with the third."""
    for module in (corpora, vectors):
        monkeypatch.setattr(module, "SHARD_PASSAGES", 50)
    corpus, shards = corpus_of(tmp_path, 220), []
    real = Encoder.passages

    def encode(self: Encoder, block: list[dict[str, str]]) -> np.ndarray:
        shards.append(block[0]["id"])
        if len(shards) == 3:
            raise KeyboardInterrupt
        return real(self, block)

    monkeypatch.setattr(Encoder, "passages", encode)
    with pytest.raises(KeyboardInterrupt):
        Dense.build(corpus, tmp_path / "i", plain(model))
    Dense.build(corpus, tmp_path / "i", plain(model))
    assert shards == ["p0", "p50", "p100", "p100", "p150", "p200"]


def test_the_commands(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two retrievers in one folder, and both as one; settings by name; an index is used as it was made."""
    monkeypatch.setenv("DRORL_CACHE", str(tmp_path / "cache"))
    run = CliRunner().invoke
    source, queries = passages(tmp_path / "p.jsonl", 400), tmp_path / "q.jsonl"
    queries.write_text("".join(json.dumps({"question": q, "golden_answers": ["x"]}) + "\n" for q in QUERIES[:5]))
    index = ["index", "--corpus", str(source), "--output", str(tmp_path / "c"), "--retriever"]
    settings = ["--set", f"model={model}", "--set", "index=ivfpq", "--set", "query_prefix=none"]
    assert run(app, [*index, "bm25"]).exit_code == 0
    done = run(app, [*index, "dense", *settings])
    assert done.exit_code == 0 and "400 passages in" in done.stderr, done.exception
    rows = {}
    for name, k in (("bm25", "100"), ("dense", "100"), ("hybrid", "7")):
        output = tmp_path / f"{name}.jsonl"
        arguments = ["--corpus", str(tmp_path / "c"), "--queries", str(queries), "--retriever", name]
        done = run(app, ["retrieve", *arguments, "--top-k", k, "--output", str(output)])
        assert (done.exit_code, done.stdout) == (0, ""), done.exception
        rows[name] = [json.loads(line)["candidates"] for line in output.read_text().splitlines()]
    for b, d, h in zip(rows["bm25"], rows["dense"], rows["hybrid"], strict=True):
        ranks = [{c["id"]: c["rank"] for c in found} for found in (b, d)]
        fused = {name: sum(1 / (60 + r[name]) for r in ranks if name in r) for name in {**ranks[0], **ranks[1]}}
        assert [c["score"] for c in h] == pytest.approx(sorted(fused.values(), reverse=True)[:7])
        assert all(c["score"] == pytest.approx(fused[c["id"]]) for c in h)
    arguments = ["--corpus", str(tmp_path / "c"), "--queries", str(queries), "--output", str(tmp_path / "x.jsonl")]
    for given, said in {
        "index=hnsw": "holds no hnsw of its vectors",
        "model=none": "no model of sentence-transformers",
        "probs=3": "no setting 'probs'; there are model, index",
        "probes=many": "probes='many' is no int",
        "probes": "write a name, =, and a value",
    }.items():
        done = run(app, ["retrieve", *arguments, "--retriever", "dense", "--set", given])
        assert done.exit_code != 0 and said in f"{done.exception} {done.stderr}", given
    done = run(app, ["retrieve", *arguments, "--retriever", "hybrid", "--set", "dense.probes=1", "--set", "of=bm25"])
    assert "a retriever that is not fused" in str(done.exception)


@pytest.mark.network
def test_wordllama_is_a_mean_of_token_vectors() -> None:
    """The embedded encoder gives the mean of the wheel's vectors, of length 1; and knows what words are near."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = build_wordllama()
    encoder = Encoder("wordllama-256")
    assert encoder.dimension == 256 and (encoder.query_prefix, encoder.passage_prefix) == ("", "")
    table = load_file(next(folder.rglob("model.safetensors")))["embedding.weight"]
    tokens = Tokenizer.from_file(str(next(folder.rglob("tokenizer.json"))))
    text = "Who wrote the opera Carmen?"
    mean = table[tokens.encode(text, add_special_tokens=False).ids].mean(axis=0)
    [found] = encoder.queries([text])
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-3)
    near, far = encoder.queries(["The composer of Carmen is Bizet.", "A glacier is a body of ice."]) @ found
    assert near > far + 0.2
