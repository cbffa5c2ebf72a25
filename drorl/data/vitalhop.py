"""VitalHop: two-hop questions over real passages, which no single passage answers.

"What is the highest point of the country where Lake Turkana is located?" One passage says in which country the lake
is, another what that country's highest point is, and nothing but the first tells which of several such passages the
second one is.

1. First hops: Wikipedia's vital articles (as in [`vitalqa`]) whose first passage names a single country, by its name
   for a place, by the adjective of its people for a person. The passage has to read so, see [`link_of`].
2. Second hops: what the World Factbook says of that country in one field, see [`factbook`].
3. Candidates: three countries, the right one and those of the two articles that are most like the first hop's, from
   the same part of the world if there are any (a name such as Osaka tells much), with three passages each: that
   article, the fact asked for, and another fact. Countries and facts are level, so nothing but reading tells them
   apart; an answer stands in one passage alone. Their order is BM25's.
4. The split is a hash of the country, of all candidates: no passage of test stands in train, nor its country.

Links are found by matching strings: of 40 questions read no link was wrong, and three were debatable (the home country
of an ancient Greek, a second anthem). Figures are those of the Factbook's edition of 2015, and out of date.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value, load_from_disk
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from drorl.data import packages
from drorl.data.factbook import FACTBOOK, RELATIONS, Country, Fact, read_countries
from drorl.data.texts import PASSAGES_WHEEL, Passage, hash_fraction, passages_of, read_articles, rounded_mean
from drorl.data.vitalqa import Corpus, analyse
from drorl.metrics import contains_answer

VERSION = 1  # raise it whenever the build below changes its result
NUM_COUNTRIES = 3  # of the candidates of a question
QUESTIONS_PER_ARTICLE, MAX_ARTICLES_PER_COUNTRY = 5, 30
SPLIT_BOUNDS = {"test": 0.2, "validation": 0.3, "train": 1.0}  # of a hash of the country
RECALL_AT = (2, 5, 8)

LICENCES = {"articles (Wikipedia)": "CC BY-SA 4.0", "facts (CIA World Factbook)": FACTBOOK.licence}
WARNING = "Links are matched by string. Figures are those of the World Factbook's edition of 2015, and out of date."

_PLACES = (
    "archipelago|bay|borough|building|canal|capital|castle|cathedral|cave|church|city|cliff|coast|commune|dam|desert|"
    "district|fort|glacier|gorge|island|lake|landmark|metropolis|mosque|mountain|municipality|museum|palace|park|"
    "peninsula|plateau|port|prefecture|province|pyramid|region|reef|river|ruins|site|state|station|strait|"
    "temple|territory|tomb|tower|town|university|valley|village|volcano|waterfall"
)
_PEOPLE = (
    "academic|activist|actor|actress|architect|artist|astronomer|author|biologist|chemist|choreographer|composer|"
    "conductor|critic|dancer|director|dramatist|economist|emperor|engineer|explorer|filmmaker|general|guitarist|"
    "historian|industrialist|inventor|journalist|king|lawyer|leader|linguist|mathematician|musician|naturalist|"
    "novelist|officer|painter|philosopher|photographer|physician|physicist|pianist|player|playwright|poet|politician|"
    "psychologist|revolutionary|scholar|scientist|sculptor|singer|sociologist|songwriter|statesman|theologian|"
    "theorist|writer"
)
_COMES = {"is": "comes", "was": "came"}
_NO_COUNTRY = ("New Mexico", "New England", "Northern Ireland", "Guinea pig", "Lake Chad", "Inner Mongolia")

_STRING = Value("string")
_CANDIDATE = {"id": _STRING, "title": _STRING, "text": _STRING, "score": Value("float64")}
_METADATA = {"gold_ids": List(_STRING), "relation": _STRING, "country": _STRING, "entity": _STRING}
FEATURES = Features(
    {"id": _STRING, "query": _STRING, "answers": List(_STRING)}
    | {"candidates": List({**_CANDIDATE, "rank": Value("int64"), "is_gold": Value("bool")}), "metadata": _METADATA}
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Link:
    """An article whose first passage says to which country its subject belongs, and noun phrases for that country."""

    passage: Passage
    country: str
    phrases: Sequence[str]


class Linker:
    """Finds the one country that a passage names.

    Args:
        countries (`Sequence[Country]`): those that are looked for.
    """

    def __init__(self, countries: Sequence[Country]) -> None:
        self._country = {country.name: country.name for country in countries}
        self._country |= {country.adjective: country.name for country in countries if country.adjective}
        self._names = re.compile(_any_of([*self._country, *_NO_COUNTRY]))
        names = _any_of(country.name for country in countries)
        adjectives = _any_of(country.adjective for country in countries if country.adjective)
        is_place, is_person = r"^[^.]*?\bis (?:an?|the|one of the) ", r"^[^.]*?\b(?P<be>is|was) an? (?:[a-z]+ )?"
        self._place = re.compile(rf"{is_place}[^.,;]*?\b(?:{_PLACES})s?\b[^.;]*? (?:in|of) [^.;]*?{names}")
        self._person = re.compile(rf"{is_person}{adjectives} (?!and\b)(?:[^\s.;]+ ){{0,5}}?(?:{_PEOPLE})\b")

    def link_of(self, article: Passage) -> Link | None:
        """The link that an article's first passage makes, or `None`.

        The passage has to name one country and no other, the title none; it has to say that its subject is a place in
        that country, or a person of its people.
        """
        passage = {**passages_of(article)[0], "title": article["title"]}
        named = {self._country.get(name, "") for name in self._names.findall(passage["text"])}
        if len(named) != 1 or "" in named or self._names.search(article["title"]):
            return None
        subject = _subject(article)
        if match := self._person.search(passage["text"]):
            phrases = [f"the home country of {subject}", f"the country that {subject} {_COMES[match['be']]} from"]
        elif self._place.search(passage["text"]):
            phrases = [f"the country where {subject} is located", f"the country in which {subject} lies"]
        else:
            return None
        return Link(passage, named.pop(), phrases)


def _any_of(names: Iterable[str]) -> str:
    """A pattern for any of some names as whole words, the longest first."""
    return rf"(?<![\w-])({'|'.join(map(re.escape, sorted(names, key=lambda name: (-len(name), name))))})(?![\w-])"


def _subject(article: Passage) -> str:
    """An article's title as it is said: without what tells it from others, with the article that its text has."""
    title = re.sub(r" \(.*\)$", "", article["title"])
    return f"the {title}" if article["text"].startswith(f"The {title}") else title


def find_links(articles: Sequence[Passage], countries: Sequence[Country]) -> list[Link]:
    """The links of all articles, up to `MAX_ARTICLES_PER_COUNTRY` of a country, in the order of a hash."""
    linker, counts, kept = Linker(countries), Counter[str](), []
    for article in sorted(articles, key=lambda article: hash_fraction(article["id"])):
        link = linker.link_of(article)
        if link is not None and counts[link.country] < MAX_ARTICLES_PER_COUNTRY:
            counts[link.country] += 1
            kept.append(link)
    return kept


class Pool:
    """The passages of one split: first and second hops, and what BM25 says of them.

    Args:
        links (`Sequence[Link]`): see [`find_links`].
        countries (`Sequence[Country]`): those of the links among them.
    """

    def __init__(self, links: Sequence[Link], countries: Sequence[Country]) -> None:
        self.facts = {country.name: country.facts for country in countries}
        self._region = {country.name: country.region for country in countries}
        self._links = list(links)
        self._articles = Corpus([link.passage for link in links])
        facts = [fact.passage for of_country in self.facts.values() for fact in of_country.values()]
        self._index = Corpus([*self._articles.passages, *facts])

    def rows(self, link: Link) -> Iterator[Row]:
        """The questions about the country of a link that have good candidates, in the order of a hash."""
        [hits] = self._articles.search(analyse([link.passage["text"]]), len(self._links))
        alike = [link, *(self._links[position] for position, _ in hits)]
        alike.sort(key=lambda other: self._region[other.country] != self._region[link.country])  # stable
        for fact in sorted(self.facts[link.country].values(), key=lambda fact: hash_fraction(_key(link, fact))):
            row = self._row(alike, fact)
            if row is not None:
                yield row

    def _row(self, alike: Sequence[Link], fact: Fact) -> Row | None:
        """The question for a fact of the first link's country; `None` if there are no good candidates for it."""
        key, link = _key(alike[0], fact), alike[0]
        query = _pick(fact.relation.wordings, key).format(country=_pick(link.phrases, f"{key}/phrase"))
        passages = self._passages(alike, fact, key)
        others = [passage["text"] for passage in passages if passage is not fact.passage]
        if not passages or any(contains_answer(text, fact.answers) for text in [query, *others]):
            return None
        [hits] = self._index.search(analyse([query]), len(self._index.passages))
        scores = {self._index.passages[position]["id"]: score for position, score in hits}
        ranked = sorted(passages, key=lambda p: (-scores.get(p["id"], 0.0), hash_fraction(f"{key}/{p['id']}")))
        golds = [link.passage["id"], fact.passage["id"]]
        candidates = [
            {**p, "score": scores.get(p["id"], 0.0), "rank": rank, "is_gold": p["id"] in golds}
            for rank, p in enumerate(ranked, start=1)
        ]
        about = {"relation": fact.relation.name, "country": link.country, "entity": link.passage["title"]}
        return {"id": key, "query": query, "answers": fact.answers, "candidates": candidates} | {
            "metadata": {"gold_ids": golds, **about}
        }

    def _passages(self, alike: Sequence[Link], fact: Fact, key: str) -> list[Passage]:
        """Of each country the article, the fact asked for, and another one; empty if there are not enough of them."""
        first: dict[str, Link] = {}
        for link in alike:
            if fact.relation.name in self.facts[link.country]:
                first.setdefault(link.country, link)
        links = list(first.values())[:NUM_COUNTRIES]
        known = [self.facts[link.country] for link in links]
        shared = set.intersection(*map(set, known)) - {fact.relation.name}
        if len(links) < NUM_COUNTRIES or not shared:
            return []
        relations = fact.relation.name, _pick(sorted(shared), f"{key}/other")
        return [link.passage for link in links] + [facts[name].passage for facts in known for name in relations]


def make_rows(links: Sequence[Link], countries: Sequence[Country]) -> list[Row]:
    """The rows of one split: of each link some `QUESTIONS_PER_ARTICLE`, all in the order of a hash, which mixes them.

    Args:
        links (`Sequence[Link]`): see [`find_links`].
        countries (`Sequence[Country]`): those of the links among them; all candidates are about them.
    """
    pool = Pool(links, countries)
    rows = [row for link in links for row in islice(pool.rows(link), QUESTIONS_PER_ARTICLE)]
    return sorted(rows, key=lambda row: hash_fraction(row["id"]))


def _key(link: Link, fact: Fact) -> str:
    """The id of the question for a fact that starts from a link."""
    return f"{link.passage['id']}/{fact.relation.name}"


def _pick(choices: Sequence[str], key: str) -> str:
    """One of some choices, by the hash of a key."""
    return choices[int(hash_fraction(key) * len(choices))]


def split_of(country: str) -> str:
    """The split that a country belongs to, with all that is said and asked about it."""
    return next(split for split, bound in SPLIT_BOUNDS.items() if hash_fraction(country) < bound)


def describe_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """What a split is like: its size, the gold recall of two orders of its candidates, lengths, and a checksum.

    `one` and `both` are recall@k of at least one and of both golds; of random order it is their expectation.
    """
    golds = [[c["is_gold"] for c in row["candidates"]] for row in rows]
    texts = [c["text"] for row in rows for c in row["candidates"]]
    return {
        "rows": len(rows),
        "countries": len({row["metadata"]["country"] for row in rows}),
        "articles": len({row["metadata"]["entity"] for row in rows}),
        "by_relation": dict(sorted(Counter(row["metadata"]["relation"] for row in rows).items())),
        "bm25_order": {
            name: {str(k): rounded_mean(sum(gold[:k]) >= at_least for gold in golds) for k in RECALL_AT}
            for name, at_least in (("one", 1), ("both", 2))
        },
        "random_order": {
            name: {str(k): rounded_mean(_chance(len(gold), k, at_least) for gold in golds) for k in RECALL_AT}
            for name, at_least in (("one", 1), ("both", 2))
        },
        "mean_query_words": rounded_mean(len(row["query"].split()) for row in rows),
        "mean_passage_words": rounded_mean(len(text.split()) for text in texts),
        "sha256": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
    }


def _chance(num_candidates: int, k: int, at_least: int) -> float:
    """Probability that `k` candidates drawn at random hold one, or both, of two golds."""
    without = num_candidates - 2
    return 1.0 - sum(math.comb(2, g) * math.comb(without, k - g) for g in range(at_least)) / math.comb(
        num_candidates, k
    )


def build_key() -> str:
    """Name of the build: its version, and a hash of all it is made from."""
    pinned = [dict(PASSAGES_WHEEL.files), FACTBOOK.sha256]
    patterns = [_PLACES, _PEOPLE, _NO_COUNTRY, [[r.name, r.path, r.pattern, list(r.wordings)] for r in RELATIONS]]
    made_from = [pinned, patterns, NUM_COUNTRIES, QUESTIONS_PER_ARTICLE, MAX_ARTICLES_PER_COUNTRY, SPLIT_BOUNDS]
    return f"vitalhop-v{VERSION}-{hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]}"


def load_vitalhop(cache_dir: Path | None = None) -> DatasetDict:
    """VitalHop with its splits `train`, `validation` and `test`, built on first use (half a minute and a download).

    A row is `{"id", "query", "answers", "candidates", "metadata"}`: nine candidates in BM25's order, each
    `{"id", "title", "text", "score", "rank", "is_gold"}`, two of them gold; `metadata` has their ids, first hop first,
    as `gold_ids`, and the `relation`, the `country` and the `entity` of the question.

    Args:
        cache_dir (`Path`, *optional*): defaults to [`~drorl.data.packages.cache_dir`].

    Raises:
        DownloadError: a package is not in the cache and its index cannot be reached.
    """
    return load_from_disk(_built(cache_dir) / "rows")


def vitalhop_facts(cache_dir: Path | None = None) -> dict[str, Any]:
    """The facts of the build [`load_vitalhop`] gives: sources, sizes, recall, licences and the warning."""
    return json.loads((_built(cache_dir) / "facts.json").read_text(encoding="utf-8"))


def _built(cache_dir: Path | None) -> Path:
    """Folder of the build, made if needed."""
    cache = cache_dir or packages.cache_dir()
    return packages.build_once(cache / "data" / build_key(), lambda folder: _build(folder, cache), "Building VitalHop")


def _build(folder: Path, cache: Path) -> None:
    """Fetch, link, split, and write `rows` and `facts.json`, which tell nothing of when and where, to `folder`."""
    (introductions,) = packages.fetch_wheel(PASSAGES_WHEEL, cache).values()
    countries = read_countries(packages.fetch_tarball(FACTBOOK, cache))
    links = find_links(read_articles(introductions), countries)
    dataset, parts = DatasetDict(), {}
    for split in ("train", "validation", "test"):
        rows = make_rows(
            [link for link in links if split_of(link.country) == split],
            [country for country in countries if split_of(country.name) == split],
        )
        columns = {name: [row[name] for row in rows] for name in FEATURES}
        dataset[split], parts[split] = Dataset.from_dict(columns, features=FEATURES), describe_rows(rows)
    dataset.save_to_disk(folder / "rows")
    facts = {
        "name": "VitalHop",
        "version": VERSION,
        "warning": WARNING,
        "licences": LICENCES,
        "packages": {package.requirement: package.licence for package in (PASSAGES_WHEEL, FACTBOOK)},
        "countries": len(countries),
        "links": len(links),
        "splits": parts,
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def print_facts(console: Console, facts: Mapping[str, Any] | None = None) -> None:
    """Print the facts, by default those of the embedded build: a table, the relations, the warning, the licences."""
    facts = vitalhop_facts() if facts is None else facts
    headings = (
        "split",
        "rows",
        "countries",
        "articles",
        *(f"{what}@{k}" for what in ("one", "both") for k in RECALL_AT),
    )
    table = Table(*headings, box=SIMPLE_HEAD, title="VitalHop: gold recall@k, %, of BM25 / of random order")
    relations = Counter[str]()
    for name, part in facts["splits"].items():
        orders = [part["bm25_order"], part["random_order"]]
        recalls = (
            "/".join(f"{100 * order[what][str(k)]:.0f}" for order in orders)
            for what in ("one", "both")
            for k in RECALL_AT
        )
        table.add_row(name, *map(str, (part["rows"], part["countries"], part["articles"])), *recalls)
        relations.update(part["by_relation"])
    console.print(table)
    console.print(", ".join(f"{name} {count}" for name, count in relations.most_common()))
    console.print(facts["warning"], style="bold")
    console.print("; ".join(f"{what}: {licence}" for what, licence in facts["licences"].items()))
