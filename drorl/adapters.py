"""Two adapters on one base: who is active, who is trained.

One frozen base carries two LoRA adapters, `selector` and `generator`: half the memory of two models. PEFT's
`set_adapter` freezes every adapter but the active one, so an optimizer, DDP or gradient clipping that looks at
`requires_grad` would lose the other. [`activate`] switches without freezing.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .models import load_model_and_tokenizer

SELECTOR, GENERATOR = "selector", "generator"
ROLES = (SELECTOR, GENERATOR)
REFERENCE = "reference"
"""The selector as it was when training began, for a KL penalty; no role: it is neither trained nor part of a run."""


def add_adapters(base: PreTrainedModel, config: LoraConfig, roles: tuple[str, ...] = ROLES) -> PeftModel:
    """Returns `base` with one trainable adapter per role; the base is frozen.

    Raises:
        ValueError: if `config.bias` is not `"none"`: a trained bias would be shared by both roles.
    """
    if config.bias != "none":
        raise ValueError(f"LoraConfig(bias={config.bias!r}) would train one bias for both roles; use bias='none'")
    first, *others = roles
    model = get_peft_model(base, copy.deepcopy(config), adapter_name=first)  # PEFT writes the base's name into it
    for role in others:
        model.add_adapter(role, copy.deepcopy(config))
    activate(model, first)
    return model


def load_with_adapters(
    model: str | PreTrainedModel | PeftModel,
    roles: tuple[str, ...],
    config: LoraConfig | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase | None]:
    """Returns `model` with an adapter for each of `roles`, and its tokenizer when it was loaded by name.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): a `PeftModel` brings its adapters.
        roles (`tuple[str, ...]`): `selector`, `generator`, or both.
        config (`LoraConfig`, *optional*): default: rank 16, alpha 32, all linear layers.
        init_kwargs (mapping, *optional*): for loading by name.

    Raises:
        ValueError: if a `PeftModel` lacks an adapter of these names.
    """
    tokenizer = None
    if isinstance(model, str):
        model, tokenizer = load_model_and_tokenizer(model, **(init_kwargs or {}))
    if isinstance(model, PeftModel):
        for role in reversed(roles):
            activate(model, role)
        return model, tokenizer
    default = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return add_adapters(model, config or default, roles), tokenizer


def trainable_roles(model: PeftModel) -> tuple[str, ...]:
    """Returns the roles that have an adapter in `model`."""
    return tuple(role for role in ROLES if role in model.peft_config)


def activate(model: PeftModel, role: str) -> None:
    """Makes the adapter of `role` the one that computes, and leaves every adapter trainable.

    Gradient checkpointing recomputes in the backward pass with whatever adapter is active then: a role's backward pass
    has to end before the other role is activated.

    Raises:
        ValueError: if `model` has no adapter of that name.
    """
    if role not in model.peft_config:
        raise ValueError(f"the model has no adapter {role!r}; it has {', '.join(map(repr, model.peft_config))}")
    if model.active_adapter != role:
        model.set_adapter(role, inference_mode=role not in ROLES)
    model.base_model.set_requires_grad(list(trainable_roles(model)))


def remember_selector(model: PeftModel) -> None:
    """Makes the adapter `reference` a copy of `selector`; there is none yet, or an earlier one is replaced."""
    if REFERENCE not in model.peft_config:
        model.add_adapter(REFERENCE, copy.deepcopy(model.peft_config[SELECTOR]))
    sources = adapter_parameters(model, SELECTOR)
    for name, parameter in adapter_parameters(model, REFERENCE).items():
        parameter.data.copy_(sources[name.replace(f".{REFERENCE}.", f".{SELECTOR}.")].data)
        parameter.requires_grad_(False)


def adapter_parameters(model: nn.Module, role: str) -> dict[str, nn.Parameter]:
    """Returns the parameters of one adapter, by name."""
    return {name: p for name, p in model.named_parameters() if f".{role}." in name}


def load_adapter_weights(model: PeftModel, directory: str | Path, role: str) -> None:
    """Copies saved weights into the existing adapter of `role`, which keeps its place in the optimizer.

    Raises:
        ValueError: if there is no adapter in `directory`, or if it lacks weights that the adapter of `role` has.
    """
    if not (Path(directory) / SAFETENSORS_WEIGHTS_NAME).is_file():  # PEFT would take the path for a name on the hub
        raise ValueError(f"{directory} holds no adapter: it has no {SAFETENSORS_WEIGHTS_NAME}")
    result = set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"), adapter_name=role)
    missing = [key for key in result.missing_keys if f".{role}." in key]
    if missing or result.unexpected_keys:
        raise ValueError(f"{directory} does not hold the adapter {role!r}: {len(missing)} weights are missing")
