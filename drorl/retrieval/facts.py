"""What an index is of: a small file of JSON beside it, written last, so that an index with its facts is whole."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drorl.errors import InvalidInputError


def read_facts(path: Path) -> dict[str, Any] | None:
    """Returns the facts of a file, `None` if there are none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Writes facts, all or nothing."""
    replace(path, lambda aside: aside.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8"))


@contextmanager
def damage_named(folder: Path) -> Generator[None]:
    """Says of files that were whole once, and cannot be opened, that they are damaged.

    Raises:
        InvalidInputError: they are.
    """
    try:
        yield
    except (OSError, ValueError, EOFError, LookupError) as error:
        said = " ".join(str(error).split())[:200]
        raise InvalidInputError(f"{folder} is damaged ({said}): delete it, and make it again") from error


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file aside and puts it in its place: who has the old one open, or mapped, keeps it as it was."""
    aside = path.with_name(f"{path.name}.partial")
    write(aside)
    aside.replace(path)
