"""The readings of a budget of minutes, so that a run which a clock has bounded can be repeated without one."""

import json
from pathlib import Path

from accelerate import PartialState

CLOCK_FILE = "clock.jsonl"


class BudgetReadings:
    """What is left of a budget at the beginning of each step, kept in `clock.jsonl`; or read from there.

    A line is `{"phase": "DRO", "step": 3, "left": 0.97}`. A clock is the only thing in a run that no seed repeats: it
    decides on the learning rate of every step, and on the last one. Whoever is given the readings needs no clock.

    Args:
        run_dir (`Path`): where the readings are kept.
        phase (`str`): of the run; each has a budget.
        repeated (`Path`, *optional*): directory of the run whose readings stand for those of the clock.
    """

    def __init__(self, run_dir: Path, phase: str, repeated: Path | None = None):
        self._file, self._phase = run_dir / CLOCK_FILE, phase
        self._readings = None if repeated is None else read_clock(repeated, phase)

    def at_beginning(self, step: int, measured: float) -> float:
        """Returns the share of the budget that is left when `step` steps are done and another begins."""
        left = measured if self._readings is None else self._readings[step]
        if PartialState().is_main_process:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": self._phase, "step": step, "left": left}) + "\n")
        return left

    def is_spent(self, step: int, measured: float) -> bool:
        """Returns whether no further step begins after `step` of them."""
        return measured == 0.0 if self._readings is None else step not in self._readings


def read_clock(run_dir: Path, phase: str) -> dict[int, float]:
    """Returns steps done -> share left, of the steps that count: those after a resumed checkpoint were made again."""
    path, readings = run_dir / CLOCK_FILE, dict[int, float]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        reading = json.loads(line)
        if reading["phase"] == phase:
            readings = {step: left for step, left in readings.items() if step < reading["step"]}
            readings[reading["step"]] = reading["left"]
    return readings
