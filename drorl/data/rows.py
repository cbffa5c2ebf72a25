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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from drorl.errors import InvalidInputError

if TYPE_CHECKING:
    from datasets import Dataset  # takes a second to import, which reading files does not need

logger = logging.getLogger(__name__)

COLUMNS = ("query", "answers", "candidates")

Rows = TypeVar("Rows", "Dataset", list[dict[str, Any]])


class RowError(InvalidInputError):
    """A row that cannot be trained or evaluated on.

    Args:
        index (`int`): position of the row; of a record of a file its number, from 1.
        field (`str`): where in the row, e.g. `candidates[3].text`; empty: all of it.
        problem (`str`): what is wrong with it.
        kind (`str`, *optional*): the same without what was seen, so that it can be counted. Default: `problem`.
        path (`Path`, *optional*): the file that it is a row of.
    """

    def __init__(
        self, index: int, field: str, problem: str, kind: str | None = None, path: Path | None = None
    ) -> None:
        where = f"row {index}, field {field!r}" if field else f"row {index}"
        super().__init__(f"{where}: {problem}" if path is None else f"{path}, {where}: {problem}")
        self.index, self.field, self.problem, self.kind = index, field, problem, kind or problem

    def of(self, path: Path) -> "RowError":
        """The same, of a row of that file."""
        return RowError(self.index, self.field, self.problem, self.kind, path)


def validate_rows(
    rows: Rows, num_selected: int, on_error: Literal["fail", "skip"] = "fail", require_scores: bool = False
) -> tuple[Rows, Counter[str]]:
    """The rows that can be used, of the type given, and how many were skipped for which problem.

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
    looked_at = rows
    if not isinstance(rows, list):  # the other columns would only have to be decoded
        looked_at = rows.select_columns([name for name in COLUMNS if name in rows.column_names])
    for index, row in enumerate(looked_at):
        problem = problem_of(row, num_selected, require_scores)
        if problem is None:
            kept.append(index)
            continue
        field, kind, particulars = problem
        if on_error == "fail":
            raise RowError(index, field, kind + particulars)
        skipped[kind] += 1
    if not skipped:
        return rows, skipped
    reasons = ", ".join(f"{kind} ({count})" for kind, count in skipped.most_common())
    logger.warning("Skipped %d of %d rows: %s", skipped.total(), len(rows), reasons)
    return ([rows[index] for index in kept] if isinstance(rows, list) else rows.select(kept)), skipped


def problem_of(row: Mapping[str, Any], num_selected: int, require_scores: bool) -> tuple[str, str, str] | None:
    """The first thing wrong with a row: its field, its kind (in the same words for every row), what was seen."""
    if not _is_text(row.get("query")):
        return "query", "empty or missing query", ""
    answers, candidates = row.get("answers"), row.get("candidates")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return "answers", "answers are not a list of texts", f": {answers!r}"
    if not any(map(_is_text, answers)):
        return "answers", "no answer that is not blank", ""
    if not isinstance(candidates, list) or not all(isinstance(candidate, dict) for candidate in candidates):
        return "candidates", "candidates are not a list of passages", ""
    if len(candidates) < num_selected:
        return "candidates", "fewer candidates than are selected", f": {len(candidates)} < {num_selected}"
    for position, candidate in enumerate(candidates):
        where, score = f"candidates[{position}]", candidate.get("score")
        if not isinstance(candidate.get("title"), str):
            return f"{where}.title", "missing title", ""
        if not _is_text(candidate.get("text")):
            return f"{where}.text", "empty or missing passage text", ""
        if require_scores and not (isinstance(score, (int, float)) and math.isfinite(score)):
            return f"{where}.score", "missing or non-finite score, which a retrieval prior needs", f": {score!r}"
    # Without an id, a passage is its title and text.
    for passage, count in Counter(c.get("id") or (c["title"], c["text"]) for c in candidates).items():
        if count > 1:
            return "candidates", "candidate occurs twice", f": {passage!r}"
    return None


def _is_text(value: Any) -> bool:
    """Whether a value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())
