"""Which engines drorl runs under, and what it says of the others. Training under them: test_processes.py."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType
from processes import CONFIGS
from runs import config
from torch.distributed.tensor import DTensor

from drorl.errors import InvalidInputError
from drorl.sharding import wants_sharding
from drorl.trainer import DROTrainer
from drorl.zero import check_zero


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment that `accelerate launch` makes of recipes/accelerate/fsdp2.yaml."""
    settings = load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in settings.items():
        monkeypatch.setenv(name.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    return monkeypatch


@pytest.mark.parametrize("path", CONFIGS.glob("*.yaml"), ids=lambda path: path.stem)
def test_accelerate_takes_every_shipped_configuration(path: Path) -> None:
    """Unknown keys are errors there; the recipe, and not the launcher, says what is computed in which data type."""
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"
    assert config.distributed_type in ("MULTI_GPU", "FSDP", "DEEPSPEED")


def test_one_process_shares_with_nobody(fsdp: pytest.MonkeyPatch, make_trainer: Callable[..., DROTrainer]) -> None:
    """The same command with one process trains, with the whole base."""
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert not any(isinstance(p, DTensor) for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fsdp_version", "1"),
        ("fsdp_cpu_ram_efficient_loading", "true"),
        ("fsdp_activation_checkpointing", "true"),
        ("fsdp_offload_params", "true"),
    ],
)
def test_what_would_go_wrong_is_refused(
    name: str, value: str, fsdp: pytest.MonkeyPatch, make_trainer: Callable[..., DROTrainer]
) -> None:
    """By the name it has in the file, before anything is trained."""
    fsdp.setenv(name.upper(), value)
    if name == "fsdp_version":
        fsdp.setenv("FSDP_RESHARD_AFTER_FORWARD", "FULL_SHARD")  # its value there
    with pytest.raises(InvalidInputError, match=rf"this {name}: .*fsdp2.yaml"):
        make_trainer()


def test_other_engines_are_refused_by_name() -> None:
    """With what to use instead."""
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.MEGATRON_LM)
    with pytest.raises(InvalidInputError, match=r"MEGATRON_LM.*ddp\.yaml.*fsdp2\.yaml"):
        wants_sharding(accelerator)


@pytest.mark.parametrize(
    ("plugin", "settings", "words"),
    [
        ({"zero_stage": 3}, {}, r"zero_stage other than 2: .*zero2\.yaml, or use fsdp2\.yaml"),
        ({"offload_optimizer_device": "cpu"}, {}, r"offload_optimizer_device: .*zero2\.yaml"),
        ({"hf_ds_config": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}}, {}, r"an optimizer"),
        ({"hf_ds_config": {"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}}, {}, r"a scheduler"),
        ({}, {"bf16": True}, r"bf16 or fp16: set bf16: false"),
        ({}, {"selector_objective": "ppo"}, r"selector_objective: ppo: .*ddp\.yaml"),
    ],
)
def test_what_deepspeed_would_do_otherwise_is_refused(
    plugin: dict[str, Any], settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """By its name, from accelerate's own reading of the settings; DeepSpeed need not be installed to be refused."""
    asked = DeepSpeedPlugin(**plugin)
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=asked))
    with pytest.raises(InvalidInputError, match=f"^drorl does not run under DeepSpeed with {words}"):
        check_zero(accelerator, config(tmp_path, **settings))


def test_deepspeed_does_not_clip_by_itself(tmp_path: Path) -> None:
    """Its default is a norm of 1, of both roles together."""
    asked = DeepSpeedPlugin(zero_stage=2)
    check_zero(cast(Any, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=asked))), config(tmp_path))
    assert asked.deepspeed_config["gradient_clipping"] == 0.0
