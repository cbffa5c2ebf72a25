"""An engine that is no vLLM, and its server: a second model, which knows of the trainer's what was delivered to it."""

import contextlib
import dataclasses
import http.server
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from drorl.engines.base import Branch, Completion, Engine, StaleAdapterError
from drorl.engines.delivery import Adapter


class SecondModel(Engine):
    """Answers by one forward pass per question, with the adapter that PEFT loads from what was delivered.

    Args:
        base (`PreTrainedModel`): a copy of the trainer's base, for the engine alone.
        folder (`Path`): where adapters are unpacked.
        error (`float`): standard deviation of noise in its log-probabilities, nats; fixed by the question.
    """

    window = 2048

    def __init__(self, base: PreTrainedModel, folder: Path, error: float = 0.0):
        self.base, self.folder, self.error = base, folder, error
        self.delivered: list[str] = []
        self.model: PeftModel | None = None

    def deliver(self, adapter: Adapter) -> str:
        if not self.delivered or self.delivered[-1] != adapter.version:
            adapter.write(self.folder / adapter.version)
            base = self.base if self.model is None else self.model.unload()
            with torch.random.fork_rng():
                self.model = PeftModel.from_pretrained(base, self.folder / adapter.version).eval()
            self.delivered.append(adapter.version)
        return adapter.version

    @torch.no_grad()
    def _logps(self, tokens: Sequence[int]) -> torch.Tensor:
        logps = torch.log_softmax(self.model(input_ids=torch.tensor([list(tokens)])).logits[0, -1].float(), dim=-1)
        noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31))
        return logps + self.error * noise

    def next_token_logps(
        self, version: str, prompts: Sequence[Sequence[int]], branches: Sequence[Branch]
    ) -> tuple[str, list[list[float]]]:
        logps = [self._logps([*prompts[b.prompt], *b.context])[list(b.allowed)].tolist() for b in branches]
        return self._answered(version), logps

    def _answered(self, version: str) -> str:
        if version not in self.delivered[-1:]:
            raise StaleAdapterError(f"not {version}")
        return self.delivered[-1]

    def generate(
        self,
        version: str,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_id: int,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> tuple[str, list[Completion]]:
        pairs = zip(prompts, seeds or [0] * len(prompts), strict=True)
        texts = [self._text(prompt, max_tokens, end_id, temperature, seed) for prompt, seed in pairs]
        return self._answered(version), texts

    def _text(self, prompt: Sequence[int], max_tokens: int, end_id: int, temperature: float, seed: int) -> Completion:
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        logps: list[float] = []
        while len(tokens) < max_tokens and tokens[-1:] != [end_id]:
            row = torch.log_softmax(self._logps([*prompt, *tokens]) / (temperature or 1.0), dim=-1)
            token = int(torch.multinomial(row.exp(), 1, generator=generator)) if temperature else int(row.argmax())
            tokens.append(token)
            logps.append(float(row[token]))
        return Completion(tokens, logps)

    def close(self) -> None:
        pass


class StandInServer(http.server.ThreadingHTTPServer):
    """Speaks with [`RemoteEngine`] as `drorl serve` does, and answers with a [`SecondModel`].

    Args:
        engine ([`SecondModel`]): answers.
        base (`str`): fingerprint of its base.
    """

    def __init__(self, engine: SecondModel, base: str):
        super().__init__(("127.0.0.1", 0), _Routes)
        self.engine, self.base, self.trainer = engine, base, ""
        self.asked: list[str] = []
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def forget(self) -> None:
        """As after a restart."""
        self.trainer = ""
        self.engine.delivered.clear()


class _Routes(http.server.BaseHTTPRequestHandler):
    server: StandInServer

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{self.command} {self.path}")
        time.sleep(self.server.delay)
        status, answer = self._answer(self.path.removeprefix("/drorl/"), body, self.headers["X-Drorl-Client"])
        self.send_response(status)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(json.dumps(answer if status == 200 else {"error": {"message": answer}}).encode())

    do_POST = do_PUT = do_DELETE = _handle

    def _answer(self, path: str, body: bytes, client: str) -> tuple[int, Any]:
        server, engine = self.server, self.server.engine
        if (self.command, path) == ("POST", "client"):
            if json.loads(body)["base"] != server.base:
                return 412, "this server serves another base"
            if server.trainer not in ("", client):
                return 423, f"another trainer ({server.trainer}) was here"
            server.trainer = client
            return 200, {"window": engine.window, "dtype": "float32"}
        if client != server.trainer:
            return 409, f"this server does not know the trainer {client}"
        if self.command == "DELETE":
            server.trainer = ""
        if self.command in ("DELETE", "POST") and path in ("client", "heartbeat"):
            return 200, {}
        if self.command == "PUT":
            return 200, {"version": engine.deliver(Adapter(path.rsplit("/", 1)[1], body))}
        asked = json.loads(body)
        try:
            if path == "logps":
                asked["branches"] = [Branch(**branch) for branch in asked["branches"]]
                version, logps = engine.next_token_logps(**asked)
                return 200, {"version": version, "logps": logps}
            version, texts = engine.generate(**asked)
            return 200, {"version": version, "completions": [dataclasses.asdict(text) for text in texts]}
        except StaleAdapterError as error:
            return 409, str(error)


@contextlib.contextmanager
def standing_in(engine: SecondModel, base: str) -> Iterator[StandInServer]:
    """The server, until the block ends."""
    server = StandInServer(engine, base)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
