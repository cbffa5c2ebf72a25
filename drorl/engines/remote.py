"""The trainer's end of `drorl serve` (`vllm_mode=server`)."""

import contextlib
import dataclasses
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import requests
import torch
from rich.console import Console
from transformers.utils import logging

from .base import Branch, Completion, Engine, EngineError
from .delivery import Adapter

logger = logging.get_logger(__name__)
LEASE_SECONDS = 60.0
"""How long a trainer that is not heard of keeps a server to itself; it is heard of three times as often."""
THIS_PROCESS = uuid.uuid4().hex[:12]
"""The name of this process's trainers: one takes a server over from another, since only one trains at a time."""
_RETRY_SECONDS = 1.0
_ANSWER_SECONDS = 600.0
_TIMEOUTS = (5.0, _ANSWER_SECONDS)  # for a connection and for an answer
_AWAY = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)  # down, or gone while it answered
_stderr = Console(stderr=True)


class RemoteEngine(Engine):
    """An engine in a server that samples for this trainer alone.

    What can go wrong between the two is found out, not hoped against: the server is told the base's fingerprint
    before the first question, and the adapter's version with each. A server that cannot be reached is waited for, one
    that has been restarted gets the adapters again.

    Args:
        url (`str`): address of the server.
        base (`str`): fingerprint of the trainer's base, see [`~delivery.base_fingerprint`].
        timeout (`float`): seconds to wait for the server, `vllm_server_timeout`.
        client (`str`, *optional*): name under which all processes of one trainer are known; default: this process's.
        dtype (`torch.dtype`, *optional*): the trainer's; another one of the server is warned of.
        main (`bool`): whether this process speaks for the trainer: it sends the adapters, keeps the server, and gives
            it back. The others ask.

    Raises:
        EngineError: if the server does not answer in time, serves another base, or works for another trainer.
    """

    def __init__(
        self,
        url: str,
        base: str,
        timeout: float = 240.0,
        client: str | None = None,
        dtype: torch.dtype | None = None,
        main: bool = True,
    ):
        self.url, self.timeout, self.main = url.rstrip("/"), timeout, main
        self.client = client or THIS_PROCESS
        self._base, self._dtype = base, dtype
        self._session = requests.Session()
        self._session.headers["X-Drorl-Client"] = self.client
        self._adapters: dict[str, Adapter] = {}
        self._connect()
        # Called when the engine is closed or collected, or the program ends.
        self._leave = weakref.finalize(self, _stay(self.url, self.client)) if main else None

    def deliver(self, adapter: Adapter) -> str:
        last = self._adapters.get(adapter.role)
        self._adapters[adapter.role] = adapter  # in every process: whichever finds the server restarted sends it
        if self.main and (last is None or last.version != adapter.version):
            answer = self._call("PUT", f"adapters/{adapter.role}", data=adapter.content)
            self._check_arrival(answer, adapter)
        return adapter.version

    def next_token_logps(
        self, version: str, prompts: Sequence[Sequence[int]], branches: Sequence[Branch]
    ) -> tuple[str, list[list[float]]]:
        asked = {"prompts": list(prompts), "branches": [dataclasses.asdict(branch) for branch in branches]}
        answer = self._call("POST", "logps", json={"version": version, **asked})
        return answer["version"], answer["logps"]

    def generate(
        self,
        version: str,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_id: int,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> tuple[str, list[Completion]]:
        asked = {"max_tokens": max_tokens, "end_id": end_id, "temperature": temperature, "seeds": seeds}
        asked["prompts"] = list(prompts)
        answer = self._call("POST", "generate", json={"version": version, **asked})
        return answer["version"], [Completion(**text) for text in answer["completions"]]

    def close(self) -> None:
        if self._leave is not None:
            self._leave()

    def _check_arrival(self, answer: dict[str, Any], adapter: Adapter) -> None:
        if answer["version"] != adapter.version:
            raise EngineError(f"{self.url} has received {answer['version']} where {adapter.version} was sent")

    def _connect(self) -> None:
        """Introduces this trainer to the server, and gives it what it has lost."""
        answer = self._read(self._answered("POST", "client", {"json": {"base": self._base}}))
        self.window = answer["window"]
        own = str(self._dtype).removeprefix("torch.")
        if self._dtype is not None and answer["dtype"] != own:
            logger.warning(
                f"{self.url} computes in {answer['dtype']}, the trainer in {own}: start it with --dtype {own}, or the "
                "probabilities differ by more than they need to"
            )
        for adapter in self._adapters.values():
            response = self._answered("PUT", f"adapters/{adapter.role}", {"data": adapter.content})
            self._check_arrival(self._read(response), adapter)

    def _call(self, method: str, path: str, **content: Any) -> Any:
        """Returns the server's answer; one that has forgotten this trainer or its adapters is told again, once."""
        response = self._answered(method, path, content, refused=(409,))
        if response.status_code == 409:
            logger.warning(f"{_reason(response)} ({self.url}): sending the adapters again")
            self._connect()
            response = self._answered(method, path, content)
        return self._read(response)

    def _read(self, response: requests.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise EngineError(f"{response.url} answers with something else; is this `drorl serve MODEL`?") from error

    def _answered(
        self, method: str, path: str, content: dict[str, Any], refused: Sequence[int] = ()
    ) -> requests.Response:
        """Returns an answer that is no error, or one of `refused`."""
        url = f"{self.url}/drorl/{path}"
        response = self._waited_for(lambda: self._session.request(method, url, timeout=_TIMEOUTS, **content))
        if not response.ok and response.status_code not in refused:
            raise EngineError(f"{self.url}: {_reason(response)}")
        return response

    def _waited_for(self, ask: Callable[[], requests.Response]) -> requests.Response:
        """Returns an answer of a server that may be starting, or still be kept for a trainer that is gone."""
        start, patience = time.monotonic(), _Patience(self.url, self.timeout)
        with contextlib.closing(patience):
            while True:
                waited = time.monotonic() - start
                try:
                    response = ask()
                except _AWAY as error:
                    if waited > self.timeout:
                        raise EngineError(
                            f"the vLLM server at {self.url} cannot be reached since {waited:.0f} s "
                            f"({type(error).__name__}). Start it with: drorl serve MODEL"
                        ) from error
                    patience.wait("cannot be reached", waited)
                except requests.ReadTimeout as error:
                    raise EngineError(f"{self.url} has not answered for {_ANSWER_SECONDS:.0f} s") from error
                except requests.RequestException as error:
                    raise EngineError(f"{self.url} cannot be asked: {error}") from error
                else:
                    if response.status_code != 423 or waited > min(self.timeout, 1.5 * LEASE_SECONDS):
                        return response
                    patience.wait("works for another trainer", waited)


class _Patience:
    """Says that the trainer waits, in the log once and on a terminal as long as it does."""

    def __init__(self, url: str, timeout: float):
        self._url, self._timeout, self._status = url, timeout, _stderr.status("")
        self._said = False

    def wait(self, why: str, waited: float) -> None:
        if not self._said:
            logger.warning(f"the vLLM server at {self._url} {why}: waiting for {self._timeout:.0f} s at most")
            self._status.start()
            self._said = True
        self._status.update(f"{self._url} {why}: waiting, {waited:.0f} of {self._timeout:.0f} s")
        time.sleep(min(_RETRY_SECONDS, self._timeout))

    def close(self) -> None:
        self._status.stop()


def _stay(url: str, client: str) -> Callable[[], None]:
    """Lets the server hear of this trainer from now on, and returns what ends that and gives the server back."""
    left, headers = threading.Event(), {"X-Drorl-Client": client}

    def heard() -> None:
        while not left.wait(LEASE_SECONDS / 3):
            with contextlib.suppress(requests.RequestException):  # what is wrong the next question will find out
                requests.post(f"{url}/drorl/heartbeat", headers=headers, timeout=5)

    def leave() -> None:
        left.set()
        with contextlib.suppress(requests.RequestException):
            requests.delete(f"{url}/drorl/client", headers=headers, timeout=5)

    threading.Thread(target=heard, name="drorl-heartbeat", daemon=True).start()
    return leave


def _reason(response: requests.Response) -> str:
    """Returns what the server says is wrong, which is JSON where the server is `drorl serve`."""
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code} {response.reason}; is this `drorl serve MODEL`?"
