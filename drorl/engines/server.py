"""`drorl serve`: vLLM's own OpenAI server with a few routes more, as one of its endpoint plugins.

For a trained run, `POST /select` and `POST /answer`: the whole pipeline, both adapters on one engine; both are models
of the OpenAI routes too. For a base model, `/drorl/...`: a trainer brings its adapters and asks how likely tokens are
next (`vllm_mode=server`). `/health`, `/v1/...` and the rest are vLLM's.
"""

import asyncio
import errno
import os
import socket
import threading
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import uvloop
from fastapi import APIRouter, Body, Depends, FastAPI, Header, HTTPException, Request
from pydantic import BaseModel, Field, model_validator
from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser

from drorl.adapters import GENERATOR, ROLES, SELECTOR
from drorl.errors import InvalidInputError
from drorl.models import choose_dtype, resolve_model
from drorl.pipeline import SETTINGS_FILE, RankedPassage

from .base import Branch, EngineError, StaleAdapterError
from .delivery import Adapter, base_fingerprint
from .pipeline import EnginePipeline, saved_base
from .remote import LEASE_SECONDS
from .served import ServedEngine
from .vllm import engine_settings, start_error

MAX_ADAPTER_BYTES, MAX_QUESTION_BYTES = 4 * 2**30, 64 * 2**20  # of a trainer's requests
MAX_PROMPTS, MAX_BRANCHES = 2**14, 2**18
BODY_SECONDS, ADAPTER_SECONDS = 30.0, 600.0  # in which a request has to arrive


@dataclass
class ServeOptions:
    """What the routes need to know beside vLLM's own arguments, and how the server fares."""

    run_dir: Path | None = None
    """A trained run; `None`: the server samples for a trainer."""
    max_passages: int = 200
    """Most candidates of a request."""
    max_body_bytes: int = 4 * 2**20
    """Longest request of a user."""
    started: bool = False
    died: bool = False
    """Whether the engine has gone, and the server with it."""


@dataclass
class Service:
    """What the routes share."""

    engine: ServedEngine
    options: ServeOptions
    pipeline: EnginePipeline | None
    base: str
    trainer: str | None = None
    heard: float = 0.0

    def __post_init__(self) -> None:
        self.lock = threading.RLock()  # an adapter never changes under a question
        self._door = threading.Lock()

    def admit(self, client: str, base: str) -> None:
        """Lets a trainer in, if it has this base and no other trainer is at work."""
        if base != self.base:
            raise HTTPException(
                412, f"this server serves another base: {self.engine.base} ({self.base}), the trainer has {base}"
            )
        with self._door:
            idle = time.monotonic() - self.heard
            if self.trainer not in (None, client) and idle < LEASE_SECONDS:
                raise HTTPException(
                    423,
                    f"another trainer ({self.trainer}) was here {idle:.0f} s ago: a server samples for one trainer. "
                    f"Start a second server, or wait {LEASE_SECONDS - idle:.0f} s if that trainer is gone",
                )
            self.trainer, self.heard = client, time.monotonic()

    def hear(self, client: str, last: bool = False) -> None:
        """Notes that the trainer is there, or that this is its `last` word."""
        with self._door:
            if self.trainer is None or client != self.trainer:
                raise HTTPException(409, f"this server does not know the trainer {client or '(no name)'}")
            self.trainer, self.heard = None if last else client, time.monotonic()


def service(request: Request) -> Service:
    return request.app.state.drorl


def served_pipeline(request: Request) -> EnginePipeline:
    return request.app.state.drorl.pipeline


def trainers_service(request: Request, x_drorl_client: Annotated[str, Header()] = "") -> Service:
    """Returns the service to the trainer that it works for."""
    it = service(request)
    it.hear(x_drorl_client)
    return it


Shared = Annotated[Service, Depends(service)]
Pipeline = Annotated[EnginePipeline, Depends(served_pipeline)]
Trainers = Annotated[Service, Depends(trainers_service)]


# -------------------------------------------------------------------------------------------------------- for users
class Candidate(BaseModel):
    id: str
    title: str
    text: str = Field(min_length=1)
    score: float | None = None


class Question(BaseModel):
    query: str = Field(min_length=1)
    candidates: list[Candidate] = Field(min_length=1)

    def checked(self, it: Service) -> tuple[str, list[dict[str, Any]]]:
        if len(self.candidates) > it.options.max_passages:
            raise HTTPException(
                400, f"{len(self.candidates)} candidates are more than this server takes: {it.options.max_passages}"
            )
        return self.query, [candidate.model_dump() for candidate in self.candidates]


class Selection(Question):
    k: int | None = None


def _ranked(passages: list[RankedPassage]) -> list[dict[str, Any]]:
    return [{**ranked.passage, "logp": ranked.logp} for ranked in passages]


users = APIRouter()


@users.post("/select")
def select(question: Selection, it: Shared, pipeline: Pipeline) -> dict[str, Any]:
    """The selector's most likely permutation, best first."""
    return {"passages": _ranked(pipeline.select(*question.checked(it), question.k))}


@users.post("/answer")
def answer(question: Question, it: Shared, pipeline: Pipeline) -> dict[str, Any]:
    """The generator's answer from the selected passages, and these."""
    answered = pipeline.answer(*question.checked(it))
    return {"answer": answered.text, "citations": _ranked(answered.citations)}


# ------------------------------------------------------------------------------------------------------ for a trainer
class Prompts(BaseModel):
    version: str
    prompts: list[list[int]] = Field(max_length=MAX_PROMPTS)


class LogpsRequest(Prompts):
    branches: list[Branch] = Field(max_length=MAX_BRANCHES)

    @model_validator(mode="after")
    def _of_prompts(self) -> Self:
        if not all(0 <= branch.prompt < len(self.prompts) for branch in self.branches):
            raise ValueError(f"a branch is of none of the {len(self.prompts)} prompts")
        return self


class GenerateRequest(Prompts):
    max_tokens: int = Field(ge=1)
    end_id: int = Field(ge=0)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] | None = None

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if self.seeds is not None and len(self.seeds) != len(self.prompts):
            raise ValueError(f"{len(self.seeds)} seeds for {len(self.prompts)} prompts")
        return self


trainers = APIRouter(prefix="/drorl")


async def body(request: Request) -> bytes:
    return await request.body()


@trainers.post("/client")
def connect(it: Shared, base: Annotated[str, Body(embed=True)], x_drorl_client: Annotated[str, Header()]) -> dict:
    it.admit(x_drorl_client, base)
    return {"window": it.engine.window, "dtype": str(it.engine.dtype).removeprefix("torch.")}


@trainers.delete("/client")
def disconnect(it: Shared, x_drorl_client: Annotated[str, Header()]) -> dict:
    it.hear(x_drorl_client, last=True)
    return {}


@trainers.post("/heartbeat")
def heartbeat(it: Trainers) -> dict:
    return {}


@trainers.put("/adapters/{role}")
def deliver(role: Literal["selector", "generator"], it: Trainers, content: Annotated[bytes, Depends(body)]) -> dict:
    with it.lock:
        return {"version": it.engine.deliver(Adapter(role, content))}


@trainers.post("/logps")
def logps(asked: LogpsRequest, it: Trainers) -> dict:
    with it.lock:
        version, logps = _if_fresh(it.engine.next_token_logps, asked.version, asked.prompts, asked.branches)
    return {"version": version, "logps": logps}


@trainers.post("/generate")
def generate(asked: GenerateRequest, it: Trainers) -> dict:
    with it.lock:
        arguments = asked.version, asked.prompts, asked.max_tokens, asked.end_id, asked.temperature, asked.seeds
        version, completions = _if_fresh(it.engine.generate, *arguments)
    return {"version": version, "completions": completions}


def _if_fresh(ask: Any, *arguments: Any) -> Any:
    try:
        return ask(*arguments)
    except StaleAdapterError as error:
        raise HTTPException(409, str(error)) from error


# --------------------------------------------------------------------------------------------------------- the server
class LimitBody:
    """Refuses requests that are longer than they may be, before they are read, or that do not arrive."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit, size, complete = _options(scope["app"].state.args).max_body_bytes, 0, False
        adapter = scope["method"] == "PUT" and scope["path"].startswith("/drorl/adapters/")
        if scope["path"].startswith("/drorl/"):
            limit = MAX_ADAPTER_BYTES if adapter else MAX_QUESTION_BYTES
        seconds = ADAPTER_SECONDS if adapter else BODY_SECONDS
        deadline = asyncio.get_running_loop().time() + seconds

        async def limited() -> Any:
            nonlocal size, complete
            if complete:  # what is still received is that the client has gone, for which nobody waits too long
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"the request did not arrive within {seconds:g} s") from error
            size, complete = size + len(message.get("body", b"")), not message.get("more_body", False)
            if size > limit:
                raise HTTPException(413, f"the request is longer than this server takes: {limit} bytes")
            return message

        await self._app(scope, limited, send)


class DrorlPlugin:
    """The routes above, as vLLM loads them (entry point `vllm.endpoint_plugins`, `VLLM_PLUGINS=drorl`)."""

    name = "drorl"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(trainers if _options(app.state.args).run_dir is None else users)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        options, engine = _options(args), ServedEngine(engine_client, args)
        _note_death(engine_client, options)
        pipeline = None
        if options.run_dir is not None:
            engine.adopt(state.openai_serving_models.lora_requests)
            pipeline = EnginePipeline.over(engine, options.run_dir, {role: role for role in ROLES})
        state.drorl = Service(engine, options, pipeline, base_fingerprint(engine.base))
        options.started = True


def _note_death(client: Any, options: ServeOptions) -> None:
    """Notes whether the engine was dead when it was first shut down: vLLM ends alike then and when it is told to."""
    shutdown, first = client.shutdown, threading.Lock()

    def noted(*arguments: Any, **keywords: Any) -> Any:
        if first.acquire(blocking=False):
            options.died = client.errored
        return shutdown(*arguments, **keywords)

    client.shutdown = noted


def _options(args: Namespace) -> ServeOptions:
    return getattr(args, "drorl", ServeOptions())  # `vllm serve` with the plugin has none


def serve(
    source: str,
    host: str,
    port: int,
    dtype: str,
    window: int | None,
    memory: float,
    max_lora_rank: int | None,
    max_passages: int,
    max_body_mib: float,
    native_lora: bool | None = None,
) -> None:
    """Serves a trained run, or a base model for a trainer, until it is interrupted.

    Raises:
        EngineError: if the port is taken, the engine does not start, or is lost.
        InvalidInputError: if a run is to be served otherwise than it can be.
    """
    run_dir = Path(source) if (Path(source) / SETTINGS_FILE).is_file() else None
    model = resolve_model(source if run_dir is None else saved_base(run_dir))
    if run_dir is not None:
        if native_lora is False or max_lora_rank is not None:
            raise InvalidInputError(
                "a run's two adapters share one base, so they are not merged, and have the rank that they have: leave "
                "--no-native-lora and --max-lora-rank out"
            )
        native_lora, max_lora_rank = True, max(Adapter.saved(run_dir / role, role).rank for role in ROLES)
    _check_port(host, port)
    cli_env_setup()
    settings = engine_settings(model, choose_dtype(dtype), max_lora_rank or 64, window, memory, native_lora)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    settings |= {"host": host, "port": port, "middleware": [f"{__name__}.{LimitBody.__name__}"]}
    if run_dir is not None:
        settings["lora_modules"] = [LoRAModulePath(role, str(run_dir / role)) for role in (GENERATOR, SELECTOR)]
    for name, value in settings.items():
        setattr(args, name, value)
    args.drorl = options = ServeOptions(run_dir, max_passages, int(max_body_mib * 2**20))
    validate_parsed_serve_args(args)
    os.environ["VLLM_PLUGINS"] = ",".join(filter(None, [os.environ.get("VLLM_PLUGINS"), DrorlPlugin.name]))
    try:
        uvloop.run(run_server(args))
    except KeyboardInterrupt:
        pass
    except Exception as error:  # out of memory is one of several types, depending on where
        failed = EngineError(f"the server has failed: {error}") if options.started else start_error(error)
        raise failed from error
    if options.died:
        raise EngineError("vLLM's engine has died, and the server with it; its log says why")


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET  # as vLLM has it
    try:
        *_, address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise EngineError(f"--host {host} is no address: {error.strerror}") from error
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            other = "--port" if error.errno == errno.EADDRINUSE else "--host"
            raise EngineError(f"cannot listen on {host}:{port}: {error.strerror}; choose another {other}") from error
