"""What is saved is whole, loads alone, and goes on as if nothing had happened."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel
from runs import (
    DEFAULTS,
    adapter_state,
    assert_identical,
    base_state,
    both_adapters,
    config,
    digests,
    measured,
    near_permutations,
    smallest_move,
)
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import drorl.two_roles
from drorl.adapters import GENERATOR, SELECTOR, activate, adapter_parameters
from drorl.callbacks import EMIterationCallback
from drorl.pipeline import SETTINGS_FILE, RAGPipeline
from drorl.trainer import DROTrainer

ROLES = (SELECTOR, GENERATOR)
Rows = list[dict[str, Any]]
Make = Callable[..., DROTrainer]


class StopAfter(TrainerCallback):
    """Ends training after some steps, while the schedule is that of the whole run."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def optimizer_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a saved optimizer, by parameter and name."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return {f"{i}/{name}": torch.as_tensor(value) for i, kept in state.items() for name, value in kept.items()}


# ------------------------------------------------------------------------------------------------------------ resuming
# Permutations are sampled and candidates shuffled, so the random numbers have to go on as well; the learning rate
# falls, so the schedule has to.
RESUMABLE: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 2,
    "shuffle_candidates": True,
    "lr_scheduler_type": "linear",
    "max_passage_tokens": 9,  # cuts some passages and not others: their share is counted from the beginning
}


# A critic, and a reference that is neither zero nor the selector as it is when the run goes on.
PPO: dict[str, Any] = {"selector_objective": "ppo", "beta": 0.3}
# One E-step for two updates, or for four: what was drawn is still to be trained on when the run goes on.
BUFFER: dict[str, Any] = {"steps_per_generation": 2}
EPOCHS: dict[str, Any] = {**BUFFER, "num_iterations": 2}
FREE_TEXT: dict[str, Any] = {
    **EPOCHS,
    "selector_objective": "grpo",
    "constrained": False,
    "max_completion_length": 6,
}
ACCUMULATED: dict[str, Any] = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}


@pytest.mark.parametrize(
    ("num_rows", "done", "objective"),
    [
        (8, 2, {}),
        (8, 4, {}),
        (6, 4, {}),
        (8, 2, PPO),
        (8, 3, {"logging_steps": 2}),
        (8, 1, BUFFER),
        (8, 3, {**PPO, **EPOCHS}),
        (8, 1, FREE_TEXT),
        (8, 1, ACCUMULATED),
    ],
    ids=["mid-epoch", "boundary", "epoch 2", "ppo", "log", "buffer", "epochs", "free text", "accumulated"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    num_rows: int,
    done: int,
    objective: dict[str, Any],
    make_trainer: Make,
    rows: Callable[..., Rows],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """Some steps, a checkpoint, a new process, two more steps: bit for bit what the steps at a stretch give.

    The log is the same too, but for times and memory. A step takes two rows: with 8 rows step 2 is within the first
    epoch and step 4 ends it, with 6 step 4 is in the second epoch, whose order of rows is another one.
    """
    if objective is FREE_TEXT:
        objective = objective | {"generation_kwargs": near_permutations(tokenizer)}
    settings = {**RESUMABLE, "save_steps": done, **objective, "train_rows": rows(num_rows, 6), "max_steps": done + 2}
    straight = make_trainer(output_dir="straight", **settings)
    straight.train()
    make_trainer(output_dir="resumed", callbacks=[StopAfter(done)], **settings).train()
    first = get_last_checkpoint(str(tmp_path / "resumed"))
    assert first == str(tmp_path / "resumed" / f"checkpoint-{done}")

    torch.manual_seed(12345)  # a new process knows nothing of the old one's generator
    resumed = make_trainer(output_dir="resumed", **settings)
    for role in ROLES:  # nor of its adapters, of which the reference of a KL penalty was made
        for parameter in adapter_parameters(resumed.model, role).values():
            parameter.data.zero_()
    resumed.train(resume_from_checkpoint=first)

    assert resumed.state.global_step == done + 2
    assert_identical(both_adapters(resumed), both_adapters(straight))
    last = f"checkpoint-{done + 2}"
    assert_identical(optimizer_tensors(tmp_path / "resumed" / last), optimizer_tensors(tmp_path / "straight" / last))
    assert measured(resumed.state.log_history) == measured(straight.state.log_history)


def test_a_run_that_is_over_makes_no_step_more(make_trainer: Make, rows: Callable[..., Rows]) -> None:
    """Resumed from its last step, in the middle of an epoch, a run ends at once, as it was, with the same log."""
    settings = {**RESUMABLE, "train_rows": rows(8, 6), "max_steps": 3}
    trainer = make_trainer(**settings)
    trainer.train()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint="last")
    assert resumed.state.global_step == 3
    assert_identical(both_adapters(resumed), both_adapters(trainer))
    assert measured(resumed.state.log_history) == measured(trainer.state.log_history)


class KilledError(BaseException):
    """As good as a kill: nothing of the library catches it."""


def test_an_evaluation_that_was_owed_is_made_up_for(
    make_trainer: Make, rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between an epoch's checkpoint and its evaluation: that EM iteration counts, and stops the run."""
    settings = {
        **RESUMABLE,
        "train_rows": rows(4, 6),
        "eval_rows": rows(2, 6),
        "eval_strategy": "epoch",
        "metric_for_best_model": "f1",
        "max_steps": 8,
    }

    def trainer_of(scores: list[float], **more: Any) -> DROTrainer:
        values = iter(scores)
        monkeypatch.setattr(drorl.two_roles, "aggregate", lambda records: {"f1": next(values)})
        return make_trainer(callbacks=[EMIterationCallback("eval_f1")], **settings, **more)

    straight = trainer_of([0.5, 0.4], output_dir="straight")
    straight.train()
    assert straight.state.global_step == 4
    killed = trainer_of([0.5])
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(drorl.two_roles, "aggregate", Mock(side_effect=[{"f1": 0.5}, KilledError]))
        killed.train()
    assert killed.state.global_step == 4
    resumed = trainer_of([0.4])
    resumed.train(resume_from_checkpoint="last")
    assert resumed.state.global_step == 4
    assert measured(resumed.state.log_history) == measured(straight.state.log_history)
    assert resumed.state.best_global_step == straight.state.best_global_step == 2


def test_the_best_checkpoint_is_loaded_in_the_end(
    make_trainer: Make, rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With `load_best_model_at_end` both adapters end as validation liked them best, and that checkpoint is kept."""
    scores = iter([0.1, 0.9, 0.3, 0.2])
    monkeypatch.setattr(drorl.two_roles, "aggregate", lambda records: {"f1": next(scores)})
    trainer = make_trainer(
        eval_rows=rows(2, 6),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="f1",
    )
    states: list[dict[str, torch.Tensor]] = []

    class Record(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            states.append(both_adapters(trainer))

    trainer.add_callback(Record())
    trainer.train()
    assert len(states) == 4
    assert smallest_move(states[3], states[1]) > 1e-4
    assert_identical(both_adapters(trainer), states[1])
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def test_the_best_step_need_not_have_been_saved(
    make_trainer: Make, rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Evaluated every step, saved every second, best after the first: training goes on, and no such file is named."""
    scores = iter([0.9, 0.1, 0.2, 0.3])
    monkeypatch.setattr(drorl.two_roles, "aggregate", lambda records: {"f1": next(scores)})
    evaluation = {"eval_rows": rows(2, 6), "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "f1"}
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1, **evaluation)
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert trainer.state.best_model_checkpoint is None
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


# --------------------------------------------------------------------------------------------------------- a full disk
def full_disk(*_: Any, **__: Any) -> None:
    """Fails as a write to a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", ["first file", "optimizer", "rename"])
def test_a_failed_save_leaves_the_previous_checkpoint(
    moment: str, make_trainer: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A disk that is full at the second checkpoint costs that one only, though the limit is one checkpoint.

    The first is bit-identical afterwards, is the last that can be found, and training resumes from it to the end.
    """
    settings = {**RESUMABLE, "save_total_limit": 1, "max_steps": 4}
    trainer = make_trainer(callbacks=[StopAfter(2)], **settings)
    trainer.train()
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-2"
    before = digests(checkpoint)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", SETTINGS_FILE} <= before.keys()

    resumed = make_trainer(**settings)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        if moment == "first file":
            patch.setattr(RAGPipeline, "save_pretrained", full_disk)
        elif moment == "optimizer":
            patch.setattr(torch, "save", full_disk)
        else:
            patch.setattr(os, "replace", full_disk)
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert digests(checkpoint) == before
    assert get_last_checkpoint(str(run)) == str(checkpoint)

    again = make_trainer(**settings)
    again.train(resume_from_checkpoint=True)
    straight = make_trainer(output_dir="straight", **settings)
    straight.train()
    assert_identical(both_adapters(again), both_adapters(straight))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


# ---------------------------------------------------------------------------------------------------- loading it alone
@pytest.fixture
def base_dir(
    tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> Callable[..., str]:
    """Makes directories that hold a tiny model and its tokenizer."""

    def make(name: str = "base", **overrides: Any) -> str:
        tiny_model(**overrides).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


IDS = torch.arange(5, 45)[None]


@pytest.mark.parametrize("role", ROLES)
def test_each_adapter_loads_alone(
    role: str, make_trainer: Make, tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """`PeftModel.from_pretrained(base, run/role)` gives the trained role's logits, without drorl."""
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        activate(trainer.model.eval(), role)
        trained = trainer.model(input_ids=IDS).logits
        alone = PeftModel.from_pretrained(tiny_model(), tmp_path / "run" / role).eval()(input_ids=IDS).logits
        base = tiny_model()(input_ids=IDS).logits
    assert torch.equal(alone, trained)
    assert (base - trained).abs().max() > 0.1


def test_a_separate_generator_is_saved_and_loaded(
    base_dir: Callable[..., str], lora: LoraConfig, rows: Callable[..., Rows], tmp_path: Path
) -> None:
    """Two bases named by path: both train and stay as they were, and the saved pair selects and answers the same.

    A checkpoint of it resumes to the same adapters, too.
    """
    selector, generator = base_dir("selector"), base_dir("generator", seed=1, hidden_size=16)
    settings = {"model_init_kwargs": {"dtype": "float32"}, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def make(output_dir: str) -> DROTrainer:
        args = config(tmp_path / output_dir, **settings)
        return DROTrainer(selector, args, rows(4, 6), generator_model=generator, peft_config=lora)

    trainer = make("run")
    models = {SELECTOR: trainer.model, GENERATOR: trainer.pipeline.generator_model}
    before = {role: (base_state(model), adapter_state(model, role)) for role, model in models.items()}
    trainer.train()
    for role, model in models.items():
        assert_identical(base_state(model), before[role][0])
        # The entries of B, which start at 0, move by the rate, 1e-2, in each step; A follows them.
        assert smallest_move(adapter_state(model, role), before[role][1]) > 1e-4

    trainer.save_model()
    for role, base in ((SELECTOR, selector), (GENERATOR, generator)):
        saved = json.loads((tmp_path / "run" / role / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == base
    assert lora.base_model_name_or_path is None  # the caller's own is left alone
    loaded = RAGPipeline.from_pretrained(tmp_path / "run", dtype="float32", device="cpu")
    trainer.model.eval()
    for row in rows(3, 6):
        mine, theirs = (p.answer(row["query"], row["candidates"]) for p in (trainer.pipeline, loaded))
        assert mine == theirs

    resumed = make("run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_identical(adapter_state(resumed.model, SELECTOR), adapter_state(trainer.model, SELECTOR))
    owner = resumed.pipeline.generator_model
    assert_identical(adapter_state(owner, GENERATOR), adapter_state(models[GENERATOR], GENERATOR))


def test_the_settings_reach_the_file(make_trainer: Make, tmp_path: Path) -> None:
    """What the trained pair was trained with is what `drorl.json` says, so that it is used in the same way."""
    settings = {"identifiers": "letter", "selector_temperature": 0.5, "max_passage_tokens": 9, "num_selected": 3}
    trainer = make_trainer(**settings)
    trainer.save_model()
    saved = json.loads((tmp_path / "run" / SETTINGS_FILE).read_text())["settings"]
    assert {name: saved[name] for name in settings} == settings
    assert saved["num_candidates"] == DEFAULTS["num_candidates"]
