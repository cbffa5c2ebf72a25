"""Gradients by name, comparisons that refuse to compare nothing, and a model under one back end."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

import drorl.backends
from drorl.attention import uninstall

Gradients = dict[str, torch.Tensor]


def randomise_adapters(model: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Draws every LoRA B, which is made of zeros: with those an adapter changes nothing, and A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(scale * values)


def widen_norms(model: nn.Module) -> nn.Module:
    """Makes a float64 model one throughout, in place: the RMS norms of transformers always compute in float32.

    Left as they are, they round the backward pass to 1e-7, and no gradient could be compared more closely than that.
    """
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                wide = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
                wide.load_state_dict(norm.state_dict())
                setattr(parent, name, wide)
    return model


def gradients(loss: torch.Tensor, parameters: Mapping[str, nn.Parameter], retain_graph: bool = False) -> Gradients:
    """The gradient of a loss with respect to each of the named parameters; one that has no part in it fails."""
    values = torch.autograd.grad(loss, list(parameters.values()), retain_graph=retain_graph)
    return dict(zip(parameters, values, strict=True))


def accumulated(parameters: Mapping[str, nn.Parameter]) -> Gradients:
    """The gradients that backward passes have left in the parameters, zeros where there are none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}


def assert_same_gradients(actual: Gradients, expected: Gradients, rtol: float, atol: float = 0.0) -> None:
    """Checks that two gradients agree, relative to the largest entry of each tensor, and that none is zero."""
    assert actual.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        size = gradient.abs().max().item()
        assert size > atol, f"{name} has no gradient, so there is nothing to compare"
        difference = (actual[name] - gradient).abs().max().item()
        assert difference <= rtol * size + atol, f"{name}: differs by {difference:.2e} where the largest is {size:.2e}"


@contextmanager
def through(backend: str, model: PreTrainedModel) -> Iterator[None]:
    """Makes a model share prefixes in one way, as long as it lasts; that it can is checked first."""
    assert drorl.backends._objection(model, backend) is None
    drorl.backends._backends[model] = backend
    yield
    del drorl.backends._backends[model]
    uninstall(model)
