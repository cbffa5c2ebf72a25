"""Data sets of the library `datasets`: those of the hub, by name, and folders on disk.

    hotpotqa/hotpot_qa?name=distractor&split=train[:1000]        OWNER/NAME on the hub
    my_rows                                                      a folder of `save_to_disk`
    my_files?split=validation                                    a folder of data files, as `load_dataset` reads them

Behind the question mark stand arguments of `datasets.load_dataset`: `name` (of the configuration), `split` and
`revision`. No code of a data set is run: `datasets` has none of that any more.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from drorl.errors import InvalidInputError

from .files import Record

if TYPE_CHECKING:
    from datasets import Dataset  # takes a second to import, which reading files does not need

ARGUMENTS = ("name", "split", "revision")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_NAME = re.compile(r"\.(jsonl?|tsv|csv|gz|zst|txt)$")


def is_dataset(source: Path) -> bool:
    """Whether a source is a data set: a folder, or no path at all but the name of one on the hub."""
    name, _, asked = str(source).partition("?")
    if source.exists():
        return _is_saved(source)
    return bool(asked or _HUB_NAME.fullmatch(name) and not _FILE_NAME.search(name))


def _is_saved(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json"))


def open_dataset(source: Path, split: str) -> "Dataset":
    """Returns a data set; `split` is the one to take where the source names none.

    Raises:
        InvalidInputError: if it cannot be had.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    name, _, asked = str(source).partition("?")
    arguments = {"split": split, **dict(parse_qsl(asked))}
    if unknown := arguments.keys() - set(ARGUMENTS):
        raise InvalidInputError(f"{source}: {', '.join(sorted(unknown))} is none of {', '.join(ARGUMENTS)}")
    try:
        if not _is_saved(Path(name)):
            return load_dataset(name, **arguments)
        saved = load_from_disk(name)
    except (OSError, ValueError, DatasetsError) as error:
        kind = "a folder, and no data set" if Path(name).is_dir() else "no file, and no data set that can be had"
        raise InvalidInputError(f"{source} is {kind}: {' '.join(str(error).split())[:300]}") from error
    if isinstance(saved, DatasetDict) and arguments["split"] not in saved:
        raise InvalidInputError(f"{source} has no split {arguments['split']!r}; it has {', '.join(map(str, saved))}")
    return saved[arguments["split"]] if isinstance(saved, DatasetDict) else saved


def dataset_records(dataset: "Dataset") -> Iterator[Record]:
    """Yields the records of a data set, from 1; in a table what a record lacks is `None`, and is left out again."""
    for number, record in enumerate(dataset, start=1):
        yield number, _without_none(record)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
