"""Scores of predictions in a file: whatever the rows carry is measured, as the data set's own script does it.

| a row has                                        | measured, beside `exact_match` and `f1` of the answer           |
|--------------------------------------------------|------------------------------------------------------------------|
| `candidates`, best first                         | `recall@k` by answer                                             |
| ... of which `is_gold`, or `gold_ids` or         | `gold_recall@k` (share of the golds), `mrr`, `ndcg@10`           |
| `gold_titles` are named                          |                                                                  |
| `supporting_facts`, `predicted_supporting_facts` | `supporting_facts/...`, `answer/...`, `joint/...` (HotpotQA)     |
| `evidences`, `predicted_evidences`               | `evidences/...`, and joint with them, too (2Wiki)                |
| `support_idxs`, `predicted_support_idxs`         | `support/...` (MuSiQue)                                          |

`...` stands for `exact_match`, `f1`, `precision` and `recall`. What is right may also stand in `metadata`, where
drorl's readers leave it. As in the official scripts, a row that says what is right and lacks what was predicted counts
as 0; a measure for which no row of the file has anything predicted is left out.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import facts
from .data.fields import Problem, list_of, objects_of, text_of
from .data.files import records
from .data.rows import RowError
from .metrics import KILT, MetricSettings, Overlap, answer_overlap
from .ranking import gold_of, known, ndcg, recall_at, recalls, reciprocal_rank

DEPTHS = (1, 3, 5, 10, 20)
NATS = ("answer_logp", "iw_elbo")
"""What `drorl evaluate` adds to a row."""
Scores = dict[str, float]
_NOTHING = Overlap(0.0, 0.0, 0.0, 0.0)


@dataclass
class FileScores:
    """Means over the rows of a file."""

    exact_match: float | None
    f1: float | None
    """`None` of no rows."""
    n: int
    more: Scores = field(default_factory=dict)
    """What else the rows carry, by its name."""
    skipped: Counter[str] = field(default_factory=Counter)


def score_file(path: Path, settings: MetricSettings = KILT, on_error: str = "fail") -> FileScores:
    """Returns the mean scores of a file of `{"prediction": str, "answers": [str, ...], ...}`, as fractions.

    Raises:
        RowError: a row is not like that, and `on_error` is `fail`.
        InvalidInputError: the file cannot be read.
    """
    totals, counts, predicted = defaultdict[str, float](float), Counter[str](), set[str]()
    skipped = Counter[str]()
    for number, record in records(path):
        found = score_record(number, record, settings)
        if isinstance(found, RowError):
            if on_error == "fail":
                raise found.of(path)
            skipped[found.kind] += 1
            continue
        predicted |= found.predicted
        counts.update(found.scores.keys())
        for name, value in found.scores.items():
            totals[name] += value
    means = {name: total / counts[name] for name, total in totals.items() if name in predicted}
    answer = means.pop("exact_match", None), means.pop("f1", None)
    return FileScores(*answer, counts["f1"], means, skipped)


@dataclass
class RowScores:
    """What one row is worth, and which of its scores are of something that was predicted."""

    scores: Scores = field(default_factory=dict)
    predicted: set[str] = field(default_factory=set)

    @property
    def measured(self) -> Scores:
        """The scores of what was predicted."""
        return {name: value for name, value in self.scores.items() if name in self.predicted}

    def add(self, scores: Mapping[str, float], predicted: bool = True) -> None:
        self.scores |= scores
        self.predicted |= scores.keys() if predicted else set()

    def add_overlap(self, name: str, part: Overlap | None, predicted: bool = True) -> None:
        """Adds an overlap; `None`: there is no prediction."""
        scores = {f"{name}/{of}": value for of, value in asdict(part or _NOTHING).items()}
        self.add(scores, predicted and part is not None)


def score_record(number: int, record: Any, settings: MetricSettings = KILT) -> RowScores | RowError:
    """Returns the scores of a record of a file, or what is wrong with it."""
    if isinstance(record, RowError):
        return record
    try:
        return _score(record, settings)
    except Problem as problem:
        return RowError(number, problem.field, problem.kind + problem.seen, problem.kind)


def _score(row: Any, settings: MetricSettings) -> RowScores:
    if not isinstance(row, dict):
        raise Problem("", "no record", row)
    prediction, answers = row.get("prediction"), row.get("answers")
    if not isinstance(prediction, str):
        raise Problem("prediction", "no text", prediction)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise Problem("answers", "no list of texts", answers)
    found = RowScores()
    answer = answer_overlap(prediction, answers, settings)
    found.add({"exact_match": answer.exact_match, "f1": answer.f1})
    _add_rests_on(found, row, answer, settings)
    _add_ranking(found, row, answers, settings)
    return found


# ----------------------------------------------------------------------------------------- what the answer rests on
def _add_rests_on(found: RowScores, row: Mapping[str, Any], answer: Overlap, settings: MetricSettings) -> None:
    def measured(name: str, read: Callable, measure: Callable[..., Overlap], *arguments: Any) -> Overlap | None:
        said = row.get(f"predicted_{name}")
        if said is None:
            return None
        return measure(read(said, f"predicted_{name}"), read(known(row, name), name), *arguments)

    parts: list[Overlap | None] = [answer]
    if known(row, "supporting_facts") is not None:
        parts.append(measured("supporting_facts", _facts, facts.supporting_facts, settings.fold_titles))
        found.add_overlap("supporting_facts", parts[-1])
        if known(row, "evidences") is not None:
            parts.append(measured("evidences", _triples, facts.evidences))
            found.add_overlap("evidences", parts[-1])
        whole = [part for part in parts if part is not None]
        found.add_overlap("answer", answer, len(whole) > 1)
        found.add_overlap("joint", facts.joint(whole) if len(whole) == len(parts) else None)
    if known(row, "support_idxs") is not None:
        found.add_overlap("support", measured("support_idxs", _numbers, facts.support))


def _facts(value: Any, name: str) -> list[facts.Fact]:
    """Pairs of title and sentence; or, as on the hub, a record of two lists."""
    if isinstance(value, dict):
        titles, sentences = list_of(value, "title"), list_of(value, "sent_id")
        if len(titles) != len(sentences):
            raise Problem(name, "not as many titles as sentences", len(titles))
        value = list(map(list, zip(titles, sentences, strict=True)))
    for pair in list_of({name: value}, name):
        if not (isinstance(pair, list) and [type(item) for item in pair] == [str, int]):
            raise Problem(name, "no pairs of title and number of sentence", pair)
    return [(title, sentence) for title, sentence in value]


def _triples(value: Any, name: str) -> list[list[list[str]]]:
    """Triples of names, a list stands for all names of one thing; or, as on the hub, a record of three lists."""
    if isinstance(value, dict):
        parts = [list_of(value, part) for part in ("fact", "relation", "entity")]
        if len(set(map(len, parts))) > 1:
            raise Problem(name, "not as many subjects as relations and objects", value)
        value = list(map(list, zip(*parts, strict=True)))
    found = []
    for triple in list_of({name: value}, name):
        names = [[of] if isinstance(of, str) else of for of in triple] if isinstance(triple, list) else []
        if len(names) != 3 or not all(isinstance(of, list) and all(isinstance(n, str) for n in of) for of in names):
            raise Problem(name, "no triples of subject, relation and object", triple)
        found.append(names)
    return found


def _numbers(value: Any, name: str) -> list[int]:
    if not all(type(number) is int for number in list_of({name: value}, name)):
        raise Problem(name, "no list of numbers", value)
    return value


# ---------------------------------------------------------------------------------------------------- ranked passages
def _add_ranking(found: RowScores, row: Mapping[str, Any], answers: Sequence[str], settings: MetricSettings) -> None:
    given = row.get("candidates") is not None
    candidates = objects_of(row, "candidates") if given else []
    at = recalls([text_of(c, "text", "") for c in candidates], answers) or [0.0]
    found.add({f"recall@{k}": at[:k][-1] for k in DEPTHS}, given)
    for names in ("gold_ids", "gold_titles"):
        if (named := known(row, names)) is not None:
            list_of({names: named}, names)
    gold = gold_of(row, candidates) if given else None
    if gold is not None:
        relevant, num_gold = gold
        found.add({f"gold_recall@{k}": recall_at(relevant, num_gold, k) for k in DEPTHS}, given)
        found.add({"mrr": reciprocal_rank(relevant), "ndcg@10": ndcg(relevant, num_gold)}, given)
