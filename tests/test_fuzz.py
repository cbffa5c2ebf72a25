"""Files of every format, damaged in every way that comes to mind: rows or a clear error, soon."""

import gzip
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import WHOLE

from drorl.data.formats import PASSAGES, ROWS
from drorl.data.reading import Reading, read_aliases
from drorl.data.rows import RowError, problem_of
from drorl.data.trec import read_qrels, read_run
from drorl.errors import UserError
from drorl.scoring import score_record

FORMATS = ROWS | PASSAGES
EXAMPLES = 440  # of each of 25 readers: 11,000
SECONDS = 20  # of the processor, for one file of a few kB

GARBAGE = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1e308,
        10**400,
        float("nan"),
        float("inf"),
        "",
        " ",
        "\0",
        "[",
        "['a']",
        "[[1]]",
        "\ud83d",
        "{",
    ]
    + ["x" * 3000, [], {}, [[]], [[[["a"]]]], [None], {"": None}, {"title": [1], "sentences": "x"}, ["a", ["b"]], "١"]
    + [[["T", "s"]], [["T", ["s"], 1]], [{"title": "T"}], "[1] > [1]", "[99]", "Title: T Text:", "\u2028", "a\tb\nc"]
) | st.text(max_size=20)
BYTES = st.sampled_from(
    [b"\0", b"\xff", b"\xf6", b"\xef\xbb\xbf", b'"', b"'", b"\n", b"\r", b"\r\n", b"\t", b",", b"{", b"}", b"[", b"]"]
    + [b"\\", b"\\ud83d", b"\\u0000", b'"question": 5, ', b'"answers": null, ', b"NaN", b"-", b"1e999", b"9" * 500]
    + [b"[" * 3000, b'{"a":' * 3000, b"x" * 2000, b'""', b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\x1f\x8b", b"//"]
) | st.binary(min_size=1, max_size=4)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a record, with each of its keys or positions."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    """A file of the format, of which values are exchanged, left out or doubled, and bytes put in, taken out or cut."""
    records = json.loads(json.dumps(WHOLE[name]))
    for _ in range(draw(st.integers(0, 2))):
        where = draw(st.sampled_from(list(places(records))))
        match draw(st.sampled_from(["exchange", "leave out", "double"])):
            case "exchange":
                where[0][where[1]] = deepcopy(draw(GARBAGE))
            case "leave out":
                del where[0][where[1]]
            case "double" if isinstance(where[0], list):
                where[0].append(deepcopy(where[0][where[1]]))
        if not records:
            break
    data = laid_out(draw, records, table=not FORMATS[name].fields)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["put in", "take out", "cut", "repeat"])):
            case "put in":
                data = data[:at] + draw(BYTES) + data[at:]
            case "take out":
                data = data[:at] + data[at + draw(st.integers(1, 5)) :]
            case "cut":
                data = data[:at]
            case "repeat":
                data += data[at:]
    packed = draw(st.sampled_from([bytes, bytes, bytes, gzip.compress, zstandard.compress]))(data)
    return packed if draw(st.integers(0, 9)) else packed[: draw(st.integers(0, len(packed)))]


def laid_out(draw: st.DrawFn, records: list, table: bool) -> bytes:
    """The records as lines, an array, an indented one, one object, or a table."""
    if table:
        delimiter = draw(st.sampled_from("\t\t,"))
        quoted = [[str(cell) for cell in cells] if isinstance(cells, list) else [str(cells)] for cells in records]
        return "\n".join(delimiter.join(cells) for cells in quoted).encode(errors="replace")
    match draw(st.sampled_from(["lines", "lines", "array", "indented", "object"])):
        case "lines":
            text = "\n".join(json.dumps(record, ensure_ascii=draw(st.booleans())) for record in records)
        case "object":
            text = json.dumps({f"q{i}": [record] for i, record in enumerate(records)})
        case shape:
            text = json.dumps(records, indent=1 if shape == "indented" else None)
    return text.encode(errors="surrogatepass")


@contextmanager
def soon() -> Iterator[None]:
    """Fails on what takes long, and ends what never ends; one line is the message of a user's mistake."""

    def never(*_: object) -> None:
        raise AssertionError("it hangs")

    signal.signal(signal.SIGALRM, never)
    signal.alarm(600)
    start = time.process_time()
    try:
        yield
    except UserError as error:
        assert len(str(error)) < 3000 and "\n" not in str(error)
    finally:
        signal.alarm(0)
    assert time.process_time() - start < SECONDS


def check(path: Path, name: str, format: str) -> None:
    """Reads a file in one format, strictly and leniently; what it yields can be used and written."""
    formats = ROWS if name in ROWS else PASSAGES
    for on_error in ("fail", "skip"):
        with soon():
            reading = Reading(path, formats, format, on_error)
            for row in reading:
                assert isinstance(row["id"], str)
                json.dumps(row, ensure_ascii=False).encode()
                if formats is PASSAGES:
                    assert row["text"].strip() and isinstance(row["title"], str)
                else:
                    has_answers = formats[reading.format].has_answers
                    assert problem_of(row if has_answers else {**row, "answers": ["-"]}, 0, False) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_any_damaged_file_is_rows_or_one_line(name: str, tmp_path: Path) -> None:
    """10,000 files, in their own format, in one that is guessed: never a traceback, never a hang."""
    assert WHOLE.keys() == FORMATS.keys()
    suffix = ".jsonl" if FORMATS[name].fields else ".tsv"

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=damaged(name), suffix=st.sampled_from([suffix, suffix, ".json", ".csv", ""]))
    def run(data: bytes, suffix: str) -> None:
        path = tmp_path / f"any{suffix}"
        path.write_bytes(data)
        check(path, name, name)
        check(path, name, "auto")

    run()


SCORED = {
    "prediction": "x",
    "answers": ["x"],
    "candidates": [{"id": "1", "title": "T", "text": "x", "is_gold": True}],
    "metadata": {"gold_titles": ["T"], "evidences": [["a", "r", "e"]]},
    "gold_ids": ["1"],
    "supporting_facts": {"title": ["A"], "sent_id": [0]},
    "predicted_supporting_facts": [["A", 0]],
    "predicted_evidences": [[["a", "b"], "r", "e"]],
    "support_idxs": [1],
    "predicted_support_idxs": [1],
}


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    where=st.lists(st.tuples(st.integers(0, 100), GARBAGE), min_size=1, max_size=3),
    kept=st.sets(st.sampled_from(sorted(SCORED))),
)
def test_any_damaged_prediction_is_scored_or_named(where: list[tuple[int, Any]], kept: set[str]) -> None:
    """Scores between 0 and 1, or what is wrong: never a traceback. Recall of evidences may exceed 1."""
    row = deepcopy({name: value for name, value in SCORED.items() if name in kept | {"prediction", "answers"}})
    for number, garbage in where:
        if at := list(places(row)):
            container, key = at[number % len(at)]
            container[key] = deepcopy(garbage)
    found = score_record(1, row)
    if not isinstance(found, RowError):
        assert all(0 <= v <= 1 for name, v in found.scores.items() if not name.startswith(("evidences", "joint")))


WHOLE_LINES = {
    read_qrels: b"query-id\tcorpus-id\tscore\nq1\td2\t1\nq1 0 d3 2\n",
    read_run: b"q1 Q0 d3 1 2.5 x\nq1 Q0 d2 2 7.5 x\n",
    read_aliases: b'{"Q_id": "Q1", "aliases": ["a"], "demonyms": []}\n{"Q_id": "Q2", "aliases": [], "demonyms": []}\n',
}


@pytest.mark.slow
@pytest.mark.parametrize("read", WHOLE_LINES)
def test_any_damaged_side_file_is_read_or_one_line(read: Any, tmp_path: Path) -> None:
    """The same of judgements, runs and aliases."""

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(edits=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 5), BYTES), max_size=4))
    def run(edits: list[tuple[int, int, bytes]]) -> None:
        data = WHOLE_LINES[read]
        for at, length, new in edits:
            data = data[:at] + new + data[at + length :]
        (tmp_path / "any").write_bytes(data)
        with soon():
            json.dumps(read(tmp_path / "any"), ensure_ascii=False).encode()

    run()
