"""The fields of a record: each as what it has to be, or the `Problem` that says what it is instead."""

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
MAX_TEXT = 1_000_000
"""Characters; a longer text is no passage."""


class Problem(ValueError):
    """What is wrong with a record.

    Args:
        field (`str`): where.
        kind (`str`): what, in the same words for every record.
        seen (`object`): what is there instead.
    """

    def __init__(self, field: str, kind: str, seen: object = None):
        self.field, self.kind = field, kind
        self.seen = "" if seen is None else f": {repr(seen)[:80]}"
        super().__init__(f"{field}: {kind}{self.seen}")


class LeftOut(Exception):
    """A record that is whole, and not wanted."""


def refuse_unwritable(name: str, value: object) -> None:
    """Refuses what JSON has no number for, and NUL, which is a character of no text, anywhere in a value.

    Raises:
        Problem: there is one; `name` says where.
    """
    left = [value]
    while left:
        match left.pop():
            case dict() as items:
                left += items.values()
            case list() as items:
                left += items
            case str() as text if "\0" in text:
                raise Problem(name, "a NUL character", text)
            case float() as number if not math.isfinite(number):
                raise Problem(name, "no number", number)


def text_of(record: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """Returns a text of a record."""
    value = record.get(name, default)
    if isinstance(value, (float, str)):
        refuse_unwritable(name, value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # ids and years
    if not isinstance(value, str):
        raise Problem(name, "no text", value)
    if len(value) > MAX_TEXT:
        raise Problem(name, f"a text of more than {MAX_TEXT:,} characters", len(value))
    return value


def list_of(record: Mapping[str, Any], name: str, default: list | None = None) -> list:
    """Returns a list of a record."""
    value = record.get(name, default)
    if not isinstance(value, list):
        raise Problem(name, "no list", value)
    return value


def answers_of(values: object, name: str) -> list[str]:
    """Returns gold answers, each once, in their order; one answer may stand by itself."""
    values = [values] if isinstance(values, (str, int, float)) else values
    if not isinstance(values, list):
        raise Problem(name, "no list of answers", values)
    answers = [text_of({name: value}, name) for value in values]
    for answer in answers:
        if _BRACKETED.fullmatch(answer) and isinstance(_literal(answer), (list, tuple, set, dict)):
            raise Problem(name, "an answer that is the text of a list", answer)
    return list(dict.fromkeys(answer for answer in answers if answer.strip()))


_BRACKETED = re.compile(r"\s*(\[.*\]|\(.*\)|\{.*\})\s*", re.DOTALL)  # else 1,000 would be a pair of numbers


def _literal(text: str) -> object:
    """What a Python literal stands for, `None` if a text is none; nothing is evaluated."""
    try:
        return ast.literal_eval(text.strip()) if len(text) < MAX_TEXT else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def literal_list(text: str) -> list | None:
    """The list of texts that a Python literal stands for."""
    value = _literal(text)
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def candidate(title: str, text: str, **more: Any) -> Row:
    """Returns a passage; what is `None` is left out."""
    return {"title": title, "text": text, **{name: value for name, value in more.items() if value is not None}}


def score_of(record: Mapping[str, Any]) -> float | None:
    value = record.get("score")
    try:
        score = None if value is None else float(value)  # DPR writes them as texts
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if score is not None and not math.isfinite(score):
        raise Problem("score", "no number", value)
    return score


def objects_of(record: Mapping[str, Any], name: str) -> list[dict]:
    items = list_of(record, name)
    for item in items:
        if not isinstance(item, dict):
            raise Problem(name, "no list of records", item)
    return items
