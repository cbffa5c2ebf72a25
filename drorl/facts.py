r"""Metrics of what an answer rests on: supporting facts, evidence, supporting paragraphs, and all of it together.

Each is an [`~metrics.Overlap`] of one question, as the data set's own script computes it.

References:
    HotpotQA: https://github.com/hotpotqa/hotpot/blob/master/hotpot_evaluate_v1.py
    2WikiMultihopQA: https://github.com/Alab-NII/2wikimultihop/blob/main/2wikimultihop_evaluate_v1.1.py
    MuSiQue: https://github.com/StonyBrookNLP/musique/blob/main/metrics/support.py
"""

import string
from collections.abc import Collection, Sequence
from itertools import product
from math import prod
from typing import TypeAlias

from .metrics import Overlap

Fact: TypeAlias = tuple[str, int]
"""A sentence: the title of its paragraph, and which of its sentences, from 0."""
Triple: TypeAlias = Sequence[Sequence[str]]
"""Subject, relation and object, each with all of its names."""

_DELETED = str.maketrans("", "", string.punctuation)


def overlap(predicted: Collection, gold: Collection) -> Overlap:
    """Agreement of two collections. Two empty ones match exactly, with F1 0, as in HotpotQA's script.

    Example:
        >>> overlap({1, 2, 3}, {3, 4})
        Overlap(exact_match=0.0, f1=0.4, precision=0.3333333333333333, recall=0.5)
    """
    hits, missed = sum(item in gold for item in predicted), sum(item not in predicted for item in gold)
    precision = hits / len(predicted) if predicted else 0.0
    recall = hits / (hits + missed) if hits + missed else 0.0
    return Overlap.of(float(hits == len(predicted) and not missed), precision, recall)


def supporting_facts(predicted: Collection[Fact], gold: Collection[Fact], fold_titles: bool = False) -> Overlap:
    """Agreement of the sentences that were said to support the answer with those that do.

    Args:
        predicted (`Collection[Fact]`): what was said.
        gold (`Collection[Fact]`): what is right.
        fold_titles (`bool`): titles in lower case, as in 2Wiki's script; facts that differ in nothing else still count
            one by one there.
    """
    if not fold_titles:
        return overlap(set(predicted), set(gold))
    folded = [[(title.lower(), sentence) for title, sentence in set(facts)] for facts in (predicted, gold)]
    return overlap(*folded)


def evidences(predicted: Collection[Triple], gold: Sequence[Triple]) -> Overlap:
    """Agreement of triples (subject, relation, object), under any of their names, as in 2Wiki's script.

    Case, ASCII punctuation and white space do not matter; articles do. Two triples that name one gold triple count as
    two hits there, so that recall may exceed 1.

    Example:
        >>> said, gold = [[["Ed Wood"], ["country"], ["USA"]]], [[["Ed Wood"], ["country"], ["U.S.A.", "America"]]]
        >>> evidences(said, gold).f1
        1.0
    """
    said = {names for triple in predicted for names in _spellings(triple)}
    known = [_spellings(triple) for triple in gold]
    hits = sum(any(names in spellings for spellings in known) for names in said)
    precision, recall = (hits / len(triples) if triples else 0.0 for triples in (said, known))
    return Overlap.of(float(hits == len(said) == len(known)), precision, recall)


def _spellings(triple: Triple) -> set[tuple[str, ...]]:
    """A triple under all of its names."""
    return set(product(*([" ".join(name.lower().translate(_DELETED).split()) for name in names] for names in triple)))


def support(predicted: Collection[int], gold: Collection[int]) -> Overlap:
    """Agreement of paragraphs, by their numbers. As in MuSiQue's script, two empty collections agree: all is 1."""
    if not predicted and not gold:
        return Overlap(1.0, 1.0, 1.0, 1.0)
    return overlap(set(predicted), set(gold))


def joint(parts: Sequence[Overlap]) -> Overlap:
    """The answer and what it rests on as one: products of exact match, precision and recall, and the F1 of these."""
    return Overlap.of(
        *(prod(getattr(part, name) for part in parts) for name in ("exact_match", "precision", "recall"))
    )
