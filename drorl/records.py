"""What one system did with each question, the means over them, and the difference of two systems on the same ones."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import InvalidInputError
from .statistics import bootstrap_mean, paired_bootstrap

METRICS = ("exact_match", "f1", "recall@1", "all_gold@2", "answer_logp", "iw_elbo")


@dataclass(frozen=True)
class Record:
    """What one system did with one question."""

    query: str
    prediction: str
    exact_match: float
    f1: float
    recall: list[float]
    """For k = 1..N, whether one of the first k passages contains an answer: of the K chosen and, behind them, of the
    others in the order of how likely they were to be the first choice."""
    answer_logp: float
    """log p_g(y | x, chosen passages), nats."""
    iw_elbo: float
    """The bound on log p(y|x), nats; NaN for a system without a selector."""
    chosen: list[int]
    """The chosen passages, as indices into the row's candidates."""
    all_gold: list[float] = field(default_factory=list)
    """For k = 1..N, whether the first k passages, in the same order, hold every gold one; empty: none is known."""
    order: list[int] = field(default_factory=list)
    """All that were read, in the order of `recall`; a record kept by an earlier version has none."""


def per_question(records: Sequence[Record], metric: str) -> list[float]:
    """Returns one value per question of `exact_match`, `f1`, `recall@k`, `all_gold@k`, `answer_logp` or `iw_elbo`.

    NaN where a question has none, such as `all_gold@k` where no gold passage is known.
    """
    name, _, k = metric.partition("@")
    values = [getattr(record, name) for record in records]
    return [of[int(k) - 1] if int(k) <= len(of) else math.nan for of in values] if k else values


def aggregate(records: Sequence[Record]) -> dict[str, float]:
    """Returns the mean of every metric over the questions; metrics that a system does not have are left out.

    Raises:
        InvalidInputError: if there are no records.
    """
    if not records:
        raise InvalidInputError("there is no question to evaluate on")
    names = ("exact_match", "f1", "recall@1", "recall@3", "recall@5", "all_gold@2", "answer_logp", "iw_elbo")
    means = {name: mean_of_finite(per_question(records, name)) for name in names}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def mean_of_finite(values: Sequence[float]) -> float:
    """Returns the mean of the finite values, NaN if there are none; -inf would be a question without a likelihood."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def difference(before: Sequence[Record], after: Sequence[Record], metric: str) -> dict[str, Any]:
    """Returns the paired bootstrap of one metric over the questions for which both systems have a finite value."""
    values = zip(per_question(before, metric), per_question(after, metric), strict=True)
    pairs = [pair for pair in values if all(map(math.isfinite, pair))]
    interval = paired_bootstrap([a for a, _ in pairs], [b for _, b in pairs])
    return {**asdict(interval), "n": len(pairs)}


def describe(records: Sequence[Record]) -> dict[str, Any]:
    """Returns a system's means with their 95 % intervals, as `summary.json` has them."""
    means = aggregate(records)
    finite = {name: [v for v in per_question(records, name) if math.isfinite(v)] for name in METRICS if name in means}
    intervals = {name: bootstrap_mean(values).ci95 for name, values in finite.items()}
    return {**{name: means.get(name) for name in METRICS}, "ci95": intervals}
