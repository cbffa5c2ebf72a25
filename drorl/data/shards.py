"""A long output in shards that survive being killed: what is finished is kept, and the whole appears at once."""

import gzip
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import zstandard
from filelock import FileLock, Timeout

from drorl.errors import InvalidInputError

from .packages import cache_dir

logger = logging.getLogger(__name__)


@contextmanager
def only_one(target: Path) -> Generator[None]:
    """Lets one process of this machine at a time make a target; the next one says so, and waits.

    The lock is kept in the cache, so that nothing lies about beside what a user has asked for.
    """
    name = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:16]
    path = cache_dir() / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is making %s: waiting until it is done", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Shards:
    """The parts of a file of lines that is being made.

    They are kept in a folder beside it, each complete or absent, until [`finish`] joins them. Whoever begins again
    with the same `key` goes on after the last one; another key begins anew. As long as the same key leads to the same
    lines, the file is the same to the byte whether its making was interrupted or not.

    Args:
        output (`Path`): the file; packed if its name ends in .gz or .zst.
        key (`str`): what the lines depend on.

    Raises:
        InvalidInputError: if there is no place for it.
    """

    def __init__(self, output: Path, key: str):
        self.output, self.folder = output, output.with_name(f".{output.name}.shards")
        if output.is_dir() or not output.parent.is_dir():
            raise InvalidInputError(f"{output} cannot be written: it is a folder, or lies in none")
        kept = self.folder / "key"
        if not kept.exists() or kept.read_text() != key:
            self._discard()
            self.folder.mkdir()
            aside = self.folder / "partial"
            aside.write_text(key)
            aside.replace(kept)
        self.notes: list[Any] = []
        """What was said of each finished shard."""
        while (note := self._path("json")).exists():
            self.notes.append(json.loads(note.read_text()))

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{len(self.notes):06d}.{suffix}"

    def _discard(self) -> None:
        """Removes the folder; its key first, so that what is left of it when killed is of no use to anybody."""
        (self.folder / "key").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, lines: Iterable[str], note: Any) -> None:
        """Keeps a shard of lines, each without its end, and what is to be known of it; whole or not at all."""
        self._path("lines").write_bytes("".join(f"{line}\n" for line in lines).encode())
        aside = self._path("partial")
        aside.write_text(json.dumps(note))
        aside.replace(self._path("json"))  # the last step: a shard counts once this exists
        self.notes.append(note)

    def lines(self) -> Iterator[bytes]:
        """Yields the lines of the finished shards."""
        for number in range(len(self.notes)):
            with (self.folder / f"{number:06d}.lines").open("rb") as shard:
                yield from shard

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves nothing behind where nothing was made."""
        if not self.notes:
            self._discard()

    def finish(self) -> None:
        """Joins the shards into the file, which replaces an earlier one, and removes them."""
        aside = self.folder / "whole"
        with aside.open("wb") as raw:
            with _packed(raw, self.output.suffix) as sink:
                for number in range(len(self.notes)):
                    with (self.folder / f"{number:06d}.lines").open("rb") as shard:
                        shutil.copyfileobj(shard, sink)
            raw.flush()
            os.fsync(raw.fileno())
        aside.replace(self.output)
        self._discard()


def _packed(raw: Any, suffix: str) -> Any:
    """A stream into another one, the same bytes whenever it is written."""
    if suffix == ".gz":
        return gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)
    if suffix == ".zst":
        return zstandard.ZstdCompressor().stream_writer(raw, closefd=False)
    return nullcontext(raw)
