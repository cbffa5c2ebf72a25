"""With GRPO's advantage, free text and a frozen generator, drorl *is* `trl.GRPOTrainer`: so comparisons are fair.

Both trainers start from the same adapter and are given the same rows, the same reward and the same random numbers. The
stock trainer is unmodified; its reward is `AnswerLikelihoodReward`, and its prompts are drorl's, as text. The models
are random, so their texts are drawn from the few tokens that identifiers are made of, with some help to put them in
order: a part of them holds a permutation, the others have no reward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from runs import (
    Reseed,
    State,
    WeightRecorder,
    adapter_state,
    assert_identical,
    config,
    largest_difference,
    near_permutations,
)
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from drorl.adapters import GENERATOR, SELECTOR, activate
from drorl.prompts import PromptBuilder
from drorl.rewards import AnswerLikelihoodReward
from drorl.trainer import DROTrainer

STEPS = 5
# Float32 rounding, amplified by five steps of Adam, is a few 1e-6 here; the adapter moves by a thousand times this.
TOLERANCE = 1e-4
Rows = list[dict[str, Any]]


class RecordedReward(AnswerLikelihoodReward):
    """Keeps what it returned."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.returned: list[float | None] = []

    def __call__(self, *args: Any, **kwargs: Any) -> list[float | None]:
        rewards = super().__call__(*args, **kwargs)
        self.returned += rewards
        return rewards


@dataclass
class Run:
    """What five steps left behind."""

    losses: list[float]
    weights: list[State]
    start: State


def shared_settings(tokenizer: PreTrainedTokenizerFast, identifiers: str, **overrides: Any) -> dict[str, Any]:
    """What both trainers are told: Adam at a rate that moves the weights visibly, and which tokens may be drawn."""
    settings: dict[str, Any] = {
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_steps": STEPS,
        "learning_rate": 3e-2,
        "weight_decay": 0.0,
        "lr_scheduler_type": "linear",
        "max_completion_length": 12,
        "generation_kwargs": near_permutations(tokenizer, {"number": "123456", "letter": "ABCDEF"}[identifiers]),
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return settings | overrides


def run(trainer: GRPOTrainer, adapter: str = SELECTOR) -> Run:
    """Trains and returns the losses and weights of each step, by the names of drorl's adapter."""
    recorder = WeightRecorder(trainer.model, adapter)
    for callback in (Reseed(), recorder):
        trainer.add_callback(callback)
    start = adapter_state(trainer.model, adapter)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(recorder.steps) == STEPS
    first, *steps = [renamed(state, adapter, SELECTOR) for state in (start, *recorder.steps)]
    return Run(losses, steps, first)


def renamed(state: State, old: str, new: str) -> State:
    """The weights of one adapter under the names of another."""
    return {name.replace(f".{old}.", f".{new}."): value for name, value in state.items()}


def prompts_as_text(builder: PromptBuilder, tokenizer: PreTrainedTokenizerFast, rows: Rows) -> list[str]:
    """drorl's prompts as texts that TRL's tokenization turns into the very same tokens."""
    prompts = [builder.selector(row["query"], row["candidates"]).ids for row in rows]
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=False)
    assert tokenizer(text=texts)["input_ids"] == prompts
    return texts


ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
CASES: dict[str, tuple[dict[str, Any], str, int, float]] = {  # settings, identifiers, K, temperature
    "dapo": ({"loss_type": "dapo"}, "letter", 2, 1.0),
    "dapo, accumulated": ({"loss_type": "dapo", **ACCUMULATED}, "number", 1, 1.0),
    "grpo": ({"loss_type": "grpo"}, "number", 1, 1.0),
    "grpo, accumulated": ({"loss_type": "grpo", **ACCUMULATED}, "letter", 2, 1.0),
    "bnpo, unscaled rewards, cooler": ({"loss_type": "bnpo", "scale_rewards": "none"}, "number", 1, 0.7),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "letter", 1, 1.0),
    # The second step on the same samples is off-policy: ratios, and with so narrow a range, clipping.
    "grpo, KL": ({"loss_type": "grpo", "beta": 0.5}, "number", 1, 1.0),
    "dapo, two iterations, KL": ({"loss_type": "dapo", "num_iterations": 2, "beta": 0.1}, "letter", 2, 1.0),
    # Micro-batches of texts whose longest differ.
    "dapo, accumulated, two iterations, KL": (
        {"loss_type": "dapo", "num_iterations": 2, "beta": 0.1, **ACCUMULATED},
        "letter",
        2,
        1.0,
    ),
    "dapo, two iterations": ({"loss_type": "dapo", "num_iterations": 2, "epsilon": 0.02}, "number", 2, 1.0),
}


@pytest.mark.parametrize(("settings", "identifiers", "num_selected", "temperature"), CASES.values(), ids=CASES)
def test_grpo_without_a_generator_is_trls_grpo(
    settings: dict[str, Any],
    identifiers: str,
    num_selected: int,
    temperature: float,
    tmp_path: Path,
    adapted_model: Callable[..., PeftModel],
    tiny_model: Callable[..., torch.nn.Module],
    lora: LoraConfig,
    tokenizer: PreTrainedTokenizerFast,
    rows: Callable[..., Rows],
) -> None:
    """Losses and adapter weights of both trainers agree to 1e-4 after each of five steps that move them by more."""
    data = rows(8, 6)
    shared = shared_settings(tokenizer, identifiers, **settings)
    own = {"selector_objective": "grpo", "generator_objective": "none", "constrained": False}
    own |= {"identifiers": identifiers, "num_selected": num_selected, "selector_temperature": temperature}
    dro = DROTrainer(adapted_model(randomise=True), config(tmp_path, **shared, **own), data, None, tokenizer)

    generator = adapted_model(randomise=True)
    activate(generator, GENERATOR)
    reward = RecordedReward(generator, tokenizer, identifiers, num_selected)
    adapter = "default"  # of another name TRL finds no reference for its KL
    model = get_peft_model(tiny_model(), lora, adapter_name=adapter)
    loaded = model.load_state_dict(renamed(adapter_state(dro.model, SELECTOR), SELECTOR, adapter), strict=False)
    assert not loaded.unexpected_keys
    texts = prompts_as_text(dro.pipeline.prompts, tokenizer, data)
    stock = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(str(tmp_path), **shared, temperature=temperature),
        train_dataset=Dataset.from_list([{"prompt": t, **row} for t, row in zip(texts, data, strict=True)]),
        processing_class=tokenizer,
    )

    expected, actual = run(stock, adapter), run(dro)

    assert_identical(actual.start, expected.start)
    moved = largest_difference(expected.weights[-1], expected.start)
    assert moved > 100 * TOLERANCE, f"the weights move by {moved} only: the comparison would prove nothing"
    parsed = [r for r in reward.returned if r is not None]
    share = len(parsed) / len(reward.returned)
    assert 0.1 < share < 0.9, "both kinds of texts are to occur"
    assert torch.tensor(parsed).std() > 0.1
    # On-policy, `grpo` weighs every text alike and advantages sum to 0: its loss is 0, only its gradient is not.
    assert settings["loss_type"] == "grpo" or max(map(abs, expected.losses)) > 10 * TOLERANCE
    assert actual.losses == pytest.approx(expected.losses, abs=TOLERANCE)
    for step, (mine, theirs) in enumerate(zip(actual.weights, expected.weights, strict=True), start=1):
        difference = largest_difference(mine, theirs)
        assert difference < TOLERANCE, f"step {step}: adapters differ by {difference:.1e}"
