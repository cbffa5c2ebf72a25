"""The row every data set of drorl comes as, and its validation.

```python
{
    "query": str,
    "answers": list[str],  # all gold answers; at least one that is not blank
    "candidates": [{"title": str, "text": str, "id": str, "score": float}, ...],  # in the retriever's order
}
```

A candidate's `id` is optional, its `score` too unless a retrieval prior is used. A row may have more columns, `id`
among them; they are kept.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from datasets import Dataset

from drorl.errors import InvalidInputError

logger = logging.getLogger(__name__)

COLUMNS = ("query", "answers", "candidates")

Rows = TypeVar("Rows", Dataset, list[dict[str, Any]])


class RowError(InvalidInputError):
    """A row that cannot be trained or evaluated on.

    Args:
        index (`int`): position of the row.
        field (`str`): where in the row, e.g. `candidates[3].text`.
        problem (`str`): what is wrong with it.
    """

    def __init__(self, index: int, field: str, problem: str) -> None:
        super().__init__(f"row {index}, field {field!r}: {problem}")
        self.index, self.field, self.problem = index, field, problem


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows.

    Args:
        read (`int`): rows looked at.
        kept (`int`): rows without a problem.
        skipped (`dict[str, int]`): problem -> rows skipped for it.
    """

    read: int
    kept: int
    skipped: dict[str, int] = field(default_factory=dict)


class _Problem(Exception):
    """Field, kind of problem (the same words for every row, so that it can be counted) and particulars."""

    def __init__(self, field: str, kind: str, particulars: str = "") -> None:
        self.field, self.kind, self.particulars = field, kind, particulars


def validate_rows(
    rows: Rows, num_selected: int, on_error: Literal["fail", "skip"] = "fail", require_scores: bool = False
) -> tuple[Rows, RowCounts]:
    """The rows that can be used, of the type given, and counts.

    Args:
        rows (`Dataset` or `list[dict]`): see the module's docstring.
        num_selected (`int`): K, the number of candidates a row needs at least.
        on_error (`str`): `"fail"` raises at the first bad row, `"skip"` leaves bad rows out, counts them, warns once.
        require_scores (`bool`): every candidate needs a finite `score`, as a retrieval prior does.

    Raises:
        RowError: a row is bad and `on_error` is `"fail"`. It names the row and the field.
    """
    if on_error not in ("fail", "skip"):
        raise ValueError(f'on_error={on_error!r}: use "fail" or "skip".')
    kept: list[int] = []
    skipped: Counter[str] = Counter()
    for index, row in enumerate(_needed_columns(rows)):
        try:
            _check_row(row, num_selected, require_scores)
        except _Problem as problem:
            if on_error == "fail":
                raise RowError(index, problem.field, problem.kind + problem.particulars) from None
            skipped[problem.kind] += 1
        else:
            kept.append(index)
    counts = RowCounts(len(rows), len(kept), dict(skipped))
    if not skipped:
        return rows, counts
    reasons = ", ".join(f"{kind} ({count})" for kind, count in skipped.most_common())
    logger.warning("Skipped %d of %d rows: %s", skipped.total(), counts.read, reasons)
    return _take(rows, kept), counts


def _needed_columns(rows: Rows) -> Rows:
    """The rows without the columns that are not looked at, which would only have to be decoded."""
    if isinstance(rows, Dataset):
        return rows.select_columns([name for name in COLUMNS if name in rows.column_names])
    return rows


def _take(rows: Rows, indices: Sequence[int]) -> Rows:
    """The rows at `indices`, whole."""
    if isinstance(rows, Dataset):
        return rows.select(indices)
    return [rows[index] for index in indices]


def _check_row(row: Mapping[str, Any], num_selected: int, require_scores: bool) -> None:
    """Raise `_Problem` for the first thing that is wrong with a row."""
    if not _is_text(row.get("query")):
        raise _Problem("query", "empty or missing query")
    answers = row.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise _Problem("answers", "answers are not a list of texts", f": {answers!r}")
    if not any(map(_is_text, answers)):
        raise _Problem("answers", "no answer that is not blank")
    candidates = row.get("candidates")
    if not isinstance(candidates, list) or not all(isinstance(candidate, dict) for candidate in candidates):
        raise _Problem("candidates", "candidates are not a list of passages")
    if len(candidates) < num_selected:
        raise _Problem("candidates", "fewer candidates than are selected", f": {len(candidates)} < {num_selected}")
    for position, candidate in enumerate(candidates):
        _check_candidate(candidate, f"candidates[{position}]", require_scores)
    # Without an id, a passage is its title and text.
    _check_ids([candidate.get("id") or (candidate["title"], candidate["text"]) for candidate in candidates])


def _check_candidate(candidate: Mapping[str, Any], where: str, require_scores: bool) -> None:
    """Raise `_Problem` for the first thing that is wrong with a candidate."""
    if not isinstance(candidate.get("title"), str):
        raise _Problem(f"{where}.title", "missing title")
    if not _is_text(candidate.get("text")):
        raise _Problem(f"{where}.text", "empty or missing passage text")
    if require_scores:
        score = candidate.get("score")
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise _Problem(
                f"{where}.score", "missing or non-finite score, which a retrieval prior needs", f": {score!r}"
            )


def _check_ids(ids: Sequence[Any]) -> None:
    """Raise `_Problem` if an id occurs twice."""
    if len(set(ids)) < len(ids):
        twice = next(identifier for identifier, count in Counter(ids).items() if count > 1)
        raise _Problem("candidates", "candidate occurs twice", f": {twice!r}")


def _is_text(value: Any) -> bool:
    """Whether a value is a text that is not blank."""
    return isinstance(value, str) and not value.isspace() and value != ""
