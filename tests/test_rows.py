"""What is a usable row, and what is said about one that is not."""

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from drorl.data.rows import RowError, validate_rows

Row = dict[str, Any]


def good_row(number: int = 0) -> Row:
    """A row of three candidates, with a column of its own."""
    candidates = [{"id": str(i), "title": f"Title {i}", "text": f"Text {i}.", "score": 3.0 - i} for i in range(3)]
    return {"query": f"query {number}?", "answers": ["yes"], "candidates": candidates, "source": "made up"}


def put(*path: Any, value: Any) -> Callable[[Row], None]:
    """A function that sets the value at a path of a row."""

    def spoil(row: Row) -> None:
        target: Any = row
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return spoil


def drop(*path: Any) -> Callable[[Row], None]:
    """A function that removes the value at a path of a row."""

    def spoil(row: Row) -> None:
        target: Any = row
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]

    return spoil


SPOILS = {
    "query": [drop("query"), put("query", value=""), put("query", value=" \n"), put("query", value=None)],
    "answers": [
        drop("answers"),
        put("answers", value=[]),
        put("answers", value=["", "  "]),
        put("answers", value="yes"),
        put("answers", value=["yes", 3]),
    ],
    "candidates": [
        drop("candidates"),
        drop("candidates", 0),
        put("candidates", value=["a", "b", "c"]),
        put("candidates", 2, "id", value="0"),
    ],
    "candidates[1].text": [
        drop("candidates", 1, "text"),
        put("candidates", 1, "text", value=" "),
        put("candidates", 1, "text", value=None),
    ],
    "candidates[1].title": [drop("candidates", 1, "title"), put("candidates", 1, "title", value=None)],
    "candidates[1].score": [
        drop("candidates", 1, "score"),
        put("candidates", 1, "score", value=math.nan),
        put("candidates", 1, "score", value=math.inf),
        put("candidates", 1, "score", value="2.0"),
    ],
}
CASES = [(field, spoil) for field, spoils in SPOILS.items() for spoil in spoils]


@pytest.mark.parametrize(("field", "spoil"), CASES)
def test_a_bad_row_is_named_with_its_field(field: str, spoil: Callable[[Row], None]) -> None:
    """Each kind of damage raises an error that names the row's index and the damaged field, and no other."""
    rows = [good_row(0), good_row(1), good_row(2)]
    spoil(rows[1])
    with pytest.raises(RowError) as caught:
        validate_rows(rows, num_selected=3, require_scores=True)
    assert (caught.value.index, caught.value.field) == (1, field)
    assert "row 1" in str(caught.value)
    assert field in str(caught.value)


@pytest.mark.parametrize(("field", "spoil"), CASES)
def test_a_bad_row_can_be_skipped(field: str, spoil: Callable[[Row], None], caplog: pytest.LogCaptureFixture) -> None:
    """With `on_error="skip"` the same damage costs that row alone, is counted under one reason, and warned of once."""
    rows = [good_row(0), good_row(1), good_row(2)]
    spoil(rows[1])
    with caplog.at_level(logging.WARNING):
        kept, skipped = validate_rows(rows, num_selected=3, on_error="skip", require_scores=True)
    assert kept == [rows[0], rows[2]]
    assert list(skipped.values()) == [1]
    assert len(caplog.records) == 1
    assert "Skipped 1 of 3 rows" in caplog.text


def test_good_rows_come_back_untouched() -> None:
    """Valid input is returned as it is, extra columns included, and nothing is skipped."""
    rows = [good_row(i) for i in range(3)]
    before = copy.deepcopy(rows)
    kept, skipped = validate_rows(rows, num_selected=3, require_scores=True)
    assert kept is rows
    assert kept == before
    assert not skipped


def test_ids_and_scores_are_optional() -> None:
    """Candidates without id are no duplicates of each other, and scores are asked for only by a retrieval prior."""
    row = good_row()
    for candidate in row["candidates"]:
        del candidate["id"], candidate["score"]
    assert validate_rows([row], num_selected=3) == ([row], {})
    with pytest.raises(RowError, match="score"):
        validate_rows([row], num_selected=3, require_scores=True)


def test_a_dataset_stays_a_dataset_with_all_its_columns() -> None:
    """A `Dataset` is filtered as a list is and keeps its columns; a missing column is a missing field of row 0."""
    rows = [good_row(i) for i in range(4)]
    rows[2]["answers"] = []
    dataset = Dataset.from_list(rows)
    kept, skipped = validate_rows(dataset, num_selected=2, on_error="skip")
    assert isinstance(kept, Dataset)
    assert kept.to_list() == [rows[0], rows[1], rows[3]]
    assert skipped == {"no answer that is not blank": 1}
    with pytest.raises(RowError, match="row 0, field 'query'"):
        validate_rows(dataset.remove_columns("query"), num_selected=2)


def test_an_unknown_policy_is_refused() -> None:
    """A misspelt `on_error` does not silently mean one of the two."""
    with pytest.raises(ValueError, match="on_error='ignore'"):
        validate_rows([good_row()], num_selected=1, on_error="ignore")  # ty: ignore[invalid-argument-type]
