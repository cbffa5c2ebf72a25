"""The estimators beside DRO in the trainer: same rollouts, same code, so only what they weigh differs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients, gradients, through
from peft import PeftModel
from runs import GradientRecorder, adapter_state, assert_identical, base_state, smallest_move
from test_trainer import record_rollouts
from transformers import PreTrainedTokenizerFast

import drorl.trainer
from drorl.adapters import GENERATOR, REFERENCE, SELECTOR, activate, adapter_parameters
from drorl.losses import LossOutput
from drorl.metrics import f1
from drorl.policy import Decisions, SelectorPolicy
from drorl.ppo import ValueHead, generalized_advantages
from drorl.prompts import PromptBuilder
from drorl.rollouts import Rollout
from drorl.states import base_of
from drorl.trainer import DROTrainer

Rows = list[dict[str, Any]]
Make = Callable[..., DROTrainer]
FIRST = {"proposal": "first_choices", "num_selected": 1, "num_generations": 6, "per_device_train_batch_size": 12}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "reinforce": {"selector_objective": "reinforce"},
    "rloo, likelihood": {"selector_objective": "rloo", "reward": "likelihood"},
    "grpo, KL": {"selector_objective": "grpo", "beta": 0.1},
    "ppo": {"selector_objective": "ppo"},
    "ppo, epochs, KL": {"selector_objective": "ppo", "beta": 0.1, "num_iterations": 3},
    "ppo, checkpointing": {"selector_objective": "ppo", "beta": 0.1, "gradient_checkpointing": True},
    "pointwise": {"selector_objective": "pointwise", **FIRST},
    "pointwise, K = 2": {"selector_objective": "pointwise", **FIRST, "num_selected": 2},
}


@pytest.mark.parametrize("settings", OBJECTIVES.values(), ids=OBJECTIVES)
def test_both_adapters_learn_by_every_objective(settings: dict[str, Any], make_trainer: Make) -> None:
    """Four steps move every weight of both roles, leave the base bit-identical, and log finite numbers."""
    trainer = make_trainer(max_steps=4, **settings)
    base, start = base_state(trainer.model), {r: adapter_state(trainer.model, r) for r in (SELECTOR, GENERATOR)}
    trainer.train()
    assert_identical({n: v for n, v in base_state(trainer.model).items() if n in base}, base)
    for role, before in start.items():
        assert smallest_move(adapter_state(trainer.model, role), before) > 0
    logged = [entry for entry in trainer.state.log_history if "selector/loss" in entry]
    assert len(logged) == 4
    assert all(torch.isfinite(torch.tensor(list(entry.values()))).all() for entry in logged)
    assert ("kl" in logged[-1] or "critic/loss" in logged[-1]) == ("beta" in settings or "ppo" in str(settings))


def test_pointwise_weights_are_of_single_passages(make_trainer: Make) -> None:
    """Whatever K, each of the six candidates is weighed once, by what the generator says after it alone."""
    settings = {**FIRST, "num_selected": 2, "max_steps": 1}
    trainer = make_trainer(selector_objective="pointwise", identifiers="query", **settings)
    rollouts = record_rollouts(trainer)
    trainer.train()
    assert rollouts
    for _, rollout in rollouts:
        assert rollout.permutations == [(i,) for i in range(6)]
        assert rollout.proposal_logps is not None and rollout.proposal_logps.shape == (6, 1)
        builder, shown = trainer.pipeline.generator_prompts, rollout.question.shown
        assert rollout.contexts == [builder.generator(rollout.question.row["query"], [passage]) for passage in shown]


# -------------------------------------------------------------------------------------------------------------- critic
@pytest.mark.parametrize("backend", ["blocks", "mask", "cached", "repeated"])
def test_values_are_the_critics_of_the_state_before_each_decision(
    backend: str,
    adapted_model: Callable[..., PeftModel],
    tokenizer: PreTrainedTokenizerFast,
    rows: Callable[..., Rows],
) -> None:
    """V(x, z_<t) is the linear map of the last hidden state after prompt and choices, by one plain pass of each.

    With titles, of which some begin alike, by every way of sharing prefixes; values and gradients to 1e-5 of float32.
    """
    model = adapted_model(randomise=True)
    activate(model, SELECTOR)
    head = ValueHead(model.config.hidden_size)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    builder = PromptBuilder(tokenizer, "title", 2)
    prompts = [builder.selector(row["query"], row["candidates"]) for row in rows(2, 5)]
    drawn = [[(0, 3), (4, 1), (0, 1)], [(2, 0), (2, 1), (3, 4)]]
    with through(backend, base_of(model)):
        decisions = Decisions(SelectorPolicy(), model, prompts, critic=head)
        logps = [logps for logps, _ in decisions.permutation_logps(drawn)]
        values = decisions.values(drawn)
    assert values is not None
    assert values.shape == (2, 3, 2)

    expected = torch.empty(2, 3, 2)
    parameters = adapter_parameters(model, SELECTOR) | dict(head.named_parameters())
    for q, of_query in enumerate(drawn):
        for i, z in enumerate(of_query):
            for t in range(2):
                ids = torch.tensor([[*prompts[q].ids, *prompts[q].slate.token_ids(z[:t])]])
                hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
                expected[q, i, t] = head.linear(hidden[0, -1])[0]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    plain = Decisions(SelectorPolicy(), model, prompts)
    for with_critic, (without, _) in zip(logps, plain.permutation_logps(drawn), strict=True):
        torch.testing.assert_close(with_critic, without)
    weights = torch.arange(12.0).view(2, 3, 2)
    assert_same_gradients(
        gradients((weights * values).sum(), parameters), gradients((weights * expected).sum(), parameters), rtol=1e-4
    )


def recorded_losses(trainer: DROTrainer) -> list[dict[str, Any]]:
    """The list to which every selector loss adds what it was given."""
    calls: list[dict[str, Any]] = []
    selector_loss = trainer._selector_loss

    def recorded(rollouts: list[Rollout], scored: Any, weighting: Any, *rest: Any) -> LossOutput:
        calls.append({"rollouts": rollouts, "scored": scored, "weighting": weighting})
        return selector_loss(rollouts, scored, weighting, *rest)

    trainer._selector_loss = recorded
    return calls


def test_ppos_first_gradient_is_the_formula(make_trainer: Make) -> None:
    """One epoch, a critic that says 0: -mean over decisions of whitened lambda^(K-1-t) r, times log p's gradient.

    The selector's gradient of one step, against log-probabilities of a new pass and advantages written out; 1e-4.
    """
    trainer = make_trainer(max_steps=1, selector_objective="ppo", loss_type="bnpo", max_grad_norm=1e9)
    parameters = adapter_parameters(trainer.model, SELECTOR)
    recorder, calls = GradientRecorder(selector=parameters), recorded_losses(trainer)
    start = adapter_state(trainer.model, SELECTOR)
    trainer.add_callback(recorder)
    trainer.train()
    [call] = calls
    for name, value in start.items():
        parameters[name].data.copy_(value)
    rewards = call["weighting"].rewards
    rewards = (rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-4)  # as the critic learns them
    advantages = torch.stack([0.95 * rewards, rewards], dim=-1)  # K = 2, lambda = .95, V = 0
    advantages = (advantages - advantages.mean()) / advantages.std(unbiased=False)
    activate(trainer.model, SELECTOR)
    prompts, drawn = [r.prompt for r in call["rollouts"]], [r.drawn for r in call["rollouts"]]
    pairs = Decisions(trainer.pipeline.policy, trainer.model, prompts).permutation_logps(drawn)
    logps = torch.stack([logps for logps, _ in pairs])
    expected = gradients(-(advantages * logps).mean(), parameters)
    assert_same_gradients(recorder.steps[0]["selector"], expected, rtol=1e-4)


def test_later_epochs_keep_the_values_of_the_rollout(make_trainer: Make) -> None:
    """Three epochs over one rollout: the old values are the critic's when it was drawn, and the critic moves on."""
    trainer = make_trainer(max_steps=3, selector_objective="ppo", num_iterations=3)
    torch.nn.init.normal_(trainer.pipeline.critic.linear.weight, generator=torch.Generator().manual_seed(0))
    calls = recorded_losses(trainer)
    trainer.train()
    first, *later = calls
    olds = torch.stack([r.old_values for r in first["rollouts"]])
    torch.testing.assert_close(olds, first["scored"].values.detach(), rtol=0, atol=1e-5)
    for call in later:
        torch.testing.assert_close(torch.stack([r.old_values for r in call["rollouts"]]), olds, rtol=0, atol=0)
        assert (call["scored"].values.detach() - olds).abs().max() > 1e-3


def test_later_epochs_keep_the_rewards_of_the_first(make_trainer: Make) -> None:
    """The generator learns between epochs, and its likelihoods move; the rewards of a rollout do not."""
    trainer = make_trainer(max_steps=3, selector_objective="grpo", num_iterations=3)
    calls = recorded_losses(trainer)
    trainer.train()
    first, *later = [call["weighting"] for call in calls]
    for weighting in later:
        torch.testing.assert_close(weighting.rewards, first.rewards, rtol=0, atol=0)
        assert (weighting.metrics["generator/logps"] - first.metrics["generator/logps"]).abs() > 1e-3


def test_a_single_permutation_is_scored_once(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weight is 1, so `min_importance_weight` spares nothing: one pass of the generator a step, not two."""
    passes = []
    score = drorl.trainer.answer_logps_of
    monkeypatch.setattr(drorl.trainer, "answer_logps_of", lambda *args: passes.append(1) or score(*args))
    single = {"proposal": "retriever", "num_generations": 1, "per_device_train_batch_size": 2}
    make_trainer(max_steps=2, min_importance_weight=0.5, selector_objective="none", **single).train()
    assert len(passes) == 2


def test_the_critic_learns_the_reward(make_trainer: Make, rows: Callable[..., Rows]) -> None:
    """On one row seen again and again, with a frozen generator, its error falls by half in 40 steps."""
    trainer = make_trainer(
        train_rows=rows(2, 6),
        max_steps=40,
        selector_objective="ppo",
        generator_objective="none",
        reward="likelihood",
        vf_coef=1.0,
        learning_rate=3e-2,
    )
    trainer.train()
    losses = [entry["critic/loss"] for entry in trainer.state.log_history if "critic/loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_an_advantage_needs_no_value_behind_the_last_decision() -> None:
    """What stands in the padding, NaN from a permutation without text included, does not reach the advantages."""
    rewards, values = torch.tensor([[[0.0, 1.0, 0.0]]]), torch.tensor([[[0.5, 0.5, 3.0]]])
    mask = torch.tensor([[[1, 1, 0]]])
    short = generalized_advantages(rewards[..., :2], values[..., :2], mask[..., :2])
    assert generalized_advantages(rewards, values, mask)[0, 0].tolist() == [*short[0, 0].tolist(), 0.0]


# ----------------------------------------------------------------------------------------------- reference and reward
def test_the_reference_is_the_selector_at_the_start(make_trainer: Make) -> None:
    """It stays while the selector moves, has no gradient, and the first step's KL is 0."""
    trainer = make_trainer(max_steps=4, selector_objective="grpo", beta=0.2)
    start = adapter_state(trainer.model, SELECTOR)
    trainer.train()
    reference = adapter_state(trainer.model, REFERENCE)
    assert_identical({n.replace(REFERENCE, SELECTOR): v for n, v in reference.items()}, start)
    assert not any(p.requires_grad for p in adapter_parameters(trainer.model, REFERENCE).values())
    logged = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert logged[0] == pytest.approx(0, abs=1e-7)
    assert logged[-1] > 1e-6


def test_the_reward_f1_is_that_of_the_greedy_answer(make_trainer: Make, rows: Callable[..., Rows]) -> None:
    """Every permutation's reward is F1 of what the generator answers from its passages alone."""
    data = rows(2, 6)
    trainer = make_trainer(train_rows=data, max_steps=1, selector_objective="rloo", reward="f1", learning_rate=0.0)
    for row in data:  # a random model's answers share nothing with a name, so its own is made the gold answer of some
        context = trainer.pipeline.generator_prompts.generator(row["query"], row["candidates"][:2])
        row["answers"] = [trainer.pipeline.generate([context])[0] or "?"]
    trainer = make_trainer(
        model=trainer.model,
        train_rows=data,
        max_steps=1,
        selector_objective="rloo",
        reward="f1",
        learning_rate=0.0,
        num_generations=30,
        per_device_train_batch_size=60,
    )
    calls = recorded_losses(trainer)
    trainer.train()
    rewards, expected = calls[0]["weighting"].rewards, []
    for rollout in calls[0]["rollouts"]:
        answers = [trainer.pipeline.generate([context])[0] for context in rollout.contexts]
        expected.append([f1(answer, rollout.question.row["answers"]) for answer in answers])
    torch.testing.assert_close(rewards, torch.tensor(expected))
    assert rewards.min() < rewards.max()
