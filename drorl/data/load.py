"""Rows to train and to evaluate on, from wherever people keep them, in a table on disk."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from drorl.errors import InvalidInputError

from .prepare import VERSION
from .reading import Reading

logger = logging.getLogger(__name__)

TEXT = Value("string")
CANDIDATE = {"id": TEXT, "title": TEXT, "text": TEXT, "score": Value("float64"), "is_gold": Value("bool")}
GOLDS = {"gold_ids": [TEXT], "gold_titles": [TEXT]}
ROW = {"id": TEXT, "query": TEXT, "answers": [TEXT], "candidates": [CANDIDATE], "metadata": GOLDS}
FEATURES = Features(ROW)


def load_rows(source: str, split: str = "train") -> Dataset:
    """Returns the rows of a file in any format of `ROWS`, a folder of `datasets`, or a data set of the hub.

    They are what `drorl prepare` writes, but of `metadata` only the names of gold passages. The table is made once, in
    the cache of `datasets`, and again when the source has changed; it is memory-mapped.

    Args:
        source (`str`): see [`hub`] for what is no file.
        split (`str`): of a source that has several and names none.

    Raises:
        RowError: a record is broken.
        InvalidInputError: the source cannot be read, has no rows, or its questions have no candidates yet.
    """
    reading = Reading(Path(source), split=split, need_answers=True)
    first = next(iter(reading), None)
    if first is None:
        raise InvalidInputError(f"{source} has no rows")
    if not first["candidates"]:
        raise InvalidInputError(f"the first question of {source} has no candidates: drorl retrieve finds them")
    reading.skipped.clear()
    key = hashlib.sha256(json.dumps([reading.depends, VERSION, str(FEATURES)]).encode()).hexdigest()
    try:
        return Dataset.from_generator(_rows, features=FEATURES, gen_kwargs={"reading": reading}, fingerprint=key[:16])
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _rows(reading: Reading) -> Iterator[dict[str, Any]]:
    for row in reading:
        known = [{name: candidate.get(name) for name in CANDIDATE} for candidate in row["candidates"]]
        golds = {name: list(map(str, row["metadata"].get(name) or [])) for name in GOLDS}
        yield {name: row[name] for name in ("id", "query", "answers")} | {"candidates": known, "metadata": golds}
    if reading.skipped:
        logger.warning("%s: left out %s", reading.path, dict(reading.skipped))
