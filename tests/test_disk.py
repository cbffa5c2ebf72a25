"""A disk that is full and one that became read-only, real ones: training stops with one line, the last save is whole.

`test_worker` runs in a mount namespace of its own, where a small disk of memory can be mounted.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import run_worker, starter, worker
from runs import assert_identical, both_adapters

from drorl.errors import OutputError
from drorl.manifest import find_checkpoint, problem_of
from drorl.trainer import DROTrainer

pytestmark = pytest.mark.slow
NAMESPACE = ["unshare", "--map-root-user", "--mount"]
allowed = shutil.which("unshare") and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


@worker
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_worker(fault: str, make_trainer: Callable[..., DROTrainer], tmp_path: Path) -> None:
    """Space for three and a half, or read-only after three: the next one fails, the last is gone on from."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "max_steps": 6}
    straight = make_trainer(output_dir="straight", **settings)
    straight.train()
    size = sum(f.stat().st_size for f in (tmp_path / "straight" / "checkpoint-3").rglob("*") if f.is_file())
    run = tmp_path / "run"
    run.mkdir()
    mount(run, f"size={int(3.5 * size) if fault == 'full' else 100 * size}")
    trainer = make_trainer(**settings)
    if fault == "read-only":
        save = trainer._save_checkpoint

        def save_while_possible(*arguments: object) -> None:
            if trainer.state.global_step == 4:
                subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
            save(*arguments)

        trainer._save_checkpoint = save_while_possible
    with pytest.raises(OutputError) as stopped:
        trainer.train()
    step, message = trainer.state.global_step, str(stopped.value)
    assert step == 4 if fault == "read-only" else step in (3, 4)  # files fill their last blocks by a half on average
    assert message.startswith(f"the checkpoint of step {step} cannot be written to {run} (")
    assert message.endswith(f"checkpoint-{step - 1} is whole: go on from it with resume_from_checkpoint")
    assert "\n" not in message
    assert problem_of(run / f"checkpoint-{step - 1}") is None
    assert find_checkpoint(run, "last") == str(run / f"checkpoint-{step - 1}")
    if fault == "read-only":
        with pytest.raises(OutputError, match="nothing can be written to output_dir .*: Read-only file system"):
            make_trainer(**settings).train(resume_from_checkpoint="last")
    subprocess.run(["mount", "-o", f"remount,rw,size={100 * size}", str(run)], check=True)
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint="last")
    assert_identical(both_adapters(resumed), both_adapters(straight))
    if fault == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
    else:
        with pytest.raises(OSError, match="No space left"):
            (run / "of another").write_bytes(bytes(100 * size))
    with pytest.raises(OutputError, match=rf"^the model cannot be written to {run} \(.*checkpoint-6 is whole"):
        resumed.save_model()


@starter
@pytest.mark.skipif(not allowed, reason="no mount namespaces here")
def test_a_disk_that_takes_no_more() -> None:
    """In a process that may mount a disk: see `test_worker`."""
    run_worker(f"{__file__}::test_worker", "slow", [*NAMESPACE, sys.executable])
