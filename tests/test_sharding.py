"""Which engines drorl runs under, and what it says of the others. Training under them: test_processes.py."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from processes import CONFIGS
from torch.distributed.tensor import DTensor

from drorl.errors import InvalidInputError
from drorl.sharding import wants_sharding
from drorl.trainer import DROTrainer


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
    assert config.distributed_type in ("MULTI_GPU", "FSDP")


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


def test_deepspeed_is_refused_by_name() -> None:
    """With what to use instead; docs/distributed.md says why."""
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(InvalidInputError, match=r"DEEPSPEED.*ddp\.yaml.*fsdp2\.yaml"):
        wants_sharding(accelerator)
