"""Files as people have them: JSON lines, JSON arrays and objects, tables; plain, gzip or zstd; read as a stream.

Reading takes the memory of one record, whatever the file holds, and what is wrong with a record is said with its
number, its field and what was seen. Nothing of a file is ever evaluated, unpickled or executed.
"""

import csv
import gzip
import io
import json
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import ijson
import zstandard

from drorl.errors import InvalidInputError

from .rows import RowError

MAX_RECORD_BYTES = 1 << 26
"""A longer line is not read: it is no row, and there is no telling where it ends."""
MAX_EXPANSION = 200
"""Texts shrink four to twenty times; a stream that grows more than this is made to fill the memory or the disk."""
_FREE_BYTES = 1 << 24
_BUFFER_BYTES = 1 << 16
_CELL_LINES = 10_000
"""A cell in quotes that has more is one whose quote was left open."""
_GZIP, _ZSTD, _BOM = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf"
_TABLES = (".tsv", ".csv")

Record: TypeAlias = tuple[int, Any]
"""The number of a record in its file, from 1, and the record: parsed JSON, a list of cells, or the `RowError` that
says why there is none."""

csv.field_size_limit(MAX_RECORD_BYTES)  # a quote that is left open is looked for the end of: up to here


class _Expanding(io.RawIOBase):
    """A decompressed stream that is refused once it has grown out of all proportion to the file."""

    def __init__(self, stream: Any, compressed: BinaryIO, path: Path):
        self._stream, self._compressed, self._path, self._count = stream, compressed, path, 0

    def _is_cut_off(self) -> bool:
        """zstandard's reader ends quietly in the middle of a frame; its parser of frames does not."""
        self._compressed.seek(0)
        last = zstandard.ZstdDecompressor().decompressobj()
        while block := self._compressed.read(_BUFFER_BYTES):
            while block:
                if last.eof:
                    last = zstandard.ZstdDecompressor().decompressobj()
                last.decompress(block)
                block = last.unused_data
        return not last.eof

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise InvalidInputError(f"{self._path} is damaged or cut off: {error}") from error
        if not data and isinstance(self._stream, zstandard.ZstdDecompressionReader) and self._is_cut_off():
            raise InvalidInputError(f"{self._path} is damaged or cut off: its last frame has no end")
        self._count += len(data)
        if self._count > _FREE_BYTES + MAX_EXPANSION * self._compressed.tell():
            raise InvalidInputError(
                f"{self._path} grows more than {MAX_EXPANSION} times when it is unpacked, which no text does: "
                "unpack it yourself if you trust it"
            )
        buffer[: len(data)] = data
        return len(data)


def open_stream(path: Path) -> io.BufferedReader:
    """Opens a file for reading, unpacked if it is gzip or zstd, whatever its name says; a byte order mark is skipped.

    Raises:
        InvalidInputError: if it is not a file that can be read.
    """
    if path.is_dir():
        raise InvalidInputError(f"{path} is a folder, and a file is needed")
    if path.exists() and not path.is_file():
        raise InvalidInputError(f"{path} is no regular file: it is read more than once, so save it first")
    try:
        raw = path.open("rb")
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from error
    start = raw.peek(len(_ZSTD))
    unpacked: Any = raw
    if start.startswith(_GZIP):
        unpacked = _Expanding(gzip.GzipFile(fileobj=raw), raw, path)
    elif start.startswith(_ZSTD):
        unpacked = _Expanding(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), raw, path)
    stream = io.BufferedReader(unpacked, _BUFFER_BYTES)
    if stream.peek(len(_BOM)).startswith(_BOM):
        stream.read(len(_BOM))
    return stream


def text_of(data: bytes, number: int) -> "str | RowError":
    """Decodes a line."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        seen = data[max(0, error.start - 10) : error.end + 10]
        return RowError(number, "", f"byte {error.start + 1} is no UTF-8: {seen!r}", "no UTF-8")
    return RowError(number, "", "a NUL character") if "\0" in text else text


def lines(stream: io.BufferedReader, blank: bool = False) -> Iterator[tuple[int, "str | RowError"]]:
    """Yields the number and the text of each line, without its end; those that are `blank` only if asked for."""
    number = 0
    while data := stream.readline(MAX_RECORD_BYTES):
        number += 1
        if len(data) == MAX_RECORD_BYTES and not data.endswith(b"\n"):
            while (rest := stream.readline(_BUFFER_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, RowError(number, "", f"a line of more than {MAX_RECORD_BYTES >> 20} MiB")
        elif blank or data.strip():
            yield number, text_of(data.rstrip(b"\r\n"), number)


def parsed(text: str, number: int) -> Any:
    """Returns what a line of JSON says, or the `RowError`."""
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # the escape of half a character; alone it can be written nowhere
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        return RowError(number, "", f"half of a character (a surrogate): {error.object[error.start]!r}", "no UTF-8")
    except json.JSONDecodeError as error:
        seen = text[max(0, error.pos - 20) : error.pos + 20]
        return RowError(number, "", f"no JSON, {error.msg} at character {error.pos + 1}: {seen!r}", "no JSON")
    except (ValueError, RecursionError) as error:
        return RowError(number, "", f"no JSON that can be read: {error}", "no JSON")


def records(path: Path, quoted: bool = True) -> Iterator[Record]:
    """Yields the records of a file: lines or items of JSON, or the rows of a table (.tsv, .csv; also .tsv.gz ...).

    In a table a cell in quotes may hold anything, and a quote in it is doubled; unless it is not `quoted`: then a
    quote is a character like others.

    Of one JSON object over several lines, or of one that maps names to lists of records and so is none itself, each
    entry is a record: `{"key": ..., "value": ...}`.

    Raises:
        InvalidInputError: if the file cannot be read, or is damaged in a way that no later record can be found.
    """
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst")), "")
    with open_stream(path) as stream:
        first = stream.readline(MAX_RECORD_BYTES).strip()
        alone = not stream.peek(1).strip()
    is_object = suffix != ".jsonl" and first.startswith(b"{") and _is_whole_object(first, alone)
    with open_stream(path) as stream:
        if suffix in _TABLES:
            yield from _cells(stream, "\t" if b"\t" in first else ",", quoted)  # DPR's qa.csv has tabs
        elif first.startswith(b"[") or is_object:
            yield from _streamed(stream, path, "" if is_object else "item")
        else:
            for number, line in lines(stream):
                yield number, line if isinstance(line, RowError) else parsed(line, number)


def _is_whole_object(first: bytes, alone: bool) -> bool:
    """Whether a file is one JSON object by its first line: that opens it, or is all of it and no record."""
    try:
        entry = json.loads(first)
    except (ValueError, RecursionError):
        return first == b"{" or len(first) == MAX_RECORD_BYTES  # anything else is a line that was cut off
    return alone and len(entry) > 0 and all(isinstance(v, list) and _are_objects(v) for v in entry.values())


def _are_objects(items: list) -> bool:
    return len(items) > 0 and all(isinstance(item, dict) for item in items)


class _Metered:
    """A stream of which no more than one record is read between two records.

    Args:
        stream (`io.BufferedReader`): what is read.
    """

    def __init__(self, stream: io.BufferedReader):
        self._stream, self.read_bytes = stream, 0

    def read(self, size: int) -> bytes:
        self.read_bytes += size
        if self.read_bytes > MAX_RECORD_BYTES + _BUFFER_BYTES:
            raise ijson.JSONError(f"a record of more than {MAX_RECORD_BYTES >> 20} MiB")
        return self._stream.read(size)


def _streamed(stream: io.BufferedReader, path: Path, prefix: str) -> Iterator[Record]:
    number, metered = 0, _Metered(stream)
    try:
        if prefix:
            for number, item in enumerate(ijson.items(metered, prefix, use_float=True), start=1):
                metered.read_bytes = 0
                yield number, item
        else:
            for number, (key, value) in enumerate(ijson.kvitems(metered, "", use_float=True), start=1):
                metered.read_bytes = 0
                yield number, {"key": key, "value": value}
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: no JSON after record {number}: {' '.join(str(error).split())}") from error


def _cells(stream: io.BufferedReader, delimiter: str, quoted: bool) -> Iterator[Record]:
    """Yields the rows of a table, each with the number of its first line."""
    source = lines(stream, blank=True)
    ahead: deque[tuple[int, str | RowError]] = deque()  # what a quote left open had taken in is read again
    taken: list[tuple[int, str | RowError]] = []

    def texts() -> Iterator[str]:
        while len(taken) < _CELL_LINES and (line := ahead.popleft() if ahead else next(source, None)) is not None:
            taken.append(line)
            yield "\n" if isinstance(line[1], RowError) else f"{line[1]}\n"

    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = csv.reader(texts(), delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        taken.clear()
        try:
            cells = next(rows, None)
        except csv.Error as error:
            cells = _refused(error, *taken[0])
            ahead.extendleft(reversed(taken[1:]))
            del taken[1:]
            rows = csv.reader(texts(), delimiter=delimiter, quoting=quoting, strict=True)
        if cells is None:
            return
        damaged = next((line for _, line in taken if isinstance(line, RowError)), None)
        if damaged or cells:
            yield taken[0][0], damaged or cells


def _refused(error: csv.Error, number: int, line: str | RowError) -> RowError:
    """Why a row of a table is none."""
    problem = "no row of a table, or a quote is left open"
    return RowError(number, "", f"{problem} ({error}): {str(line)[:80]!r}", problem)
