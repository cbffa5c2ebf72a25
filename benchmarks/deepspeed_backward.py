"""Whether DeepSpeed sums the gradients of two backward passes of which each reaches one adapter; docs/distributed.md.

    pip install deepspeed==0.19.8       # in an environment of its own, with DS_BUILD_OPS=0
    DS_ACCELERATOR=cpu torchrun --standalone --nproc_per_node 2 benchmarks/deepspeed_backward.py

Prints, for ZeRO-2 and ZeRO-3, by how much the weights differ from those of one process after two steps of SGD.
"""

import copy
import os

import torch
from torch import nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.adapters = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])

    def forward(self, states: torch.Tensor, role: int) -> torch.Tensor:
        return torch.tanh(self.base(states) + self.adapters[role](states))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(2)])

    def forward(self, states: torch.Tensor, role: int) -> torch.Tensor:
        for layer in self.layers:
            states = layer(states, role)
        return states


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def losses(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model(inputs, 0).square().mean(), model(inputs, 1).pow(3).mean()


def difference(stage: int, passes: int) -> float:
    """By how much two steps in two processes differ from two in one."""
    import deepspeed

    torch.manual_seed(0)
    model, inputs = Model(), torch.randn(2, 4, 8)
    alone = copy.deepcopy(model)
    optimizer = sgd(alone)
    for _ in range(2):
        optimizer.zero_grad()
        sum(losses(alone, inputs)).backward()
        optimizer.step()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    mine = inputs[int(os.environ["RANK"])]
    for _ in range(2):
        if passes == 1:
            engine.backward(sum(losses(engine, mine)))
        else:
            engine.set_gradient_accumulation_boundary(False)
            engine.backward(engine(mine, 0).square().mean())
            engine.set_gradient_accumulation_boundary(True)
            engine.backward(engine(mine, 1).pow(3).mean())
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3), torch.no_grad():
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        return max((p - q).abs().max().item() for p, q in pairs)


if __name__ == "__main__":
    for stage in (2, 3):
        for passes in (1, 2):
            found = difference(stage, passes)
            if os.environ["RANK"] == "0":
                print(f"ZeRO-{stage}, {passes} backward pass(es): {found:.1e}", flush=True)
