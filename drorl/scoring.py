"""Scores of predictions in a file: the metrics of [`metrics`], for any file in which people keep predictions."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .data.files import records
from .data.rows import RowError
from .metrics import KILT, MetricSettings, exact_match, f1


@dataclass
class FileScores:
    """Means over the rows of a file."""

    exact_match: float | None
    f1: float | None
    """`None` of no rows."""
    n: int
    skipped: Counter[str] = field(default_factory=Counter)


def score_file(path: Path, settings: MetricSettings = KILT, on_error: str = "fail") -> FileScores:
    """Returns the mean exact match and F1 of a file of `{"prediction": str, "answers": [str, ...]}`, as fractions.

    Raises:
        RowError: a row is not like that, and `on_error` is `fail`.
        InvalidInputError: the file cannot be read.
    """
    totals, n, skipped = [0.0, 0.0], 0, Counter[str]()
    for number, record in records(path):
        found = record if isinstance(record, RowError) else _pair(record, number)
        if isinstance(found, RowError):
            if on_error == "fail":
                raise found.of(path)
            skipped[found.kind] += 1
            continue
        n += 1
        totals[0] += exact_match(*found, settings)
        totals[1] += f1(*found, settings)
    return FileScores(*(total / n if n else None for total in totals), n, skipped)


def _pair(record: Any, number: int) -> tuple[str, list[str]] | RowError:
    """The prediction and the gold answers of a row."""
    if not isinstance(record, dict):
        return RowError(number, "", f"no record: {repr(record)[:80]}", "no record")
    prediction, answers = record.get("prediction"), record.get("answers")
    if not isinstance(prediction, str):
        return RowError(number, "prediction", f"no text: {repr(prediction)[:80]}", "no prediction")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        return RowError(number, "answers", f"no list of texts: {repr(answers)[:80]}", "no answers")
    return prediction, answers
