"""The trainer's end of `drorl serve` (`vllm_mode=server`)."""

import atexit
import contextlib
import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

import requests
from rich.console import Console
from transformers.utils import logging

from drorl.models import resolve_model

from .base import Branch, Completion, Engine, EngineError
from .delivery import Adapter, base_fingerprint, base_folder

logger = logging.get_logger(__name__)
_RETRY_SECONDS = 1.0
_TIMEOUTS = (5.0, 600.0)  # seconds, for a connection and for an answer
_stderr = Console(stderr=True)


class RemoteEngine(Engine):
    """An engine in a server that samples for this trainer alone.

    What can go wrong between the two is found out, not hoped against: the server is asked for its base's fingerprint
    before the first question, and for the adapter's version with each. A server that does not answer is waited for,
    one that has been restarted gets the adapters again.

    Args:
        url (`str`): address of the server.
        model (`str`): name or folder of the trainer's base.
        timeout (`float`): seconds to wait for the server, `vllm_server_timeout`.
        client (`str`, *optional*): name under which all processes of one trainer are known; default: a random one.

    Raises:
        EngineError: if the server does not answer in time, serves another base, or works for another trainer.
    """

    def __init__(self, url: str, model: str, timeout: float = 240.0, client: str | None = None):
        self.url, self.timeout = url.rstrip("/"), timeout
        self.client = client or uuid.uuid4().hex[:12]
        self._base = base_fingerprint(base_folder(resolve_model(model)))
        self._session = requests.Session()
        self._session.headers["X-Drorl-Client"] = self.client
        self._adapters: dict[str, Adapter] = {}
        self._connect()
        atexit.register(self.close)

    def deliver(self, adapter: Adapter) -> str:
        last = self._adapters.get(adapter.role)
        if last is None or last.version != adapter.version:
            self._send(adapter)
            self._adapters[adapter.role] = adapter
        return adapter.version

    def next_token_logps(
        self, version: str, prompts: Sequence[Sequence[int]], branches: Sequence[Branch]
    ) -> list[list[float]]:
        asked = {"prompts": list(prompts), "branches": [dataclasses.asdict(branch) for branch in branches]}
        return self._call("POST", "logps", json={"version": version, **asked})["logps"]

    def generate(
        self,
        version: str,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_id: int,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        asked = {"max_tokens": max_tokens, "end_id": end_id, "temperature": temperature, "seeds": seeds}
        asked["prompts"] = list(prompts)
        texts = self._call("POST", "generate", json={"version": version, **asked})["completions"]
        return [Completion(**text) for text in texts]

    def close(self) -> None:
        atexit.unregister(self.close)
        with contextlib.suppress(requests.RequestException):
            self._session.delete(f"{self.url}/drorl/client", timeout=5)

    def _send(self, adapter: Adapter) -> None:
        answer = self._call("PUT", f"adapters/{adapter.role}", data=adapter.content)
        if answer["version"] != adapter.version:
            raise EngineError(f"{self.url} has received {answer['version']} where {adapter.version} was sent")

    def _connect(self) -> None:
        """Introduces this trainer to the server, and gives it what it has lost."""
        self.window = self._answered("POST", "client", {"json": {"base": self._base}}).json()["window"]
        for adapter in self._adapters.values():
            self._send(adapter)

    def _call(self, method: str, path: str, **content: Any) -> Any:
        """Returns the server's answer; one that has forgotten this trainer or its adapters is told again, once."""
        response = self._answered(method, path, content, refused=(409,))
        if response.status_code == 409:
            logger.warning(f"{_reason(response)} ({self.url}): sending the adapters again")
            self._connect()
            response = self._answered(method, path, content)
        return response.json()

    def _answered(
        self, method: str, path: str, content: dict[str, Any], refused: Sequence[int] = ()
    ) -> requests.Response:
        """Returns an answer that is no error, or one of `refused`; waits for a server that cannot be reached."""
        url, start, waiting = f"{self.url}/drorl/{path}", time.monotonic(), None
        try:
            while True:
                try:
                    response = self._session.request(method, url, timeout=_TIMEOUTS, **content)
                    break
                except requests.RequestException as error:
                    waited = time.monotonic() - start
                    if waited > self.timeout:
                        raise EngineError(
                            f"the vLLM server at {self.url} cannot be reached since {waited:.0f} s "
                            f"({type(error).__name__}). Start it with: drorl serve MODEL"
                        ) from error
                    waiting = waiting or _stderr.status("")
                    waiting.start()
                    waiting.update(f"waiting for the vLLM server at {self.url}: {waited:.0f} of {self.timeout:.0f} s")
                    time.sleep(min(_RETRY_SECONDS, self.timeout))
        finally:
            if waiting is not None:
                waiting.stop()
        if not response.ok and response.status_code not in refused:
            raise EngineError(f"{self.url}: {_reason(response)}")
        return response


def _reason(response: requests.Response) -> str:
    """Returns what the server says is wrong, which is JSON where the server is `drorl serve`."""
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code} {response.reason}; is this `drorl serve MODEL`?"
