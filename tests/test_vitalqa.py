"""The build of VitalQA, step by step on a made-up corpus, and the real one once."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drorl.data import packages, texts, vitalqa
from drorl.data.rows import validate_rows
from drorl.data.texts import Question, distinct_questions, passages_of, read_articles, read_questions
from drorl.data.vitalqa import Corpus, make_rows, split_of, to_dataset

ARTICLES = {
    "Danube": "The Danube is a river that flows through Vienna and Budapest before it reaches the Black Sea.",
    "Rhine": "The Rhine is a river that flows through Basel and Cologne before it reaches the North Sea.",
    "Thames": "The Thames is a river that flows through Oxford and London before it reaches the North Sea.",
    "Vienna": "Vienna is the capital of Austria, a city of music whose opera house opened in the year 1869.",
    "Cologne": "Cologne is a city of Germany whose cathedral was finished only in the nineteenth century.",
}


@pytest.fixture(scope="module")
def articles() -> list[dict[str, str]]:
    """The five articles above, each short enough to be one passage."""
    return [{"id": title, "title": title, "text": text} for title, text in ARTICLES.items()]


def question(query: str, *answers: str, source: str = "trivia") -> Question:
    """A question whose id is its text."""
    return Question(query, source, query, list(answers))


def rows_of(
    articles: list[dict[str, str]], questions: Sequence[Question], num_candidates: int = 3
) -> list[dict[str, Any]]:
    """The rows of the questions that pass the filter."""
    return make_rows(questions, articles, [p for a in articles for p in passages_of(a)], num_candidates)


def kept(articles: list[dict[str, str]], *questions: Question) -> dict[str, str]:
    """Query -> gold of the questions that pass the filter, with three candidates each."""
    return {row["query"]: row["gold"] for row in rows_of(articles, questions)}


def test_a_supported_question_is_kept_with_its_gold(articles: list[dict[str, str]]) -> None:
    """A question is kept when an article contains an answer and shares enough of its terms; that one is the gold."""
    river = question("The river that flows by Cologne and Basel", "Rhine", "Rhein")
    assert kept(articles, river) == {river.query: "Rhine"}


@pytest.mark.parametrize(
    ("dropped", "why"),
    [
        (question("The river that flows by Cologne and Basel", "Po"), "no candidate contains an answer"),
        (
            question("The river Rhine that reaches the North Sea", "Rhine"),
            "the question has the answer",
        ),
        (
            question("The river that flows into the sea", "Vienna and Budapest before it reaches the Black Sea"),
            "the answer has more than six tokens",
        ),
        (question("A river", "Rhine"), "only one term is shared"),
        (question("Through the river", "Rhine"), "a function word is no second term"),
        (question("The river that flows by Cologne", "the", "?"), "the answers are empty once normalised"),
        (question("The opera house of Austria", "Vienna"), "too few passages share a term"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_an_unsupported_question_is_dropped(articles: list[dict[str, str]], dropped: Question, why: str) -> None:
    """Each condition of the filter is enough to drop a question by itself."""
    assert kept(articles, dropped) == {}, why


def test_coverage_is_asked_for_by_source(articles: list[dict[str, str]]) -> None:
    """A passage that covers about half of a question's idf mass supports it where 40 % will do, not 70 %."""
    query = "The river that flows by Basel and zebras"
    assert kept(articles, question(query, "Rhine", source="trivia")) == {query: "Rhine"}
    assert kept(articles, question(query, "Rhine", source="wq")) == {}


def test_answer_words_do_not_count_as_coverage(articles: list[dict[str, str]]) -> None:
    """Terms of the answer are taken out of the question first: sharing them is what containing an answer is."""
    sea = "The sea that is black"
    assert kept(articles, question(sea, "Budapest")) == {sea: "Danube"}
    assert kept(articles, question(sea, "Black Sea")) == {}


def test_candidates_are_in_the_retrievers_order(articles: list[dict[str, str]]) -> None:
    """Scores fall, equal ones are in the corpus' order, and passages without a shared term are no candidates."""
    (hits,) = Corpus(articles).search(vitalqa.analyse(["The river that reaches the North Sea"]), k=5)
    assert [list(ARTICLES)[position] for position, _ in hits] == ["Rhine", "Thames", "Danube"]
    assert hits[0][1] == hits[1][1] > hits[2][1] > 0


def test_questions_with_one_gold_share_a_split(articles: list[dict[str, str]]) -> None:
    """The split is a function of the gold article, so no article is gold in two of them, and no row is lost."""
    queries = [f"The river that flows by {city}" for city in ("Basel", "Cologne", "London", "Oxford", "Vienna")]
    rows = rows_of(articles, [question(query, "Rhine", "Thames", "Danube") for query in queries])
    golds = {name: set(part["gold"]) for name, part in to_dataset(rows).items()}
    assert sum(part.num_rows for part in to_dataset(rows).values()) == len(rows) == 5
    assert all(split_of(gold) == name for name, of_split in golds.items() for gold in of_split)
    assert set().union(*golds.values()) == {"Rhine", "Thames", "Danube"}


def test_splits_have_their_shares() -> None:
    """Of many gold articles, the three splits get about the shares asked for: 19, 8 and 73 %."""
    splits = [split_of(f"passage {i}") for i in range(5000)]
    for split, share in {"test": 0.19, "validation": 0.08, "train": 0.73}.items():
        assert splits.count(split) / 5000 == pytest.approx(share, abs=0.02)


def test_the_build_is_deterministic(articles: list[dict[str, str]]) -> None:
    """The same input in another order of questions gives the same rows, byte for byte, and they are valid rows."""
    questions = [question(f"The river that flows by {city}", "Rhine", "Thames") for city in ("Basel", "London")]
    rows = rows_of(articles, questions)
    again = rows_of(articles, questions[::-1])
    assert json.dumps(rows) == json.dumps(again)
    assert len(rows) == 2
    validate_rows(rows, num_selected=3, require_scores=True)


def test_equal_questions_are_kept_once() -> None:
    """Of questions that differ in case, punctuation or articles only, the first stays, in its place."""
    questions = [question("Who is the king?", "A"), question("where"), question("who is king", "B")]
    assert distinct_questions(questions) == questions[:2]


def test_malformed_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    """A row with unbalanced quotes, no list, code, or no answers costs itself alone; quoted rows are read in full."""
    path = tmp_path / "topics.dpr.trivia.dev.txt"
    good = [
        "What is\u0085it?\t['this', \"that's\"]\r",  # U+0085 ends no row
        '"""Who sang """"Help""""?"""\t"[\'The Beatles\', ""The Fab Four\'s""]"\r',
    ]
    bad = ["Q\t['a", "Q\t'a'", "Q\t[]", "Q\t[1]", "Q", "\t['a']", "Q\t__import__('os').getcwd()", "Q\t\"['a'] x\" y"]
    path.write_text("\n".join([good[0], *bad, good[1], ""]), encoding="utf-8", newline="")
    questions, malformed = read_questions(path, "trivia")
    assert malformed == len(bad)
    assert [(q.id, q.query, q.answers) for q in questions] == [
        ("trivia-dev-0", "What is\u0085it?", ["this", "that's"]),
        ("trivia-dev-9", 'Who sang "Help"?', ["The Beatles", "The Fab Four's"]),
    ]


def test_json_rows(tmp_path: Path) -> None:
    """WebQuestions' rows are JSON; one that is cut off, or lacks its answers, is counted as malformed."""
    path = tmp_path / "topics.dpr.wq.test.txt"
    path.write_text('{"question": "who?", "answer": ["me"]}\n{"question": "wh\n{"question": "who?"}\n', "utf-8")
    assert read_questions(path, "wq") == ([Question("wq-test-0", "wq", "who?", ["me"])], 2)


def test_short_articles_are_left_out(tmp_path: Path) -> None:
    """An introduction of eleven words is no article, one of twelve is."""
    articles = {name: {"title": name, "extract": " ".join("w" * words)} for name, words in {"a": 11, "b": 12}.items()}
    path = tmp_path / "summaries.json"
    path.write_text(json.dumps(articles), encoding="utf-8")
    assert [article["id"] for article in read_articles(path)] == ["b"]


def cut(text: str) -> list[str]:
    """The texts of an article's passages."""
    passages = passages_of({"id": "A", "title": "The A", "text": text})
    assert [(p["id"], p["title"]) for p in passages] == [(f"A#{i}", "The A") for i in range(len(passages))]
    return [p["text"] for p in passages]


def words(count: int) -> str:
    """A sentence of so many words."""
    return " ".join(["Word", *["word"] * (count - 2), "end."])


def test_articles_are_cut_at_the_ends_of_sentences() -> None:
    """Sentences stay together up to 36 words."""
    ten, twenty, thirty = words(10), words(20), words(30)
    assert cut(f"{twenty} {twenty}  {thirty}") == [twenty, twenty, thirty]
    assert cut(f"{thirty} {twenty} {words(16)}") == [thirty, f"{twenty} {words(16)}"]
    assert cut(f"{ten} {ten} {ten}") == [f"{ten} {ten} {ten}"]


def test_a_short_sentence_joins_its_neighbour() -> None:
    """Fewer than twelve words are no passage: they make the one before them, or behind them, longer by as much."""
    assert cut(f"{words(36)} {words(11)} {words(36)}") == [f"{words(36)} {words(11)}", words(36)]
    assert cut(f"{words(36)} {words(12)}") == [words(36), words(12)]
    assert cut(f"{words(5)} {words(36)}") == [f"{words(5)} {words(36)}"]
    assert cut(f"{words(36)} {words(8)} {words(8)} {words(8)}") == [
        f"{words(36)} {words(8)}",
        f"{words(8)} {words(8)}",
    ]


def test_a_long_sentence_is_cut_into_equal_parts() -> None:
    """A sentence of 80 words gives 26, 27 and 27; what follows joins the last one, and no word is lost."""
    long = [f"W{i}" for i in range(79)] + ["end."]
    assert cut(f"{words(20)} {' '.join(long)} Then it stops.") == [
        words(20),
        " ".join(long[:26]),
        " ".join(long[26:53]),
        f"{' '.join(long[53:])} Then it stops.",
    ]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ('He came? Yes! "So he did." (He left.) "Where?" It is 1990. In AD. The UN (UNO). End', 9),
        ("J. R. R. Tolkien of St. Louis and the U.S. Army knew Dr. Who, e.g. from TV", 1),
        ("It costs 3.5 dollars. and no capital follows", 1),
    ],
)
def test_where_sentences_end(text: str, sentences: int) -> None:
    """At a full stop, question or exclamation mark before a capital, but not after an initial or a short title."""
    assert len(texts._SENTENCE_END.split(text)) == sentences


def test_an_article_supports_what_none_of_its_passages_does() -> None:
    """The answer and the question's words may stand in different passages; the candidates are passages."""
    text = f"It flows through Basel and Cologne, past many small harbours and towns. {words(36)} Its name is Rhine."
    articles = [{"id": "R", "title": "A river", "text": text}]
    articles += [{"id": str(i), "title": f"Town {i}", "text": f"Town {i} has a river. {words(12)}"} for i in range(3)]
    asked = question("The river that flows by Cologne and Basel", "Rhine")
    (row,) = rows_of(articles, [asked], num_candidates=5)
    assert row["gold"] == "R"
    assert [c["id"] for c in row["candidates"]] == ["R#0", "0#0", "1#0", "2#0", "R#1"]
    passages = Corpus(passages_of(articles[0]))
    (terms,) = vitalqa.analyse([asked.query])
    assert vitalqa.find_gold(asked, asked.answers, terms, [(0, 1.0), (1, 1.0)], passages) is None


def test_recall_of_random_order_is_its_expectation(articles: list[dict[str, str]]) -> None:
    """With one of three candidates holding the answer, recall@1 is 1/3 at random and recall@3 is 1 in any order."""
    rows = rows_of(articles, [question("The river that flows by Basel", "Rhine")])
    facts = vitalqa.describe_rows(rows)
    assert facts["answer_recall_random_order"]["1"] == pytest.approx(1 / 3, abs=1e-4)
    assert facts["answer_recall_random_order"]["3"] == facts["answer_recall_bm25_order"]["3"] == 1.0


def test_a_finished_build_is_loaded_not_repeated(
    tmp_path: Path, articles: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `_build` wrote is what is loaded, schema included, and the second call does not build."""
    cities = {"Basel": "Rhine", "London": "Thames", "Budapest": "Danube"}
    rows = rows_of(articles, [question(f"The river that flows by {c}", river) for c, river in cities.items()])
    splits = dict(zip(cities.values(), ("train", "validation", "test"), strict=True))
    monkeypatch.setattr(vitalqa, "split_of", splits.__getitem__)
    builds = []

    def build(folder: Path, cache: Path) -> None:
        builds.append(cache)
        to_dataset(rows).save_to_disk(folder / "rows")
        (folder / "facts.json").write_text('{"name": "VitalQA"}', encoding="utf-8")

    monkeypatch.setattr(vitalqa, "_build", build)
    for _ in range(2):
        loaded = vitalqa.load_vitalqa(tmp_path)
        assert {name: part[0] for name, part in loaded.items()} == {splits[row["gold"]]: row for row in rows}
        assert all(part.features == vitalqa.FEATURES for part in loaded.values())
    assert vitalqa.vitalqa_facts(tmp_path) == {"name": "VitalQA"}
    assert builds == [tmp_path]


@pytest.mark.slow
@pytest.mark.network
def test_the_real_set(tmp_path: Path) -> None:
    """The real build has the sizes and recall that are documented, disjoint golds, and a rebuild gives equal rows."""
    dataset, facts = vitalqa.load_vitalqa(), vitalqa.vitalqa_facts()
    assert (facts["articles"], facts["passages"], sum(facts["questions_read"].values())) == (10021, 30347, 34549)
    assert {name: part.num_rows for name, part in dataset.items()} == {"train": 1764, "validation": 165, "test": 423}
    assert facts["all"]["answer_recall_bm25_order"]["1"] == pytest.approx(0.48, abs=0.01)
    assert facts["all"]["answer_recall_random_order"]["1"] == pytest.approx(0.08, abs=0.01)
    golds = [set(part["gold"]) for part in dataset.values()]
    assert sum(map(len, golds)) == len(set().union(*golds))
    for part in dataset.values():
        validate_rows(part, num_selected=20, require_scores=True)
        lengths = [len(c["text"].split()) for row in part for c in row["candidates"]]
        assert max(lengths) == 48
        assert sum(length < 12 for length in lengths) < 0.01 * len(lengths)
        from_gold = [any(c["id"].split("#")[0] == row["gold"] for c in row["candidates"]) for row in part]
        assert sum(from_gold) / len(from_gold) > 0.9

    vitalqa._build(tmp_path, packages.cache_dir())
    assert json.loads((tmp_path / "facts.json").read_text(encoding="utf-8")) == facts  # has checksums of all rows

    console = Console(file=io.StringIO(), width=100)
    vitalqa.print_facts(console)
    assert "never" in console.file.getvalue()  # ty: ignore[missing-attribute]
