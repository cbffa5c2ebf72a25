"""Scores of files of predictions: the official scripts' figures, by hand and by a second implementation of each."""

import json
import random
import re
import string
import unicodedata
from pathlib import Path
from typing import Any

import ir_measures
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import RR, R, nDCG
from typer.testing import CliRunner

from drorl.cli import app
from drorl.cli.data import Preset
from drorl.data.reading import Reading, read_aliases
from drorl.data.rows import RowError
from drorl.facts import evidences, support, supporting_facts
from drorl.metrics import PRESETS, answer_overlap, exact_match, f1
from drorl.ranking import ndcg, recall_at, reciprocal_rank
from drorl.scoring import FileScores, score_file

run = CliRunner().invoke


def scores(tmp_path: Path, rows: list[dict], preset: str = "hotpot", **options: Any) -> FileScores:
    """The scores of rows in a file."""
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return score_file(path, PRESETS[preset], **options)


def overlap_of(more: dict[str, float], name: str) -> list[float]:
    """Exact match, F1, precision and recall of one measure."""
    return [more[f"{name}/{of}"] for of in ("exact_match", "f1", "precision", "recall")]


# ------------------------------------------------------------------------------------------------------------- answers
def squad_f1(prediction: str, gold: str, yes_no: bool, empty: bool) -> tuple[float, float, float]:
    """F1, precision and recall of one pair, the long way round: tokens are crossed off one by one."""

    def tokens(text: str) -> list[str]:
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    said, right = tokens(prediction), tokens(gold)
    if yes_no and said != right and any(" ".join(of) in ("yes", "no", "noanswer") for of in (said, right)):
        return 0.0, 0.0, 0.0
    if empty and not (said and right):
        return (float(said == right),) * 3
    left, same = list(right), 0
    for token in said:
        if token in left:
            left.remove(token)
            same += 1
    if same == 0:
        return 0.0, 0.0, 0.0
    precision, recall = same / len(said), same / len(right)
    return 2 * precision * recall / (precision + recall), precision, recall


TEXTS = st.lists(
    st.sampled_from(["the", "A", "an", "yes", "No", "noanswer", "U.S.", "us", "Café", "Cafe\u0301", "2,000", "-", " "])
    | st.text(max_size=4),
    max_size=4,
).map(" ".join)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), st.sampled_from(["kilt", "wow", "hotpot", "2wiki", "musique"]))
def test_answers_score_as_in_the_scripts(prediction: str, answers: list[str], preset: str) -> None:
    """Of any text, under every preset, F1, precision and recall are those of a second implementation."""
    settings = PRESETS[preset]
    each = [squad_f1(prediction, gold, preset in ("hotpot", "2wiki"), preset == "musique") for gold in answers]
    found = answer_overlap(prediction, answers, settings)
    assert (found.f1, found.precision, found.recall) == pytest.approx(tuple(map(max, zip(*each, strict=True))))
    assert f1(prediction, answers, settings) == found.f1
    assert exact_match(prediction, answers, settings) == found.exact_match


@pytest.mark.parametrize(
    ("prediction", "gold", "kilt", "musique", "hotpot"),
    [
        ("Café", "Cafe\u0301", (0, 0), (0, 0), (0, 0)),  # NFC and NFD are different letters to every script
        ("２０２０", "2020", (0, 0), (0, 0), (0, 0)),  # full-width digits
        ("Ｔｏｋｙｏ", "tokyo", (0, 0), (0, 0), (0, 0)),
        ("東京。", "東京", (0, 0), (0, 0), (0, 0)),  # an ideographic full stop is no ASCII punctuation
        ("January 1st, 2020", "1 January 2020", (0, 2 / 3), (0, 2 / 3), (0, 2 / 3)),  # 1st is not 1
        ("2020-01-01", "20200101", (1, 1), (1, 1), (1, 1)),  # punctuation is deleted, and nothing put in its place
        ("The The", "a", (1, 0), (1, 1), (1, 0)),  # nothing is left of both: MuSiQue's F1 alone is 1
        ("", "?!", (1, 0), (1, 1), (1, 0)),
        ("", "Rome", (0, 0), (0, 0), (0, 0)),
        ("...", "Rome", (0, 0), (0, 0), (0, 0)),
        ("yes, it is", "yes", (0, 1 / 2), (0, 1 / 2), (0, 0)),
        ("İstanbul", "i̇stanbul", (1, 1), (1, 1), (1, 1)),  # lower-casing makes two characters of one
    ],
)
def test_the_hard_texts(prediction: str, gold: str, kilt: tuple, musique: tuple, hotpot: tuple) -> None:
    """Worked out by hand from the scripts: exact match and F1 under KILT's, MuSiQue's and HotpotQA's meaning."""
    if prediction == "Café":
        assert unicodedata.normalize("NFC", gold) == prediction
    for name, expected in (("kilt", kilt), ("musique", musique), ("hotpot", hotpot)):
        settings = PRESETS[name]
        found = exact_match(prediction, [gold], settings), f1(prediction, [gold], settings)
        assert found == pytest.approx(expected), name


# ---------------------------------------------------------------------------------------- HotpotQA, 2Wiki and MuSiQue
def test_hotpotqa_by_hand(tmp_path: Path) -> None:
    """Answer, supporting facts and joint figures of two questions, the second of them without predicted facts."""
    rows = [
        {
            "prediction": "in New York",
            "answers": ["New York"],
            "supporting_facts": [["A", 0], ["B", 1]],
            "predicted_supporting_facts": [["A", 0], ["A", 1], ["a", 0], ["A", 0]],  # one of three distinct, of two
        },
        {"prediction": "yes", "answers": ["yes"], "metadata": {"supporting_facts": {"title": ["A"], "sent_id": [0]}}},
    ]
    found = scores(tmp_path, rows)
    assert (found.exact_match, found.f1, found.n) == (0.5, pytest.approx(0.9), 2)
    assert overlap_of(found.more, "answer") == pytest.approx([1 / 2, 0.9, (2 / 3 + 1) / 2, 1])
    assert overlap_of(found.more, "supporting_facts") == pytest.approx([0, 0.4 / 2, (1 / 3) / 2, (1 / 2) / 2])
    precision, recall = 2 / 3 * 1 / 3, 1 / 2
    joint_f1 = 2 * precision * recall / (precision + recall)
    assert overlap_of(found.more, "joint") == pytest.approx([0, joint_f1 / 2, precision / 2, recall / 2])
    assert not scores(tmp_path, rows[1:]).more  # nothing of the kind was predicted


def test_2wiki_by_hand(tmp_path: Path) -> None:
    """Titles in any case, evidence under any name, and joint figures over all three parts."""
    facts = [["Ed Wood", 0], ["Bo", 2]]
    gold = [["Ed Wood", "country", ["USA", "United States"]], [["Bo"], "country", ["Italy"]]]
    said = [["ed  wood", "Country", "united states!"], ["The Bo", "country", "Italy"]]  # articles are kept
    row = {"prediction": "U.S.", "answers": ["USA", "US"], "supporting_facts": facts, "evidences": gold}
    row |= {"predicted_supporting_facts": [["ED WOOD", 0], ["bo", 2]], "predicted_evidences": said}
    found = scores(tmp_path, [row], "2wiki").more
    assert overlap_of(found, "supporting_facts") == [1, 1, 1, 1]
    assert overlap_of(found, "evidences") == [0, 0.5, 0.5, 0.5]
    assert overlap_of(found, "joint") == [0, 0.5, 0.5, 0.5]
    assert overlap_of(scores(tmp_path, [row], "hotpot").more, "supporting_facts") == [0, 0, 0, 0]
    columns = {part: [triple[i] for triple in gold] for i, part in enumerate(("fact", "relation", "entity"))}
    assert scores(tmp_path, [{**row, "evidences": columns}], "2wiki").more == found
    with pytest.raises(RowError, match="field 'evidences': not as many subjects as relations and objects"):
        scores(tmp_path, [{**row, "evidences": {**columns, "fact": []}}], "2wiki")
    del row["predicted_evidences"]
    assert not any(name.startswith(("joint", "evidences")) for name in scores(tmp_path, [row], "2wiki").more)


def test_2wikis_evidence_has_the_aliases_of_its_file(tmp_path: Path) -> None:
    """The reader puts them where the metric finds them, for subjects and objects, and leaves relations alone."""
    (tmp_path / "aliases").write_text('{"Q_id": "Q30", "aliases": ["USA"], "demonyms": ["American"]}\n')
    record = {
        "_id": "1",
        "question": "which?",
        "answer": "United States",
        "answer_id": "Q30",
        "context": [["Ed Wood", ["He was American."]]],
        "supporting_facts": [["Ed Wood", 0]],
        "evidences": [["Ed Wood", "country", "United States"]],
        "evidences_id": [["Q1", "country", "Q30"]],
    }
    (tmp_path / "2wiki.jsonl").write_text(json.dumps(record))
    [row] = Reading(tmp_path / "2wiki.jsonl", options={"aliases": read_aliases(tmp_path / "aliases")})
    row |= {"prediction": "USA", "predicted_evidences": [["Ed Wood", "country", "American"]]}
    row |= {"predicted_supporting_facts": [["Ed Wood", 0]]}
    assert scores(tmp_path, [row], "2wiki").more["joint/exact_match"] == 1.0
    record["evidences_id"] = [["Q1", "Q30"]]
    (tmp_path / "2wiki.jsonl").write_text(json.dumps(record))
    with pytest.raises(RowError, match="row 1: no record of the format 2wiki"):
        list(Reading(tmp_path / "2wiki.jsonl", options={"aliases": read_aliases(tmp_path / "aliases")}))


FACTS = st.lists(st.tuples(st.sampled_from(["A", "a", "B"]), st.integers(0, 1)), max_size=5)


@given(FACTS, FACTS)
def test_supporting_facts_as_in_the_scripts(said: list[tuple], gold: list[tuple]) -> None:
    """HotpotQA compares sets; 2Wiki folds titles afterwards, so that it may count one fact twice. Counted naively."""
    for fold in (False, True):
        pairs = [[(t.lower() if fold else t, s) for t, s in set(facts)] for facts in (said, gold)]
        hits = wrong = missed = 0
        for fact in pairs[0]:
            hits, wrong = (hits + 1, wrong) if fact in pairs[1] else (hits, wrong + 1)
        for fact in pairs[1]:
            missed += fact not in pairs[0]
        precision = hits / (hits + wrong) if hits + wrong else 0.0
        recall = hits / (hits + missed) if hits + missed else 0.0
        found = supporting_facts(said, gold, fold)
        assert (found.precision, found.recall) == (precision, recall)
        assert found.exact_match == (wrong + missed == 0)
        assert found.f1 == pytest.approx(2 * precision * recall / (precision + recall) if precision + recall else 0)


def test_evidence_that_hits_twice() -> None:
    """Two names of one gold triple are two hits in 2Wiki's script: recall 2 of 1, and no exact match."""
    found = evidences([[["a"], ["r"], ["x"]], [["a"], ["r"], ["y"]]], [[["A"], ["R"], ["X.", "Y"]]])
    assert (found.exact_match, found.precision, found.recall) == (0.0, 1.0, 2.0)
    assert evidences([], []) == supporting_facts([], []) != support([], [])


def test_musique_by_hand(tmp_path: Path) -> None:
    """The best alias counts, and paragraphs are compared by their numbers."""
    rows = [
        {
            "prediction": "Roma",
            "answers": ["Rome", "Roma"],
            "support_idxs": [0, 2],
            "predicted_support_idxs": [2, 1, 4],
        },
        {"prediction": "the", "answers": ["a"], "support_idxs": [], "predicted_support_idxs": []},
        {"prediction": "x", "answers": ["y"], "support_idxs": [3]},
    ]
    found = scores(tmp_path, rows, "musique")
    assert (found.exact_match, found.f1) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert overlap_of(found.more, "support") == pytest.approx([1 / 3, 1.4 / 3, (1 / 3 + 1) / 3, 1.5 / 3])


# ------------------------------------------------------------------------------------------------------------- ranking
def test_ranking_is_that_of_trec_eval() -> None:
    """Recall, reciprocal rank and nDCG of random rankings, some golds not found at all: ir-measures agrees."""
    draw = random.Random(0)
    judged, ranked, ours = [], [], []
    for query in range(200):
        names = [str(i) for i in draw.sample(range(40), draw.randint(1, 25))]
        gold = {str(i) for i in draw.sample(range(40), draw.randint(1, 12))}
        judged += [ir_measures.Qrel(str(query), name, 1) for name in gold]
        ranked += [ir_measures.ScoredDoc(str(query), name, -rank) for rank, name in enumerate(names)]
        relevant = [name in gold for name in names]
        at = [recall_at(relevant, len(gold), k) for k in (1, 5, 20)]
        ours.append([*at, reciprocal_rank(relevant), ndcg(relevant, len(gold))])
    theirs = {(m.query_id, m.measure): m.value for m in ir_measures.iter_calc([*MEASURES], judged, ranked)}
    for query, values in enumerate(ours):
        assert values == pytest.approx([theirs[str(query), measure] for measure in MEASURES]), query


MEASURES = (R @ 1, R @ 5, R @ 20, RR, nDCG @ 10)


def test_a_run_is_scored_as_by_trec_eval(tmp_path: Path) -> None:
    """drorl prepare --run --qrels, then drorl score: means over the judged queries, of which most golds are not found,
    some are in no ranking, and one query has no ranking at all: ir-measures agrees."""
    draw = random.Random(1)
    judged = {str(q): {f"p{i}" for i in draw.sample(range(30), draw.randint(1, 6))} for q in range(20)}
    ranked = {str(q): [f"p{i}" for i in draw.sample(range(30), draw.randint(1, 9))] for q in range(19)}
    texts = {
        "topics.tsv": [f"{q}\tquestion {q}?" for q in judged],
        "qrels": [f"{q} 0 {p} {int(p in judged[q])}" for q in judged for p in sorted(judged[q] | {"p0"})],
        "run": [f"{q} Q0 {p} {i} {-i} x" for q, names in ranked.items() for i, p in enumerate(names)],
        "corpus.jsonl": [json.dumps({"id": f"p{i}", "text": f"Text {i}."}) for i in range(30)],
    }
    paths = {name: tmp_path / name for name in texts}
    for name, lines in texts.items():
        paths[name].write_text("".join(f"{line}\n" for line in lines))
    command = ["prepare", "--input", paths["topics.tsv"], "--format", "topics", "--run", paths["run"], "--corpus"]
    command += [paths["corpus.jsonl"], "--qrels", paths["qrels"], "--output", tmp_path / "rows.jsonl"]
    assert run(app, list(map(str, command))).exit_code == 0
    rows = [json.loads(line) | {"prediction": "x", "answers": ["y"]} for line in (tmp_path / "rows.jsonl").open()]
    found = scores(tmp_path, rows).more
    qrels, ranking = (list(read(str(paths[of]))) for read, of in zip(READ_TREC, ("qrels", "run"), strict=True))
    theirs = ir_measures.calc_aggregate(MEASURES, qrels, ranking)
    ours = [found[name] for name in ("gold_recall@1", "gold_recall@5", "gold_recall@20", "mrr", "ndcg@10")]
    assert ours == pytest.approx([theirs[measure] for measure in MEASURES])  # both in float64
    assert 0 < found["gold_recall@20"] < 0.5


READ_TREC = ir_measures.read_trec_qrels, ir_measures.read_trec_run


def test_candidates_are_measured(tmp_path: Path) -> None:
    """By answer and by gold; golds by title count once; without names, the marked ones are all there are."""
    passages = [("Bo", "Nothing."), ("Rome", "It is."), ("Rome", "In Roma."), ("Acme", "Rome!")]
    candidates = [{"id": f"p{i}", "title": title, "text": text} for i, (title, text) in enumerate(passages)]
    row = {"prediction": "Rome", "answers": ["Rome"], "candidates": candidates}
    found = scores(tmp_path, [row]).more
    assert found == {"recall@1": 0, "recall@3": 0, "recall@5": 1, "recall@10": 1, "recall@20": 1}
    others = {**row, "answers": ["Paris", "Rome"]}  # recall is KILT's, as in an evaluation, whatever the preset
    assert scores(tmp_path, [others], "dro-official").more == found
    found = scores(tmp_path, [{**row, "metadata": {"gold_titles": ["Rome", "Acme", "Lost"]}}]).more
    assert [found[f"gold_recall@{k}"] for k in (1, 3, 5)] == pytest.approx([0, 1 / 3, 2 / 3])
    assert found["mrr"] == 0.5
    assert scores(tmp_path, [{**row, "gold_ids": ["p3"]}]).more["mrr"] == 0.25
    marked = [{**c, "is_gold": c["title"] == "Rome"} for c in candidates]
    found = scores(tmp_path, [{**row, "candidates": marked}, {"prediction": "x", "answers": ["y"]}]).more
    assert (found["gold_recall@3"], found["recall@20"]) == (1.0, 0.5)  # the other row has candidates for neither


def test_what_is_wrong_in_a_row_is_named(tmp_path: Path) -> None:
    """The file, the row, the field and what was seen; or it is skipped and counted."""
    row = {"prediction": "x", "answers": ["y"]}
    assert not scores(tmp_path, [{"supporting_facts": 5, **row}]).more  # with which nothing is compared
    assert scores(tmp_path, [{"metadata": 5, "candidates": [{"text": "y"}], **row}]).more["recall@1"] == 1
    for more, message in (
        (
            {"supporting_facts": [["A", "0"]], "predicted_supporting_facts": []},
            r"row 2, field 'supporting_facts': no pairs of title .*: \['A', '0'\]",
        ),
        ({"supporting_facts": [], "predicted_supporting_facts": 5}, "'predicted_supporting_facts': no list: 5"),
        ({"support_idxs": [True], "predicted_support_idxs": [1]}, "field 'support_idxs': no list of numbers"),
        ({"supporting_facts": [], "evidences": [["a", "b"]], "predicted_evidences": []}, "no triples"),
        (
            {"predicted_supporting_facts": {"title": ["A"], "sent_id": []}, "supporting_facts": []},
            "not as many titles as sentences",
        ),
        ({"candidates": ["x"]}, "field 'candidates': no list of records"),
        ({"answers": "y"}, "field 'answers': no list of texts: 'y'"),
        ({"prediction": None}, "field 'prediction': no text"),
    ):
        with pytest.raises(
            RowError, match=f"predictions.jsonl, row 2.*{message}" if "row" not in message else message
        ):
            scores(tmp_path, [row, {**row, **more}])
        skipped = scores(tmp_path, [row, {**row, **more}], on_error="skip")
        assert (skipped.n, skipped.skipped.total()) == (1, 1)


def test_the_last_line_is_the_contract(tmp_path: Path) -> None:
    """Whatever else there is stands above it; without more, it is the only line."""
    path = tmp_path / "predictions.jsonl"
    row = {"prediction": "Rome", "answers": ["Rome"]}
    path.write_text(json.dumps(row))
    command = ["score", "--input", str(path)]
    assert json.loads(run(app, [*command, "--json"]).stdout) == {"exact_match": 1.0, "f1": 1.0, "n": 1}
    path.write_text(json.dumps({**row, "support_idxs": [1, 2], "predicted_support_idxs": [1]}))
    first, last = run(app, [*command, "--json", "--preset", "musique"]).stdout.splitlines()
    assert json.loads(last) == {"exact_match": 1.0, "f1": 1.0, "n": 1}
    assert json.loads(first)["support/f1"] == pytest.approx(2 / 3)
    shown = run(app, [*command, "--preset", "musique"]).stdout
    assert "exact match 100.00 %, F1 100.00 %, 1 predictions" in shown and "support/f1 66.67 %" in shown
    assert {preset.value for preset in Preset} == PRESETS.keys()
