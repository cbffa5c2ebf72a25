"""The private names of TRL and transformers that drorl stands on are still there, and still mean the same.

When a test here fails after an upgrade, the message says which name changed; nothing else needs to be looked at first.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl import __version__ as trl_version

from drorl.checkpoints import AtomicCheckpoints
from drorl.hub import SharedOnHub
from drorl.trainer import DROTrainer
from drorl.two_roles import TwoRoleTrainer

# Every private name of TRL and transformers that is overridden or used in drorl. Each is checked against the
# installed version, so that an upgrade fails with one clear message.
OVERRIDDEN_TRL_HOOKS = {
    "create_accelerator_and_postprocess": (),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "train": ("resume_from_checkpoint",),
    "_generate_and_score_completions": ("inputs",),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "_compute_loss": ("model", "inputs"),
    "_get_train_sampler": ("dataset",),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    "_clip_grad_norm": ("model",),
    "_save": ("output_dir", "state_dict"),
    "save_model": ("output_dir", "_internal_call"),
    "create_optimizer": ("model",),
    "log": ("logs", "start_time"),
    "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
    "create_model_card": ("model_name", "dataset_name", "tags"),
    "push_to_hub": ("commit_message", "blocking", "token", "revision"),
    "_push_from_checkpoint": ("checkpoint_folder",),
}
USED_TRL_HOOKS = {
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "num_generations"),
    "_evaluate": ("trial", "ignore_keys_for_eval"),
    "_determine_best_metric": ("metrics", "trial"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_scaler": ("checkpoint",),
}
OWNERS = (DROTrainer, TwoRoleTrainer, AtomicCheckpoints, SharedOnHub)
HOOKS = {**OVERRIDDEN_TRL_HOOKS, **USED_TRL_HOOKS}


def parameters_of(owner: type, name: str) -> list[str]:
    """The parameters of a method below its decorators, without `self`."""
    return list(inspect.signature(inspect.unwrap(inspect.getattr_static(owner, name))).parameters)[1:]


@pytest.mark.parametrize("name", HOOKS)
def test_each_hook_exists_with_its_parameters(name: str) -> None:
    """Every hook is a method of the installed `GRPOTrainer`, with the parameters that drorl passes, in that order."""
    assert hasattr(GRPOTrainer, name), f"TRL {trl_version} has no GRPOTrainer.{name} any more"
    parameters = parameters_of(GRPOTrainer, name)
    expected = list(HOOKS[name])
    assert parameters[: len(expected)] == expected, (
        f"TRL {trl_version}: GRPOTrainer.{name} takes ({', '.join(parameters)}), drorl counts on {', '.join(expected)}"
    )


@pytest.mark.parametrize("name", OVERRIDDEN_TRL_HOOKS)
def test_each_override_takes_what_the_hook_takes(name: str) -> None:
    """A parameter that TRL's caller may pass is one that the override takes."""
    missing = [p for p in parameters_of(GRPOTrainer, name) if p not in parameters_of(DROTrainer, name)]
    assert missing == [], f"TRL {trl_version}: GRPOTrainer.{name} also takes {', '.join(missing)}"


def own_names() -> set[str]:
    """The methods and properties that `DROTrainer` defines, `__init__` and TRL's labels for model cards apart."""
    return {
        name
        for name, value in chain.from_iterable(vars(owner).items() for owner in OWNERS)
        if not name.startswith("__") and (callable(value) or isinstance(value, (property, staticmethod)))
    }


def test_the_list_of_overrides_is_complete() -> None:
    """What `DROTrainer` redefines of its parents is in the list: nothing is overridden unchecked or by accident."""
    assert {name for name in own_names() if hasattr(GRPOTrainer, name)} == set(OVERRIDDEN_TRL_HOOKS)


def attributes_of_self() -> tuple[set[str], set[str]]:
    """The names that the methods of `DROTrainer` read from `self`, and those that they set."""
    classes = [ast.parse(textwrap.dedent(inspect.getsource(owner))) for owner in OWNERS]
    read, written = set(), set()
    for node in chain.from_iterable(map(ast.walk, classes)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            (written if isinstance(node.ctx, ast.Store) else read).add(node.attr)
    return read, written


@pytest.fixture
def stock_trainer(
    tmp_path: Path, adapted_model: Callable[..., PeftModel], tokenizer: PreTrainedTokenizerFast
) -> GRPOTrainer:
    """TRL's own trainer after one step; some of its attributes exist only then."""
    settings: dict[str, Any] = {"num_generations": 2, "per_device_train_batch_size": 2, "max_steps": 1, "bf16": False}
    quiet: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    config = GRPOConfig(str(tmp_path), max_completion_length=2, logging_steps=10, **settings, **quiet)
    trainer = GRPOTrainer(
        model=adapted_model(),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "Which river?"}] * 2),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def test_every_attribute_that_is_used_exists(stock_trainer: GRPOTrainer) -> None:
    """Every name that `DROTrainer` reads from `self` without defining it exists on TRL's own trainer."""
    read, written = attributes_of_self()
    inherited = read - written - own_names()
    assert {"_metrics", "current_gradient_accumulation_steps", "epsilon_low", "loss_type"} <= inherited
    gone = sorted(name for name in inherited if not hasattr(stock_trainer, name))
    assert gone == [], f"TRL {trl_version}: GRPOTrainer has no {', '.join(gone)} any more"
    unlisted = {n for n in inherited if n.startswith("_") and callable(getattr(stock_trainer, n))} - HOOKS.keys()
    assert unlisted == set(), f"private methods of TRL that USED_TRL_HOOKS does not list: {', '.join(unlisted)}"


def test_metrics_are_lists_by_mode_and_name(stock_trainer: GRPOTrainer) -> None:
    """`_metrics[mode][name]` is a list to append to; TRL logs the means and empties it."""
    stock_trainer._metrics["train"]["made/up"] += [1.0, 3.0]
    stock_trainer.log(logs := {})
    assert logs["made/up"] == 2.0
    assert "made/up" not in stock_trainer._metrics["train"]


def test_the_progress_of_a_run_is_where_it_is_looked_for(stock_trainer: GRPOTrainer) -> None:
    """What a checkpoint adds to transformers' own: after a micro-batch of one step, not logged yet."""
    assert stock_trainer._step == stock_trainer.state.global_step == 1
    assert len(stock_trainer._buffered_inputs) == stock_trainer.args.steps_per_generation == 1
    assert stock_trainer._globalstep_last_logged == 0
    assert vars(stock_trainer.args)["_setup_devices"] == stock_trainer.args.device  # found once, and kept there
    assert stock_trainer._total_loss_scalar == stock_trainer._tr_loss.item()  # added at the end of training


def test_trl_refuses_a_group_of_one_in_the_words_that_are_looked_for() -> None:
    """`DROConfig` tells this complaint of TRL's from all others by its words."""
    with pytest.raises(ValueError) as caught:
        GRPOConfig("unused", num_generations=1, per_device_train_batch_size=1, report_to="none", use_cpu=True)
    assert "at least 2 generations" in str(caught.value), (
        f"TRL {trl_version} words its refusal of num_generations=1 differently: {caught.value}"
    )


def test_trl_splits_the_e_step_by_its_first_tensor(stock_trainer: GRPOTrainer) -> None:
    """TRL shuffles what the E-step returns and deals it out: lists go with the first tensor, scalars stay whole."""
    batch = {"row": torch.arange(4), "rollouts": ["a", "b", "c", "d"], "num_items_in_batch": torch.tensor(7.0)}
    stock_trainer.args.steps_per_generation = 2
    stock_trainer._step = 0
    stock_trainer._generate_and_score_completions = lambda inputs: batch
    stock_trainer.model.train()
    parts = [stock_trainer._prepare_inputs([])]
    stock_trainer._step = 1
    parts.append(stock_trainer._prepare_inputs([]))
    assert sorted(r for part in parts for r in part["rollouts"]) == batch["rollouts"]
    for part in parts:
        assert part["rollouts"] == ["abcd"[i] for i in part["row"]]
        assert len(part["rollouts"]) == 2
        assert part["num_items_in_batch"] == 7.0
