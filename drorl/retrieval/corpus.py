"""A corpus on disk: its passages by number, in the memory of those that are asked for."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from drorl.data.files import MAX_RECORD_BYTES
from drorl.data.formats import PASSAGES
from drorl.data.ids import id_hashes
from drorl.data.reading import Reading
from drorl.data.rows import RowError
from drorl.data.shards import Shards, only_one
from drorl.errors import InvalidInputError

from .facts import damage_named, read_facts, replace, write_facts

logger = logging.getLogger(__name__)

SHARD_PASSAGES = 20_000
VERSION = 2
_FILE, _OFFSETS, _FACTS = "passages.jsonl", "offsets.npy", "corpus.json"


class Corpus:
    """The passages of a folder that [`Corpus.build`] has made.

    Args:
        folder (`Path`): see [`build`].

    Raises:
        InvalidInputError: if it holds no corpus.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        facts = read_facts(folder / _FACTS)
        if facts is None or facts.get("version") != VERSION:
            raise InvalidInputError(f"{folder} holds no corpus of this version: make one with drorl index")
        self.key: str = facts["key"]
        """Of the content: equal passages in equal order have equal keys."""
        self.skipped: Counter[str] = Counter(facts["skipped"])
        """How many records of the file were left out, and why."""
        with damage_named(folder):
            self._offsets = np.load(folder / _OFFSETS, mmap_mode="r")
            self._file = (folder / _FILE).open("rb")  # read, not mapped: what is mapped counts as this process' memory
            size, wanted = os.fstat(self._file.fileno()).st_size, int(self._offsets[-1])
            if size != wanted:
                raise ValueError(f"{_FILE} has {size:,} bytes of {wanted:,}")

    @classmethod
    def build(cls, source: Path, folder: Path, format: str = "auto", on_error: str = "fail") -> "Corpus":
        """Makes a corpus of a file of passages, see [`data.formats.PASSAGES`]; goes on where it was killed.

        Raises:
            RowError: a passage is broken, or its id occurs twice, and `on_error` is `fail`.
            InvalidInputError: the file cannot be read, or has no passages.
        """
        folder.mkdir(parents=True, exist_ok=True)
        reading = Reading(source, PASSAGES, format, on_error)  # ty: ignore[invalid-argument-type]
        of = json.dumps([reading.depends, VERSION])
        with only_one(folder / _FILE):
            if (read_facts(folder / _FACTS) or {}).get("of") != of:
                (folder / _FACTS).unlink(missing_ok=True)
                _make(reading, folder, of)
        corpus = cls(folder)
        for kind, count in corpus.skipped.most_common():
            logger.info("%s: left out %s: %s", source, f"{count:,}", kind)
        return corpus

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The passage at a position: id, title, text."""
        start, end = int(self._offsets[position]), int(self._offsets[position + 1])
        return json.loads(os.pread(self._file.fileno(), end - start, start))

    def blocks(self, start: int, size: int) -> Iterator[list[dict[str, Any]]]:
        """Yields the passages from a position on, in blocks."""
        for first in range(start, len(self), size):
            yield [self[position] for position in range(first, min(first + size, len(self)))]


def _make(reading: Reading, folder: Path, of: str) -> None:
    """Writes the passages, where each begins, and last the facts."""
    path = folder / _FILE
    with Shards(path, of) as shards:
        if shards.notes:
            reading.start = shards.notes[-1]["record"]
        passages = iter(reading)
        while block := list(islice(passages, SHARD_PASSAGES)):
            lines = (json.dumps(passage, ensure_ascii=False) for passage in block)
            shards.add(lines, {"record": reading.number, "skipped": dict(reading.skipped)})
            reading.skipped.clear()
        shards.finish()
    skipped = sum((Counter(note["skipped"]) for note in shards.notes), Counter(reading.skipped))
    count = sum(1 for _ in path.open("rb"))
    if count == 0:
        raise InvalidInputError(f"{reading.path} has no passages")
    first, later = _equal_ids(path, count)
    if len(later) and reading.on_error == "fail":
        raise _equal(reading, int(first[0]), int(later[0]))
    if len(later):
        skipped["equal ids"] = len(later)
        _leave_out(path, later, count)
    offsets, key = _line_ends(path)
    replace(folder / _OFFSETS, lambda aside: _save(aside, offsets))
    write_facts(folder / _FACTS, {"of": of, "key": key, "version": VERSION, "skipped": skipped})


def _equal(reading: Reading, first: int, later: int) -> RowError:
    """Says which records of the source have equal ids, whatever blank lines and headers stand before them."""
    reading.start = 0
    numbers = [reading.number for _ in islice(reading, later + 1)]
    problem = f"equal to that of row {numbers[first]}"
    return RowError(numbers[later], "id", problem, "equal ids", reading.path)


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save puts .npy behind a name without it
        np.save(file, array)


def _equal_ids(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the earlier ones of passages with equal ids, and the later ones, by their hashes."""
    with path.open("rb") as lines:
        hashes = id_hashes(lines, count)
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    by_place = np.argsort(order[equal + 1])
    return order[equal][by_place], order[equal + 1][by_place]


def _leave_out(path: Path, positions: np.ndarray, count: int) -> None:
    """Writes a file of lines again without some of them."""
    is_kept = np.ones(count, dtype=bool)
    is_kept[positions] = False

    def write(aside: Path) -> None:
        with path.open("rb") as lines, aside.open("wb") as file:
            file.writelines(line for line, keep in zip(lines, is_kept, strict=True) if keep)

    replace(path, write)


def _line_ends(path: Path) -> tuple[np.ndarray, str]:
    """Returns where each line of a file begins, and where the last one ends, and a hash of its content."""
    ends, seen, digest = [np.zeros(1, dtype=np.int64)], 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MAX_RECORD_BYTES):
            digest.update(block)
            ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + seen + 1)
            seen += len(block)
    return np.concatenate(ends), digest.hexdigest()
