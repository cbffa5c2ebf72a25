"""A checkpoint that is not what was written is found out, passed over, and never loaded."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import assert_identical, both_adapters, digests
from transformers.trainer_utils import get_last_checkpoint

import drorl.checkpoints
from drorl.errors import InvalidInputError
from drorl.manifest import MANIFEST, STAGING, find_checkpoint, problem_of, write_manifest
from drorl.trainer import DROTrainer

FILES = {
    "trainer_state.json": b"{}",
    "optimizer.pt": bytes(1000),
    "selector/adapter_model.safetensors": bytes(range(256)),
}


def write_checkpoint(folder: Path) -> Path:
    """Files as a checkpoint has them, with their manifest."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder)
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda c: flip_a_bit(c / "selector/adapter_model.safetensors"), "adapter_model.safetensors is not what"),
    "half a file": (lambda c: cut_in_half(c / "optimizer.pt"), "optimizer.pt is not what was written"),
    "a file": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "a pickle that nobody wrote": (lambda c: (c / "scheduler.pt").write_bytes(b"evil"), "scheduler.pt is not in its"),
    "the manifest": (lambda c: (c / MANIFEST).unlink(), f"it has no {MANIFEST}"),
    "half the manifest": (lambda c: cut_in_half(c / MANIFEST), f"its {MANIFEST} cannot be read"),
    "a manifest of nothing": (lambda c: (c / MANIFEST).write_text('{"sha256": {}}'), "does not list trainer_state"),
    "another manifest": (lambda c: (c / MANIFEST).write_text("[1]"), f"its {MANIFEST} cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_out(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`last` is the newest one that is whole, the other is named with a reason; named itself, it is refused."""
    older, newer = (write_checkpoint(tmp_path / f"checkpoint-{step}") for step in (9, 10))
    assert problem_of(newer) is None
    assert find_checkpoint(tmp_path, "last") == str(newer)
    assert caplog.text == ""
    harm, reason = DAMAGES[damage]
    harm(newer)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, "last") == str(older)
    assert f"{newer} is passed over: " in caplog.text and reason in caplog.text
    assert find_checkpoint(tmp_path, str(older)) == str(older)
    with pytest.raises(InvalidInputError, match=f"checkpoint-10 cannot be resumed from: .*{reason}") as refused:
        find_checkpoint(tmp_path, str(newer))
    assert "\n" not in str(refused.value)
    harm(older)
    with pytest.raises(InvalidInputError, match="there is no whole checkpoint 'last'"):
        find_checkpoint(tmp_path, "last")


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    """Neither in a directory that is empty, nor in one that does not exist, nor one that is named."""
    for wanted, run_dir in (("last", tmp_path), ("last", tmp_path / "no"), (str(tmp_path / "checkpoint-1"), tmp_path)):
        with pytest.raises(InvalidInputError, match="there is no checkpoint"):
            find_checkpoint(run_dir, wanted)


def test_one_that_was_killed_before_its_rename_is_put_in_its_place(tmp_path: Path) -> None:
    """A whole one that was still aside is the newest; a half one stays there, and does not hide an older one."""
    older = write_checkpoint(tmp_path / "checkpoint-2")
    aside = write_checkpoint(tmp_path / STAGING / "checkpoint-4")
    (aside / MANIFEST).rename(tmp_path / "kept")
    assert find_checkpoint(tmp_path, "last") == str(older)
    (tmp_path / "kept").rename(aside / MANIFEST)
    assert find_checkpoint(tmp_path, "last") == str(tmp_path / "checkpoint-4")
    assert problem_of(tmp_path / "checkpoint-4") is None
    assert not aside.exists()


class KilledError(BaseException):
    """As good as a kill: nothing of the library catches it."""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_step_that_is_saved_twice_is_never_without_a_checkpoint(
    renames: int, make_trainer: Callable[..., DROTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before, between and behind the two renames by which it replaces itself, it can be found."""
    trainer = make_trainer(save_strategy="steps", save_steps=2, save_total_limit=1, max_steps=2)
    trainer.train()
    done: list[Path] = []
    replace = os.replace

    def rename(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KilledError
        done.append(source)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(os, "replace", rename)
        if renames == 2:
            patch.setattr(drorl.checkpoints, "rotate_checkpoints", lambda **_: rename(tmp_path, tmp_path))
        trainer._save_checkpoint(trainer.model, None)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert find_checkpoint(tmp_path / "run", "last") == str(checkpoint)
    assert problem_of(checkpoint) is None


def test_every_file_of_a_real_checkpoint_is_in_its_manifest(
    make_trainer: Callable[..., DROTrainer], tmp_path: Path
) -> None:
    """With a critic, a reference and a buffer: every file but the manifest, with the digest that hashlib gives."""
    objective = {"selector_objective": "ppo", "beta": 0.1, "num_iterations": 2}
    make_trainer(save_strategy="steps", save_steps=1, max_steps=1, **objective).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    written = json.loads((checkpoint / MANIFEST).read_text())["sha256"]
    expected = digests(checkpoint)
    del expected[MANIFEST]
    assert written == expected
    adapters = {f"{name}/adapter_model.safetensors" for name in ("selector", "generator", "reference")}
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "progress.pt", "critic.safetensors"}
    assert adapters | states | {"trainer_state.json", "drorl.json"} <= written.keys()


def test_training_goes_on_from_the_newest_whole_one(
    make_trainer: Callable[..., DROTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One bit of the newest checkpoint's adapter is wrong: the run goes on from the one before, to the same end."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    straight = make_trainer(**settings)
    straight.train()
    newest = tmp_path / "run" / "checkpoint-3"
    assert get_last_checkpoint(str(tmp_path / "run")) == str(newest)
    flip_a_bit(newest / "generator" / "adapter_model.safetensors")
    resumed = make_trainer(**settings)
    with pytest.raises(InvalidInputError, match="cannot be resumed from: generator/adapter_model.safetensors is not"):
        resumed.train(resume_from_checkpoint=str(newest))
    assert resumed.state.global_step == 0
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is passed over" in caplog.text
    assert_identical(both_adapters(resumed), both_adapters(straight))
    assert problem_of(newest) is None  # it was written again


def test_a_best_checkpoint_that_is_damaged_is_not_loaded(
    make_trainer: Callable[..., DROTrainer], tmp_path: Path
) -> None:
    """What training would end with is checked as what it begins with is."""
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    best = tmp_path / "run" / "checkpoint-1"
    trainer.state.best_model_checkpoint = str(best)
    trainer._load_best_model()
    flip_a_bit(best / "selector" / "adapter_model.safetensors")
    with pytest.raises(InvalidInputError, match="the best checkpoint, cannot be loaded: selector/adapter_model"):
        trainer._load_best_model()
