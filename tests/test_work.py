"""How much a training step computes, and that computing it in other portions changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients, gradients
from peft import LoraConfig, PeftModel
from runs import GradientRecorder, Reseed, near_permutations
from test_trainer import one_step_gradients, record_rollouts, sequence_logp
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import drorl.trainer
from drorl.adapters import GENERATOR, ROLES, SELECTOR, activate, adapter_parameters, add_adapters
from drorl.backends import backend_of
from drorl.errors import InvalidInputError
from drorl.likelihood import sequence_logps
from drorl.losses import Weighting
from drorl.permutations import Permutation, prefixes_of
from drorl.rollouts import Rollout, batches
from drorl.trainer import DROTrainer
from drorl.tree import TokenTree

Make = Callable[..., DROTrainer]


def encoded_tokens(model: nn.Module) -> list[int]:
    """The list to which every forward pass of the model adds how many tokens it encodes."""
    passes: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: passes.append(inputs[0].numel()))
    return passes


def distinct(sequences: list[list[int]]) -> int:
    """How many distinct prefixes the sequences have."""
    tree = TokenTree()
    for sequence in sequences:
        tree.add(sequence)
    return len(tree)


@pytest.mark.parametrize("num_selected", [1, 2])
def test_on_policy_every_distinct_token_is_encoded_once(make_trainer: Make, num_selected: int) -> None:
    """A step encodes the prompts once, later decisions twice (to draw, to train), and each context once.

    With two queries in the micro-batch there is one pass for the prompts and the first decision, with K = 2 one to
    draw the second and one for its gradient, and one for the generator.
    """
    trainer = make_trainer(max_steps=1, num_selected=num_selected)
    backend_of(trainer.model)
    rollouts = record_rollouts(trainer)
    passes = encoded_tokens(trainer.model)
    trainer.train()
    drawn = [rollout for _, rollout in rollouts]
    prompts, *later, contexts = passes

    def asked(r: Rollout, prefixes: list[Permutation]) -> list[list[int]]:
        return [[*r.prompt.ids, *tokens] for tokens in [(), *r.prompt.slate.decisions(prefixes).contexts]]

    assert prompts == distinct([s for r in drawn for s in asked(r, [()])])
    more = distinct([s for r in drawn for s in asked(r, prefixes_of(r.drawn))]) - prompts
    assert later == [more, more] * (num_selected - 1)
    answers = [[*context, *r.answers[0][:-1]] for r in drawn for context in r.contexts]
    assert contexts == distinct(answers)


@pytest.mark.parametrize("num_selected", [1, 2])
def test_each_passage_alone_is_encoded_once(make_trainer: Make, num_selected: int) -> None:
    """A selector that scores queries has one pass for all decisions of all queries, to draw and to train."""
    trainer = make_trainer(max_steps=1, num_selected=num_selected, identifiers="query")
    backend_of(trainer.model)
    rollouts = record_rollouts(trainer)
    passes = encoded_tokens(trainer.model)
    trainer.train()
    selector = [[*ids, *query[:-1]] for _, r in rollouts for ids, query in r.prompt.queries]
    generator = [[*context, *r.answers[0][:-1]] for _, r in rollouts for context in r.contexts if context]
    assert passes == [distinct(selector), distinct(generator)]


@pytest.mark.parametrize("identifiers", ["title", "query"])
def test_a_frozen_selector_is_not_asked_for_the_retrievers_order(make_trainer: Make, identifiers: str) -> None:
    """Supervised fine-tuning of the generator costs what the generator costs."""
    trainer = make_trainer(
        max_steps=1,
        identifiers=identifiers,
        proposal="retriever",
        selector_objective="none",
        num_generations=1,
    )
    backend_of(trainer.model)
    rollouts = record_rollouts(trainer)
    passes = encoded_tokens(trainer.model)
    trainer.train()
    contexts = [[*context, *r.answers[0][:-1]] for _, r in rollouts for context in r.contexts if context]
    assert passes == [distinct(contexts)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"selector_objective": "grpo", "generator_objective": "sft", "loss_type": "grpo"},
        {"selector_objective": "grpo", "loss_type": "dapo"},
        {"selector_objective": "rloo", "loss_type": "bnpo"},
        {"selector_objective": "grpo", "loss_type": "bnpo", "constrained": False},
        {"generator_objective": "none"},
        {"selector_objective": "none"},
        {"gradient_checkpointing": True},
    ],
    ids=lambda s: ", ".join(map(str, s.values())) or "dro",
)
def test_a_bound_on_the_tokens_of_a_pass_leaves_the_gradients_alone(
    settings: dict[str, Any], make_trainer: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Query by query (200 tokens), prompts encoded again for the loss: gradients as in one pass, to rounding."""
    settings = settings | {"max_completion_length": 12, "generation_kwargs": near_permutations(tokenizer)}
    whole = one_step_gradients(make_trainer, **settings)
    bounded = one_step_gradients(make_trainer, max_tokens_per_forward=300, **settings)
    for role in ROLES:
        trained = {"selector": "selector_objective", "generator": "generator_objective"}[role]
        if settings.get(trained) != "none":
            assert_same_gradients(bounded[role], whole[role], rtol=1e-5)


def test_within_a_bound_the_graphs_of_the_roles_never_coexist(make_trainer: Make) -> None:
    """The generator's graph is gone before the selector's is built, query by query; unbounded, they do coexist.

    What a forward pass with gradient builds is counted as alive until the next backward pass.
    """
    for bound, expected in ((None, [2]), (300, [1, 1, 1, 1])):
        trainer = make_trainer(max_steps=1, max_tokens_per_forward=bound)
        backend_of(trainer.model)
        alive: set[str] = set()
        seen: list[int] = []

        def forward(module: nn.Module, *_: Any, alive: set[str] = alive) -> None:
            if torch.is_grad_enabled():
                alive.add(module.active_adapter)

        def backward(loss: torch.Tensor, alive: set[str] = alive, seen: list[int] = seen, **_: Any) -> None:
            seen.append(len(alive))
            alive.clear()
            loss.backward()

        trainer.model.register_forward_hook(forward)
        trainer.accelerator.backward = backward
        trainer.train()
        assert seen[: len(expected)] == expected


def test_a_query_beyond_the_bound_is_refused(make_trainer: Make) -> None:
    """The message has the query's tokens, the bound, and the settings that help."""
    trainer = make_trainer(max_steps=1, max_tokens_per_forward=100)
    with pytest.raises(
        InvalidInputError, match=r"needs \d{3} distinct tokens.*max_tokens_per_forward is 100.*num_cand"
    ):
        trainer.train()


def test_rollouts_are_grouped_by_their_tokens(make_trainer: Make) -> None:
    """Groups keep the order, none exceeds the bound, and none could take the next rollout in."""
    trainer = make_trainer(max_steps=2)
    rollouts = record_rollouts(trainer)
    trainer.train()
    drawn: list[Rollout] = [rollout for _, rollout in rollouts]
    limit = 2 * max(r.size for r in drawn)
    groups = list(batches(drawn, limit))
    assert [r for group in groups for r in group] == drawn
    sizes = [sum(r.size for r in group) for group in groups]
    assert max(sizes) <= limit
    assert all(size + after[0].size > limit for size, after in zip(sizes, groups[1:], strict=False))
    assert list(batches(drawn, None)) == [drawn]


def test_every_question_has_its_own_randomness(make_trainer: Make) -> None:
    """The questions of a step draw with different seeds, and a repeated run with the same ones."""
    runs = []
    for _ in range(2):
        rollouts = record_rollouts(trainer := make_trainer(max_steps=2))
        trainer.train()
        runs.append([rollout.question.seed for _, rollout in rollouts])
    assert len(set(runs[0])) == len(runs[0]) == 4
    assert runs[0] == runs[1]


def test_contexts_of_small_weight_are_not_back_propagated(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Above a threshold of 0.3 the generator's gradient is that of $-\sum_{w_i \ge 0.3} w_i \log p_g$, computed here.

    Only those contexts are encoded with a graph, at most three of four; the selector's gradient stays.
    """
    trainer = make_trainer(max_steps=1, min_importance_weight=0.3, max_grad_norm=0.0)
    parameters = {role: adapter_parameters(trainer.model, role) for role in ROLES}
    start = {name: p.detach().clone() for role in ROLES for name, p in parameters[role].items()}
    for callback in (Reseed(), recorder := GradientRecorder(**parameters)):
        trainer.add_callback(callback)
    rollouts = record_rollouts(trainer)
    weightings: list[torch.Tensor] = []
    weigh = drorl.trainer.weigh

    def recorded(*args: Any, **kwargs: Any) -> Weighting:
        weighting = weigh(*args, **kwargs)
        weightings.append(weighting.importance_weights)
        return weighting

    monkeypatch.setattr(drorl.trainer, "weigh", recorded)
    graphs: list[int] = []
    trainer.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: graphs.append(inputs[0].numel() if torch.is_grad_enabled() else -inputs[0].numel())
    )
    trainer.train()
    *_, scored, kept = graphs
    assert scored < 0 < kept < -scored
    trainer.model.load_state_dict(start, strict=False)
    activate(trainer.model, GENERATOR)
    losses = []
    for (_, rollout), weights in zip(rollouts, weightings[0], strict=True):
        logps = [sequence_logp(trainer.model, context, rollout.answers[0]) for context in rollout.contexts]
        losses += [-w * logp for w, logp in zip(weights, logps, strict=True) if w >= 0.3]
    assert 0 < len(losses) < 8
    loss = torch.stack(losses).sum() / 2
    assert trainer.state.log_history[0]["generator/loss"] == pytest.approx(loss.item(), rel=1e-3)  # logged in 4 digits
    naive = gradients(loss, parameters[GENERATOR])
    assert_same_gradients(recorder.steps[0][GENERATOR], naive, rtol=1e-4)
    whole = one_step_gradients(make_trainer)
    assert_same_gradients(recorder.steps[0][SELECTOR], whole[SELECTOR], rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"constrained": False}, {"selector_objective": "grpo"}],
    ids=["dro", "free text", "grpo"],
)
def test_a_bound_changes_nothing_off_policy_either(
    settings: dict[str, Any], make_trainer: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Two iterations on the same permutations: the second step's gradients are equal too, to 1e-4.

    It comes after a step of Adam, which turns differences of rounding into differences of weights.
    """
    text = {"max_completion_length": 12, "generation_kwargs": near_permutations(tokenizer)}
    steps = []
    for bound in (None, 300):
        trainer = make_trainer(
            max_steps=2, num_iterations=2, max_grad_norm=0.0, max_tokens_per_forward=bound, **settings, **text
        )
        recorder = GradientRecorder(**{role: adapter_parameters(trainer.model, role) for role in ROLES})
        for callback in (Reseed(), recorder):
            trainer.add_callback(callback)
        trainer.train()
        steps.append(recorder.steps)
    for bounded, whole in zip(steps[1], steps[0], strict=True):
        for role in ROLES:
            assert_same_gradients(bounded[role], whole[role], rtol=1e-4)


def test_a_model_that_checkpoints_by_itself_is_noticed(
    make_trainer: Make, adapted_model: Callable[..., PeftModel]
) -> None:
    """Switched on at the model, not in the settings, gradient checkpointing leaves the gradients alone as well."""
    plain = one_step_gradients(make_trainer)
    model = adapted_model(randomise=True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    own = one_step_gradients(make_trainer, model=model)
    for role in ROLES:
        assert_same_gradients(own[role], plain[role], rtol=1e-5)


def test_a_sequence_beyond_the_models_window_is_refused(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """Beyond the positions that a model knows, for scaled ones beyond the original ones, numbers are no use."""
    pairs = [([*range(5, 15)], [1, 2]), ([*range(5, 30)], [1, 2])]
    with pytest.raises(InvalidInputError, match="26 tokens.*exact up to 20.*max_prompt_length"):
        sequence_logps(tiny_model(max_position_embeddings=20), pairs)
    sequence_logps(tiny_model(max_position_embeddings=26), pairs)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 20}
    with pytest.raises(InvalidInputError, match="exact up to 20"):
        sequence_logps(tiny_model(max_position_embeddings=40, rope_parameters=rope), pairs)


def test_dropout_is_refused(make_trainer: Make, tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """Sequences that share a prefix would share its noise: an error that says what to set; disabled, it is fine."""

    def dropping() -> nn.Module:
        config = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return add_adapters(tiny_model(), config)

    with pytest.raises(
        InvalidInputError, match=r"dropout of 0\.1 in .*lora_dropout.*lora_dropout=0.*disable_dropout=True"
    ):
        make_trainer(model=dropping())
    make_trainer(model=dropping(), disable_dropout=True)
    with pytest.raises(InvalidInputError, match="attention_dropout=0.2.*model's configuration"):
        make_trainer(model=add_adapters(tiny_model(attention_dropout=0.2), LoraConfig(r=2, target_modules=["q_proj"])))
