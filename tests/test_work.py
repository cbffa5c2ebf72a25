"""How much a training step computes, and that computing it in other portions changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients
from peft import LoraConfig
from runs import near_permutations
from test_trainer import one_step_gradients, record_rollouts
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from drorl.adapters import ROLES, add_adapters
from drorl.errors import InvalidInputError
from drorl.likelihood import backend_of
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


def test_on_policy_every_distinct_token_is_encoded_once(make_trainer: Make) -> None:
    """A step encodes the prompts once, their branches twice (to draw, to train), and each context once.

    With two queries in the micro-batch there is one pass for the prompts, K = 2 to draw, one for the branches, one for
    the generator.
    """
    trainer = make_trainer(max_steps=1)
    backend_of(trainer.model)
    rollouts = record_rollouts(trainer)
    passes = encoded_tokens(trainer.model)
    trainer.train()
    assert len(passes) == 1 + 2 + 1 + 1
    drawn = [rollout for _, rollout in rollouts]
    prompts, *drawing, branches, contexts = passes
    assert prompts == distinct([r.prompt.ids[:-1] for r in drawn])
    assert sum(drawing) <= branches
    answers = [[*context, *r.answers[0][:-1]] for r in drawn for context in r.contexts]
    assert contexts == distinct(answers)


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


def test_contexts_of_small_weight_are_not_back_propagated(make_trainer: Make) -> None:
    """Above a threshold of 0.3 the generator's gradient is that of the other contexts alone, and only they are encoded
    with a graph; the selector's gradient stays.

    At most three of four weights exceed it, so less is encoded with a graph than is scored.
    """
    trainer = make_trainer(max_steps=1, min_importance_weight=0.3)
    backend_of(trainer.model)
    graphs: list[int] = []
    trainer.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: graphs.append(inputs[0].numel() if torch.is_grad_enabled() else -inputs[0].numel())
    )
    trainer.train()
    *_, scored, kept = graphs
    assert scored < 0 < kept < -scored
    whole = one_step_gradients(make_trainer)
    thresholded = one_step_gradients(make_trainer, min_importance_weight=0.3)
    assert_same_gradients(thresholded["selector"], whole["selector"], rtol=1e-5)
    tiny = one_step_gradients(make_trainer, min_importance_weight=1e-12)
    assert_same_gradients(tiny["generator"], whole["generator"], rtol=1e-5)
    with pytest.raises(AssertionError, match="differs by"):
        assert_same_gradients(thresholded["generator"], whole["generator"], rtol=1e-2)


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
    with pytest.raises(InvalidInputError, match=r"0\.2 in attention_dropout"):
        make_trainer(model=add_adapters(tiny_model(attention_dropout=0.2), LoraConfig(r=2, target_modules=["q_proj"])))
