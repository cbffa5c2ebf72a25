"""Files in any format, read as rows or passages one by one."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from drorl.errors import InvalidInputError

from .fields import LeftOut, Problem, Row, list_of, refuse_unwritable
from .files import Record, records
from .formats import PASSAGES, ROWS, Format
from .hub import dataset_records, is_dataset, open_dataset
from .packages import sha256_of
from .rows import RowError, problem_of
from .trec import beir_records

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Reading:
    """Rows or passages of a file, one by one as they are asked for, and a count of what was not one.

    Args:
        path (`Path`): a file, a folder (BEIR's, or of `datasets`), or the name of a data set on the hub, see [`hub`].
        formats (`Mapping`): `ROWS` or `PASSAGES`.
        format (`str`): a name among them; `auto` takes the first that the first record fits.
        on_error (`str`): `fail` raises at the first record that is not whole, `skip` leaves it out and counts it.
        options (`dict`): what else the format's function takes: `aliases` of 2wiki, `keep_unanswerable` of musique.
        split (`str`): of a BEIR folder or a data set.
        num_selected (`int`): a row with fewer candidates is not whole.
        need_scores (`bool`): nor is one of which a candidate has no score.
        need_answers (`bool`): nor is one without answers, of a format that need not have any.
        start (`int`): so many records are passed over, and not looked at.
        skipped (`Counter`): how many records were left out, and why.
        number (`int`): of the last record that was read, from 1.

    Raises:
        RowError: a record is not whole and `on_error` is `fail`.
        InvalidInputError: the file cannot be read, or is of no known format.
    """

    path: Path
    formats: Mapping[str, Format] = field(default_factory=lambda: ROWS)
    format: str = "auto"
    on_error: Literal["fail", "skip"] = "fail"
    options: dict[str, Any] = field(default_factory=dict)
    split: str = "test"
    num_selected: int = 0
    need_scores: bool = False
    need_answers: bool = False
    start: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    number: int = 0

    def __post_init__(self) -> None:
        if self.format != "auto" and self.format not in self.formats:
            raise InvalidInputError(f"no format {self.format!r}; there are auto, {', '.join(self.formats)}")
        if self.on_error not in ("fail", "skip"):
            raise InvalidInputError(f"on_error={self.on_error!r}: use 'fail' or 'skip'")

    def __iter__(self) -> Iterator[Row]:
        read = None
        for number, record in self._records():
            if read is None and not isinstance(record, RowError):
                read = self._reader(record)
            if number <= self.start:
                continue
            self.number = number
            if read is not None and not isinstance(record, RowError):
                try:
                    row = read(record)
                except LeftOut as reason:
                    if str(reason) != "header":
                        self.skipped[str(reason)] += 1
                    continue
                except Problem as problem:
                    record = RowError(number, problem.field, problem.kind + problem.seen, problem.kind)
                else:
                    row["id"] = str(number) if row["id"] is None else str(row["id"])
                    record = self._checked(row, number)
            if isinstance(record, RowError):
                if self.on_error == "fail":
                    raise record.of(self.path)
                self.skipped[record.kind] += 1
                continue
            yield record

    @cached_property
    def _is_beir(self) -> bool:
        return self.formats is ROWS and any((self.path / name).exists() for name in ("queries.jsonl", "qrels"))

    @cached_property
    def _dataset(self) -> "Dataset | None":
        return open_dataset(self.path, self.split) if is_dataset(self.path) and not self._is_beir else None

    def _records(self) -> Iterator[Record]:
        if self._dataset is not None:
            return dataset_records(self._dataset)
        quoted = self.format == "auto" or self.formats[self.format].quoted
        return beir_records(self.path, self.split) if self._is_beir else records(self.path, quoted)

    @cached_property
    def depends(self) -> list[Any]:
        """What the rows depend on, as JSON: files by a hash of what is in them, whatever they are called or dated."""
        path = self.path
        files = [path / "queries.jsonl", path / "qrels" / f"{self.split}.tsv"] if self._is_beir else [path]
        content = [sha256_of(file) for file in files if file.is_file()]
        if self._dataset is not None:
            content = [self._dataset._fingerprint]
        # A format may go by the file's name.
        return [content, "".join(path.suffixes), self.format, self.on_error, self.options, self.split]

    def _reader(self, record: object) -> Callable[[Any], Row]:
        if self.format == "auto":
            self.format = format_of(record, self.formats, self.path)
        known = self.formats[self.format]
        self._refuse_options_of_others(known)
        table = not known.fields
        read = partial(known.read, **self.options)
        order: list[int] = []
        columns = known.columns
        if isinstance(record, list) and len(record) == len(columns) and all(name in record for name in columns):
            order = [record.index(name) for name in columns]

        def checked(record: object) -> Row:
            if not isinstance(record, list if table else dict):
                raise Problem("", f"no record of the format {self.format}", record)
            try:
                if isinstance(record, list) and len(record) == len(order):
                    record = [record[place] for place in order]
                row = read(record)
                for name, value in row.items():
                    refuse_unwritable(name, value)
                return row
            except Problem:
                raise
            except (TypeError, AttributeError, LookupError, OverflowError, ValueError) as error:  # something in it is
                raise Problem("", f"no record of the format {self.format}: {error}", record) from error

        return checked

    def _refuse_options_of_others(self, known: Format) -> None:
        for option in self.options.keys() - signature(known.read).parameters.keys():
            takers = [name for name, other in self.formats.items() if option in signature(other.read).parameters]
            raise InvalidInputError(
                f"{option} is for the format {' or '.join(takers)}, and {self.path} is of the format {self.format}"
            )

    def _checked(self, row: Row, number: int) -> Row | RowError:
        """Completes a row or a passage, and looks at it as the trainer will."""
        if self.formats is PASSAGES:
            return row if row["text"].strip() else RowError(number, "text", "empty text", "empty text")
        row.setdefault("metadata", {})
        for rank, item in enumerate(row["candidates"], start=1):
            item["rank"] = rank
            item["id"] = str(item["id"] if item.get("id") is not None else f"{row['id']}/{rank}")
        has_answers = self.need_answers or self.formats[self.format].has_answers
        asked = row if has_answers else {**row, "answers": ["-"]}
        problem = problem_of(asked, self.num_selected, self.need_scores)
        return row if problem is None else RowError(number, problem[0], problem[1] + problem[2], problem[1])


def format_of(record: object, formats: Mapping[str, Format], path: Path) -> str:
    """Returns the name of the first format that a record fits.

    Raises:
        InvalidInputError: if there is none.
    """
    for name, known in formats.items():
        if known.fits(record) or (isinstance(record, list) and not known.fields):
            return name
    seen = str(sorted(record))[:800] if isinstance(record, dict) else repr(record)[:80]
    known = "; ".join(f"{name} ({' '.join(sorted(f.fields)) or 'a table'})" for name, f in formats.items())
    raise InvalidInputError(f"{path}: a record with {seen} is of no format that is known. They are: {known}")


def read_aliases(path: Path) -> dict[str, list[str]]:
    """Returns the aliases of 2Wiki's id_aliases.json, by the id of the answer."""
    found: dict[str, list[str]] = {}
    for number, record in records(path):
        if isinstance(record, RowError):
            raise record.of(path)
        if not isinstance(record, dict) or "Q_id" not in record:
            raise RowError(number, "Q_id", "no id of an answer", path=path)
        try:
            found[str(record["Q_id"])] = [
                str(name) for field in ("aliases", "demonyms") for name in list_of(record, field, [])
            ]
        except Problem as problem:
            raise RowError(number, problem.field, problem.kind + problem.seen, path=path) from problem
    return found
