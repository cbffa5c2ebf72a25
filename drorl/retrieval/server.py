"""A retriever behind the `/retrieve` protocol, see [`http`]: for Search-R1 and its descendants, and for drorl itself.

`POST /retrieve` answers as Search-R1's server does; documents have a title and a text beside their contents. `GET
/retriever` says what the answers depend on. Errors are `{"detail": ...}`: 4xx where the request is to blame.
"""

import asyncio
import json
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

import uvicorn
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from drorl.data import files
from drorl.data.rows import RowError
from drorl.errors import UserError

from .retrievers import Retriever

DEFAULT_TOP_K = 3
"""Of a request that does not say; as Search-R1's server has it."""
_BODY_SECONDS = 30.0
_STOP_SECONDS = 30


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Args:
        body_bytes (`int`): its length.
        queries (`int`): how many.
        top_k (`int`): passages of each.
        passages (`int`): of all its queries together; the answer takes about a kilobyte for each.
        requests (`int`): at the same time; more are told to come back (HTTP 503).
    """

    body_bytes: int = 1 << 22
    queries: int = 1_024
    top_k: int = 1_000
    passages: int = 100_000
    requests: int = 256


def application(retriever: Retriever, limits: Limits) -> Starlette:
    """Returns the application. One search runs at a time: stemmers and models are not made for several threads."""
    one = CapacityLimiter(1)

    async def retrieve(request: Request) -> Response:
        queries, k, scored = _asked(await _body(request, limits.body_bytes), limits)
        return Response(
            await to_thread.run_sync(_answer, retriever, queries, k, scored, limiter=one),
            media_type="application/json",
        )

    async def describe(_: Request) -> Response:
        return JSONResponse({"key": retriever.key})

    async def refused(_: Request, error: Any) -> Response:
        return JSONResponse({"detail": error.detail}, error.status_code)

    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": f"{type(error).__name__}: {error}"}, 500)

    routes = [Route("/retrieve", retrieve, methods=["POST"]), Route("/retriever", describe)]
    return Starlette(routes=routes, exception_handlers={HTTPException: refused, Exception: failed})


async def _body(request: Request, limit: int) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise HTTPException(413, f"the request is longer than this server takes: {limit:,} bytes")
    except TimeoutError as error:
        raise HTTPException(408, f"the request did not arrive within {_BODY_SECONDS:g} s") from error
    return bytes(body)


def _asked(body: bytes, limits: Limits) -> tuple[list[str], int, bool]:
    """Returns the queries, how many passages each is to have, and whether with scores."""
    text = files.text_of(body, 0)
    asked = text if isinstance(text, RowError) else files.parsed(text, 0)
    if isinstance(asked, RowError):
        raise HTTPException(400, asked.problem)
    if not isinstance(asked, dict):
        raise HTTPException(400, f"no JSON object: {str(asked)[:80]!r}")
    queries, k, scored = asked.get("queries"), asked.get("topk"), asked.get("return_scores", False)
    k = DEFAULT_TOP_K if k is None else k
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise HTTPException(400, f"queries: no list of texts: {str(queries)[:80]!r}")
    if len(queries) > limits.queries:
        raise HTTPException(400, f"queries: {len(queries):,} are more than this server takes: {limits.queries:,}")
    if type(k) is not int or not 1 <= k <= limits.top_k:
        raise HTTPException(400, f"topk: no number from 1 to {limits.top_k:,}: {str(k)[:80]}")
    if len(queries) * k > limits.passages:
        raise HTTPException(400, f"{len(queries):,} queries, topk {k:,}: more than {limits.passages:,} passages")
    if not isinstance(scored, bool):
        raise HTTPException(400, f"return_scores: neither true nor false: {str(scored)[:80]}")
    return queries, k, scored


def _answer(retriever: Retriever, queries: list[str], k: int, scored: bool) -> bytes:
    found = [[_wire(passage, scored) for passage in passages] for passages in retriever.search(queries, k)]
    return json.dumps({"result": found, "key": retriever.key}, ensure_ascii=False, allow_nan=False).encode()


def _wire(passage: dict[str, Any], scored: bool) -> dict[str, Any]:
    document: dict[str, Any] = {name: passage[name] for name in ("id", "title", "text")}
    document["contents"] = f'"{passage["title"]}"\n{passage["text"]}'
    return {"document": document, "score": passage.get("score")} if scored else document


def listen(host: str, port: int) -> socket.socket:
    """Takes an address; port 0 is any that is free.

    Raises:
        UserError: if it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error


def serve(retriever: Retriever, sock: socket.socket, limits: Limits | None = None) -> None:
    """Serves until SIGINT or SIGTERM; what has been asked by then is answered first."""
    limits = limits or Limits()
    config = uvicorn.Config(
        application(retriever, limits),
        log_level="warning",
        lifespan="off",
        limit_concurrency=limits.requests,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())  # uvicorn raises the signal again when it has stopped
    uvicorn.Server(config).run(sockets=[sock])
