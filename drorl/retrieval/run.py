"""Candidates for the questions of a file: resumed where it was stopped, and not found twice."""

from pathlib import Path
from typing import Any

from drorl.data.fields import Row
from drorl.data.prepare import SHARD_ROWS, Prepared, write_rows
from drorl.data.reading import Reading
from drorl.errors import InvalidInputError

from .retrievers import Retriever

SHARD_CANDIDATES = 40_000
"""Passages that are in memory at a time, some 50 MB of text."""


def retrieve_rows(
    retriever: Retriever,
    queries: Path,
    output: Path,
    k: int,
    format: str = "auto",
    on_error: str = "fail",
    quiet: bool = False,
) -> Prepared:
    """Writes the rows of a file of questions with the best k passages as their candidates; see [`write_rows`].

    A passage is marked as gold where the question names gold passages, by id or by title.

    Raises:
        RowError: a question is broken and `on_error` is `fail`.
        InvalidInputError: a file cannot be read or written.
    """
    if k < 1:
        raise InvalidInputError(f"top_k={k}: at least one passage has to be asked for")

    def with_candidates(rows: list[Row]) -> list[Row]:
        found = retriever.search([row["query"] for row in rows], k)
        return [{**row, "candidates": _marked(f, row["metadata"])} for row, f in zip(rows, found, strict=True)]

    reading = Reading(queries, format=format, on_error=on_error)  # ty: ignore[invalid-argument-type]
    shard_rows = max(1, min(SHARD_ROWS, SHARD_CANDIDATES // k))
    return write_rows(reading, output, with_candidates, [retriever.key, k], quiet, shard_rows)


def _marked(candidates: list[dict[str, Any]], metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """Marks what the data set calls gold, if it says so at all."""
    ids, titles = metadata.get("gold_ids"), metadata.get("gold_titles")
    if ids is None and titles is None:
        return candidates
    names = [{str(name) for name in named} if isinstance(named, list) else set() for named in (ids, titles)]
    return [{**c, "is_gold": c["id"] in names[0] or c["title"] in names[1]} for c in candidates]
