r"""Candidates from a server that speaks the `/retrieve` protocol of Search-R1 and its descendants.

`POST /retrieve {"queries": [...], "topk": k, "return_scores": true}` is answered by a list for each query:
`{"result": [[{"document": {"id": "7", "contents": "\"Title\"\nText"}, "score": 1.5}, ...], ...]}`. The forms that are
in use beside it are read as well: the lists alone, documents without scores, with title and text, without an id.
Source: https://github.com/PeterGriffinJin/Search-R1, search_r1/search/retrieval_server.py.
"""

import hashlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from drorl.data import files
from drorl.data.fields import Problem, Row, candidate, score_of, text_of
from drorl.data.formats import title_and_text
from drorl.data.rows import RowError
from drorl.errors import InvalidInputError, UserError

from .retrievers import Place, settings_of

MAX_ANSWER_BYTES = 1 << 26
_FIRST_DELAY = 0.5
"""Seconds before a request is sent again; each time twice as long."""
_IDS = ("id", "_id", "docid")


class RetrieverServerError(UserError):
    """A server of passages that does not answer, or with something else."""


class _AwayError(Exception):
    """What may be over when it is asked again."""


class HTTPRetriever:
    """Searches where a server does, such as `drorl serve-retriever`.

    The connection is the standard library's, because its socket can be closed when the time is over. It follows no
    redirect, unpacks nothing, and knows no proxies.

    Args:
        url (`str`): of the server, with or without `/retrieve`.
        timeout (`float`): seconds for the whole answer to one request, however slowly it comes.
        batch_size (`int`): queries of one request.
        tries (`int`): how often a request is sent at most: again where no connection can be made or is lost, and after
            HTTP 429 and 5xx, but not after a timeout, which would double the server's work.
        max_bytes (`int`): the longest answer that is read.

    Raises:
        InvalidInputError: if the URL is none.
        RetrieverServerError: if nobody answers there, or with what is no answer. The message says what was seen.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 120.0,
        batch_size: int = 64,
        tries: int = 5,
        max_bytes: int = MAX_ANSWER_BYTES,
    ):
        self.url = url.rstrip("/").removesuffix("/retrieve")
        self.timeout, self.batch_size, self.tries, self.max_bytes = timeout, batch_size, tries, max_bytes
        self._connect_to, self._path = _address(self.url)
        self._said = self._self_description()
        self.key = f"http {self.url} {self._said}"
        """The server's address, and what it says of itself: another server than drorl's says nothing, and may change
        its index unnoticed."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Row]]:
        """Returns the candidates of each query in the server's order, at most k.

        A passage without an id gets one of its content; where the server gives no scores there are none.
        """
        if k < 1:
            return [[] for _ in queries]
        starts = range(0, len(queries), self.batch_size)
        return [found for start in starts for found in self._batch(queries[start : start + self.batch_size], k)]

    def _batch(self, queries: Sequence[str], k: int) -> list[list[Row]]:
        answer = self._json("POST", "retrieve", {"queries": list(queries), "topk": k, "return_scores": True})
        lists = answer
        if isinstance(answer, dict):
            lists = answer.get("result")
            if "key" in answer and answer["key"] != self._said:
                raise RetrieverServerError(f"{self.url} has become another retriever: {str(answer['key'])[:200]}")
        if not isinstance(lists, list):
            raise RetrieverServerError(f"{self.url} answers without lists of passages: {str(answer)[:100]!r}")
        if len(lists) != len(queries):
            raise RetrieverServerError(f"{self.url} answers with {len(lists)} lists to {len(queries)} queries")
        try:
            return [_candidates(found, k, f"query {i}") for i, found in enumerate(lists, start=1)]
        except Problem as problem:
            raise RetrieverServerError(f"{self.url}: {problem}") from problem

    def _self_description(self) -> str:
        """Returns the key of the retriever behind a server of drorl; of another one nothing."""
        try:
            answer = self._json("GET", "retriever")
        except _NoAnswerError:
            return ""
        return str(answer["key"]) if isinstance(answer, dict) and "key" in answer else ""

    def _json(self, method: str, path: str, content: Any = None) -> Any:
        body = self._answered(
            method, f"{self._path}/{path}", None if content is None else json.dumps(content).encode()
        )
        text = files.text_of(body, 0)
        answer = text if isinstance(text, RowError) else files.parsed(text, 0)
        if isinstance(answer, RowError):
            raise _NoAnswerError(f"{self.url} answers with {answer.problem}")
        return answer

    def _answered(self, method: str, path: str, body: bytes | None) -> bytes:
        problem: Exception | None = None
        for attempt in range(self.tries):
            if attempt:
                time.sleep(_FIRST_DELAY * 2 ** (attempt - 1))
            try:
                return self._asked(method, path, body)
            except _AwayError as error:
                problem = error
        raise RetrieverServerError(f"{self.url} has failed {self.tries} times, at last: {problem}") from problem

    def _asked(self, method: str, path: str, body: bytes | None) -> bytes:
        """Returns the content of an answer that is no error."""
        try:
            with closing(self._connect_to(timeout=self.timeout)) as connection:
                connection.connect()
                with _deadline(connection.sock, self.timeout):
                    connection.request(method, path, body, {"Content-Type": "application/json"})
                    response = connection.getresponse()
                    content = response.read(self.max_bytes + 1)
        except TimeoutError as error:
            raise RetrieverServerError(f"{self.url} has not answered within {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise _AwayError(f"{type(error).__name__} {error}".strip()) from error
        if len(content) > self.max_bytes:
            raise RetrieverServerError(f"{self.url} answers with more than {self.max_bytes:,} bytes")
        if response.length:
            raise _AwayError(f"an answer that ends {response.length:,} bytes too early")
        self._refuse(response, content)
        return content

    def _refuse(self, response: http.client.HTTPResponse, content: bytes) -> None:
        status, packed = response.status, response.headers.get("Content-Encoding", "identity")
        said = f"HTTP {status} {response.reason}: {content[:200].decode(errors='replace')!r}"
        if status in (404, 405, 501):
            raise _NoAnswerError(f"{self.url} does not speak /retrieve: {said}")
        if status == 429 or status >= 500:
            raise _AwayError(said)
        if 300 <= status < 400:
            target = response.headers.get("Location", "nowhere")
            raise RetrieverServerError(f"{self.url} redirects to {target}: give that address if you trust it")
        if status != 200:
            raise RetrieverServerError(f"{self.url}: {said}")
        if packed.lower() != "identity":
            raise RetrieverServerError(f"{self.url} answers packed as {packed}, which it was not asked for")


class _NoAnswerError(RetrieverServerError):
    """There is no such path, or something else lives at it."""


def _address(url: str) -> tuple[Any, str]:
    """Returns what makes a connection to a server, and the path to it."""
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    try:
        parts = urlsplit(url)
        kind, host, port = kinds[parts.scheme], parts.hostname, parts.port
        if not host or parts.query or parts.fragment or parts.username:
            raise ValueError("a host and a path are needed, and nothing else is used")
    except (KeyError, ValueError) as error:
        raise InvalidInputError(f"{url!r} is no address of a server, such as http://127.0.0.1:8000") from error
    return lambda timeout: kind(host, port, timeout=timeout), parts.path


@contextmanager
def _deadline(sock: socket.socket, seconds: float) -> Generator[None]:
    """Ends a connection once its time is over, wherever in the answer that is.

    Raises:
        TimeoutError: if it was.
    """
    over = threading.Event()

    def end() -> None:
        over.set()
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        if not over.is_set():
            raise
    finally:
        timer.cancel()
    if over.is_set():
        raise TimeoutError


def _candidates(found: object, k: int, where: str) -> list[Row]:
    if not isinstance(found, list):
        raise Problem(where, "no list of passages", found)
    if len(found) > k:
        raise Problem(where, f"more than the {k} passages that were asked for", len(found))
    candidates = []
    for rank, item in enumerate(found, start=1):
        try:
            candidates.append(_candidate(item, rank))
        except Problem as problem:
            raise Problem(f"{where}, passage {rank}", str(problem)) from problem
    names = [c["id"] for c in candidates]
    if twice := next((name for rank, name in enumerate(names) if name in names[:rank]), None):
        raise Problem(where, "a passage that occurs twice", twice)
    return candidates


def _candidate(item: object, rank: int) -> Row:
    """Returns the candidate that a server means, in whichever form."""
    given = item if isinstance(item, dict) and "document" in item else {"document": item}
    document = given["document"]
    if isinstance(document, str):
        document = {"contents": document}
    if not isinstance(document, dict):
        raise Problem("document", "no passage", document)
    if "text" in document:
        title, text = text_of(document, "title", ""), text_of(document, "text")
    else:
        title, text = title_and_text(text_of(document, "contents"))
    if not text.strip():
        raise Problem("text", "empty", document)
    name = next((n for n in _IDS if n in document), None)
    made = hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:16] if name is None else text_of(document, name)
    score = score_of(given if "score" in given else document)
    return {"id": made, **candidate(title, text, score=score, rank=rank)}


@dataclass(frozen=True)
class HTTPSettings:
    """Who is asked, see [`HTTPRetriever`]."""

    url: str
    timeout: float = 120.0
    batch_size: int = 64
    tries: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= threading.TIMEOUT_MAX or self.batch_size < 1 or self.tries < 1:
            raise InvalidInputError(
                f"timeout={self.timeout} is a number of seconds above 0, and batch_size={self.batch_size} and "
                f"tries={self.tries} are 1 at least"
            )


def open_http(place: Place, given: Mapping[str, str]) -> HTTPRetriever:
    """Opens a server, which has its own corpus; see [`~drorl.retrieval.retrievers.open_retriever`]."""
    if place.folder is not None:
        raise InvalidInputError("http asks a server that has its own index: there is nothing to make here")
    settings = settings_of(HTTPSettings, given)
    return HTTPRetriever(settings.url, settings.timeout, settings.batch_size, settings.tries)
