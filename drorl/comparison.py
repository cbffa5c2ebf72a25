"""Results of a comparison of methods: cells that are kept once they are done, and what can be said of any two methods.

A *cell* is one method trained with one seed within one budget and asked the same held-out questions as all others.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InvalidInputError
from .records import Record, aggregate, per_question
from .statistics import Interval, crossed_bootstrap

RATES = ("exact_match", "f1", "recall@1", "recall@3", "recall@5", "all_gold@2")
METRICS = (*RATES, "iw_elbo")
_DIGITS = 4


@dataclass(frozen=True)
class Cell:
    """One method, seed and budget, and what came of it."""

    method: str
    seed: int
    budget: str
    """`10 minutes` of training at the method's pace, or `400 queries`."""
    metrics: dict[str, float | None]
    """Means over the questions; `None` where a system has none, or is not finite."""
    minutes: float
    """Of training, the warm-up not counted."""
    query_steps: int
    """Queries trained on, each as often as it was seen."""
    settings: dict[str, Any]
    commit: str | None
    predictions: dict[str, list]
    """One entry per question: `prediction`, `chosen` and the metrics."""
    diverged: bool = False
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    """What training logged, by name, one value a step; `None`: no number."""
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells a cell from the others."""
        return self.method, self.seed, self.budget

    @property
    def questions(self) -> tuple:
        """What has to be equal for cells to have been asked the same questions."""
        asked = (self.settings.get(name) for name in ("data", "split", "num_eval_questions"))
        return (*asked, len(self.predictions["prediction"]))


def nothing(num_questions: int) -> tuple[dict[str, float | None], dict[str, list]]:
    """Returns the metrics and predictions of a system that has diverged: it answers no question."""
    kept: dict[str, list] = {"prediction": [""] * num_questions, "chosen": [[]] * num_questions}
    return dict.fromkeys(RATES, 0.0), kept | {name: [0.0] * num_questions for name in RATES}


def describe(records: Sequence[Record]) -> tuple[dict[str, float | None], dict[str, list]]:
    """Returns the metrics of a cell and its predictions, compactly."""
    metrics: dict[str, float | None] = dict.fromkeys((*METRICS, "answer_logp"))
    kept: dict[str, list] = {"prediction": [r.prediction for r in records], "chosen": [r.chosen for r in records]}
    means = aggregate(records)
    for name in metrics.keys() & means.keys():
        values = per_question(records, name)
        if all(map(math.isfinite, values)):
            metrics[name], kept[name] = means[name], [round(value, _DIGITS) for value in values]
    return metrics, kept


class Results:
    """The cells of a file, which is replaced as a whole whenever one is added.

    Args:
        path (`Path`): `results/compare.json`; need not exist.

    Raises:
        InvalidInputError: if the file is not what was written, such as a file that was cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self.cells: dict[tuple[str, int, str], Cell] = {}
        if path.exists():
            try:
                self.cells = {cell.key: cell for cell in _read(path)}
            except (ValueError, TypeError, KeyError) as error:
                raise InvalidInputError(
                    f"{path} is not a results file, or was cut off ({error}): restore it from git or move it away"
                ) from error

    def done(self, method: str, seed: int, budget: str, settings: Mapping[str, Any], force: bool = False) -> bool:
        """Whether a cell has a result that was made with these settings.

        Raises:
            InvalidInputError: if it was made with others, unless `force` says that it is to be made again.
        """
        cell = self.cells.get((method, seed, budget))
        if cell is None:
            return False
        names = sorted({*cell.settings, *settings})
        changed = [name for name in names if cell.settings.get(name) != settings.get(name)]
        if changed and not force:
            raise InvalidInputError(
                f"{method}, seed {seed}, {budget} has a result with other settings ({', '.join(changed)}): "
                "--force makes it again"
            )
        return not changed

    def add(self, *cells: Cell) -> None:
        """Keeps cells, in place of earlier ones of the same keys; the file is whole at any moment."""
        self.cells |= {cell.key: cell for cell in cells}
        aside = self.path.with_suffix(".tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(asdict(c), allow_nan=False) for c in self.cells.values())
        aside.write_text(f'{{"cells": [\n{lines}\n]}}\n')
        aside.replace(self.path)

    def budgets(self) -> list[str]:
        """The budgets that there are cells of, small ones first."""
        return sorted({cell.budget for cell in self.cells.values()}, key=lambda budget: float(budget.split()[0]))

    def of(self, method: str, budget: str) -> list[Cell]:
        """The cells of a method, by seed, those that diverged among them."""
        found = [cell for cell in self.cells.values() if (cell.method, cell.budget) == (method, budget)]
        return sorted(found, key=lambda cell: cell.seed)

    def methods(self, budget: str) -> list[str]:
        """The methods that there are cells of, in the order in which they were added."""
        return list(dict.fromkeys(cell.method for cell in self.cells.values() if cell.budget == budget))

    def difference(self, a: str, b: str, budget: str, metric: str, other_seeds: bool = True) -> Interval | None:
        """Returns `b - a` of a metric on the seeds that both have, paired by question; `None` if there are none.

        Of cells that were asked the same questions in the same data type. The interval is of other seeds and other
        questions, or with `other_seeds=False` of other questions alone.
        """
        pairs = [
            (x.predictions[metric], y.predictions[metric])
            for x in self.of(a, budget)
            for y in self.of(b, budget)
            if x.seed == y.seed and metric in x.predictions and metric in y.predictions
            if (x.machine.get("dtype"), x.questions) == (y.machine.get("dtype"), y.questions)
        ]
        if not pairs:
            return None
        differences = np.array([np.subtract(y, x) for x, y in pairs])
        return crossed_bootstrap((differences if other_seeds else differences.mean(axis=0, keepdims=True)).tolist())

    def mean(self, method: str, budget: str, metric: str) -> Interval | None:
        """Returns a metric's mean over seeds and questions; `None` if the method has none."""
        values = [cell.predictions[metric] for cell in self.of(method, budget) if metric in cell.predictions]
        return crossed_bootstrap(values) if values else None


def _read(path: Path) -> Iterable[Cell]:
    names = {f.name for f in fields(Cell)}
    for cell in json.loads(path.read_text())["cells"]:
        if unknown := cell.keys() - names:
            raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
        yield Cell(**cell)
