"""Two adapters on one base: each computes alone, both stay trainable, and each is saved and loaded by itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Gradients, accumulated, assert_same_gradients, randomise_adapters
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import LlamaForCausalLM

from drorl.adapters import (
    GENERATOR,
    ROLES,
    SELECTOR,
    activate,
    adapter_parameters,
    add_adapters,
    load_adapter_weights,
    trainable_roles,
)
from drorl.likelihood import sequence_logps

PAIRS = [([3, 1, 4, 1, 5], [9, 2, 6]), ([3, 1, 4], [5, 3])]


def loss_of(model: nn.Module) -> torch.Tensor:
    """A negative log-likelihood under the active adapter."""
    return -torch.cat(sequence_logps(model, PAIRS)).sum()


def by_role(model: nn.Module) -> dict[str, Gradients]:
    """What has been accumulated in each role's adapter."""
    return {role: accumulated(adapter_parameters(model, role)) for role in ROLES}


# ------------------------------------------------------------------------------------------------------ who is trained
def test_the_base_is_frozen_and_both_adapters_are_trainable(adapted_model: Callable[..., PeftModel]) -> None:
    """Exactly the parameters of the two adapters require a gradient, and they are disjoint and of equal size."""
    model = adapted_model()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    selector, generator = (set(adapter_parameters(model, role)) for role in ROLES)
    assert trainable == selector | generator
    assert not selector & generator
    assert len(selector) == len(generator) == 2 * 2 * 2  # layers, modules, A and B
    assert trainable_roles(model) == ROLES
    assert model.active_adapter == SELECTOR


def test_activating_a_role_freezes_none(adapted_model: Callable[..., PeftModel]) -> None:
    """PEFT's set_adapter freezes the others, which an optimizer would then miss; activate leaves both trainable."""
    model = adapted_model()
    for role in (GENERATOR, SELECTOR, SELECTOR, GENERATOR):
        activate(model, role)
        assert model.active_adapter == role
        assert all(p.requires_grad for r in ROLES for p in adapter_parameters(model, r).values())
    model.set_adapter(SELECTOR)
    assert not any(p.requires_grad for p in adapter_parameters(model, GENERATOR).values())  # so there is need for it


def test_activating_a_role_changes_what_is_computed(adapted_model: Callable[..., PeftModel]) -> None:
    """Each role has its own likelihoods, which come back when it does."""
    model = adapted_model(randomise=True)
    losses = []
    for role in (SELECTOR, GENERATOR, SELECTOR):
        activate(model, role)
        losses.append(loss_of(model).item())
    assert losses[0] == losses[2]
    assert abs(losses[0] - losses[1]) > 0.1


def test_a_new_adapter_changes_nothing_yet(
    tiny_model: Callable[..., LlamaForCausalLM], adapted_model: Callable[..., PeftModel]
) -> None:
    """LoRA's B is zero at first, so both roles begin as the base model."""
    model, expected = adapted_model(), loss_of(tiny_model()).item()
    for role in ROLES:
        activate(model, role)
        assert loss_of(model).item() == expected


def test_an_adapter_that_does_not_exist_is_named(adapted_model: Callable[..., PeftModel]) -> None:
    """The error says which adapter was asked for and which there are."""
    with pytest.raises(ValueError, match="no adapter 'reader'; it has 'selector', 'generator'"):
        activate(adapted_model(), "reader")


def test_a_model_may_have_one_role_only(tiny_model: Callable[..., LlamaForCausalLM], lora: LoraConfig) -> None:
    """A separate generator has its own base: the selector's model then has the selector alone."""
    model = add_adapters(tiny_model(), lora, (SELECTOR,))
    assert trainable_roles(model) == (SELECTOR,)
    activate(model, SELECTOR)
    with pytest.raises(ValueError, match="no adapter 'generator'"):
        activate(model, GENERATOR)


def test_a_trained_bias_is_refused(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """A bias belongs to the base, so training it would tie the roles together."""
    with pytest.raises(ValueError, match="bias='all'.*bias='none'"):
        add_adapters(tiny_model(), LoraConfig(target_modules=["q_proj"], bias="all"))


# ----------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize(("role", "other"), [(SELECTOR, GENERATOR), (GENERATOR, SELECTOR)])
def test_the_gradient_of_a_role_touches_its_own_adapter_only(
    adapted_model: Callable[..., PeftModel], role: str, other: str
) -> None:
    """After a backward pass of one role, all of its parameters have a gradient and none of anything else has one."""
    model = adapted_model(randomise=True)
    activate(model, role)
    loss_of(model).backward()
    own = adapter_parameters(model, role)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in own.values())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(own)
    assert not set(own) & set(adapter_parameters(model, other))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient_when_each_backward_ends_before_the_next_role(
    adapted_model: Callable[..., PeftModel], use_reentrant: bool
) -> None:
    """Selector forward, backward; then generator forward, backward: gradients as without checkpointing, to 1e-12.

    Float64, without dropout; the recomputed states are bitwise those of the forward pass, so hardly anything is lost.
    """
    gradients = {}
    for checkpointing in (False, True):
        model = adapted_model(torch.float64, randomise=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        for role in ROLES:
            activate(model, role)
            loss_of(model).backward()
        gradients[checkpointing] = by_role(model)
    for role in ROLES:
        assert_same_gradients(gradients[True][role], gradients[False][role], rtol=1e-12)


def test_checkpointing_is_wrong_when_the_other_role_is_activated_before_backward(
    adapted_model: Callable[..., PeftModel],
) -> None:
    """Why the order matters: the backward pass recomputes with the adapter that is active then.

    If this fails, PEFT or torch has learnt better, and the two backward passes of a step may be joined.
    """
    model = adapted_model(torch.float64, randomise=True).train()
    activate(model, SELECTOR)
    loss_of(model).backward()
    right = by_role(model)[SELECTOR]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    activate(model, SELECTOR)
    loss = loss_of(model)
    activate(model, GENERATOR)
    loss.backward()
    wrong = by_role(model)[SELECTOR]
    assert any((wrong[name] - right[name]).abs().max() > 0.01 * right[name].abs().max() for name in right)


# -------------------------------------------------------------------------------------------------------------- saving
def test_each_adapter_is_saved_and_loaded_by_itself(adapted_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    """Saved to selector/ and generator/, loaded into another model: the same weights, bit by bit, the same losses."""
    saved = adapted_model(randomise=True)
    saved.save_pretrained(tmp_path, selected_adapters=list(ROLES))
    loaded = adapted_model()
    for role in ROLES:
        before = {
            name: p.clone() for name, p in loaded.named_parameters() if name not in adapter_parameters(loaded, role)
        }
        load_adapter_weights(loaded, str(tmp_path / role), role)
        assert all(torch.equal(dict(loaded.named_parameters())[name], value) for name, value in before.items())
    for role in ROLES:
        expected, actual = adapter_parameters(saved, role), adapter_parameters(loaded, role)
        assert all(torch.equal(actual[name], value) for name, value in expected.items())
        for model in (saved, loaded):
            activate(model, role)
        assert loss_of(loaded).item() == loss_of(saved).item()


def test_an_adapter_loads_alone_with_peft(
    adapted_model: Callable[..., PeftModel], tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """`PeftModel.from_pretrained` on one of the directories gives that role, without drorl."""
    saved = adapted_model(randomise=True)
    saved.save_pretrained(tmp_path, selected_adapters=list(ROLES))
    for role in ROLES:
        activate(saved, role)
        alone = PeftModel.from_pretrained(tiny_model(), tmp_path / role)
        assert loss_of(alone).item() == loss_of(saved).item()


def test_loaded_weights_keep_their_place_in_an_optimizer(
    adapted_model: Callable[..., PeftModel], tmp_path: Path
) -> None:
    """Loading copies into the existing parameters, so that an optimizer made before goes on training them."""
    model = adapted_model(randomise=True)
    model.save_pretrained(tmp_path, selected_adapters=list(ROLES))
    before = adapter_parameters(model, SELECTOR)
    optimizer = torch.optim.SGD(before.values(), lr=0.1)
    randomise_adapters(model, seed=1)
    load_adapter_weights(model, str(tmp_path / SELECTOR), SELECTOR)
    assert all(value is before[name] for name, value in adapter_parameters(model, SELECTOR).items())
    activate(model, SELECTOR)
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    assert loss_of(model) != loss


def test_weights_of_other_layers_are_refused(
    adapted_model: Callable[..., PeftModel], tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """A directory without some of the adapter's weights is named; nothing is left half loaded without a word."""
    other = add_adapters(tiny_model(), LoraConfig(r=2, target_modules=["k_proj"]))
    other.save_pretrained(tmp_path, selected_adapters=list(ROLES))
    with pytest.raises(ValueError, match="selector does not hold the adapter 'selector': 8 weights are missing"):
        load_adapter_weights(adapted_model(), str(tmp_path / SELECTOR), SELECTOR)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_a_directory_without_an_adapter_is_named(
    adapted_model: Callable[..., PeftModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exists: bool,
    relative: bool,
) -> None:
    """A path that holds no adapter is an error that says so; one that reads like a hub name is not looked up."""
    monkeypatch.chdir(tmp_path)
    directory = Path("run/selector") if relative else tmp_path / "run" / "selector"
    if exists:
        directory.mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{directory} holds no adapter"):
        load_adapter_weights(adapted_model(), str(directory), SELECTOR)
