r"""Metrics of ranked passages, of one query: does the answer occur in them, and do they hold the gold passages?

A passage counts as relevant or not, and a gold passage counts once: of several with the name of one gold passage (the
paragraphs of one article, where golds are known by title) the first is relevant.

References:
    trec_eval: https://github.com/usnistgov/trec_eval
    nDCG: Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR techniques, TOIS 20 (2002)
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .metrics import KILT, MetricSettings, contains_answer


def recalls(texts: Sequence[str], answers: Sequence[str], settings: MetricSettings = KILT) -> list[float]:
    """Returns recall@k for each k: whether a normalised answer occurs in one of the first k texts."""
    found, seen = [], False
    for text in texts:
        seen = seen or contains_answer(text, answers, settings)
        found.append(float(seen))
    return found


def relevance(names: Sequence[str], gold: Collection[str]) -> list[bool]:
    """Returns which of the ranked passages is the first one with the name of a gold passage.

    Example:
        >>> relevance(["Rome", "Bo", "Rome", "Acme"], {"Rome", "Acme"})
        [True, False, False, True]
    """
    return [name in gold and name not in names[:rank] for rank, name in enumerate(names)]


def known(row: Mapping[str, Any], name: str) -> Any:
    """Returns what a row, or its `metadata`, says of that name."""
    metadata = row.get("metadata")
    return row.get(name, metadata.get(name) if isinstance(metadata, dict) else None)


def gold_of(row: Mapping[str, Any], ranked: Sequence[Mapping[str, Any]]) -> tuple[list[bool], int] | None:
    """Returns which of the ranked passages are gold, and how many golds there are; `None`: nobody says.

    A row, or its `metadata`, names golds as `gold_ids` or `gold_titles`. Where its candidates are only marked
    (`is_gold`), those that were not retrieved are not known of.
    """
    for names, of in (("gold_ids", "id"), ("gold_titles", "title")):
        if named := known(row, names):
            gold = set(map(str, named))
            return relevance([str(passage.get(of)) for passage in ranked], gold), len(gold)
    if all(passage.get("is_gold") is None for passage in row["candidates"]):
        return None
    return [bool(passage.get("is_gold")) for passage in ranked], sum(bool(p.get("is_gold")) for p in row["candidates"])


def recall_at(relevant: Sequence[bool], num_gold: int, k: int) -> float:
    """Returns the share of the gold passages that are among the first k."""
    return sum(relevant[:k]) / num_gold if num_gold else 0.0


def reciprocal_rank(relevant: Sequence[bool]) -> float:
    """Returns 1/rank of the first relevant passage; its mean over queries is MRR.

    Example:
        >>> reciprocal_rank([False, True, True])
        0.5
    """
    return 1 / (relevant.index(True) + 1) if True in relevant else 0.0


def ndcg(relevant: Sequence[bool], num_gold: int, k: int = 10) -> float:
    r"""Returns $\sum_{i \le k} \frac{r_i}{\log_2(i + 1)}$ over what it is with all gold passages first."""
    gain = sum(1 / math.log2(rank + 1) for rank, hit in enumerate(relevant[:k], start=1) if hit)
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(num_gold, k) + 1))
    return gain / best if best else 0.0
