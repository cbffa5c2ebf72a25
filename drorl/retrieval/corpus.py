"""A corpus on disk: its passages by number, in the memory of those that are asked for."""

import hashlib
import json
import mmap
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from drorl.data.files import MAX_RECORD_BYTES, records
from drorl.data.formats import PASSAGES
from drorl.data.reading import Reading
from drorl.data.rows import RowError
from drorl.data.shards import Shards
from drorl.errors import InvalidInputError

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
        try:
            facts = json.loads((folder / _FACTS).read_text())
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{folder} holds no corpus: make one with drorl index") from error
        self.key: str = facts["key"]
        """Of the content: equal passages in equal order have equal keys."""
        self._offsets = np.load(folder / _OFFSETS, mmap_mode="r")

    @classmethod
    def build(cls, source: Path, folder: Path, format: str = "auto", on_error: str = "fail") -> "Corpus":
        """Makes a corpus of a file of passages, see [`data.formats.PASSAGES`]; goes on where it was killed.

        Raises:
            RowError: a passage is broken, or its id occurs twice, and `on_error` is `fail`.
            InvalidInputError: the file cannot be read, or has no passages.
        """
        folder.mkdir(parents=True, exist_ok=True)
        reading = Reading(source, PASSAGES, format, on_error)  # ty: ignore[invalid-argument-type]
        kept = json.dumps([reading.depends, VERSION])
        facts = folder / _FACTS
        if facts.exists() and json.loads(facts.read_text())["of"] == kept:
            return cls(folder)
        facts.unlink(missing_ok=True)
        with Shards(folder / _FILE, kept) as shards:
            if shards.notes:
                reading.start = shards.notes[-1]["record"]
            passages = iter(reading)
            while block := list(islice(passages, SHARD_PASSAGES)):
                shards.add((json.dumps(passage, ensure_ascii=False) for passage in block), {"record": reading.number})
            shards.finish()
        offsets, key = _line_ends(folder / _FILE)
        if len(offsets) == 1:
            raise InvalidInputError(f"{source} has no passages")
        np.save(folder / _OFFSETS, offsets)
        _refuse_equal_ids(folder / _FILE, len(offsets) - 1, source)
        aside = facts.with_suffix(".partial")
        aside.write_text(json.dumps({"of": kept, "key": key, "passages": len(offsets) - 1}))
        aside.replace(facts)
        return cls(folder)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @cached_property
    def _bytes(self) -> mmap.mmap:
        with (self.folder / _FILE).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The passage at a position: id, title, text."""
        start, end = self._offsets[position], self._offsets[position + 1]
        return json.loads(self._bytes[start:end])

    def blocks(self, start: int, size: int) -> Iterator[list[dict[str, Any]]]:
        """Yields the passages from a position on, in blocks."""
        for first in range(start, len(self), size):
            yield [self[position] for position in range(first, min(first + size, len(self)))]


def _refuse_equal_ids(path: Path, count: int, source: Path) -> None:
    """Compares the ids of all passages, by 8 bytes of a hash of each.

    Raises:
        RowError: if an id occurs twice, with the numbers of the passages (a header is none).
    """
    hashes = np.empty(count, dtype=np.uint64)
    for position, (_, passage) in enumerate(records(path)):
        digest = hashlib.blake2b(passage["id"].encode(), digest_size=8).digest()
        hashes[position] = int.from_bytes(digest, "little")
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if len(equal):
        first, second = int(order[equal[0]]) + 1, int(order[equal[0] + 1]) + 1
        raise RowError(second, "id", f"equal to that of passage {first}", "equal ids", source)


def _line_ends(path: Path) -> tuple[np.ndarray, str]:
    """Returns where each line of a file begins, and where the last one ends, and a hash of its content."""
    ends, seen, digest = [np.zeros(1, dtype=np.int64)], 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MAX_RECORD_BYTES):
            digest.update(block)
            ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + seen + 1)
            seen += len(block)
    return np.concatenate(ends), digest.hexdigest()
