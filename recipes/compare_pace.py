"""The pace of each method, in seconds a query: what makes a budget of minutes the same queries wherever a cell runs.

    python recipes/compare.py pace       # writes recipes/grids/<grid>.pace.json; nothing else may run meanwhile

Stopped by the clock, a cell would depend on what else the machine does, and could not be made again. So the methods
take turns in one process, the median over the rounds is the pace of each, and `10 minutes` of training are the
queries that it gets through in that time.
"""

import json
import math
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from compare_cell import Asked, configured, pace_key, queries_per_step, warmed_up
from nq import load_data
from rich.progress import track
from transformers import TrainerCallback

from drorl.provenance import commit, machine

ROUNDS, TIMED_QUERIES, TIMED_STEPS = 3, 16, 3


class StepClock(TrainerCallback):
    """When each step has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def seconds_per_query(asked: Asked, work: Path) -> float:
    """Trains a few steps; the first one, in which memory is reserved and kernels are built, does not count."""
    script, config = configured(asked, work)
    per_step = queries_per_step(config)
    config.max_steps = 1 + max(TIMED_STEPS, math.ceil(TIMED_QUERIES / per_step))
    rows, _ = load_data(script)
    trainer, clock = warmed_up(asked, script, config, rows["train"], work), StepClock()
    trainer.add_callback(clock)
    torch.manual_seed(asked.seed)  # each method gets the same queries
    trainer.train()
    return (clock.ends[-1] - clock.ends[0]) / (per_step * (len(clock.ends) - 1))


def measure(cells: Iterable[Asked], path: Path, work: Path, rounds: int = ROUNDS, force: bool = False) -> None:
    """Measures methods by turns, and adds them to a file; methods that compute the same are measured as one.

    What the file knows is kept, unless `force` says otherwise: cells were made with it.
    """
    paces = json.loads(path.read_text()) if path.exists() else {}
    groups: dict[str, list[Asked]] = {}
    for asked in cells:
        if force or pace_key(asked.settings) not in paces:
            groups.setdefault(pace_key(asked.settings), []).append(asked)
    seconds: dict[str, list[float]] = {key: [] for key in groups}
    for key in track([*groups] * rounds, "pace of each method"):
        seconds[key].append(round(seconds_per_query(groups[key][0], work), 4))
    for key, members in groups.items():
        paces[key] = {
            "seconds_per_query": statistics.median(seconds[key]),
            "rounds": seconds[key],
            "methods": sorted({asked.method for asked in members}),
            "batch": members[0].settings["per_device_train_batch_size"],
            "machine": machine(),
            "commit": commit(),
        }
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(paces, indent=1) + "\n")
    aside.replace(path)
