"""Short runs on tiny random models: what learns, what must not change, and whether the gradients are the method's."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients, gradients
from peft import LoraConfig, get_peft_model
from runs import (
    GradientRecorder,
    Reseed,
    adapter_state,
    assert_identical,
    base_state,
    config,
    largest_difference,
    near_permutations,
    norm,
    smallest_move,
)
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import drorl.rollouts
import drorl.trainer
from drorl.adapters import GENERATOR, SELECTOR, activate, adapter_parameters
from drorl.data.rows import RowError
from drorl.errors import DivergedError
from drorl.losses import LossOutput, Scores
from drorl.policy import Decisions
from drorl.prompts import PromptBuilder
from drorl.rollouts import Rollout
from drorl.trainer import DROTrainer

ROLES = (SELECTOR, GENERATOR)
Rows = list[dict[str, Any]]
Make = Callable[..., DROTrainer]
MODES: dict[str, dict[str, Any]] = {
    "policy, number": {"proposal": "policy", "identifiers": "number", "gradient_checkpointing": True},
    "first choices, letter": {
        "proposal": "first_choices",
        "identifiers": "letter",
        "num_candidates": 4,
        "shuffle_candidates": True,
        "retrieval_prior_weight": 0.5,
    },
    "retriever, title": {
        "proposal": "retriever",
        "identifiers": "title",
        "num_generations": 1,
        "per_device_train_batch_size": 2,
    },
}


def record_rollouts(trainer: DROTrainer) -> list[tuple[dict[str, Any], Rollout]]:
    """The list to which every M-step adds the rows that it is given and what was drawn for each, once."""
    rollouts: list[tuple[dict[str, Any], Rollout]] = []
    batch_loss = trainer._batch_loss

    def recorded(batch: list[Rollout], *args: Any) -> LossOutput:
        known = [rollout for _, rollout in rollouts]
        rollouts.extend((r.question.row, r) for r in batch if not any(r is other for other in known))
        return batch_loss(batch, *args)

    trainer._batch_loss = recorded
    return rollouts


def policy_logps(trainer: DROTrainer, rollout: Rollout) -> torch.Tensor:
    """log p_s of the rollout's permutations under the trainer's model as it is now, `(m, K)`."""
    decisions = trainer.pipeline.decide([rollout.prompt], keep=False)
    return decisions.permutation_logps([rollout.drawn])[0][0]


def shown_candidates(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], rollout: Any) -> list[dict[str, Any]]:
    """The row's candidates in the order in which the selector's prompt shows them; their texts are distinct."""
    prompt = tokenizer.decode(rollout.prompt.ids)
    return sorted((c for c in row["candidates"] if c["text"] in prompt), key=lambda c: prompt.index(c["text"]))


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Scores, torch.Tensor]]:
    """What each M-step weighed, and the weights."""
    calls: list[tuple[Scores, torch.Tensor]] = []
    weigh = drorl.trainer.weigh

    def recorded(given: Scores, *args: Any, **kwargs: Any) -> Any:
        weighting = weigh(given, *args, **kwargs)
        calls.append((given, weighting.importance_weights))
        return weighting

    monkeypatch.setattr(drorl.trainer, "weigh", recorded)
    return calls


# ----------------------------------------------------------------------------------------------------- what may change
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_both_adapters_learn_on_a_base_that_stays(mode: dict[str, Any], make_trainer: Make) -> None:
    """In 20 steps every tensor of both adapters moves, and everything else in the model stays bit-identical."""
    trainer = make_trainer(max_steps=20, learning_rate=1e-3, **mode)
    model = trainer.model
    base, before = base_state(model), {role: adapter_state(model, role) for role in ROLES}
    trainer.train()
    assert_identical(base_state(model), base)
    for role in ROLES:
        # Adam moves an entry by up to the rate per step; a tenth of one such step is far above any rounding.
        assert smallest_move(adapter_state(model, role), before[role]) > 1e-4
    assert trainer.state.global_step == 20
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_training_can_be_called_again(make_trainer: Make) -> None:
    """A second `train()`, as in a notebook, goes on from the adapters as they are."""
    trainer = make_trainer(max_steps=1)
    trainer.train()
    before = adapter_state(trainer.model, SELECTOR)
    trainer.train()
    assert smallest_move(adapter_state(trainer.model, SELECTOR), before) > 1e-4


@pytest.mark.parametrize("frozen", ROLES)
def test_an_objective_of_none_freezes_the_role(frozen: str, make_trainer: Make) -> None:
    """With objective `none` that adapter stays bit-identical, weight decay notwithstanding; the other one learns."""
    trainer = make_trainer(max_steps=3, weight_decay=0.1, **{f"{frozen}_objective": "none"})
    before = {role: adapter_state(trainer.model, role) for role in ROLES}
    trainer.train()
    learner = GENERATOR if frozen == SELECTOR else SELECTOR
    assert_identical(adapter_state(trainer.model, frozen), before[frozen])
    assert smallest_move(adapter_state(trainer.model, learner), before[learner]) > 1e-4
    assert len(trainer.optimizer.param_groups) == 1


def test_each_role_has_its_learning_rate(make_trainer: Make) -> None:
    """Both rates land in the optimizer beside the right parameters; a rate of 0 is a rate, not a missing one."""
    trainer = make_trainer(learning_rate=3e-3, generator_learning_rate=0.0, weight_decay=0.01)
    before = {role: adapter_state(trainer.model, role) for role in ROLES}
    trainer.train()
    groups = {group["lr"]: group for group in trainer.optimizer.param_groups}
    assert groups.keys() == {3e-3, 0.0}
    for rate, role in ((3e-3, SELECTOR), (0.0, GENERATOR)):
        assert {id(p) for p in groups[rate]["params"]} == set(
            map(id, adapter_parameters(trainer.model, role).values())
        )
        assert groups[rate]["weight_decay"] == 0.01
    assert smallest_move(adapter_state(trainer.model, SELECTOR), before[SELECTOR]) > 1e-4
    assert_identical(adapter_state(trainer.model, GENERATOR), before[GENERATOR])


def test_each_role_is_clipped_by_itself(make_trainer: Make) -> None:
    """Each role's gradient is cut to `max_grad_norm` by itself: the other's size takes nothing away."""
    limit = 1e-3
    trainer = make_trainer(max_steps=1, max_grad_norm=limit)
    groups = {role: adapter_parameters(trainer.model, role) for role in ROLES}
    trainer.add_callback(clipped := GradientRecorder(**groups))
    trainer.train()
    unclipped_norm = trainer.state.log_history[0]["grad_norm"]
    assert unclipped_norm > 10 * limit
    for role in ROLES:
        assert norm(clipped.steps[0][role]) == pytest.approx(limit, rel=1e-3)


def test_a_separate_generator_trains_on_its_own_base(
    make_trainer: Make, tiny_model: Callable[..., LlamaForCausalLM], lora: LoraConfig
) -> None:
    """Two models, each with one adapter: both adapters learn, neither base changes, gradients do not pile up."""
    selector = get_peft_model(tiny_model(), lora, adapter_name=SELECTOR)
    generator = get_peft_model(tiny_model(seed=1, num_hidden_layers=1), lora, adapter_name=GENERATOR)
    models = {SELECTOR: selector, GENERATOR: generator}
    trainer = make_trainer(selector, generator_model=generator, max_steps=3)
    before = {role: (base_state(model), adapter_state(model, role)) for role, model in models.items()}
    trainer.train()
    for role, model in models.items():
        base, adapter = before[role]
        assert_identical(base_state(model), base)
        assert largest_difference(adapter_state(model, role), adapter) > 1e-3
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shuffle", [True, False])
def test_candidates_are_shuffled_anew_each_time(
    shuffle: bool, make_trainer: Make, rows: Callable[..., Rows], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Seen again, a query shows its candidates in another order, or with `shuffle_candidates=False` in the same one.

    That five random orders of six candidates are one and the same has a chance of 720^-4.
    """
    trainer = make_trainer(train_rows=rows(2, 6), shuffle_candidates=shuffle, max_steps=5)
    rollouts = record_rollouts(trainer)
    trainer.train()
    for row in rows(2, 6):
        seen = [shown_candidates(tokenizer, r, rollout) for r, rollout in rollouts if r["query"] == row["query"]]
        assert len(seen) == 5
        assert (len({tuple(c["id"] for c in order) for order in seen}) > 1) == shuffle
        assert shuffle or seen[0] == row["candidates"]


# ------------------------------------------------------------------------------------------------- the right gradients
def one_step_gradients(make_trainer: Make, **settings: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The gradients of both roles in the first step, from the same weights, rows and random numbers."""
    trainer = make_trainer(max_steps=1, **({"max_grad_norm": 0.0} | settings))
    recorder = GradientRecorder(**{role: adapter_parameters(trainer.model, role) for role in ROLES})
    for callback in (Reseed(), recorder):
        trainer.add_callback(callback)
    trainer.train()
    return recorder.steps[0]


@pytest.mark.parametrize("generator_objective", ["dro", "elbo", "sft"])
@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_gradients_are_those_of_the_paper(
    baseline: str, generator_objective: str, make_trainer: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    r"""The optimizer is given the gradients of Eq. 10 and 11, computed here once more from the sampled permutations.

    $-\sum_i (w_i - b_i) \log p_s(z_i|x,d)$ for the selector and $-\sum_i w_i \log p_g(y|x,d_{z_i})$ for the generator,
    averaged over queries; with `elbo`, all $w_i = 1/m$ for the generator; with `sft`,
    $-\log p_g(y|x, \text{first K})$, first in the retriever's order and not in the shuffled one of the prompt.
    Float32: 1e-4 relative.
    """
    settings = {"baseline": baseline, "generator_objective": generator_objective, "shuffle_candidates": True}
    trainer = make_trainer(max_steps=1, max_grad_norm=0.0, **settings)
    model = trainer.model
    groups = {role: adapter_parameters(model, role) for role in ROLES}
    rollouts = record_rollouts(trainer)
    start = {name: p.detach().clone() for role in ROLES for name, p in groups[role].items()}
    trainer.add_callback(recorder := GradientRecorder(**groups))
    trainer.train()
    model.load_state_dict(start, strict=False)

    assert len(rollouts) == 2
    builder = PromptBuilder(tokenizer, "number", 2)
    expected: dict[str, list[torch.Tensor]] = {role: [] for role in ROLES}
    for row, rollout in rollouts:
        answer = builder.answer(row["answers"][0])
        shown = shown_candidates(tokenizer, row, rollout)
        contexts = [builder.generator(row["query"], [shown[i] for i in z]) for z in rollout.permutations]
        activate(model, GENERATOR)
        logps = torch.stack([sequence_logp(model, context, answer) for context in contexts])
        weights = torch.softmax(logps.detach(), dim=0)
        supervised = sequence_logp(model, builder.generator(row["query"], row["candidates"][:2]), answer)
        objectives = {"dro": (weights * logps).sum(), "elbo": logps.mean(), "sft": supervised}
        expected[GENERATOR].append(objectives[generator_objective])
        activate(model, SELECTOR)
        policy = policy_logps(trainer, rollout).sum(dim=1)
        others = (1 - weights) / (len(weights) - 1) if baseline == "leave_one_out" else 0.0
        expected[SELECTOR].append(((weights - others) * policy).sum())
    for role in ROLES:
        naive = gradients(-torch.stack(expected[role]).mean(), groups[role])
        assert_same_gradients(recorder.steps[0][role], naive, rtol=1e-4)


def sequence_logp(model: nn.Module, context: list[int], answer: list[int]) -> torch.Tensor:
    """log p(answer | context), one sequence, one pass."""
    logits = model(input_ids=torch.tensor([context + answer]), use_cache=False).logits[0]
    logps = torch.log_softmax(logits[len(context) - 1 : -1], dim=-1)
    return logps[torch.arange(len(answer)), answer].sum()


@pytest.mark.parametrize(
    "settings",
    [{}, {"selector_objective": "grpo", "generator_objective": "sft"}, {"constrained": False}],
    ids=["dro", "grpo and sft", "free text"],
)
def test_accumulated_gradients_are_those_of_one_batch(
    settings: dict[str, Any], make_trainer: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Two queries in one batch or in two accumulated ones: the same gradients for both roles, to float32 rounding."""
    settings = settings | {"max_completion_length": 12, "generation_kwargs": near_permutations(tokenizer)}
    together = one_step_gradients(make_trainer, per_device_train_batch_size=8, **settings)
    apart = one_step_gradients(make_trainer, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    for role in ROLES:
        assert_same_gradients(apart[role], together[role], rtol=1e-5)


def test_checkpointing_leaves_the_gradients_alone(make_trainer: Make) -> None:
    """What the backward pass computes again it computes with the right adapter: equal gradients for both roles."""
    plain = one_step_gradients(make_trainer)
    checkpointed = one_step_gradients(make_trainer, gradient_checkpointing=True)
    for role in ROLES:
        assert_same_gradients(checkpointed[role], plain[role], rtol=1e-5)


def test_checkpointing_under_the_wrong_adapter_would_be_noticed(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above has teeth: with the generator active during the selector's backward pass, gradients differ."""
    plain = one_step_gradients(make_trainer)
    compute_loss = DROTrainer._compute_loss

    def wrong(self: DROTrainer, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        loss = compute_loss(self, model, inputs)
        activate(model, GENERATOR)
        return loss

    monkeypatch.setattr(DROTrainer, "_compute_loss", wrong)
    checkpointed = one_step_gradients(make_trainer, gradient_checkpointing=True)
    with pytest.raises(AssertionError, match="differs by|has no gradient"):
        assert_same_gradients(checkpointed[SELECTOR], plain[SELECTOR], rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- the weights
def test_on_policy_weights_need_no_correction(make_trainer: Make, scores: list) -> None:
    """Sampled from the policy itself, p_s/q is 1 to rounding, step after step, though the selector moves."""
    make_trainer(max_steps=3).train()
    assert len(scores) == 3
    for given, _ in scores:
        torch.testing.assert_close(given.selector_logps, given.proposal_logps, atol=1e-5, rtol=0)


def test_a_second_iteration_follows_the_moved_selector(make_trainer: Make, scores: list) -> None:
    """On old samples the weights are p_g p_s/q with p_s of the selector as it is *now*, and q as it was then."""
    trainer = make_trainer(max_steps=2, num_iterations=2, learning_rate=3e-2, per_device_train_batch_size=4)
    rollouts = record_rollouts(trainer)
    moved: list[torch.Tensor] = []
    compute_loss = trainer._compute_loss

    def recorded(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        (rollout,) = inputs["rollouts"]
        activate(model, SELECTOR)
        with torch.no_grad():
            moved.append(policy_logps(trainer, rollout).sum(dim=1))
        return compute_loss(model, inputs)

    trainer._compute_loss = recorded
    trainer.train()
    assert len(rollouts) == 1
    (first, _), (second, weights) = scores
    assert torch.equal(first.proposal_logps, second.proposal_logps)
    torch.testing.assert_close(first.selector_logps, first.proposal_logps, atol=1e-5, rtol=0)
    assert (second.selector_logps - second.proposal_logps).abs().max() > 0.01
    torch.testing.assert_close(second.selector_logps[0], moved[1], atol=1e-5, rtol=0)
    expected = torch.softmax(second.generator_logps + moved[1] - second.proposal_logps, dim=-1)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)


def test_the_retrievers_order_is_a_weight_of_one(
    make_trainer: Make, rows: Callable[..., Rows], tokenizer: PreTrainedTokenizerFast, scores: list
) -> None:
    """`proposal="retriever"` is supervised warm-up: each row's first K in the retriever's order, however shown."""
    mode = MODES["retriever, title"] | {"shuffle_candidates": True}
    trainer = make_trainer(max_steps=2, **mode)
    rollouts = record_rollouts(trainer)
    trainer.train()
    assert len(rollouts) == 4
    for row, rollout in rollouts:
        shown = shown_candidates(tokenizer, row, rollout)
        assert shown != row["candidates"]
        assert [[shown[i] for i in z] for z in rollout.permutations] == [row["candidates"][:2]]
    for _, weights in scores:
        assert torch.equal(weights, torch.ones(2, 1))


def test_a_flatter_proposal_is_corrected(make_trainer: Make, scores: list) -> None:
    """With `proposal_temperature=2` p_s stays the policy's, q is the flatter one's, and the weights contain p_s/q."""
    trainer = make_trainer(max_steps=1, proposal_temperature=2.0)
    rollouts = record_rollouts(trainer)
    queries, candidates = ([row[key] for row in trainer.train_dataset] for key in ("query", "candidates"))
    decisions = trainer.pipeline.decisions(queries, candidates)
    first_choices = decisions.logps([[()]] * len(queries))
    first_logps = {tuple(p.ids): rows[0] for p, rows in zip(decisions.prompts, first_choices, strict=True)}
    trainer.train()
    ((given, weights),) = scores
    assert given.log_ratio.abs().min() > 1e-4
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2))
    torch.testing.assert_close(weights, torch.softmax(given.generator_logps + given.log_ratio, dim=-1))
    for _, rollout in rollouts:
        policy = first_logps[tuple(rollout.prompt.ids)]
        flatter = torch.log_softmax(policy / 2, dim=-1)
        chosen = torch.tensor([z[0] for z in rollout.permutations])
        torch.testing.assert_close(rollout.old_selector_logps[:, 0], policy[chosen], atol=1e-5, rtol=0)
        torch.testing.assert_close(rollout.proposal_logps[:, 0], flatter[chosen], atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------- what is worth nothing
def finite(model: nn.Module) -> bool:
    """Whether every parameter is a number."""
    return all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("generator_objective", ["dro", "elbo", "sft", "none"])
def test_a_query_of_nan_is_skipped_and_counted(
    generator_objective: str, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query whose likelihoods are NaN leaves no trace in the weights: it is skipped, counted, and the others train.

    The NaN is multiplied in, as an overflow in the model would bring it, so that it also comes back in the gradient.
    """
    trainer = make_trainer(max_steps=2, generator_objective=generator_objective)
    rollouts = record_rollouts(trainer)
    real = drorl.rollouts.answer_logps

    def poisoned(model: nn.Module, prompts: Any, answers: Any) -> torch.Tensor:
        logps = real(model, prompts, answers)
        bad = torch.tensor(
            [a == rollouts[0][1].answers and p is not None for p, a in zip(prompts, answers, strict=True)]
        )
        return torch.where(bad, logps * math.nan, logps) if bad.any() else logps

    monkeypatch.setattr(drorl.rollouts, "answer_logps", poisoned)
    before = {role: adapter_state(trainer.model, role) for role in ROLES}
    trainer.train()
    assert finite(trainer.model)
    skipped = [e["frac_skipped_queries"] for e in trainer.state.log_history if "frac_skipped_queries" in e]
    assert skipped[0] == 0.5
    losses = [e[f"{role}/loss"] for e in trainer.state.log_history for role in ROLES if f"{role}/loss" in e]
    assert len(losses) == (2 if generator_objective == "none" else 4)
    assert all(map(math.isfinite, losses))
    for role in ROLES if generator_objective != "none" else (SELECTOR,):
        assert smallest_move(adapter_state(trainer.model, role), before[role]) > 1e-4


@pytest.mark.parametrize(
    "objectives", [("dro", "dro"), ("none", "dro"), ("dro", "none"), ("grpo", "sft")], ids=" and ".join
)
def test_texts_without_any_permutation_teach_nothing(objectives: tuple[str, str], make_trainer: Make) -> None:
    """Free texts in which nothing is recognised: all queries are skipped, and nothing breaks or moves but `sft`."""
    selector, generator = objectives
    trainer = make_trainer(
        selector_objective=selector,
        generator_objective=generator,
        constrained=False,
        max_completion_length=4,
        generation_kwargs={"suppress_tokens": list(range(3, 400))},  # control tokens only, which are no text
    )
    before = {role: adapter_state(trainer.model, role) for role in ROLES}
    trainer.train()
    assert [e["frac_skipped_queries"] for e in trainer.state.log_history if "loss" in e] == [1.0, 1.0]
    assert [e["permutations/valid_rate"] for e in trainer.state.log_history if "loss" in e] == [0.0, 0.0]
    assert_identical(adapter_state(trainer.model, SELECTOR), before[SELECTOR])
    if generator != "sft":
        assert_identical(adapter_state(trainer.model, GENERATOR), before[GENERATOR])


# ------------------------------------------------------------------------------------------------- metrics, evaluation
METRICS = [
    "selector/loss",
    "generator/loss",
    "selector/entropy",
    "generator/logps",
    "iw_elbo",
    "effective_sample_size",
    "importance_weights/max",
    "frac_degenerate_weights",
    "frac_skipped_queries",
    "permutations/valid_rate",
    "permutations/unique_ratio",
    "passages/truncated_ratio",
]


def test_the_metrics_are_logged(make_trainer: Make) -> None:
    """Every step logs every metric, and each is within the bounds of what it measures (m = 4)."""
    trainer = make_trainer(max_steps=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert [name for name in METRICS if name not in entry] == []
        assert 1 <= entry["effective_sample_size"] <= 4
        assert 0.25 <= entry["importance_weights/max"] <= 1
        assert entry["permutations/valid_rate"] == 1.0
        assert entry["permutations/unique_ratio"] in {i / 8 for i in range(2, 9)}
        assert 0 < entry["selector/entropy"] <= math.log(6 * 5)
        assert entry["generator/logps"] < entry["iw_elbo"] < 0  # Jensen: the mean of logs below the log of the mean
        assert entry["loss"] == pytest.approx(entry["selector/loss"] + entry["generator/loss"], abs=1e-4)


def test_evaluation_of_one_choice_is_exact(
    make_trainer: Make, rows: Callable[..., Rows], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With K = 1 `iw_elbo` is log sum_z p_s(z) p_g(y|z) itself, computed here token by token; the rest are rates.

    Two of the four answers are right, of which one has a word too many, as far as EM and F1 can see.
    """
    data = rows(4, 6)
    trainer = make_trainer(eval_rows=data, num_selected=1, answer_target="first")
    written = [data[0]["answers"][0], f"{data[1]['answers'][0]} river", "Nile", ""]
    monkeypatch.setattr(trainer.pipeline, "generate", lambda prompts: written)
    trainer._metrics["train"]["loss of a step"] = [1.0]
    metrics = trainer.evaluate()
    assert "loss of a step" not in trainer.state.log_history[-1]
    assert trainer._metrics["train"]["loss of a step"] == [1.0]  # is logged with its step, not with the evaluation

    model, builder = trainer.model, PromptBuilder(tokenizer, "number", 1)
    bounds, first = [], []
    for row in data:
        symbols = tokenizer.convert_tokens_to_ids(list("[123456]"))
        ids = [*builder.selector(row["query"], row["candidates"]).ids, symbols[0]]
        activate(model, SELECTOR)
        with torch.no_grad():
            prior = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1][symbols[1:7]], dim=-1)
            activate(model, GENERATOR)
            answer = builder.answer(row["answers"][0])
            contexts = [builder.generator(row["query"], [c]) for c in row["candidates"]]
            likelihood = torch.stack([sequence_logp(model, context, answer) for context in contexts])
        bounds.append((prior + likelihood).logsumexp(0).item())
        first.append(row["answers"][0] in row["candidates"][int(prior.argmax())]["text"])
    # Float32 sums of about ten terms of 5 nats: rounding is some 1e-5.
    assert metrics["eval_iw_elbo"] == pytest.approx(sum(bounds) / 4, abs=1e-4)
    assert metrics["eval_exact_match"] == 0.25
    assert metrics["eval_f1"] == pytest.approx((1 + 2 / 3) / 4)
    assert metrics["eval_recall@1"] == sum(first) / 4
    assert [record.query for record in trainer.last_records] == [row["query"] for row in data]
    assert trainer.state.log_history[-1]["eval_f1"] == metrics["eval_f1"]


@pytest.mark.parametrize("num_generations", [2, 4])
def test_evaluation_takes_as_many_samples_as_training(
    num_generations: int, make_trainer: Make, rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For K > 1 the bound is that of `num_generations` samples, so that runs with equal settings can be compared."""
    counts = []
    sample = Decisions.sample

    def counted(self: Decisions, count: int, *args: Any, **kwargs: Any) -> Any:
        draws = sample(self, count, *args, **kwargs)
        counts.extend(len(draw.permutations) for draw in draws)
        return draws

    monkeypatch.setattr(Decisions, "sample", counted)
    make_trainer(eval_rows=rows(3, 6), num_generations=num_generations).evaluate()
    assert counts == [num_generations] * 3


def test_evaluation_during_training_changes_nothing_but_the_log(make_trainer: Make, rows: Callable[..., Rows]) -> None:
    """With and without evaluation after every step (seeded alike) training ends in the same weights, in train mode."""
    states = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(eval_rows=rows(2, 6), eval_strategy=strategy, eval_steps=1, callbacks=[Reseed()])
        trainer.train()
        assert trainer.model.training
        states.append(adapter_state(trainer.model, SELECTOR) | adapter_state(trainer.model, GENERATOR))
    assert sum("eval_f1" in entry for entry in trainer.state.log_history) == 2
    assert_identical(states[1], states[0])


# ----------------------------------------------------------------------------------------------------------- bad input
def test_a_selector_that_has_become_nan_is_named(make_trainer: Make) -> None:
    """Training stops with what to change, not with an index out of bounds in the sampler."""
    trainer = make_trainer()
    next(iter(adapter_parameters(trainer.model, SELECTOR).values())).data.fill_(math.nan)
    with pytest.raises(DivergedError, match="NaN.*lower learning_rate"):
        trainer.train()


def test_an_adapter_of_another_name_is_an_error(
    make_trainer: Make, tiny_model: Callable[..., LlamaForCausalLM], lora: LoraConfig
) -> None:
    """A `PeftModel` without the adapters of both roles is refused; the message has the names it has and lacks."""
    with pytest.raises(ValueError, match=r"no adapter '(selector|generator)'.*'default'"):
        make_trainer(get_peft_model(tiny_model(), lora))
    with pytest.raises(ValueError, match="no adapter 'generator'.*'selector'"):
        make_trainer(get_peft_model(tiny_model(), lora, adapter_name=SELECTOR))


def test_a_model_without_tokenizer_is_an_error(
    tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM], rows: Callable[..., Rows]
) -> None:
    """A directory that holds a model and no tokenizer is refused with the remedy, before anything is loaded."""
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a model but no tokenizer.*save_pretrained"):
        DROTrainer(str(tmp_path / "model"), config(tmp_path), rows(4, 6))


@pytest.mark.parametrize("where", ["train_rows", "eval_rows"])
def test_a_bad_row_is_an_error(where: str, make_trainer: Make, rows: Callable[..., Rows]) -> None:
    """Rows are checked when the trainer is made, not hours later: the error names the row and the field."""
    data = rows(4, 6)
    data[2]["candidates"][1]["text"] = " "
    with pytest.raises(RowError, match=r"row 2, field 'candidates\[1\].text'"):
        make_trainer(**{where: data})
    few = rows(4, 6)
    few[3]["candidates"] = few[3]["candidates"][:1]
    with pytest.raises(RowError, match="row 3, field 'candidates'.*1 < 2"):
        make_trainer(**{where: few})


def test_a_prior_needs_scores(make_trainer: Make, rows: Callable[..., Rows]) -> None:
    """A retrieval prior over rows without scores is refused by row and field; without the prior they are fine."""
    data = rows(4, 6)
    del data[1]["candidates"][0]["score"]
    make_trainer(train_rows=data)
    with pytest.raises(RowError, match=r"row 1, field 'candidates\[0\].score'"):
        make_trainer(train_rows=data, retrieval_prior_weight=1.0)


def test_evaluation_needs_rows(make_trainer: Make) -> None:
    """`evaluate()` without any rows says what is missing."""
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer().evaluate()


def test_too_few_rows_for_a_step_are_refused(make_trainer: Callable[..., DROTrainer]) -> None:
    """A data set that is smaller than one step would train nothing without a word; the numbers are named."""
    with pytest.raises(ValueError, match="one step takes 64 queries, but train_dataset has 8 rows"):
        make_trainer(gradient_accumulation_steps=32)


def test_a_prompt_that_can_never_fit_is_named_at_the_start(
    make_trainer: Callable[..., DROTrainer], rows: Callable[..., list[dict[str, Any]]]
) -> None:
    """A query that leaves no room for passages is refused when the trainer is made, with its row, not in step 500."""
    train_rows = rows(8, 6)
    train_rows[5]["query"] = "Which river? " * 400
    with pytest.raises(RowError, match="row 5, field 'query'.*shorten the query"):
        make_trainer(train_rows=train_rows, max_prompt_length=400)
