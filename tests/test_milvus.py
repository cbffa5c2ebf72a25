"""Vectors in Milvus: in Milvus Lite, and in the real server that PyPI delivers (`pip install milvus`; slow)."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pymilvus")

from drorl.errors import InvalidInputError
from drorl.retrieval import milvus
from drorl.retrieval.corpus import Corpus
from drorl.retrieval.milvus import Milvus, MilvusError

COUNT, QUERIES = 300, ["a river", "a lake", "the king's train"]


def encode(texts: Sequence[str]) -> np.ndarray:
    """Vectors of texts: any, but always the same."""
    draws = [np.random.default_rng(zlib.crc32(text.encode())).standard_normal(16) for text in texts]
    return np.array(draws, dtype=np.float32)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Milvus, standalone, on a free port."""
    if find_spec("milvus") is None:
        pytest.skip("needs a Milvus server: pip install --no-deps milvus")
    folder = tmp_path_factory.mktemp("milvus")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        "from milvus import main; main()",
        "--data",
        str(folder),
        "--proxy-port",
        str(port),
    ]
    log = folder / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        deadline = time.monotonic() + 120
        while "Ctrl+C to exit" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"Milvus does not start: {log.read_text()}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture(params=["lite", pytest.param("server", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "vectors.db") if request.param == "lite" else request.getfixturevalue("server")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Passages that no other test has, so that each has a collection of its own; loaded in blocks of 100."""
    monkeypatch.setattr(milvus, "BLOCK", 100)
    draw, path = random.Random(str(tmp_path)), tmp_path / "p.jsonl"
    lines = [{"id": f"p{i}", "title": f"T{i}", "text": f"{draw.random()} {i // 2}"} for i in range(COUNT)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Corpus.build(path, tmp_path / "c")


def texts_of(passages: Sequence[dict[str, str]]) -> list[str]:
    """What is encoded of passages."""
    return [f"{passage['title']} {passage['text']}" for passage in passages]


@pytest.fixture
def build(corpus: Corpus, url: str) -> Iterator[Callable[..., Milvus]]:
    """Builds it with an encoder of passages, and closes it at the end: a file of Milvus Lite is held by one only."""
    built: list[Milvus] = []

    def make(passages: milvus.Encode = encode) -> Milvus:  # of their texts
        built.append(Milvus.build(corpus, url, lambda block: passages(texts_of(block)), encode, "by hash"))
        return built[-1]

    yield make
    for retriever in built:
        retriever.close()


def brute_force(corpus: Corpus, query: str) -> list[tuple[str, float]]:
    """All passages with their inner products in float64, best first."""
    passages = [corpus[i] for i in range(len(corpus))]
    scores = encode(texts_of(passages)).astype(np.float64) @ encode([query])[0].astype(np.float64)
    return [(passages[i]["id"], scores[i]) for i in np.argsort(-scores, kind="stable")]


def test_it_finds_what_brute_force_finds(corpus: Corpus, build: Callable[..., Milvus]) -> None:
    """The same passages in the same order with the same scores; all of them where more are asked for."""
    retriever = build()
    for k in (1, 20, COUNT, COUNT + 50):
        for query, found in zip(QUERIES, retriever.search(QUERIES, k), strict=True):
            wanted = brute_force(corpus, query)[:k]
            assert [c["id"] for c in found] == [name for name, _ in wanted]
            assert np.allclose([c["score"] for c in found], [score for _, score in wanted], atol=1e-5)
            assert [c["rank"] for c in found] == list(range(1, len(found) + 1))
            assert all(c["text"] == corpus[int(c["id"][1:])]["text"] for c in found)
    assert retriever.search([], 5) == []
    assert retriever.search(QUERIES, 0) == [[], [], []]
    with pytest.raises(InvalidInputError, match="16,384 passages of a query at most, not 20,000"):
        retriever.search(QUERIES, 20_000)


def test_loading_goes_on_where_it_stopped(
    corpus: Corpus, url: str, build: Callable[..., Milvus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished blocks are not encoded again, one that may be there in part is; half a collection is not searched."""
    asked: list[int] = []

    def stopping(texts: Sequence[str]) -> np.ndarray:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(texts))
        return encode(texts)

    with pytest.raises(KeyboardInterrupt):
        build(stopping)
    with pytest.raises(InvalidInputError, match="has 200 of 300 vectors of this corpus"):
        Milvus(corpus, url, encode, "by hash")
    monkeypatch.setattr(milvus, "BLOCK", 150)  # the second block of 150 is there in part

    def counting(texts: Sequence[str]) -> np.ndarray:
        asked.append(len(texts))
        return encode(texts)

    retriever = build(counting)
    assert asked == [100, 100, 150]
    [found] = retriever.search(QUERIES[:1], COUNT)
    assert [c["id"] for c in found] == [name for name, _ in brute_force(corpus, QUERIES[0])]
    retriever.close()
    [again] = build(counting).search(QUERIES[:1], COUNT)
    assert [c["id"] for c in again] == [c["id"] for c in found]
    assert asked == [100, 100, 150]


def test_vectors_of_another_encoder_are_not_searched(corpus: Corpus, url: str, build: Callable[..., Milvus]) -> None:
    retriever = build()
    retriever.close()
    with pytest.raises(InvalidInputError, match="has 0 of 300 vectors"):
        Milvus(corpus, url, encode, "another")


def test_killed_while_loading(corpus: Corpus, tmp_path: Path) -> None:
    """kill -9 in the middle of the third block: the two before are kept on disk, and the result is the same."""
    url, tests = str(tmp_path / "vectors.db"), Path(__file__).parent
    program = f"""
import os, signal
from pathlib import Path
from test_milvus import Corpus, Milvus, encode, milvus, texts_of
milvus.BLOCK, blocks = 100, []
def dying(passages):
    blocks.append(passages)
    return encode(texts_of(passages)) if len(blocks) < 3 else os.kill(os.getpid(), signal.SIGKILL)
Milvus.build(Corpus(Path({str(corpus.folder)!r})), {url!r}, dying, encode, "by hash")
"""
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}"}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    asked: list[int] = []

    def counting(passages: Sequence[dict[str, str]]) -> np.ndarray:
        asked.append(len(passages))
        return encode(texts_of(passages))

    retriever = Milvus.build(corpus, url, counting, encode, "by hash")
    assert asked == [100]
    [found] = retriever.search(QUERIES[:1], 20)
    retriever.close()
    assert [c["id"] for c in found] == [name for name, _ in brute_force(corpus, QUERIES[0])[:20]]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "/no/such/folder/vectors.db", "vectors"])
def test_where_there_is_no_milvus(corpus: Corpus, url: str) -> None:
    """One line with the address, of a server, a file or neither."""
    with pytest.raises(MilvusError, match=f"^Milvus cannot be reached at {url}: .+$"):
        Milvus(corpus, url, encode, "by hash")
