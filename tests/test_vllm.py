"""The real engine, in this process and in a server: `make test-vllm`. Without it: test_engines.py.

The models are a random Llama of two layers and, where five updates are trained, the embedded SmolLM2-135M. In float32
on a CPU vLLM and the trainer differ by some 1e-5 nats; 1e-3 is what is allowed.
"""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from helpers import randomise_adapters
from peft import LoraConfig, PeftModel
from processes import launch, starter, task, worker
from runs import adapter_state, assert_identical, base_state, config
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from drorl.adapters import GENERATOR, ROLES, SELECTOR, activate, add_adapters
from drorl.engines.base import Branch, Completion, Engine, EngineDecisions, EngineError
from drorl.engines.delivery import Adapter, base_fingerprint
from drorl.engines.remote import RemoteEngine
from drorl.engines.vllm import LocalEngine
from drorl.errors import InvalidInputError
from drorl.export import export_role
from drorl.models import build_smollm2
from drorl.pipeline import PipelineSettings, RAGPipeline
from drorl.trainer import DROTrainer

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="make test-vllm has an environment with it")

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
SIZES = {"hidden_size": 128, "intermediate_size": 128}  # heads of 32, the smallest that vLLM's attention takes
PARITY = 1e-3  # nats per token
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def base(
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a tiny base."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(**SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(base: Path, seed: int = 0, scale: float = 0.3, rank: int = 8) -> PeftModel:
    """The base in float32 with adapters that are not zero."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = add_adapters(model, lora)
    randomise_adapters(model, seed, scale)
    activate(model, SELECTOR)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["merged", "native"])
def engine(request: pytest.FixtureRequest, base: Path) -> Iterator[LocalEngine]:
    """An engine in this process, which takes merged copies or adapters as they are."""
    engine = LocalEngine(str(base), torch.float32, 8, window=1024, native_lora=request.param)
    yield engine
    engine.close()


def pipeline_of(model: PeftModel, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> RAGPipeline:
    return RAGPipeline(model, tokenizer, PipelineSettings(5, 3, **settings))


def prompts_of(pipeline: RAGPipeline, rows: Rows, count: int) -> list[Any]:
    return [pipeline.prompts.selector(row["query"], row["candidates"]) for row in rows(count, 5)]


def probes(tokenizer: PreTrainedTokenizerFast) -> tuple[list[list[int]], list[Branch]]:
    """Prompts of several lengths, one longer than a block of vLLM's cache, and what may follow them."""
    text = tokenizer("The Danube flows through Vienna. The Rhine flows through Basel.")["input_ids"]
    prompts = [text, text[::-1] * 9, text[3:] * 4]
    return prompts, [Branch(p, text[:length], [5, 17, 80, 300]) for p in range(3) for length in (0, 1, 7)]


@torch.no_grad()
def reference(model: PeftModel, prompts: list[list[int]], branches: list[Branch]) -> torch.Tensor:
    """The same from one forward pass of the trainer's model per branch."""
    rows = [[*prompts[b.prompt], *b.context] for b in branches]
    logits = [model(input_ids=torch.tensor([tokens])).logits[0, -1] for tokens in rows]
    return torch.stack([torch.log_softmax(x, -1)[list(b.allowed)] for x, b in zip(logits, branches, strict=True)])


def answered(engine: Engine, version: str, prompts: list[list[int]], branches: list[Branch]) -> torch.Tensor:
    """What the version that is asked answers."""
    answering, logps = engine.next_token_logps(version, prompts, branches)
    assert answering == version
    return torch.tensor(logps)


# --------------------------------------------------------------------------------------------------- the same numbers
def test_twenty_syncs_arrive(engine: LocalEngine, base: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """After each of 20 strong updates the engine has the trainer's log-probabilities, and the base is untouched."""
    model = adapted(base)
    weights, files = base_state(model), (base / "model.safetensors").read_bytes()
    prompts, branches = probes(tokenizer)
    last, moved = None, []
    for seed in range(20):
        randomise_adapters(model, seed)
        version = engine.deliver(Adapter.of(model, SELECTOR))
        answers = answered(engine, version, prompts, branches)
        assert (answers - reference(model, prompts, branches)).abs().mean() <= PARITY
        if last is not None:
            moved.append(float((answers - last).abs().mean()))
        last = answers
    assert min(moved) > 100 * PARITY  # otherwise a sync that does nothing would pass
    assert_identical(base_state(model), weights)
    assert (base / "model.safetensors").read_bytes() == files


def test_an_old_version_has_no_answer(engine: LocalEngine, base: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """What was replaced is gone: asking for it is an error, not an answer of its successor."""
    prompts, branches = probes(tokenizer)
    first, second = (engine.deliver(Adapter.of(adapted(base, seed), SELECTOR)) for seed in (1, 2))
    assert engine.next_token_logps(second, prompts, branches)
    with pytest.raises(EngineError, match=f"not {first}"):
        engine.next_token_logps(first, prompts, branches)


def test_fifty_syncs_leave_nothing(engine: LocalEngine, base: Path) -> None:
    """Neither adapters nor memory grow over 50 syncs: less than 32 MiB, where an adapter has 0.3 and a copy 1.2."""
    model = adapted(base)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def sync(seed: int) -> None:
        randomise_adapters(model, seed)
        version = engine.deliver(Adapter.of(model, SELECTOR))
        engine.next_token_logps(version, [[5, 6, 7]], [Branch(0, [], [8])])

    for seed in range(10):
        sync(seed)
    before = resident()
    for seed in range(50):
        sync(seed)
    assert resident() - before < 32 * 2**20
    assert len(engine.loaded) == 1
    if engine.native_lora:
        assert len(engine.llm.llm_engine.list_loras()) == 1
        assert len(list(Path(engine._folder.name).iterdir())) == 1


def test_free_text_has_its_log_probabilities(
    engine: LocalEngine, base: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Sampled at a temperature, each token has the trainer's log-probability at it; seeds make texts repeatable."""
    model, prompt = adapted(base), probes(tokenizer)[0][0]
    version = engine.deliver(Adapter.of(model, SELECTOR))
    answering, texts = engine.generate(version, [prompt] * 4, 12, tokenizer.eos_token_id, 1.7, [0, 1, 2, 0])
    assert answering == version
    assert_texts(model, prompt, texts, 1.7)


def assert_texts(model: PeftModel, prompt: list[int], texts: list[Completion], temperature: float) -> None:
    """The first and the last of these texts have one seed, and all have the trainer's log-probabilities."""
    assert texts[0].tokens == texts[-1].tokens != texts[1].tokens
    for text in texts:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *text.tokens]])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(text.tokens)[:, None])[:, 0]
        assert (torch.tensor(text.logps) - expected).abs().mean() <= PARITY


def test_any_number_of_tokens_may_be_allowed(
    engine: LocalEngine, base: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """300 of them, which is more than one request of vLLM's takes: all are answered, in their order."""
    model, [prompt, *_] = adapted(base), probes(tokenizer)[0]
    version = engine.deliver(Adapter.of(model, SELECTOR))
    branches = [Branch(0, [7], [3]), Branch(0, [], [*range(300)][::-1]), Branch(0, [], [*range(10, 139)])]
    _, logps = engine.next_token_logps(version, [prompt], branches)
    for branch, row in zip(branches, logps, strict=True):
        [expected] = reference(model, [prompt], [branch])
        assert (torch.tensor(row) - expected).abs().max() <= PARITY


def test_an_adapter_that_is_delivered_twice_is_there(engine: LocalEngine, base: Path) -> None:
    """Also where the engine no longer knows that it has it."""
    adapter = Adapter.of(adapted(base), SELECTOR)
    version = engine.deliver(adapter)
    engine.loaded.clear()
    assert engine.deliver(adapter) == version
    assert engine.next_token_logps(version, [[5, 6]], [Branch(0, [], [7])])[0] == version
    if engine.native_lora:
        assert Path(engine.loaded[version].path).is_dir()


# ----------------------------------------------------------------------------------------------- the same distribution
def test_permutations_follow_the_policy(
    engine: LocalEngine, base: Path, tokenizer: PreTrainedTokenizerFast, rows: Rows
) -> None:
    """2,000 permutations through the engine: K distinct candidates each, and a chi-square test of all 60 cells.

    A sampler of another policy, the adapter of another seed, fails the same test.
    """
    pipeline = pipeline_of(adapted(base), tokenizer, identifiers="title")
    [prompt] = prompts_of(pipeline, rows, 1)
    cells = list(itertools.permutations(range(5), 3))
    with torch.no_grad():
        [(logps, _)] = pipeline.decide([prompt]).permutation_logps([cells])
    exact = logps.sum(dim=-1).exp().double()
    assert abs(float(exact.sum()) - 1) < 1e-5

    def p_value(seed: int) -> float:
        version = engine.deliver(Adapter.of(adapted(base, seed), SELECTOR))
        decisions = EngineDecisions(pipeline.policy, engine, version, [prompt])
        [draw] = decisions.sample(2000, generators=[torch.Generator().manual_seed(0)])
        counts = torch.tensor([draw.permutations.count(cell) for cell in cells], dtype=torch.float64)
        assert counts.sum() == 2000  # so none is malformed
        expected = 2000 * exact
        large = expected >= 5  # cells below share one
        observed = torch.cat([counts[large], counts[~large].sum()[None]])
        expected = torch.cat([expected[large], expected[~large].sum()[None]])
        statistic = ((observed - expected) ** 2 / expected).sum()
        return float(torch.special.gammaincc(torch.tensor(large.sum() / 2.0), statistic / 2))

    assert p_value(0) > 1e-3
    assert p_value(1) < 1e-6


# ------------------------------------------------------------------------------------------------------------ refusals
def test_a_prompt_beyond_the_window_is_refused(
    engine: LocalEngine, base: Path, tokenizer: PreTrainedTokenizerFast, rows: Rows
) -> None:
    """The error has both numbers and the setting; the engine lives on."""
    pipeline = pipeline_of(adapted(base), tokenizer)
    row = rows(1, 5)[0]
    long = [{**c, "text": c["text"] * 40} for c in row["candidates"]]
    prompt = pipeline.prompts.selector(row["query"], long)
    version = engine.deliver(Adapter.of(pipeline.model, SELECTOR))
    with pytest.raises(
        InvalidInputError, match=r"takes \d+ tokens, but the engine's window is 1024.*max_model_length"
    ):
        EngineDecisions(pipeline.policy, engine, version, [prompt])
    assert engine.next_token_logps(version, [[5, 6]], [Branch(0, [], [7])])


def test_an_adapter_beyond_the_rank_is_refused(engine: LocalEngine, base: Path) -> None:
    """An engine started for rank 8 says so; merged copies have no such limit."""
    adapter = Adapter.of(adapted(base, rank=12), SELECTOR)
    if engine.native_lora:
        with pytest.raises(InvalidInputError, match=r"rank is 12.*at most 8.*--max-lora-rank 16"):
            engine.deliver(adapter)
    else:
        assert engine.deliver(adapter) == adapter.version


def test_an_engine_that_does_not_fit_says_which_setting(base: Path) -> None:
    """A cache larger than the memory: the error names it. In a process of its own, which may not survive it."""
    code = (
        "import torch; from drorl.engines.vllm import LocalEngine; from drorl.errors import UserError\n"
        f"try: LocalEngine({str(base)!r}, torch.float32, 8)\n"
        "except UserError as error: print('SAID', error)"
    )
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "9000"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "SAID vLLM did not start" in result.stdout
    assert "lower VLLM_CPU_KVCACHE_SPACE (GiB, now 9000)" in result.stdout


# -------------------------------------------------------------------------------------------------------- five updates
def smollm2_trainer(tmp_path: Path, rows: Rows, callbacks: list[TrainerCallback] | None = None, **settings: Any):
    """A trainer of the embedded model in float32."""
    return DROTrainer(
        model=str(build_smollm2()),
        args=config(
            tmp_path,
            model_init_kwargs={"dtype": "float32"},
            identifiers="title",
            learning_rate=1e-3,
            **({"max_steps": 5} | settings),
        ),
        train_dataset=rows(10, 6),
        callbacks=callbacks,
    )


def assert_parity(trainer: DROTrainer) -> None:
    gaps = [e["sampling/logp_difference/mean"] for e in trainer.state.log_history if "step_time" in e]
    assert len(gaps) == 5
    assert max(gaps) <= PARITY


def test_colocated_it_trains_as_without(tmp_path: Path, rows: Rows) -> None:
    """Five updates of SmolLM2 with vLLM in this process are those without, and the base is bit-identical.

    To 2e-3, two updates' worth: the engine's probabilities differ in the sixth digit, and Adam's first updates are of
    the size of the learning rate wherever a gradient is that small.
    """
    plain = smollm2_trainer(tmp_path / "plain", rows)
    plain.train()
    served = smollm2_trainer(tmp_path / "served", rows, use_vllm=True, vllm_max_model_length=1024)
    weights = base_state(served.model)
    served.train()
    served.sampler.engine.close()
    assert_parity(served)
    assert_identical(base_state(served.model), weights)
    expected, actual = adapter_state(plain.model, SELECTOR), adapter_state(served.model, SELECTOR)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=2e-3)


@worker
def test_worker_with_an_engine(rows: Rows) -> None:
    """Two steps with vLLM beside the model of each process, on its own queries; afterwards both are still there."""
    folder = Path(task()["folder"])
    settings = {"use_vllm": True, "vllm_max_model_length": 1024, "model_init_kwargs": {"dtype": "float32"}}
    args = config(folder / "run", identifiers="title", save_strategy="steps", save_steps=2, **settings)
    trainer = DROTrainer(model=str(folder / "base"), args=args, train_dataset=rows(8, 6))
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    gaps = [e["sampling/logp_difference/max"] for e in trainer.state.log_history if "step_time" in e]
    assert len(gaps) == 2
    assert max(gaps) <= PARITY
    assert trainer.accelerator.gather(torch.ones(1)).sum() == 2


@starter
def test_each_process_has_its_engine(base: Path, tmp_path: Path) -> None:
    """`vllm_mode=colocate` with two processes, on CPUs: both train against their own engine's permutations."""
    shutil.copytree(base, tmp_path / "base")
    launch(f"{__file__}::test_worker_with_an_engine", 2, "vllm", folder=str(tmp_path))
    assert (tmp_path / "run" / "checkpoint-2" / SELECTOR).is_dir()


# --------------------------------------------------------------------------------------------------------- the server
@contextlib.contextmanager
def serving(source: Path | str, log: Path, *arguments: str, port: int | None = None) -> Iterator[tuple[str, Any]]:
    """`drorl serve` on a free port of this machine, until the block ends; gives its address and process."""
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("drorl")), "serve", str(source), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--dtype", "float32", "--max-model-len", "1024", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, "the server did not start"
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_trainer_and_its_server(tmp_path: Path, rows: Rows, base: Path) -> None:
    """Five updates of SmolLM2 against a server; then everything that can go wrong between the two.

    One test, because a server takes half a minute to start.
    """
    model = str(build_smollm2())
    with serving(model, tmp_path / "first.log") as (url, process):
        served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 3}
        trainer = smollm2_trainer(tmp_path / "run", rows, max_steps=7, **served)
        with pytest.raises(EngineError, match="another base"):
            RemoteEngine(url, base_fingerprint(base), timeout=3)
        with pytest.raises(EngineError, match="a server samples for one trainer"):
            RemoteEngine(url, base_fingerprint(Path(model)), timeout=1, client="another")
        port = int(url.rsplit(":", 1)[1])
        taken = subprocess.run(
            [str(Path(sys.executable).with_name("drorl")), "serve", model, "--port", str(port)],
            capture_output=True,
            text=True,
        )
        assert taken.returncode != 0
        assert "choose another --port" in taken.stderr

        # Killed while it samples for the sixth update: the trainer waits in vain, saves, and stops.
        engine = trainer.sampler.engine
        asked = engine.next_token_logps

        def killed(*arguments: Any) -> Any:
            if trainer.state.global_step == 5:
                os.killpg(process.pid, signal.SIGKILL)
            return asked(*arguments)

        engine.next_token_logps = killed
        with pytest.raises(EngineError, match="cannot be reached since .* The run is saved at step 5"):
            trainer.train()
        engine.next_token_logps = asked
        assert_parity(trainer)
    assert (tmp_path / "run" / "checkpoint-5" / "selector").is_dir()

    # Started again, it knows nothing; the trainer that still runs brings its adapter once more.
    with serving(model, tmp_path / "second.log", port=port) as (_, process):
        engine.timeout = 60
        adapter = Adapter.of(trainer.model, SELECTOR)
        prompts, branches = [[50, 60, 70, 80]], [Branch(0, [90], [5, 6, 7])]
        version = engine.deliver(adapter)
        answers = answered(engine, version, prompts, branches)
        assert (answers - reference(trainer.pipeline.role(SELECTOR), prompts, branches)).abs().max() <= PARITY
        # Another adapter than the trainer's, put there behind its back, is noticed and replaced.
        other = smollm2_trainer(tmp_path / "other", rows).model
        randomise_adapters(other, scale=0.05)
        requests.put(
            f"{url}/drorl/adapters/{SELECTOR}",
            data=Adapter.of(other, SELECTOR).content,
            headers={"X-Drorl-Client": engine.client},
        ).raise_for_status()
        torch.testing.assert_close(answered(engine, version, prompts, branches), answers)
        # Free text through the server is the trainer's too.
        _, texts = engine.generate(version, prompts * 3, 6, 2, 1.3, [0, 1, 0])
        assert_texts(trainer.pipeline.role(SELECTOR), prompts[0], texts, 1.3)
        trainer.close()
        served |= {"constrained": False, "max_completion_length": 8, "max_steps": 1}
        free = smollm2_trainer(tmp_path / "free", rows, **served)
        free.train()
        [gap] = [e["sampling/logp_difference/mean"] for e in free.state.log_history if "step_time" in e]
        assert gap <= PARITY
        # The engine is a process of its own: without it the server ends, and says that this was no success.
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        assert process.wait(60) == 1
        assert "engine has died" in (tmp_path / "second.log").read_text()
        free.close()


# ------------------------------------------------------------------------------------------------------- a served run
@pytest.fixture(scope="module")
def run_dir(base: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, as far as serving is concerned."""
    folder = tmp_path_factory.mktemp("run")
    model = adapted(base)
    pipeline = RAGPipeline(model, tokenizer, PipelineSettings(6, 2, identifiers="title", max_answer_length=8))
    pipeline.save_pretrained(folder)
    return folder


def test_a_served_run(run_dir: Path, rows: Rows, tmp_path: Path) -> None:
    """Selections and answers are the pipeline's own; bad requests are told what is wrong, and the server lives on."""
    ours = RAGPipeline.from_pretrained(run_dir, dtype="float32")
    with serving(run_dir, tmp_path / "serve.log", "--max-passages", "9", "--max-body-mib", "0.05") as (url, process):
        assert "127.0.0.1" in url
        for row in rows(3, 6):
            question = {"query": row["query"], "candidates": row["candidates"]}
            selected = requests.post(f"{url}/select", json={**question, "k": 1}).json()["passages"]
            answered = requests.post(f"{url}/answer", json=question).json()
            expected = ours.answer(row["query"], row["candidates"])
            assert [p["id"] for p in selected] == [expected.citations[0].passage["id"]]
            assert [p["id"] for p in answered["citations"]] == [c.passage["id"] for c in expected.citations]
            for passage, citation in zip(answered["citations"], expected.citations, strict=True):
                assert abs(passage["logp"] - citation.logp) < PARITY
            assert answered["answer"] == expected.text
        models = [card["id"] for card in requests.get(f"{url}/v1/models").json()["data"]]
        assert set(ROLES) <= set(models)
        completion = requests.post(
            f"{url}/v1/completions", json={"model": "generator", "prompt": "The Danube", "max_tokens": 3}
        )
        assert completion.ok

        few = {"query": "Which river?", "candidates": rows(1, 6)[0]["candidates"][:1]}
        many = {**few, "candidates": few["candidates"] * 10}
        for path, body, status, words in [
            ("/answer", {"query": "Which river?"}, 400, "candidates"),
            ("/answer", {**few, "query": ""}, 400, "query"),
            ("/answer", few, 400, "cannot select 2 passages from 1"),
            ("/select", {**many, "k": 1}, 400, "10 candidates are more than this server takes: 9"),
            ("/select", {"query": "q", "candidates": rows(1, 6)[0]["candidates"], "k": 7}, 400, "num_selected=2"),
            ("/answer", {**few, "query": "river " * 20000}, 413, "longer than this server takes"),
            ("/drorl/client", {"base": "x"}, 404, ""),
        ]:
            response = requests.post(f"{url}{path}", json=body)
            assert response.status_code == status, response.text
            assert words in response.text
        assert requests.post(f"{url}/answer", data="{no json").status_code == 400
        assert requests.get(f"{url}/health").ok
        process.terminate()
        assert process.wait(60) == 0


def test_a_pipeline_on_vllm(run_dir: Path, rows: Rows) -> None:
    """`RAGPipeline(backend="vllm")` selects and answers as the one on transformers does."""
    ours = RAGPipeline.from_pretrained(run_dir, dtype="float32")
    theirs = RAGPipeline.from_pretrained(run_dir, dtype="float32", backend="vllm", window=1024)
    try:
        for row in rows(3, 6):
            expected = ours.answer(row["query"], row["candidates"])
            actual = theirs.answer(row["query"], row["candidates"])
            assert actual.text == expected.text
            assert [c.passage for c in actual.citations] == [c.passage for c in expected.citations]
    finally:
        theirs.close()


def test_an_exported_generator_is_a_model_like_others(run_dir: Path, rows: Rows, tmp_path: Path) -> None:
    """vLLM itself loads what `drorl export` writes, takes its length and its end, and answers as the run does."""
    export_role(run_dir, GENERATOR, tmp_path / "merged", "float32")
    ours = RAGPipeline.from_pretrained(run_dir, dtype="float32")
    prompts = [ours.generator_prompts.generator(row["query"], row["candidates"][:2]) for row in rows(3, 6)]
    engine = LocalEngine(str(tmp_path / "merged"), torch.float32, 8, window=1024, native_lora=False)
    try:
        params = engine.llm.get_default_sampling_params()
        assert params.max_tokens == 8
        params.temperature = 0.0
        outputs = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert [output.outputs[0].text.strip() for output in outputs] == ours.generate(prompts)
    finally:
        engine.close()
