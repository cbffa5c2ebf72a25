"""Confidence intervals over questions, by the percentile bootstrap.

Two systems are compared on the *same* questions, so the comparison is paired: the unit that is resampled is a question
with both of its values, and what all questions have in common (some are hard for everyone) cancels. The interval says
how much the mean would vary over other questions of the same kind. It says nothing about another training seed.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3; for comparisons of language
systems, Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean over questions and how far it can be trusted. `dataclasses.asdict` gives its form in `summary.json`.

    Args:
        mean (`float`): mean over the questions, in the unit of the values.
        ci95 (`tuple[float, float]`): lower and upper end, at the confidence asked for (95 % unless told otherwise).
    """

    mean: float
    ci95: tuple[float, float]


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], num_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Returns the mean of `b - a` over questions with its bootstrap interval; above 0 means that `b` is larger.

    delta* = (1/n) sum_i (b_{r_i} - a_{r_i}),  r_i uniform on 1..n;  ends = quantiles of delta* over the resamples.

    Args:
        a (`Sequence[float]` of length n): the first system's value on each question.
        b (`Sequence[float]` of length n): the second system's values, in the same order of questions.
        num_resamples (`int`): number of bootstrap samples; at 10,000 the ends are off by about 1 % of the width.
        seed (`int`): of the resampling; the same seed gives the same interval.
        confidence (`float`): in (0, 1).

    Raises:
        ValueError: on different lengths, no questions, or values that are not finite.

    >>> paired_bootstrap([0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    Interval(mean=0.5, ci95=(0.0, 1.0))
    """
    return bootstrap_mean([y - x for x, y in zip(a, b, strict=True)], num_resamples, seed, confidence)


def bootstrap_mean(
    values: Sequence[float], num_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Returns the mean of `values` over questions with its bootstrap interval. Arguments as in `paired_bootstrap`.

    One question says nothing about how others differ from it: its interval is unbounded.

    >>> bootstrap_mean([0.25])
    Interval(mean=0.25, ci95=(-inf, inf))
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"a mean over questions needs one finite number for each, and at least one, not {values}")
    mean = float(array.mean())
    if len(array) == 1:
        return Interval(mean, (-math.inf, math.inf))
    rng, tail = np.random.default_rng(seed), (1 - confidence) / 2
    means = [rng.choice(array, len(array)).mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, (float(low), float(high)))


def crossed_bootstrap(
    values: Sequence[Sequence[float]], num_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Returns the mean over seeds and questions with an interval in which both are resampled.

    Every seed answers the same questions, so the values are crossed and not a sample of S * Q: a resample draws S
    seeds and Q questions, each with replacement, and takes the mean over their products. A resampled mean of S varies
    by (S-1)/S too little, which counts for few seeds, so their counts are stretched by the square root of S/(S-1).
    With three seeds it is still a guess of how seeds vary: look at them one by one as well. Source: Owen, The
    pigeonhole bootstrap, Annals of Applied Statistics 1 (2007).

    Args:
        values (`Sequence[Sequence[float]]`, S of Q each): of every seed, its value (or a difference of two systems')
            on each question, in one order. With S = 1 only the questions are resampled.
        num_resamples (`int`): number of bootstrap samples.
        seed (`int`): of the resampling.
        confidence (`float`): in (0, 1).

    Raises:
        ValueError: if the seeds have different numbers of questions, or a value is not finite.

    >>> [round(end, 3) for end in crossed_bootstrap([[0.5, 0.5], [0.0, 0.0]]).ci95]
    [-0.104, 0.604]
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{len(values)} seeds need the same number of finite values each")
    tail = (1 - confidence) / 2
    seeds, questions = _crossed_weights(*array.shape, num_resamples, seed)
    means = np.einsum("rs,sq,rq->r", seeds, array, questions, optimize=True)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(array.mean()), (float(low), float(high)))


@lru_cache(maxsize=4)  # a report asks for hundreds of intervals over the same seeds and questions
def _crossed_weights(
    num_seeds: int, num_questions: int, num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return _resampled(rng, num_seeds, num_resamples), _resampled(rng, num_questions, num_resamples)


def _resampled(rng: np.random.Generator, n: int, num_resamples: int) -> np.ndarray:
    """Returns the weights of n units in each resample, `(num_resamples, n)`; a single unit always has weight 1."""
    counts = rng.multinomial(n, [1 / n] * n, num_resamples) / n
    return 1 / n + (counts - 1 / n) * math.sqrt(n / max(n - 1, 1))
