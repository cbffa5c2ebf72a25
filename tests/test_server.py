"""The routes and the lease of `drorl serve`, with an engine that is no vLLM behind them. With vLLM: test_vllm.py."""

import asyncio
import socket
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import SecondModel
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from drorl.adapters import SELECTOR
from drorl.engines.delivery import Adapter
from drorl.errors import InvalidInputError
from drorl.pipeline import PipelineSettings, RAGPipeline

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="make test-vllm has an environment with it")

from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler  # noqa: E402

from drorl.engines import server  # noqa: E402
from drorl.engines.served import ServedEngine  # noqa: E402


@pytest.fixture
def engine(tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path) -> SecondModel:
    engine = SecondModel(tiny_model(), tmp_path / "engine")
    engine.dtype = torch.float32
    return engine


@pytest.fixture
def service(engine: SecondModel) -> server.Service:
    return server.Service(engine, server.ServeOptions(max_body_bytes=100), None, "its base")


@pytest.fixture
def client(service: server.Service) -> TestClient:
    """A trainer that is connected."""
    app = FastAPI()
    init_exception_handler(app)
    app.add_middleware(server.LimitBody)
    app.include_router(server.trainers)
    app.state.args = Namespace(drorl=service.options, log_error_stack=False)
    app.state.drorl = service
    client = TestClient(app, headers={"X-Drorl-Client": "one"}, raise_server_exceptions=False)
    assert client.post("/drorl/client", json={"base": "its base"}).json() == {"window": 2048, "dtype": "float32"}
    return client


PROMPTS: dict[str, Any] = {"version": "selector-1", "prompts": [[5, 6], [7]]}
BRANCH: dict[str, Any] = {"prompt": 0, "context": [], "allowed": [1]}
TEXTS: dict[str, Any] = {**PROMPTS, "max_tokens": 3, "end_id": 2}


@pytest.mark.parametrize(
    ("method", "path", "content", "words"),
    [
        ("PUT", "adapters/selector", {"content": b"something else"}, "not an adapter"),
        ("PUT", "adapters/..%2Fselector", {"content": b""}, ""),
        ("PUT", "adapters/judge", {"content": b""}, "generator"),
        (
            "POST",
            "logps",
            {"json": {**PROMPTS, "branches": [{**BRANCH, "prompt": 2}]}},
            "2 prompts",
        ),
        (
            "POST",
            "logps",
            {"json": {**PROMPTS, "branches": [{**BRANCH, "prompt": -1}]}},
            "prompts",
        ),
        ("POST", "logps", {"json": {**PROMPTS, "prompts": [[]] * 16385, "branches": []}}, "at most 16384"),
        ("POST", "generate", {"json": {**TEXTS, "seeds": [1]}}, "1 seeds for 2 prompts"),
        ("POST", "generate", {"json": {**TEXTS, "seeds": [1, -1]}}, "seeds"),
        ("POST", "generate", {"json": {**TEXTS, "max_tokens": 0}}, "max_tokens"),
        ("POST", "generate", {"content": b'{"temperature": NaN'}, ""),
    ],
    ids=range(10),
)
def test_what_a_trainer_cannot_mean_is_refused(
    method: str, path: str, content: dict[str, Any], words: str, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reason, before the engine hears of it; and the next question is answered."""
    response = client.request(method, f"/drorl/{path}", **content)
    assert 400 <= response.status_code < 500
    assert words in response.text
    assert client.post("/drorl/heartbeat").status_code == 200


def test_only_adapters_may_be_large(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question has a limit of its own, and an adapter's is larger; neither is the users'."""
    monkeypatch.setattr(server, "MAX_QUESTION_BYTES", 1000)
    long = b"x" * 2000
    for method, path in (("POST", "logps"), ("POST", "adapters/selector"), ("PUT", "logps")):
        assert client.request(method, f"/drorl/{path}", content=long).status_code in (405, 413)
    assert client.post("/drorl/logps", content=long).status_code == 413
    assert "not an adapter" in client.put("/drorl/adapters/selector", content=long).text


def test_a_request_that_does_not_arrive_is_refused(service: server.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that drips is given up after its time (408); after a whole one the server may take as long as it does."""
    monkeypatch.setattr(server, "BODY_SECONDS", 0.2)
    parts: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop(0)
        await asyncio.sleep(0.3)
        return {"type": "http.disconnect"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    state = SimpleNamespace(args=Namespace(drorl=service.options))
    scope = {"type": "http", "method": "POST", "path": "/select", "app": SimpleNamespace(state=state)}
    limited = server.LimitBody(app)
    parts += [{"type": "http.request", "body": b"x", "more_body": True}]
    with pytest.raises(server.HTTPException, match="408.*within 0.2 s"):
        asyncio.run(limited(scope, receive, None))
    parts += [{"type": "http.request", "body": b"x", "more_body": False}]
    asyncio.run(limited(scope, receive, None))


def test_questions_are_answered_by_version(client: TestClient, adapted_model: Callable[..., PeftModel]) -> None:
    """The answer names who gave it; another version than the engine's is answered by 409."""
    adapter = Adapter.of(adapted_model(randomise=True), SELECTOR)
    put = client.put(f"/drorl/adapters/{SELECTOR}", content=adapter.content)
    assert put.json() == {"version": adapter.version}
    asked = {**PROMPTS, "branches": [{"prompt": 0, "context": [9], "allowed": [1, 2]}]}
    answer = client.post("/drorl/logps", json={**asked, "version": adapter.version}).json()
    assert answer["version"] == adapter.version
    assert len(answer["logps"][0]) == 2
    texts = client.post("/drorl/generate", json={**TEXTS, "version": adapter.version, "seeds": [1, 2]}).json()
    assert texts["version"] == adapter.version
    assert len(texts["completions"]) == 2
    assert client.post("/drorl/logps", json=asked).status_code == 409


def test_a_lease_is_kept_by_hearing_of_the_trainer(
    client: TestClient, service: server.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another trainer is refused as long as a heartbeat is not a minute old, and only the trainer itself can leave."""
    now = [service.heard]
    monkeypatch.setattr(server.time, "monotonic", lambda: now[0])
    other = {"X-Drorl-Client": "other"}

    def enter() -> int:
        return client.post("/drorl/client", json={"base": "its base"}, headers=other).status_code

    for _ in range(3):
        now[0] += 50
        assert enter() == 423
        assert client.post("/drorl/heartbeat").status_code == 200
    assert client.delete("/drorl/client", headers=other).status_code == 409
    now[0] += 61
    assert enter() == 200
    assert client.post("/drorl/heartbeat").status_code == 409
    assert client.delete("/drorl/client", headers=other).status_code == 200
    assert client.post("/drorl/client", json={"base": "its base"}).status_code == 200
    assert client.post("/drorl/client", json={"base": "another"}).status_code == 412


def test_with_one_request_that_fails_the_others_end(
    tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """They would compute on, for nobody, while the next question waits."""
    tiny_model().save_pretrained(tmp_path)
    ended: list[int] = []

    class Client:
        model_config = SimpleNamespace(dtype=torch.float32, max_model_len=99)

        async def generate(self, prompt: int, *_: Any, **__: Any) -> Any:
            if prompt == 1:
                raise ValueError("no such token")
            try:
                await asyncio.sleep(60)
                yield None
            finally:
                ended.append(prompt)

    async def asked() -> None:
        engine = ServedEngine(Client(), Namespace(model=str(tmp_path), enable_lora=False, max_lora_rank=8))
        params = [SimpleNamespace() for _ in range(3)]
        with pytest.raises(ValueError, match="no such token"):
            await asyncio.to_thread(engine._run, [0, 1, 2], params, None)

    asyncio.run(asked())
    assert sorted(ended) == [0, 2]


def test_where_it_cannot_listen_is_said() -> None:
    """A port that is taken, on IPv6 too; a name that is no host; an address of another machine."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as taken:
            try:
                taken.bind((host, 0))
            except OSError:
                continue  # a machine without IPv6
            taken.listen()
            with pytest.raises(server.EngineError, match="choose another --port"):
                server._check_port(host, taken.getsockname()[1])
    with pytest.raises(server.EngineError, match="--host no such host is no address"):
        server._check_port("no such host", 8000)
    with pytest.raises(server.EngineError, match="choose another --host"):
        server._check_port("192.0.2.1", 8000)


@pytest.mark.parametrize("settings", [{"native_lora": False}, {"max_lora_rank": 8}])
def test_a_run_is_served_as_it_is(
    settings: dict[str, Any],
    adapted_model: Callable[..., PeftModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """What is meant for a trainer's base is refused with the reason, not ignored."""
    pipeline = RAGPipeline(adapted_model(), tokenizer, PipelineSettings(6, 2))
    pipeline.save_pretrained(tmp_path)
    options = {"max_lora_rank": None, "native_lora": None} | settings
    with pytest.raises(InvalidInputError, match="a run's two adapters share one base"):
        server.serve(str(tmp_path), "127.0.0.1", 8000, "float32", None, 0.9, max_passages=9, max_body_mib=1, **options)
