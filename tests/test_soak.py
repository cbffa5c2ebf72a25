"""A thousand updates with logs, checkpoints and evaluations: memory and open files stay what they are."""

import os
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import run_worker, starter, worker
from transformers import TrainerCallback

from drorl.callbacks import InterruptCallback
from drorl.trainer import DROTrainer

pytestmark = pytest.mark.slow
UPDATES, WARM = 1000, 100


class Usage(TrainerCallback):
    """Keeps the resident memory, MiB, and the number of open files after each step."""

    def __init__(self) -> None:
        self.memory: list[float] = []
        self.files: list[int] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * resource.getpagesize() / 2**20)
        self.files.append(len(os.listdir("/proc/self/fd")))


@worker
def test_worker(make_trainer: Callable[..., DROTrainer], rows: Callable[..., Any], tmp_path: Path) -> None:
    """Medians of a hundred steps each, because a checkpoint or an evaluation takes some memory for a moment.

    The log itself grows, by about 2 KiB a step: a quarter of the 1 % that is allowed.
    """
    usage = Usage()
    trainer = make_trainer(
        callbacks=[usage, InterruptCallback()],
        eval_rows=rows(2, 6),
        max_steps=UPDATES,
        eval_strategy="steps",
        eval_steps=100,
        save_strategy="steps",
        save_steps=25,
        save_total_limit=2,
    )
    trainer.train()
    assert len(usage.memory) == UPDATES
    assert len(trainer.state.log_history) > UPDATES
    before, after = (statistics.median(part) for part in (usage.memory[WARM : 2 * WARM], usage.memory[-WARM:]))
    sys.stdout.write(f"{before:.1f} MiB after {WARM} updates, {after:.1f} MiB after {UPDATES}\n")
    assert after < 1.01 * before
    assert set(usage.files[WARM:]) == {usage.files[WARM]}


@starter
def test_a_thousand_updates_leave_memory_and_files_as_they_are() -> None:
    """In a process of its own, whose memory is that of training."""
    run_worker(f"{__file__}::test_worker", "slow", [sys.executable])
