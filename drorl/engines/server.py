"""`drorl serve`: vLLM's own OpenAI server with a few routes more, as one of its endpoint plugins.

For a trained run, `POST /select` and `POST /answer`: the whole pipeline, both adapters on one engine; both are models
of the OpenAI routes too. For a base model, `/drorl/...`: a trainer brings its adapters and asks how likely tokens are
next (`vllm_mode=server`). `/health`, `/v1/...` and the rest are vLLM's.
"""

import asyncio
import os
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import uvloop
from fastapi import APIRouter, Body, Depends, FastAPI, Header, HTTPException, Request
from pydantic import BaseModel, Field
from safetensors.torch import save_file
from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser

from drorl.adapters import GENERATOR, ROLES, SELECTOR
from drorl.models import choose_dtype, resolve_model
from drorl.pipeline import SETTINGS_FILE, RankedPassage

from .base import Branch, StaleAdapterError
from .delivery import Adapter, base_fingerprint, base_folder
from .pipeline import EnginePipeline, saved_base
from .vllm import EngineError, VLLMEngine, engine_settings, start_error

LEASE_SECONDS = 900.0
"""How long a trainer that is not heard of keeps the server to itself."""
MAX_ADAPTER_BYTES = 4 * 2**30


@dataclass(frozen=True)
class ServeOptions:
    """What the routes need to know beside vLLM's own arguments."""

    run_dir: Path | None = None
    """A trained run; `None`: the server samples for a trainer."""
    max_passages: int = 200
    """Most candidates of a request."""
    max_body_bytes: int = 4 * 2**20
    """Longest request, other than an adapter."""


class ServedEngine(VLLMEngine):
    """The server's engine, asked from the threads in which the routes run.

    Args:
        client: vLLM's engine client; its event loop is the running one.
        args (`Namespace`): the server's arguments.
    """

    def __init__(self, client: Any, args: Namespace):
        config = client.model_config
        super().__init__(
            base_folder(args.model), config.dtype, config.max_model_len, bool(args.enable_lora), args.max_lora_rank
        )
        self._client, self._loop = client, asyncio.get_running_loop()
        self._count = 0

    def adopt(self, loras: dict[str, Any]) -> None:
        """Takes over the adapters that vLLM has loaded itself; their names are their versions."""
        self.loaded |= loras

    def _wait(self, work: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _run(self, prompts: list[Any], params: list[Any], lora: Any) -> list[Any]:
        async def one(prompt: Any, param: Any, name: str) -> Any:
            outputs = [o async for o in self._client.generate(prompt, param, name, lora_request=lora)]
            return outputs[-1]  # with FINAL_ONLY there is one

        for param in params:
            param.output_kind = RequestOutputKind.FINAL_ONLY

        async def every() -> list[Any]:
            names = [f"drorl-{self._count + i}" for i in range(len(prompts))]
            self._count += len(prompts)
            return await asyncio.gather(*map(one, prompts, params, names))

        return self._wait(every())

    def _add(self, lora: Any) -> None:
        self._wait(self._client.add_lora(lora))

    def _remove(self, lora: Any) -> None:
        self._wait(self._client.remove_lora(lora.lora_int_id))

    def _reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        folder = Path(self._folder.name) / "merged"  # the engine is another process
        folder.mkdir(exist_ok=True)
        save_file(dict(weights), folder / "model.safetensors")
        self._wait(self._client.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)}))
        if not self._wait(self._client.reset_prefix_cache()):
            raise EngineError("vLLM could not empty its prefix cache")


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

    def admit(self, client: str, base: str) -> None:
        """Lets a trainer in, if it has this base and no other trainer is at work."""
        if base != self.base:
            raise HTTPException(
                412, f"this server serves another base: {self.engine.base} ({self.base}), the trainer has {base}"
            )
        idle = time.monotonic() - self.heard
        if self.trainer not in (None, client) and idle < LEASE_SECONDS:
            raise HTTPException(
                423,
                f"another trainer ({self.trainer}) was here {idle:.0f} s ago: a server samples for one trainer. Start "
                f"a second server, or wait {LEASE_SECONDS - idle:.0f} s if that trainer is gone",
            )
        self.trainer, self.heard = client, time.monotonic()


def service(request: Request) -> Service:
    return request.app.state.drorl


def served_pipeline(request: Request) -> EnginePipeline:
    return request.app.state.drorl.pipeline


def trainers_service(request: Request, x_drorl_client: Annotated[str, Header()] = "") -> Service:
    """Returns the service to the trainer that it works for."""
    it = service(request)
    if it.trainer is None or x_drorl_client != it.trainer:
        raise HTTPException(409, f"this server does not know the trainer {x_drorl_client or '(no name)'}")
    it.heard = time.monotonic()
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
    prompts: list[list[int]]


class LogpsRequest(Prompts):
    branches: list[Branch]


class GenerateRequest(Prompts):
    max_tokens: int = Field(ge=1)
    end_id: int
    temperature: float = Field(0.0, ge=0)
    seeds: list[int] | None = None


trainers = APIRouter(prefix="/drorl")


async def body(request: Request) -> bytes:
    return await request.body()


@trainers.post("/client")
def connect(it: Shared, base: Annotated[str, Body(embed=True)], x_drorl_client: Annotated[str, Header()]) -> dict:
    it.admit(x_drorl_client, base)
    return {"window": it.engine.window}


@trainers.delete("/client")
def disconnect(it: Trainers) -> dict:
    it.trainer = None
    return {}


@trainers.put("/adapters/{role}")
def deliver(role: str, it: Trainers, content: Annotated[bytes, Depends(body)]) -> dict:
    with it.lock:
        return {"version": it.engine.deliver(Adapter(role, content))}


@trainers.post("/logps")
def logps(asked: LogpsRequest, it: Trainers) -> dict:
    with it.lock:
        return {"logps": _if_fresh(it.engine.next_token_logps, asked.version, asked.prompts, asked.branches)}


@trainers.post("/generate")
def generate(asked: GenerateRequest, it: Trainers) -> dict:
    with it.lock:
        arguments = asked.version, asked.prompts, asked.max_tokens, asked.end_id, asked.temperature, asked.seeds
        return {"completions": _if_fresh(it.engine.generate, *arguments)}


def _if_fresh(ask: Any, *arguments: Any) -> Any:
    try:
        return ask(*arguments)
    except StaleAdapterError as error:
        raise HTTPException(409, str(error)) from error


# --------------------------------------------------------------------------------------------------------- the server
class LimitBody:
    """Refuses requests that are longer than [`ServeOptions`] says, before they are read."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit = _options(scope["app"].state.args).max_body_bytes
        if scope["path"].startswith("/drorl/"):
            limit = MAX_ADAPTER_BYTES
        size = 0

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
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
        pipeline = None
        if options.run_dir is not None:
            engine.adopt(state.openai_serving_models.lora_requests)
            pipeline = EnginePipeline.over(engine, options.run_dir, {role: role for role in ROLES})
        state.drorl = Service(engine, options, pipeline, base_fingerprint(engine.base))


def _options(args: Namespace) -> ServeOptions:
    return getattr(args, "drorl", ServeOptions())  # `vllm serve` with the plugin has none


def serve(
    source: str,
    host: str,
    port: int,
    dtype: str,
    window: int | None,
    memory: float,
    max_lora_rank: int,
    max_passages: int,
    max_body_mib: float,
    native_lora: bool | None = None,
) -> None:
    """Serves a trained run, or a base model for a trainer, until it is interrupted.

    Raises:
        EngineError: if the port is taken, or the engine does not start.
    """
    run_dir = Path(source) if (Path(source) / SETTINGS_FILE).is_file() else None
    model = resolve_model(source if run_dir is None else saved_base(run_dir))
    if run_dir is not None:
        native_lora, max_lora_rank = True, max(Adapter.saved(run_dir / role, role).rank for role in ROLES)
    _check_port(host, port)
    cli_env_setup()
    settings = engine_settings(model, choose_dtype(dtype), max_lora_rank, window, memory, native_lora)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    settings |= {"host": host, "port": port, "middleware": [f"{__name__}.{LimitBody.__name__}"]}
    if run_dir is not None:
        settings["lora_modules"] = [LoRAModulePath(role, str(run_dir / role)) for role in (GENERATOR, SELECTOR)]
    for name, value in settings.items():
        setattr(args, name, value)
    args.drorl = ServeOptions(run_dir, max_passages, int(max_body_mib * 2**20))
    validate_parsed_serve_args(args)
    os.environ["VLLM_PLUGINS"] = ",".join(filter(None, [os.environ.get("VLLM_PLUGINS"), DrorlPlugin.name]))
    try:
        uvloop.run(run_server(args))
    except KeyboardInterrupt:
        pass
    except Exception as error:  # out of memory is one of several types, depending on where
        raise start_error(error) from error


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
