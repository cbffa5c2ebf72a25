"""The trainer's end of a server, against one that speaks as `drorl serve` does. The server itself: test_vllm.py."""

import gc
import http.server
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import SecondModel, StandInServer, standing_in
from helpers import randomise_adapters
from peft import PeftModel
from runs import adapter_state
from transformers import LlamaForCausalLM

from drorl.adapters import SELECTOR
from drorl.engines import remote
from drorl.engines.base import Branch, EngineError
from drorl.engines.delivery import Adapter, base_fingerprint
from drorl.engines.remote import RemoteEngine
from drorl.trainer import DROTrainer

PROMPTS, BRANCHES = [[50, 60, 70, 80], [50, 60, 90]], [Branch(0, [90], [5, 6, 7]), Branch(1, [], [8])]


@pytest.fixture
def base_dir(tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def base(base_dir: Path) -> str:
    """The fingerprint of the base."""
    return base_fingerprint(base_dir)


@pytest.fixture
def served(tiny_model: Callable[..., LlamaForCausalLM], base: str, tmp_path: Path) -> Iterator[StandInServer]:
    with standing_in(SecondModel(tiny_model(), tmp_path / "engine"), base) as server:
        yield server


def test_questions_go_to_the_server_and_back(
    served: StandInServer, base: str, adapted_model: Callable[..., PeftModel]
) -> None:
    """Log-probabilities, texts and the version are the ones that the engine gives when it is asked itself."""
    engine = RemoteEngine(served.url, base)
    version = engine.deliver(Adapter.of(adapted_model(randomise=True), SELECTOR))
    expected = served.engine.next_token_logps(version, PROMPTS, BRANCHES)
    assert engine.next_token_logps(version, PROMPTS, BRANCHES) == expected
    drawn = served.engine.generate(version, PROMPTS, 5, 2, 1.5, [3, 4])
    assert engine.generate(version, PROMPTS, 5, 2, 1.5, [3, 4]) == drawn
    assert drawn[0] == version
    assert len(drawn[1][0].logps) == len(drawn[1][0].tokens) > 0
    engine.close()


@pytest.mark.parametrize("constrained", [True, False])
def test_a_trainer_samples_from_a_server(
    constrained: bool, served: StandInServer, base_dir: Path, make_trainer: Callable[..., DROTrainer]
) -> None:
    """Permutations or free text through the server: the gap is that of the engine behind it; then it is given back."""
    model = make_trainer().model
    model.get_base_model().name_or_path = str(base_dir)
    settings = {"constrained": constrained, "max_completion_length": 4}
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": served.url}
    trainer = make_trainer(model, **settings, **server)
    trainer.train()
    logged = [e["sampling/logp_difference/max"] for e in trainer.state.log_history if "step_time" in e]
    assert len(logged) == 2
    assert max(logged) < 1e-5
    trainer.close()
    assert served.trainer == ""


# ----------------------------------------------------------------------------------------------- what goes wrong there
def test_a_server_that_forgot_gets_the_adapter_again(
    served: StandInServer, base: str, adapted_model: Callable[..., PeftModel]
) -> None:
    """From whichever process asks first, also one that has never sent any; one that forgets always is an error."""
    adapter = Adapter.of(adapted_model(randomise=True), SELECTOR)
    main = RemoteEngine(served.url, base, client="us")
    other = RemoteEngine(served.url, base, client="us", main=False)
    for engine in (main, other):
        version = engine.deliver(adapter)
    expected = main.next_token_logps(version, PROMPTS, BRANCHES)
    assert sum(path.startswith("PUT") for path in served.asked) == 1
    served.forget()
    assert other.next_token_logps(version, PROMPTS, BRANCHES) == expected
    served.engine.deliver = lambda adapter: adapter.version
    served.forget()
    with pytest.raises(EngineError, match="not selector-"):
        other.next_token_logps(version, PROMPTS, BRANCHES)
    other.close()  # only who speaks for the trainer gives the server back
    main.close()
    assert served.asked.count("DELETE /drorl/client") == 1


def test_a_server_that_is_not_there_is_waited_for_and_named(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody listens: the log says once that it waits, and the error has the address and the command."""
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9 cannot be reached since .* drorl serve"):
        RemoteEngine("http://127.0.0.1:9", "base", timeout=0.2)
    [record] = [r for r in caplog.records if "waiting for" in r.getMessage()]
    assert record.levelno == logging.WARNING


def test_a_server_that_does_not_answer_is_not_waited_for(
    served: StandInServer, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there, and at work or stuck: asking again would double its work."""
    engine = RemoteEngine(served.url, base)
    monkeypatch.setattr(remote, "_TIMEOUTS", (5.0, 0.1))
    served.delay = 0.5
    before = len(served.asked)
    with pytest.raises(EngineError, match="has not answered for"):
        engine.next_token_logps("selector-1", PROMPTS, BRANCHES)
    assert len(served.asked) == before + 1


def test_an_address_that_is_none_is_said_at_once(base: str) -> None:
    start = time.monotonic()
    with pytest.raises(EngineError, match="nonsense cannot be asked: Invalid URL"):
        RemoteEngine("nonsense", base)
    assert time.monotonic() - start < 5


def test_another_base_is_refused(served: StandInServer) -> None:
    with pytest.raises(EngineError, match="another base"):
        RemoteEngine(served.url, "not this one")


def test_another_data_type_is_warned_of(served: StandInServer, base: str, caplog: pytest.LogCaptureFixture) -> None:
    RemoteEngine(served.url, base, dtype=torch.float32).close()
    assert "--dtype" not in caplog.text
    RemoteEngine(served.url, base, dtype=torch.bfloat16).close()
    assert "computes in float32, the trainer in bfloat16" in caplog.text


@pytest.fixture
def other_server() -> Iterator[str]:
    """A web server that is something else."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_that_is_something_else_is_named(base: str, other_server: str) -> None:
    """A wrong port leads to a web server that knows nothing of this: the error asks for it."""
    with pytest.raises(EngineError, match="is this `drorl serve MODEL`"):
        RemoteEngine(other_server, base, timeout=5)


# ----------------------------------------------------------------------------------------------------------- the lease
def until(condition: Callable[[], Any]) -> None:
    """Waits for what another thread does."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_hears_of_its_trainer_until_that_is_gone(
    served: StandInServer, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a question, three times in a lease; an engine that is collected gives the server back."""
    monkeypatch.setattr(remote, "LEASE_SECONDS", 0.15)
    engine = RemoteEngine(served.url, base)
    until(lambda: served.asked.count("POST /drorl/heartbeat") >= 3)
    assert served.trainer == engine.client
    del engine
    gc.collect()
    assert served.trainer == ""
    beats = served.asked.count("POST /drorl/heartbeat")
    time.sleep(0.2)
    assert served.asked.count("POST /drorl/heartbeat") <= beats + 1


def test_a_server_that_is_kept_for_a_trainer_that_is_gone_is_waited_for(
    served: StandInServer, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that was killed and starts again gets in when the lease is over, without being started once more."""
    monkeypatch.setattr(remote, "_RETRY_SECONDS", 0.05)
    served.trainer = "killed"
    threading.Timer(0.3, lambda: setattr(served, "trainer", "")).start()
    RemoteEngine(served.url, base, timeout=20).close()
    served.trainer = "alive"
    with pytest.raises(EngineError, match=r"another trainer \(alive\)"):
        RemoteEngine(served.url, base, timeout=0.2)


def test_two_trainers_of_one_process_take_turns(
    served: StandInServer, base_dir: Path, make_trainer: Callable[..., DROTrainer]
) -> None:
    """The second takes the server over though the first is still there, and the first gets it back when it goes on."""
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": served.url}
    trainers = []
    for seed in (0, 1):
        model = make_trainer().model
        randomise_adapters(model, seed)
        model.get_base_model().name_or_path = str(base_dir)
        trainers.append(make_trainer(model, max_steps=1, output_dir=f"run-{seed}", **server))
    before = [adapter_state(trainer.model, SELECTOR) for trainer in trainers]
    for trainer in (trainers[1], trainers[0]):
        trainer.train()
    for trainer, start in zip(trainers, before, strict=True):
        assert any(
            not torch.equal(value, start[name]) for name, value in adapter_state(trainer.model, SELECTOR).items()
        )
        assert trainer.state.global_step == 1
        trainer.close()
