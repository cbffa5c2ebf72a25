"""DeepSpeed's ZeRO-2: each process holds a part of the optimizer's moments; the rest is as under DDP.

DeepSpeed averages gradients over processes while a backward pass makes them, in the order in which they come. A step
of DRO is several passes of which each reaches one adapter, and processes may make different ones: parameters would be
mixed up without a word (docs/distributed.md). So gradients are added up apart from DeepSpeed, averaged and clipped as
under DDP, and given to it when the step is made, each parameter once and in one order.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from trl import GRPOConfig

from .errors import InvalidInputError


def check_zero(accelerator: Accelerator, args: GRPOConfig) -> None:
    """Checks what `accelerate launch` was told of DeepSpeed, and leaves clipping to the trainer.

    Raises:
        InvalidInputError: if drorl does not run so, saying what to change.
    """
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    file, ddp = "take DeepSpeed's settings from recipes/accelerate/zero2.yaml", "use recipes/accelerate/ddp.yaml"
    refused = (
        ("zero_stage other than 2", plugin.zero_stage != 2, f"{file}, or use fsdp2.yaml to cut the base up"),
        ("offload_optimizer_device", plugin.offload_optimizer_device != "none", file),
        ("an optimizer in its file", "optimizer" in config, f"{file}, and the optimizer from the recipe (optim)"),
        ("a scheduler in its file", "scheduler" in config, f"{file}, and the scheduler from the recipe"),
        ("bf16 or fp16", args.bf16 or args.fp16, "set bf16: false; dtype: bfloat16 is for the base, and may stay"),
        ("selector_objective: ppo", args.selector_objective == "ppo", ddp),  # its critic is no part of the model
    )
    for name, wanted, instead in refused:
        if wanted:
            raise InvalidInputError(f"drorl does not run under DeepSpeed with {name}: {instead}")
    config["gradient_clipping"] = 0.0  # by default DeepSpeed clips to 1, both roles as one


class HandedOver(DeepSpeedOptimizerWrapper):
    """What accelerate takes for DeepSpeed's engine and its optimizer: gives it the gradients of a step together.

    Args:
        prepared (`DeepSpeedOptimizerWrapper`): as accelerate makes it.
        engine (`deepspeed.DeepSpeedEngine`): of the model that has both adapters.
        trained (`list` of `nn.Parameter`): what the optimizer steps.
    """

    def __init__(self, prepared: DeepSpeedOptimizerWrapper, engine: Any, trained: list[nn.Parameter]):
        super().__init__(prepared.optimizer)
        self.engine, self.trained = engine, trained
        engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: torch.Tensor, **_: Any) -> None:
        """Adds up gradients where DDP would, unnoticed by DeepSpeed's hooks; `accelerator.backward` calls this."""
        for p, grad in zip(self.trained, torch.autograd.grad(loss, self.trained, allow_unused=True), strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad + grad

    def get_global_grad_norm(self) -> torch.Tensor:
        """Returns the norm before the step, which the Trainer logs where it does not clip."""
        return nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])

    def step(self) -> None:
        """Makes the step; every process has the same gradients, and one of each parameter."""
        with self.engine.coalesce_grad_reduction():
            pass  # at its end DeepSpeed takes what the parameters have
        self.engine.step()
