"""Two processes on one machine train as one does: the batch is shared out, and nothing else changes.

`test_worker` is what each process runs; `run_dir_of` starts it with `accelerate launch` and the configurations in
recipes/accelerate/. As it, `test_worker_of_an_engine`: what fails in one process ends all.
"""

import json
import math
import os
import signal
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from engines import SecondModel
from helpers import randomise_adapters
from peft import LoraConfig, get_peft_model
from processes import deepspeed, launch, starter, task, worker
from runs import adapter_state, assert_identical, both_adapters, largest_difference, measured, near_permutations
from safetensors.torch import load_file
from test_health import alike, answer_alone, logged
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import drorl.rollouts
import drorl.two_roles
from drorl.adapters import GENERATOR, SELECTOR, add_adapters
from drorl.callbacks import InterruptCallback
from drorl.engines.base import EngineError
from drorl.engines.sampler import EngineSampler
from drorl.errors import InvalidInputError, UnhealthyError
from drorl.trainer import DROTrainer

pytestmark = pytest.mark.slow
ROLES = (SELECTOR, GENERATOR)
# All first choices, so nothing is random: however many processes there are, they train on the same permutations.
EXACT: dict[str, dict[str, Any]] = {
    "shared base": {},
    "checkpointing, clipped": {"gradient_checkpointing": True, "max_grad_norm": 0.1},
    "separate bases": {"separate": True, "gradient_checkpointing": True, "max_grad_norm": 0.1},
    "accumulation, a baseline and sft": {
        "baseline": "leave_one_out",
        "generator_objective": "sft",
        "gradient_accumulation_steps": 2,
        "log_completions": True,
    },
    "generator only": {"selector_objective": "none"},
    "epochs whose last queries fill no batch": {"train_queries": 10, "max_steps": -1, "num_train_epochs": 2},
    "batches that only some have": {"long_queries": 3, "max_tokens_per_forward": 900},
    "a query of -inf, alone in its process": {"poison": "-inf", "gradient_accumulation_steps": 2},
    "a query of NaN, alone in its process": {"poison": "nan", "gradient_accumulation_steps": 2},
    "light weights are not scored again": {"poison": "nan", "min_importance_weight": 0.2},
}
# What is drawn depends on the process, so two engines are compared, with as many processes each.
DRAWN: dict[str, dict[str, Any]] = {
    "drawn off policy, with a KL penalty": {
        "beta": 0.1,
        "num_iterations": 2,
        "selector_objective": "grpo",
        "max_tokens_per_forward": 900,
        "long_queries": 3,
    },
    "ppo on f1": {"selector_objective": "ppo", "reward": "f1"},
    "query likelihood": {"identifiers": "query", "num_selected": 1},
    "free text": {"constrained": False, "max_completion_length": 6},
    "cached states": {"backend": "cached"},
}
# FSDP2 makes other passes, which bfloat16 rounds in other ways.
ROUNDED: dict[str, dict[str, Any]] = {"a base in bfloat16": {"bfloat16": True}}
CASES = EXACT | DRAWN | ROUNDED
# What drorl says of a case under DeepSpeed, which knows one model.
REFUSED = {"separate bases": "a separate generator_model", "ppo on f1": "selector_objective: ppo"}


def pairs(cases: Iterable[str], *engines: str) -> list[Any]:
    """Each case under each engine that it runs under; DeepSpeed only where it is installed."""
    return [
        pytest.param(engine, case, marks=[deepspeed] if engine == "zero2" else [])
        for engine, case in product(engines, cases)
        if engine != "zero2" or case not in REFUSED
    ]


@pytest.fixture(scope="module")
def run_dir_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Who trained -> the directory of the runs of all cases: `alone`, or two processes under the engine named."""
    work = tmp_path_factory.mktemp("processes")

    @cache
    def run(name: str) -> Path:
        engine, processes = ("ddp", 1) if name == "alone" else (name, 2)
        given = {"run_dir": str(work / name), "processes": processes, "under": engine}
        launch(f"{__file__}::test_worker", processes, "slow", engine=engine, **given)
        return work / name

    return run


def lengthened(made: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Makes the passages of the first `count` rows so long that two of them have no room in one pass."""
    for passage in (passage for row in made[:count] for passage in row["candidates"]):
        passage["text"] += " It is long, and it is wide." * 3
    return made


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[int]], None]:
    """Makes the likelihood of an answer -inf, or NaN in a way that its gradient is NaN too."""

    def poison(kind: str, answer: list[int]) -> None:
        real = drorl.rollouts.answer_logps

        def answer_logps(model: Any, prompts: Any, answers: Any) -> torch.Tensor:
            logps = real(model, prompts, answers)
            bad = torch.tensor([p is not None and a == [answer] for p, a in zip(prompts, answers, strict=True)])
            worthless = logps * math.nan if kind == "nan" else torch.full_like(logps, -math.inf)
            return torch.where(bad, worthless, logps) if bad.any() else logps

        monkeypatch.setattr(drorl.rollouts, "answer_logps", answer_logps)

    return poison


@pytest.fixture
def through_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes models share prefixes in one way."""
    return lambda backend: monkeypatch.setattr(
        drorl.backends, "_objection", lambda _, asked: None if asked == backend else "not asked for"
    )


def made_trainer(
    settings: dict[str, Any],
    processes: int,
    make_trainer: Callable[..., DROTrainer],
    rows: Callable[..., Any],
    models: dict[str, Any],
) -> DROTrainer:
    """A trainer of four queries a step, in one process or shared by two."""
    queries = 4 // processes // settings.get("gradient_accumulation_steps", 1)
    made = lengthened(rows(settings.pop("train_queries", 8), 6), settings.pop("long_queries", 0))
    defaults = {
        "num_selected": 1,
        "num_generations": 6,
        "proposal": "first_choices",
        "optim": "sgd",  # Adam would blow rounding up wherever a gradient is about 0
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "seed": 3,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 6 * queries,
    }
    return make_trainer(**models, train_rows=made, eval_rows=rows(3, 6), **(defaults | settings))


def models_of(
    settings: dict[str, Any], tiny_model: Callable[..., LlamaForCausalLM], lora: LoraConfig
) -> dict[str, Any]:
    if settings.pop("bfloat16", False):
        return {"model": add_adapters(tiny_model(torch.bfloat16), lora)}
    if not settings.pop("separate", False):
        return {}
    return {
        "model": get_peft_model(tiny_model(), lora, adapter_name=SELECTOR),
        "generator_model": get_peft_model(tiny_model(seed=1), lora, adapter_name=GENERATOR),
    }


def assert_sharded(trainer: DROTrainer) -> None:
    """Half of each base is here, to a few rows; the adapters are whole."""
    for model in trainer.pipeline.models:
        base = {name: p for name, p in model.named_parameters() if "lora_" not in name}
        assert all(isinstance(p, DTensor) for p in base.values())
        here = sum(p.to_local().numel() for p in base.values())
        assert here == pytest.approx(sum(p.numel() for p in base.values()) / 2, rel=0.01)
        assert not any(isinstance(p, DTensor) for name, p in model.named_parameters() if "lora_" in name)


def assert_optimizer_cut(trainer: DROTrainer) -> None:
    """Half of what is trained is stepped here, to a few rows."""
    here = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    whole = sum(p.numel() for parameters in trainer._parameter_groups().values() for p in parameters)
    assert here == pytest.approx(whole / 2, rel=0.01)


@worker
@pytest.mark.parametrize("case", CASES)
def test_worker(
    case: str,
    make_trainer: Callable[..., DROTrainer],
    rows: Callable[..., Any],
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    lora: LoraConfig,
    poisoned: Callable[[str, list[int]], None],
    through_backend: Callable[[str], None],
) -> None:
    """Two steps of four queries each, an evaluation of three questions, and what has been logged."""
    given = task()
    settings, run_dir = dict(CASES[case]), Path(given["run_dir"]) / case
    if case not in EXACT:
        if given["processes"] == 1:
            return
        drawn = {"num_selected": 2, "num_generations": 6, "proposal": "policy"}
        settings = drawn | settings
    if not settings.get("constrained", True):
        settings["generation_kwargs"] = near_permutations(tokenizer)
    poison, backend = settings.pop("poison", None), settings.pop("backend", None)
    if backend is not None:
        through_backend(backend)
    torch.manual_seed(int(os.environ["RANK"]))  # adapters that differ: those of the first process count
    models = models_of(settings, tiny_model, lora)
    settings["output_dir"] = str(run_dir)
    if given["under"] == "zero2" and case in REFUSED:
        with pytest.raises(InvalidInputError, match=rf"under DeepSpeed with {REFUSED[case]}: .*ddp\.yaml"):
            made_trainer(settings, given["processes"], make_trainer, rows, models)
        return
    trainer = made_trainer(settings, given["processes"], make_trainer, rows, models)
    assert trainer.accelerator.num_processes == given["processes"]
    if poison is not None:
        poisoned(poison, trainer.pipeline.generator_prompts.answer(rows(8, 6)[0]["answers"][0]))
    trainer.train()
    assert (trainer.is_sharded, trainer.is_deepspeed_enabled) == (
        given["under"] == "fsdp2",
        given["under"] == "zero2",
    )
    if trainer.is_sharded:
        assert_sharded(trainer)
    if trainer.is_deepspeed_enabled:
        assert_optimizer_cut(trainer)
    metrics = trainer.evaluate()
    assert len(trainer.last_records) == 3
    if trainer.accelerator.is_main_process:
        numbers = {k: v for k, v in metrics.items() if k.startswith("eval_")}
        logged = [
            {k: v for k, v in entry.items() if isinstance(v, float) and not k.startswith(("memory/", "step_time"))}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        (run_dir / "metrics.json").write_text(json.dumps({"eval": numbers, "train": logged}))


def last_of(run: Path) -> Path:
    """The checkpoint of the latest step."""
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def samples_of(run: Path) -> list[pd.DataFrame]:
    """What `log_completions` has kept of each step, in an order that does not depend on the process."""
    order = ["prompt", "completion", "selector_logps"]  # of several rows with one query
    return [pd.read_parquet(path).sort_values(order, ignore_index=True) for path in sorted(run.glob("completions/*"))]


def agree(actual: Path, expected: Path) -> None:
    """Checks that adapters, metrics and samples of each step and an evaluation agree to float32 rounding."""
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (expected, actual))
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-6, abs=1e-5)  # log-likelihoods of -19 nats
    assert len(one["train"]) == len(two["train"]) >= 2
    for step, other in zip(one["train"], two["train"], strict=True):
        assert other == pytest.approx(step, rel=1e-5, abs=1e-5)
    for step, other in zip(samples_of(expected), samples_of(actual), strict=True):
        pd.testing.assert_frame_equal(other, step, rtol=1e-5, atol=1e-5)
    last = last_of(expected).name
    for role in ROLES:
        files = (run / last / role / "adapter_model.safetensors" for run in (actual, expected))
        # The adapters move by 1e-3 where gradients are clipped and by 1e-2 elsewhere, and agree to about 1e-8.
        assert largest_difference(*map(load_file, files)) < 1e-6


@starter
@pytest.mark.parametrize(("engine", "case"), pairs(EXACT, "ddp", "fsdp2", "zero2"))
def test_two_processes_train_as_one(engine: str, case: str, run_dir_of: Callable[[str], Path]) -> None:
    """Whatever the queries are worth and wherever they are; a checkpoint is whole for both processes."""
    together = run_dir_of(engine) / case
    agree(together, run_dir_of("alone") / case)
    assert len(list(together.glob("checkpoint-*"))) == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in last_of(together).iterdir()}
    assert not (together / ".incomplete").exists()


@starter
@pytest.mark.parametrize(("engine", "case"), pairs(DRAWN, "fsdp2", "zero2") + pairs(ROUNDED, "zero2"))
def test_an_engine_trains_as_ddp(engine: str, case: str, run_dir_of: Callable[[str], Path]) -> None:
    """A base that is cut up, or an optimizer, draws, scores and answers as one that is whole."""
    agree(run_dir_of(engine) / case, run_dir_of("ddp") / case)


@worker
def test_worker_that_resumes(make_trainer: Callable[..., DROTrainer], rows: Callable[..., Any]) -> None:
    """A run of three steps, and one that goes on from its first checkpoint, with Adam's moments and drawn samples.

    Its own adapters are others, so that the reference of the KL penalty has to come from the checkpoint too.
    """
    settings = {"proposal": "policy", "optim": "adamw_torch", "save_total_limit": 3, "max_steps": 3}
    settings |= {"selector_objective": "grpo", "beta": 0.1}
    whole, resumed = (
        made_trainer(settings | {"output_dir": f"{task()['run_dir']}/{name}"}, 2, make_trainer, rows, {})
        for name in ("whole", "resumed")
    )
    whole.train()
    randomise_adapters(resumed.model, seed=1)
    resumed.train(resume_from_checkpoint=f"{task()['run_dir']}/whole/checkpoint-1")
    assert resumed.is_sharded == (task()["under"] == "fsdp2")
    for role in ROLES:
        assert_identical(adapter_state(resumed.model, role), adapter_state(whole.model, role))
    if task()["under"] == "zero2":
        with pytest.raises(InvalidInputError, match="a trainer trains once"):
            whole.train()


@starter
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero2", marks=deepspeed)])
def test_a_run_under_an_engine_resumes(engine: str, tmp_path: Path) -> None:
    """Bit for bit, in both processes."""
    launch(f"{__file__}::test_worker_that_resumes", 2, "slow", engine=engine, run_dir=str(tmp_path), under=engine)
    whole, resumed = (tmp_path / name / "checkpoint-3" for name in ("whole", "resumed"))
    assert {path.name for path in whole.iterdir()} == {path.name for path in resumed.iterdir()}
    for role in ROLES:
        files = (run / role / "adapter_model.safetensors" for run in (resumed, whole))
        assert_identical(*map(load_file, files))


@worker
@pytest.mark.parametrize("fault", ["lost", "far off"])
def test_worker_of_an_engine(
    fault: str, make_trainer: Callable[..., DROTrainer], tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """After a step the second process loses its engine, or samples something else: both stop, and the run is saved.

    With `max_tokens_per_forward` one has more batches than the other, so they meet at the end of a step only.
    """
    rank, run_dir = int(os.environ["RANK"]), Path(task()["run_dir"]) / fault.replace(" ", "-")
    trainer = make_trainer(output_dir=str(run_dir), max_steps=3, max_tokens_per_forward=300 if rank else 3000)
    engine = SecondModel(tiny_model(), tmp_path / "engine")
    trainer.sampler = EngineSampler(trainer.args, trainer.pipeline, trainer.accelerator, engine)
    answer = engine.next_token_logps

    def failing(*arguments: Any) -> Any:
        version, logps = answer(*arguments)
        if trainer.state.global_step == 1 and rank == 1:
            if fault == "lost":
                raise EngineError("this one is gone")
            logps = [[logp - 5 * i for i, logp in enumerate(row)] for row in logps]
        return version, logps

    engine.next_token_logps = failing
    words = "this one is gone" if fault == "lost" else "not the policy that is being trained"
    with pytest.raises(EngineError, match=f"{words}.* The run is saved at step 1"):
        trainer.train()
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (run_dir / "checkpoint-1").iterdir()}


@starter
def test_an_engine_lost_by_one_process_ends_both(tmp_path: Path) -> None:
    """Neither waits for the other: both raise, and the checkpoint is whole."""
    launch(f"{__file__}::test_worker_of_an_engine", 2, "slow", run_dir=str(tmp_path))


@worker
@pytest.mark.parametrize("ill", ["one", "both"])
def test_worker_that_is_stopped(ill: str, make_trainer: Callable[..., DROTrainer], rows: Callable[..., Any]) -> None:
    """Of a process whose candidates are all alike, effective_sample_size is m; the mean over both is what counts."""
    made = rows(8, 6)
    if ill == "both" or os.environ["RANK"] == "1":
        made = alike(made)
    run_dir = Path(task()["run_dir"]) / ill
    settings = {"num_generations": 4, "per_device_train_batch_size": 4, "max_steps": 21, "on_unhealthy": "stop"}
    trainer = make_trainer(output_dir=str(run_dir), train_rows=made, **settings)
    if ill == "one":
        trainer.train()
        assert (trainer.state.global_step, trainer.health.found) == (21, {})
        return
    with pytest.raises(UnhealthyError, match="stopped at step 20; the run is saved in .*checkpoint-20"):
        trainer.train()
    names = {path.name for path in (run_dir / "checkpoint-20").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "manifest.json"} <= names


@starter
def test_both_processes_stop_a_run_that_is_not_well_or_neither(tmp_path: Path) -> None:
    """What one process finds in its own queries stops nothing; what the mean says stops both, saved, in one step."""
    launch(f"{__file__}::test_worker_that_is_stopped", 2, "slow", run_dir=str(tmp_path))


@worker
def test_worker_that_is_probed(
    make_trainer: Callable[..., DROTrainer],
    rows: Callable[..., Any],
    poisoned: Callable[[str, list[int]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second process has no answer that can be compared, and more batches than the first."""
    rank, run_dir, asked = int(os.environ["RANK"]), Path(task()["run_dir"]), []
    real = drorl.two_roles.reads_context

    def recorded(*arguments: Any) -> Any:
        found = real(*arguments)
        asked.append([float(value) for value in found])
        return found

    monkeypatch.setattr(drorl.two_roles, "reads_context", recorded)
    trainer = make_trainer(
        output_dir=str(run_dir / "run"),
        train_rows=answer_alone(rows(8, 6)),
        num_generations=8,
        per_device_train_batch_size=16,
        max_steps=10,
        max_tokens_per_forward=400 if rank else 3000,
    )
    if rank:
        poisoned("-inf", trainer.pipeline.generator_prompts.answer("Po"))
    trainer.train()
    (run_dir / f"{rank}.json").write_text(json.dumps([asked, logged(trainer, "generator/reads_context")]))


@starter
def test_a_probe_that_one_process_cannot_make_is_the_others(tmp_path: Path) -> None:
    """Neither waits for ever: both log what the first has measured on its two queries."""
    launch(f"{__file__}::test_worker_that_is_probed", 2, "slow", run_dir=str(tmp_path))
    (first, gains), (second, same) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert second == [[0.0, 0.0], [0.0, 0.0]]  # two batches, nothing to compare in either
    [[gain, count]] = first
    assert count == 2 and gains == same == [pytest.approx(gain, rel=1e-6)]


class TermToOne(TrainerCallback):
    """The second process gets SIGTERM in its second step, the first one nothing."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@worker
def test_worker_of_a_preemption(make_trainer: Callable[..., DROTrainer], rows: Callable[..., Any]) -> None:
    """Stopped in the middle of a buffer and gone on from, both processes end where an uninterrupted run does."""
    run_dir = Path(task()["run_dir"])
    settings = {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 4,
        "max_steps": 4,
        "train_rows": rows(8, 6),
    }
    straight = make_trainer(output_dir=str(run_dir / "straight"), **settings)
    straight.train()
    interrupt = InterruptCallback()
    stopped = make_trainer(output_dir=str(run_dir / "run"), callbacks=[interrupt, TermToOne()], **settings)
    stopped.train()
    assert stopped.state.global_step == 2
    assert interrupt.exit_code == 143
    names = {path.name for path in (run_dir / "run" / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "progress_0.pt", "progress_1.pt"} <= names
    resumed = make_trainer(output_dir=str(run_dir / "run"), **settings)
    with pytest.raises(InvalidInputError, match="there is no checkpoint"):  # in both, though one looks
        resumed.train(resume_from_checkpoint=str(run_dir / "checkpoint-7"))
    resumed.train(resume_from_checkpoint="last")
    assert_identical(both_adapters(resumed), both_adapters(straight))
    assert measured(resumed.state.log_history) == measured(straight.state.log_history)


@starter
def test_a_signal_to_one_process_stops_both(tmp_path: Path) -> None:
    """Neither goes on without the other; the checkpoint holds what each of them has drawn."""
    launch(f"{__file__}::test_worker_of_a_preemption", 2, "slow", run_dir=str(tmp_path))
