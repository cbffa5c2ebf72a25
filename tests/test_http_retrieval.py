"""The /retrieve protocol: what a server says is what its retriever finds, and a bad server is named in one line."""

import gzip
import http.server
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from test_retrieval import passages

from drorl.cli.retrieval import serve_retriever
from drorl.cli.runs import serve
from drorl.errors import InvalidInputError, UserError
from drorl.retrieval import http as client
from drorl.retrieval import server as server_module
from drorl.retrieval.bm25 import BM25
from drorl.retrieval.corpus import Corpus
from drorl.retrieval.http import HTTPRetriever, RetrieverServerError
from drorl.retrieval.retrievers import Place, open_retriever
from drorl.retrieval.server import Limits, application, listen

Handler = http.server.BaseHTTPRequestHandler
GOOD = {"result": [[{"document": {"id": "7", "contents": '"The Title"\nIts text.'}, "score": 2.5}]]}
READ = {"id": "7", "title": "The Title", "text": "Its text.", "score": 2.5, "rank": 1}


@contextmanager
def bad_server(answer: Callable[[Handler], None]) -> Iterator[str]:
    """A server that answers `POST` in its own way, and knows no other path than `/retrieve`."""

    class Answering(Handler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def saying(content: Any, status: int = 200, length: int | None = None, **headers: str) -> Callable[[Handler], None]:
    """An answer with this content, as JSON unless it is bytes."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(length or len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def dripping(head: bytes) -> Callable[[Handler], None]:
    """An answer that goes on for ever, a byte at a time, each well within any timeout of a single read."""

    def answer(handler: Handler) -> None:
        try:
            handler.wfile.write(head)
            for _ in range(300):
                handler.wfile.write(b"x")
                time.sleep(0.02)
        except OSError:
            pass

    return answer


def asked(url: str, k: int = 3, queries: Sequence[str] = ("a query",), **settings: Any) -> list[list[dict[str, Any]]]:
    return HTTPRetriever(url, **settings).search(queries, k)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_DELAY", 0.01)


# ------------------------------------------------------------------------------------------------ the forms of answers
@pytest.mark.parametrize(
    ("answer", "read"),
    [
        (GOOD, READ),
        (GOOD["result"], READ),
        ({"result": [[{"document": {"id": 7, "contents": "The Title\nIts text."}, "score": "2.5"}]]}, READ),
        ({"result": [[{"document": {"_id": "7", "title": "The Title", "text": "Its text."}, "score": 2.5}]]}, READ),
        ({"result": [[{"docid": "7", "title": "The Title", "text": "Its text.", "score": 2.5}]]}, READ),
        ({"result": [[{"id": "7", "contents": '"The Title"\nIts text.'}]]}, {**READ, "score": None}),
        ({"result": [[{"document": {"id": "7", "contents": "Its text."}}]]}, {**READ, "title": "", "score": None}),
        ({"result": [[{"document": '"The Title"\nIts text.', "score": 2.5}]]}, {**READ, "id": "8e7507d685259b12"}),
        ({"result": [[]]}, None),
    ],
)
def test_every_form_in_use_is_read(answer: Any, read: dict[str, Any] | None) -> None:
    """Search-R1's own, and those of its descendants: bare lists and documents, titles and texts, no score, no id."""
    expected = [] if read is None else [{name: value for name, value in read.items() if value is not None}]
    with bad_server(saying(answer)) as url:
        assert asked(url) == [expected]
        assert asked(f"{url}/retrieve/") == [expected]


@pytest.mark.parametrize(
    "given", ["timeout=nan", "timeout=-1", "timeout=inf", "timeout=1e300", "batch_size=0", "batch_size=-5", "tries=0"]
)
def test_settings_that_cannot_be_are_refused(given: str) -> None:
    """Before anybody is asked."""
    name, value = given.split("=")
    with pytest.raises(InvalidInputError, match="seconds above 0, and batch_size=.* are 1 at least"):
        open_retriever("http", Place(None), {"url": "http://127.0.0.1:9", name: value})


def test_the_longest_timeout_is_one() -> None:
    """The clock of a socket takes it."""
    with bad_server(saying(GOOD)) as url:
        assert open_retriever("http", Place(None), {"url": url, "timeout": "9e9"}).search(["q"], 3) == [[READ]]


# ------------------------------------------------------------------------------------------------------- bad servers
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (saying(b"<html>Welcome</html>"), "no JSON, Expecting value at character 1: '<html>Welcome</html>'"),
        (saying(b'{"result": [[{"docu'), "no JSON, "),
        (saying(b"\xff\xfe{}"), "byte 1 is no UTF-8"),
        (saying(b'{"result": [["\\ud800"]]}'), "half of a character"),
        (saying(b"[" * 3_900), "no JSON that can be read"),
        (saying({"error": "no index"}), "answers without lists of passages: \"{'error': 'no index'}\""),
        (saying({"result": []}), "answers with 0 lists to 1 queries"),
        (saying({"result": [[], []]}), "answers with 2 lists to 1 queries"),
        (saying({"result": ["text"]}), "query 1: no list of passages: 'text'"),
        (saying({"result": [GOOD["result"][0] * 4]}), "query 1: more than the 3 passages that were asked for: 4"),
        (saying({"result": [GOOD["result"][0] * 2]}), "query 1: a passage that occurs twice: '7'"),
        (saying({"result": [[{"document": 5}]]}), "query 1, passage 1: document: no passage: 5"),
        (saying({"result": [[{"document": {"id": "7"}}]]}), "query 1, passage 1: contents: no text"),
        (saying({"result": [[{"document": {"text": " "}}]]}), "query 1, passage 1: text: empty"),
        (
            saying({"result": [[{"document": "x", "score": float("nan")}]]}),
            "passage 1: score: no number: nan",
        ),
        (saying({"result": [[{"document": "x", "score": "high"}]]}), "score: no number: 'high'"),
        (saying({"detail": "topk is too large"}, 422), 'HTTP 422 .*: \'{"detail": "topk is too large"}\''),
        (saying(b"", 301, Location="http://192.0.2.1/elsewhere"), "redirects to http://192.0.2.1/elsewhere"),
        (saying(b"", 404), "does not speak /retrieve: HTTP 404"),
        (saying(b"z" * 5_000), "answers with more than 4,000 bytes"),
        (saying(b"", 500), r"has failed 2 times, at last: HTTP 500 Internal Server Error: ''"),
        (saying(GOOD, length=900), "has failed 2 times, at last: an answer that ends 8.. bytes too early"),
        (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "at last: BadStatusLine SSH-2.0"),
        (lambda handler: None, "at last: RemoteDisconnected"),
    ],
)
def test_a_wrong_answer_is_one_line_that_says_what_was_seen(answer: Callable[[Handler], None], message: str) -> None:
    with bad_server(answer) as url, pytest.raises(RetrieverServerError, match=message) as raised:
        asked(url, tries=2, max_bytes=4_000)
    assert str(raised.value).startswith(url)
    assert "\n" not in str(raised.value)


def test_a_bomb_is_not_unpacked() -> None:
    """64 MiB in 64 KiB: what comes packed is refused unread, whatever it holds."""
    bomb = saying(gzip.compress(b" " * (1 << 26)), Content_Encoding="gzip")
    with bad_server(bomb) as url, pytest.raises(RetrieverServerError, match="answers packed as gzip"):
        asked(url)


@pytest.mark.parametrize(
    "answer",
    [
        lambda handler: time.sleep(2),
        dripping(b"HTTP/1.1 200 OK\r\nX-Header: "),
        dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"),
        dripping(b"HTTP/1.1 200 OK\r\n\r\n"),
    ],
    ids=["silent", "dripping headers", "dripping content", "without an end"],
)
def test_the_deadline_holds_for_the_whole_answer(answer: Callable[[Handler], None]) -> None:
    """Not only for each read: a server that drips is given up at the same time as one that is silent; asked once."""
    with bad_server(answer) as url:
        retriever = HTTPRetriever(url)
        retriever.timeout, begin = 0.3, time.monotonic()
        with pytest.raises(RetrieverServerError, match=r"has not answered within 0\.3 s"):
            retriever.search(["a query"], 3)
        assert time.monotonic() - begin < 1.5


def test_what_is_over_soon_is_waited_for() -> None:
    """Two failures of the server, then an answer; each wait is twice as long as the one before."""
    times: list[float] = []

    def answer(handler: Handler) -> None:
        times.append(time.monotonic())
        saying(*[(b"busy", 503), (b"slow down", 429), (GOOD, 200)][len(times) - 1])(handler)

    with bad_server(answer) as url:
        assert asked(url) == [[READ]]
    assert times[1] - times[0] >= 0.01
    assert times[2] - times[1] >= 0.02


def test_nobody_listens() -> None:
    with pytest.raises(RetrieverServerError, match=r"127\.0\.0\.1:9 has failed 2 times, at last: ConnectionRefused"):
        HTTPRetriever("http://127.0.0.1:9", tries=2)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:x", "http://host/?a=b"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InvalidInputError, match="is no address of a server"):
        HTTPRetriever(url)


def test_no_proxy_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on this machine, which a proxy does not reach, nor elsewhere."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://192.0.2.1:1")
    with bad_server(saying(GOOD)) as url:
        assert asked(url, timeout=5) == [[READ]]


# -------------------------------------------------------------------------------------------------- drorl's own server
@pytest.fixture
def bm25(tmp_path: Path) -> BM25:
    return BM25.build(Corpus.build(passages(tmp_path / "p.jsonl", 200), tmp_path / "c"), tmp_path / "i")


@contextmanager
def serving(retriever: Any, limits: Limits | None = None) -> Iterator[str]:
    sock = listen("127.0.0.1", 0)
    limits = limits or Limits()
    server = uvicorn.Server(uvicorn.Config(application(retriever, limits), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


QUERIES = ["river king", "the of", "treaty harbour café \U0001f30a", "", "bridge"] * 5


def test_through_the_server_all_is_as_it_was(bm25: BM25) -> None:
    """Candidates to the last bit, in batches of any size; the key says which retriever answers."""
    with serving(bm25) as url:
        for size in (1, 7, 64):
            assert HTTPRetriever(url, batch_size=size).search(QUERIES, 9) == bm25.search(QUERIES, 9)
        retriever = HTTPRetriever(url)
        assert retriever.key == f"http {url} {bm25.key}"
        assert retriever.search([], 5) == []
        assert retriever.search(["river"], 0) == [[]]


def test_several_clients_do_not_disturb_one_another(bm25: BM25) -> None:
    """Eight at once get what one gets; stemmers and memory maps are not made for several threads."""
    inside: list[int] = []

    class Watched:
        key = bm25.key

        def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
            inside.append(1)
            assert len(inside) == 1
            found = bm25.search(queries, k)
            inside.pop()
            return found

    expected = bm25.search(QUERIES, 20)
    with serving(Watched()) as url, ThreadPoolExecutor(8) as pool:
        retriever = HTTPRetriever(url, batch_size=3)
        assert all(found == expected for found in pool.map(lambda _: retriever.search(QUERIES, 20), range(16)))


def raw(url: str, content: bytes) -> tuple[int, dict[str, Any]]:
    """What a client of another project gets."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("POST", "/retrieve", content)
    response = connection.getresponse()
    status, body = response.status, json.loads(response.read())
    connection.close()
    return status, body


def test_others_get_what_search_r1_gives(bm25: BM25) -> None:
    """Contents with the title in quotes; bare documents where no scores are wanted; three if it does not say."""
    [found] = bm25.search(["river"], 5)
    contents = [f'"{passage["title"]}"\n{passage["text"]}' for passage in found]
    with serving(bm25) as url:
        _, answer = raw(url, b'{"queries": ["river"], "topk": 5, "return_scores": true}')
        assert [passage["document"]["contents"] for passage in answer["result"][0]] == contents
        assert [passage["score"] for passage in answer["result"][0]] == [passage["score"] for passage in found]
        _, answer = raw(url, b'{"queries": ["river"]}')
        assert [document["contents"] for document in answer["result"][0]] == contents[:3]


@pytest.mark.parametrize(
    ("content", "status", "detail"),
    [
        (b"{", 400, "no JSON"),
        (b"\xff", 400, "no UTF-8"),
        (b"[]", 400, "no JSON object"),
        (b"{}", 400, "queries: no list of texts: 'None'"),
        (b'{"queries": "river"}', 400, "queries: no list of texts"),
        (b'{"queries": [1]}', 400, "queries: no list of texts"),
        (b'{"queries": ["a", "b", "c"]}', 400, "queries: 3 are more than this server takes: 2"),
        (b'{"queries": ["a"], "topk": 10}', 400, "topk: no number from 1 to 9: 10"),
        (b'{"queries": ["a"], "topk": true}', 400, "topk: no number"),
        (b'{"queries": ["a", "b"], "topk": 9}', 400, "2 queries, topk 9: more than 17 passages"),
        (b'{"queries": ["a"], "return_scores": 1}', 400, "return_scores: neither true nor false: 1"),
        (b'{"queries": ["' + b"a" * 200 + b'"]}', 413, "longer than this server takes: 200 bytes"),
    ],
)
def test_requests_that_are_refused(bm25: BM25, content: bytes, status: int, detail: str) -> None:
    """With a status that blames the request, and JSON that says why."""
    with serving(bm25, Limits(body_bytes=200, queries=2, top_k=9, passages=17)) as url:
        got, answer = raw(url, content)
    assert got == status
    assert detail in answer["detail"]


def test_a_request_that_does_not_arrive_is_given_up(bm25: BM25, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that stops halfway is answered by 408 after its time, and the server serves on."""
    monkeypatch.setattr(server_module, "_BODY_SECONDS", 0.2)
    with serving(bm25) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as half:
            half.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in half.recv(1000).split(b"\r\n")[0]
        assert len(asked(url, queries=["river"])[0]) == 3


def test_it_listens_on_this_machine_alone() -> None:
    """Unless told otherwise, both servers are reached from nowhere else."""
    for command in (serve, serve_retriever):
        assert inspect.signature(command).parameters["host"].default == "127.0.0.1"


def test_a_retriever_that_fails_is_a_failure_of_the_server(bm25: BM25) -> None:
    """HTTP 500 with the error's text, and scores that are no numbers are such a failure; then it serves on."""

    class Failing:
        key = "failing"

        def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
            if queries == ["fail"]:
                raise ValueError("the index is gone")
            return [[{"id": "1", "title": "", "text": "x", "score": float(query), "rank": 1}] for query in queries]

    with serving(Failing()) as url:
        for query, message in (("fail", "ValueError: the index is gone"), ("nan", "ValueError: Out of range float")):
            with pytest.raises(RetrieverServerError, match=f"HTTP 500 .*{message}"):
                asked(url, queries=[query], tries=2)
        assert asked(url, queries=["1.5"])[0][0]["score"] == 1.5


def test_another_retriever_behind_the_address_is_noticed(bm25: BM25) -> None:
    """Rows of two indexes would be in one file, and the cache would know of one."""

    class Changing:
        key = "first"
        search = bm25.search

    served = Changing()
    with serving(served) as url:
        retriever = HTTPRetriever(url)
        retriever.search(["river"], 3)
        served.key = "second"
        with pytest.raises(RetrieverServerError, match="has become another retriever: second"):
            retriever.search(["river"], 3)


def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """What was asked before SIGTERM is answered; then it ends with 0. Nobody else gets its port."""
    folder = tmp_path / "c"
    BM25.build(Corpus.build(passages(tmp_path / "p.jsonl", 200), folder), folder / "bm25")
    command = [sys.executable, "-c", "from drorl.cli import main; main()", "serve-retriever", "--corpus", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with ExitStack() as stack:
        started = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True, env=environment)
        server = stack.enter_context(started)
        stack.callback(server.kill)  # if something is wrong below, nobody waits for it
        assert server.stderr is not None
        said = server.stderr.readline()
        assert said.startswith("bm25 on http://127.0.0.1:"), said
        url = said.split()[-1]
        retriever = HTTPRetriever(url)
        with socket.create_connection(("127.0.0.1", int(url.split(":")[-1]))) as half:
            half.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 22\r\n\r\n")
            assert retriever.search(["river king"], 5) == BM25(Corpus(folder), folder / "bm25").search(
                ["river king"], 5
            )
            with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:.*choose another"):
                listen("127.0.0.1", int(url.split(":")[-1]))
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            half.sendall(b'{"queries": ["river"]}')
            assert half.recv(12) == b"HTTP/1.1 200"
        assert server.wait(10) == 0


def test_an_address_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1:8000: .*choose another --host or --port"):
        listen("192.0.2.1", 8000)
