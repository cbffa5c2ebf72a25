"""FSDP2: each process holds a part of every frozen base, and has a layer whole while it computes with it.

The adapters are not cut up. They are a hundredth of the base, so every process has them whole, as under DDP: their
gradients, the optimizer, clipping and checkpoints are the same, and nothing but the base is different. What differs is
that a pass through a model that is cut up is made by all processes together: each has to make as many, in the same
order, or all wait for ever. Where they would not (drawing, generating, evaluation), the whole base is gathered first.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, WeakSet

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, str_to_bool
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import distributed, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from .errors import InvalidInputError

_WHOLE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.DEEPSPEED)
_gathered: WeakSet[nn.Module] = WeakSet()
_sharded: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Models that are cut up, and whether each layer is given back after its forward pass."""


def wants_sharding(accelerator: Accelerator) -> bool:
    """Returns whether `accelerate launch` was told to use FSDP2, and checks that nothing else divides a base.

    Raises:
        InvalidInputError: if it was, saying what to change.
    """
    kind = accelerator.distributed_type
    if kind not in (*_WHOLE, DistributedType.FSDP):
        raise InvalidInputError(
            f"drorl does not run under {kind.value}: use recipes/accelerate/ddp.yaml, or fsdp2.yaml where the base "
            "takes too much memory"
        )
    if not str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return False
    # On CPUs accelerate passes over its own settings of FSDP.
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    accelerator.state.fsdp_plugin = plugin
    wrong = {
        "fsdp_version": plugin.fsdp_version != 2,
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,  # it would empty the adapters
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,  # drorl's is gradient_checkpointing
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
    }
    if any(wrong.values()):
        raise InvalidInputError(
            f"drorl does not run with this {', '.join(name for name in wrong if wrong[name])}: take FSDP's settings "
            "from recipes/accelerate/fsdp2.yaml"
        )
    return accelerator.num_processes > 1


def shard(model: PeftModel, accelerator: Accelerator) -> None:
    """Cuts the base of a model up among the processes, in place; each gets the adapters of the first, whole.

    Of two trainers of one model, the second finds it done.
    """
    if model in _sharded:
        return
    plugin = accelerator.state.fsdp_plugin
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    plugin.ignored_modules = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    for module in plugin.ignored_modules:
        for parameter in module.to(accelerator.device).parameters():
            distributed.broadcast(parameter.data, src=0)
    fsdp2_prepare_model(accelerator, model)
    _sharded[model] = plugin.reshard_after_forward
    for part in _parts(model):
        part.set_reshard_after_forward(plugin.reshard_after_forward, recurse=False)
    # FSDP takes the first module that is called for the whole, and `generate` calls an inner one.
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=accelerator.device))


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def takes_part(model: nn.Module) -> bool:
    """Whether a pass through the model is one that all processes make together."""
    return model in _sharded and model not in _gathered


@contextmanager
def gathered(model: nn.Module) -> Generator[None]:
    """Every process has the whole base, and may make as many passes as it likes; no gradient. All enter together."""
    if not takes_part(model):
        yield
        return
    for part in _parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    _gathered.add(model)
    try:
        yield
    finally:
        _gathered.remove(model)
        for part in _parts(model):
            part.set_reshard_after_forward(_sharded[model], recurse=False)
            part.reshard()


def most(count: int, model: nn.Module) -> int:
    """Returns the largest count of any process; a process by itself, and each where models are whole, has its own."""
    if not takes_part(model):
        return count
    largest = torch.tensor(count, device=next(model.parameters()).device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)
