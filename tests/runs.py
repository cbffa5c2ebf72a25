"""Short training runs on tiny models, and what is read from them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from helpers import Gradients, accumulated
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from drorl.adapters import GENERATOR, SELECTOR, adapter_parameters
from drorl.config import DROConfig
from drorl.trainer import DROTrainer

State = dict[str, torch.Tensor]

# N = 6, K = 2, m = 4 and two queries per step; quiet, on the CPU, in float32.
DEFAULTS: dict[str, Any] = {
    "num_candidates": 6,
    "num_selected": 2,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,  # an adapter without a gradient stays as it is
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,  # TRL's default is True
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def config(output_dir: Path, **overrides: Any) -> DROConfig:
    """The settings of a short run."""
    return DROConfig(str(output_dir), **(DEFAULTS | overrides))


def recipe_flags(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Any) -> list[str]:
    """A command line of recipes/nq.py: the demo's configuration on a tiny model and made-up files, in seconds."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, count in (("train", 8), ("test", 5)):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows(count)))
    settings = {
        "config": Path(__file__).parent.parent / "recipes/configs/nq_demo.yaml",
        "model_name_or_path": folder / "model",
        "train_file": folder / "train.jsonl",
        "test_file": folder / "test.jsonl",
        "output_dir": folder / "run",
        "lora_first_layer": 1,
        "warmup_queries": 8,
        "max_steps": 2,
        "save_steps": 1,
        "gradient_accumulation_steps": 1,
        "dtype": "float32",
        "max_minutes": 5,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def near_permutations(tokenizer: PreTrainedTokenizerBase, names: str = "123456") -> dict[str, Any]:
    """Generation settings with which a random model writes `[3]`, `[33]]` or `3[2`: some texts hold a permutation.

    Only the tokens of which identifiers are made may be drawn, and each is made likelier where it belongs.
    """
    left, right, *between = tokenizer.convert_tokens_to_ids(["[", "]", *names])
    end = tokenizer.eos_token_id
    pairs = [pair for name in between for pair in ([left, name], [name, right])]
    return {
        "suppress_tokens": [i for i in range(len(tokenizer)) if i not in (left, right, end, *between)],
        "sequence_bias": [[[left], 3.0], [[right, end], 4.0], *([pair, 5.0] for pair in pairs)],
    }


def adapter_state(model: nn.Module, role: str) -> State:
    """A copy of one adapter's weights, by name."""
    return {name: p.detach().clone() for name, p in adapter_parameters(model, role).items()}


def base_state(model: nn.Module) -> State:
    """A copy of everything in a model that is no adapter, by name."""
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}


def assert_identical(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Checks that two sets of tensors agree bit for bit."""
    assert actual.keys() == expected.keys()
    assert expected
    changed = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert not changed, f"differ: {', '.join(changed)}"


def both_adapters(trainer: DROTrainer) -> dict[str, torch.Tensor]:
    """A copy of the weights of both roles."""
    return adapter_state(trainer.model, SELECTOR) | adapter_state(trainer.model, GENERATOR)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# What a log says of the machine rather than of the run.
OF_THE_MACHINE = ("step_time", "memory/peak_gib", "runtime", "samples_per_second", "steps_per_second")


def measured(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without times and memory: two runs with equal weights have equal ones."""
    assert log_history
    return [{k: v for k, v in entry.items() if not k.endswith(OF_THE_MACHINE)} for entry in log_history]


def smallest_move(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """By how much the entry of each tensor that differs most does, in the tensor where that is least."""
    assert actual.keys() == expected.keys()
    return min((actual[name] - value).abs().max().item() for name, value in expected.items())


def largest_difference(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """By how much the entry that differs most does."""
    assert actual.keys() == expected.keys()
    return max((actual[name] - value).abs().max().item() for name, value in expected.items())


class GradientRecorder(TrainerCallback):
    """Keeps the gradients that each step's optimizer is given, clipped where the trainer clips.

    Args:
        **parameters (`Mapping[str, nn.Parameter]`): name of the group -> parameters.
    """

    def __init__(self, **parameters: Mapping[str, nn.Parameter]):
        self.parameters = parameters
        self.steps: list[dict[str, Gradients]] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.steps.append({name: accumulated(group) for name, group in self.parameters.items()})


class WeightRecorder(TrainerCallback):
    """Keeps the weights of one adapter after each step.

    Args:
        model (`nn.Module`): carries the adapter.
        role (`str`): its name.
    """

    def __init__(self, model: nn.Module, role: str):
        self.model, self.role = model, role
        self.steps: list[State] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(adapter_state(self.model, self.role))


class Reseed(TrainerCallback):
    """Seeds torch at the start of every step, so that what a step draws depends on nothing that came before it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.manual_seed(1000 + state.global_step)


def norm(gradients: Gradients) -> float:
    """The norm of all gradients together."""
    return torch.cat([g.flatten() for g in gradients.values()]).norm().item()
