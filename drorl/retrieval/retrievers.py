"""The retrievers by name, and what each is opened with: the one place to add another.

Nothing here imports a retriever before it is asked for: each has libraries of its own, and most are optional.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_args

from drorl.errors import InvalidInputError

if TYPE_CHECKING:
    from .corpus import Corpus

RETRIEVERS = {
    "bm25": "bm25:open_bm25",
    "dense": "dense:open_dense",
    "hybrid": "hybrid:open_hybrid",
    "http": "http:open_http",
    "milvus": "milvus:open_milvus",
    "colbert": "colbert:open_colbert",
}
"""Of each retriever the module and the function `(place, settings) -> Retriever` that opens it."""

Settings = TypeVar("Settings")


class Retriever(Protocol):
    """What finds candidates."""

    key: str
    """Of all that its answers depend on."""

    def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
        """Returns the best k passages of each query: id, title, text, score and rank, best first."""
        ...


@dataclass(frozen=True)
class Place:
    """A corpus, and where the indexes of it are: in its folder, each under its retriever's name.

    Args:
        source (`Path`, *optional*): a file of passages, or a folder that `drorl index` has made. A retriever that has
            the passages elsewhere needs none.
        folder (`Path`, *optional*): where the corpus of a file is made. Default: in the cache, by the file's path; it
            is made again when what is in the file has changed.
        format (`str`): of the file.
        on_error (`str`): `fail` or `skip`, see [`~drorl.data.reading.Reading`].
    """

    source: Path | None
    folder: Path | None = None
    format: str = "auto"
    on_error: str = "fail"

    @property
    def builds(self) -> bool:
        """Whether what is missing is made: nobody changes the folder of another who only wants to search it."""
        return self.folder is not None or self.source is None or not self.source.is_dir()

    @cached_property
    def corpus(self) -> "Corpus":
        """Opened, or made, when it is first asked for."""
        from drorl.data.packages import cache_dir

        from .corpus import Corpus

        if self.source is None:
            raise InvalidInputError("this retriever searches a corpus: name one")
        if not self.builds:
            return Corpus(self.source)
        if not self.source.is_file():
            raise InvalidInputError(f"{self.source} is no file of passages")
        name = hashlib.sha256(str(self.source.resolve()).encode()).hexdigest()[:16]
        folder = self.folder or cache_dir() / "corpora" / name
        return Corpus.build(self.source, folder, self.format, self.on_error)


def open_retriever(name: str, place: Place, given: Mapping[str, str] | None = None) -> Retriever:
    """Opens a retriever, or builds what it needs where the place allows it.

    Args:
        name (`str`): one of `RETRIEVERS`.
        place ([`Place`]): what it searches.
        given (`Mapping`, *optional*): settings by name, as texts; all others have their defaults, or, of an index that
            is there already and is not to be built, what it was made with.

    Raises:
        InvalidInputError: there is no such retriever or setting, or no index of these settings.
    """
    if name not in RETRIEVERS:
        raise InvalidInputError(f"no retriever {name!r}; there are {', '.join(RETRIEVERS)}")
    module, function = RETRIEVERS[name].split(":")
    return getattr(import_module(f".{module}", __package__), function)(place, given or {})


def settings_of(kind: type[Settings], given: Mapping[str, str], made: Mapping[str, Any] | None = None) -> Settings:
    """Returns a retriever's settings: those given as texts, else those of an index that is made, else the defaults.

    Args:
        kind (`type`): a dataclass.
        given (`Mapping`): texts by the names of its fields.
        made (`Mapping`, *optional*): an index's facts, with its `settings`.

    Raises:
        InvalidInputError: a name is none of its fields, or a text no value of one.
    """
    types = {field.name: field.type for field in fields(kind)}  # ty: ignore[invalid-argument-type]
    if unknown := sorted(given.keys() - types.keys()):
        raise InvalidInputError(f"no setting {unknown[0]!r}; there are {', '.join(types)}")
    values = (made or {}).get("settings", {}) | {name: _value(name, given[name], types[name]) for name in given}
    needed = [field.name for field in fields(kind) if field.default is MISSING]  # ty: ignore[invalid-argument-type]
    if missing := [name for name in needed if name not in values]:
        raise InvalidInputError(f"this retriever needs --set {missing[0]}=...")
    return kind(**values)


def _value(name: str, text: str, kind: Any) -> Any:
    """Reads a value of `float`, `int`, `bool` or `str`; `none` where a type has it."""
    kinds = get_args(kind) or (kind,)
    if type(None) in kinds and text == "none":
        return None
    try:
        return {"true": True, "false": False}[text] if kinds[0] is bool else kinds[0](text)
    except (ValueError, KeyError) as error:
        raise InvalidInputError(f"{name}={text!r} is no {getattr(kinds[0], '__name__', kinds[0])}") from error
