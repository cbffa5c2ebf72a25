"""What DeepSpeed makes of steps like DRO's: each backward pass reaches one of two adapters; docs/distributed.md.

    pip install deepspeed==0.19.8       # in an environment of its own, with DS_BUILD_OPS=0
    DS_ACCELERATOR=cpu python benchmarks/deepspeed_backward.py

Prints, for ZeRO-2 and ZeRO-3, how much the weights of two processes differ from those of one after two steps of SGD.
"""

import copy
import os
import subprocess
import sys

import torch
from torch import nn

SECONDS = 150
STEPS: dict[str, tuple[str, str]] = {
    "one backward pass of the summed losses": ("a+b", "a+b"),
    "two backward passes, one for each adapter": ("a, b", "a, b"),
    "two, in coalesce_grad_reduction": ("(a, b)", "(a, b)"),
    "one, in which a process has the adapters in the other order": ("a+b", "b+a"),
    "one, in which a process has the first adapter twice": ("a+b", "a+a+b"),
    "one, in which a process has the first adapter alone": ("a+b", "a"),
    "added up by torch.autograd.grad, handed over in coalesce_grad_reduction": ("[a, b]", "[b, a, a]"),
}
"""What each process does in a step: `+` sums losses of one backward pass, `,` goes on to the next."""


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


def losses(model: nn.Module, inputs: torch.Tensor, step: str) -> list[torch.Tensor]:
    """The loss of each backward pass of a step."""
    passes = [one.strip("[( )]").split("+") for one in step.split(",")]
    return [
        sum(model(inputs, "ab".index(role)).pow(2 + "ab".index(role)).mean() for role in roles) for roles in passes
    ]


def make_step(engine: nn.Module, inputs: torch.Tensor, step: str) -> None:
    """Makes a step in DeepSpeed's way, or in drorl's (`[`, see drorl/zero.py)."""
    if step[0] == "[":
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        grads = torch.autograd.grad(sum(losses(engine.module, inputs, step)), trained, allow_unused=True)
        for p, grad in zip(trained, grads, strict=True):
            p.grad = torch.zeros_like(p) if grad is None else grad
        engine.set_gradient_accumulation_boundary(True)
        with engine.coalesce_grad_reduction():
            pass
    elif step[0] == "(":
        with engine.coalesce_grad_reduction():
            for loss in losses(engine, inputs, step):
                engine.backward(loss)
    else:
        *first, last = step.split(",")
        engine.set_gradient_accumulation_boundary(False)
        for one in first:
            engine.backward(*losses(engine, inputs, one))
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(*losses(engine, inputs, last))
    engine.step()


def difference(stage: int, steps: tuple[str, str]) -> float:
    """By how much two steps in two processes differ from two in one."""
    import deepspeed

    torch.manual_seed(0)
    model, inputs = Model(), torch.randn(2, 4, 8)
    alone = copy.deepcopy(model)
    optimizer = sgd(alone)
    for _ in range(2):
        optimizer.zero_grad()
        for mine, step in zip(inputs, steps, strict=True):
            (sum(losses(alone, mine, step)) / 2).backward()
        optimizer.step()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    rank = int(os.environ["RANK"])
    for _ in range(2):
        make_step(engine, inputs[rank], steps[rank])
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3), torch.no_grad():
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        return max((p - q).abs().max().item() for p, q in pairs)


def measured(stage: int, name: str) -> str:
    """What two processes of this script say, which may fail or wait for each other."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(stage), name]
    run = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        output, _ = run.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        run.terminate()  # and with it the processes that it has started
        run.wait()
        return f"waits ({SECONDS} s)"
    lines = [line for line in output.splitlines() if line.startswith("differs by ")]
    return lines[0].removeprefix("differs by ") if lines and run.returncode == 0 else "fails"


if __name__ == "__main__":
    if "RANK" in os.environ:
        found = difference(int(sys.argv[1]), STEPS[sys.argv[2]])
        if os.environ["RANK"] == "0":
            print(f"differs by {found:.1e}", flush=True)
        sys.exit()
    for name in STEPS:
        print(f"{name}: ZeRO-2 {measured(2, name)}, ZeRO-3 {measured(3, name)}", flush=True)
