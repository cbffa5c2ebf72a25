"""Runs and relevance judgements as TREC and BEIR keep them.

run      query-id Q0 passage-id rank score tag      parted by white space
qrels    query-id 0 passage-id relevance            or BEIR's three columns, with a header
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from drorl.errors import InvalidInputError

from .files import Record, lines, open_stream, records
from .rows import RowError

Ranking = list[tuple[str, float]]
"""Passages by id and their scores, best first."""


def _columns(path: Path, widths: tuple[int, ...]) -> Iterator[tuple[int, list[str]]]:
    with open_stream(path) as stream:
        for number, line in lines(stream):
            if isinstance(line, RowError):
                raise line.of(path)
            cells = line.split()
            if len(cells) not in widths:
                raise RowError(number, "", f"not {' or '.join(map(str, widths))} columns: {line[:80]!r}", path=path)
            yield number, cells


def _number(text: str, path: Path, number: int, field: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RowError(number, field, f"no number: {text[:80]!r}", path=path)
    return value


def read_qrels(path: Path) -> dict[str, list[str]]:
    """Returns the passages that are relevant (above 0) to each query, by ids.

    Raises:
        RowError: a line is none of a judgement.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for number, cells in _columns(path, (3, 4)):
        if number == 1 and cells[-1] in ("score", "relevance"):
            continue
        if _number(cells[-1], path, number, "relevance") > 0:
            found[cells[0]].append(cells[-2])
    return dict(found)


def read_run(path: Path) -> dict[str, Ranking]:
    """Returns the passages that a system has found for each query, best first; the scores decide, as in trec_eval.

    Raises:
        RowError: a line is none of a run, or repeats a passage of its query.
    """
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for number, (query, _, passage, _, score, _) in _columns(path, (6,)):
        if passage in found[query]:
            raise RowError(number, "passage-id", f"{passage!r} has been found for {query!r} before", path=path)
        found[query][passage] = _number(score, path, number, "score")
    return {query: sorted(ranking.items(), key=lambda pair: -pair[1]) for query, ranking in found.items()}


def beir_records(folder: Path, split: str = "test") -> Iterator[Record]:
    """Yields the queries of a BEIR folder that have judgements in a split, with the ids of their relevant passages.

    Raises:
        InvalidInputError: if it is no such folder.
    """
    queries, judged = folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"
    if not (queries.exists() and judged.exists()):
        raise InvalidInputError(f"{folder} is a folder without queries.jsonl and qrels/{split}.tsv: not BEIR's")
    relevant = read_qrels(judged)
    for number, record in records(queries):
        if not isinstance(record, dict):
            yield number, record
        elif (gold := relevant.get(str(record.get("_id")))) is not None:
            yield number, {"_id": record.get("_id"), "text": record.get("text"), "gold_ids": gold}
