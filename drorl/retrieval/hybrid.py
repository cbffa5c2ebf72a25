r"""Several retrievers as one: each passage counts by its ranks, so that scores need not be comparable.

    score(d) = sum_r 1 / (60 + rank_r(d)),  rank 1 is best; a retriever that has not found d adds nothing

Source: Cormack, Clarke and Büttcher, Reciprocal rank fusion outperforms Condorcet and individual rank learning
methods, SIGIR 2009.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drorl.errors import InvalidInputError

from .retrievers import Place, Retriever, open_retriever, settings_of


@dataclass(frozen=True)
class HybridSettings:
    """What is fused, and how.

    Args:
        of (`str`): names of retrievers, with commas between them.
        constant (`int`): 60 in the paper; the larger, the less the first ranks stand out.
        depth (`int`): candidates that each retriever is asked for, if that is more than are wanted.
    """

    of: str = "bm25,dense"
    constant: int = 60
    depth: int = 100

    def __post_init__(self) -> None:
        if self.constant < 0 or self.depth < 1:
            raise InvalidInputError(
                f"constant={self.constant} is not to be negative, and depth={self.depth} is 1 at least"
            )


class Hybrid:
    """Fuses the rankings of retrievers.

    Args:
        retrievers (`Sequence[Retriever]`): of one corpus: an id means the same passage to all of them.
        settings ([`HybridSettings`], *optional*): `of` is not looked at here.

    Raises:
        InvalidInputError: if there are no retrievers.
    """

    def __init__(self, retrievers: Sequence[Retriever], settings: HybridSettings | None = None):
        if not retrievers:
            raise InvalidInputError("a hybrid of no retrievers finds nothing")
        self.retrievers, self.settings = retrievers, settings or HybridSettings()
        keys = [retriever.key for retriever in retrievers]
        self.key = f"hybrid {json.dumps([self.settings.constant, self.settings.depth, keys])}"

    def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
        """Returns the best k passages of each query, best first; of equal ones, who found them first and higher."""
        depth = max(k, self.settings.depth)
        rankings = [retriever.search(queries, depth) for retriever in self.retrievers]
        return [self._fused(of_query)[:k] for of_query in zip(*rankings, strict=True)]

    def _fused(self, rankings: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        passages: dict[str, dict[str, Any]] = {}  # in the order in which ties are left
        scores: dict[str, float] = {}
        for ranking in rankings:
            for rank, passage in enumerate(ranking, start=1):
                passages.setdefault(passage["id"], passage)
                scores[passage["id"]] = scores.get(passage["id"], 0.0) + 1 / (self.settings.constant + rank)
        best = sorted(passages, key=lambda name: -scores[name])
        return [{**passages[name], "score": scores[name], "rank": rank} for rank, name in enumerate(best, start=1)]


def open_hybrid(place: Place, given: Mapping[str, str]) -> Hybrid:
    """Opens the retrievers that are fused; `bm25.k1` is the setting `k1` of `bm25`."""
    settings = settings_of(HybridSettings, {name: text for name, text in given.items() if "." not in name})
    names = settings.of.split(",")
    if len(set(names)) < len(names):
        raise InvalidInputError(f"of={settings.of} names a retriever twice, which would count once")
    if stray := [name for name in given if "." in name and name.split(".")[0] not in names]:
        raise InvalidInputError(f"{stray[0]} is a setting of a retriever that is not fused: of={settings.of}")
    parts = {
        name: {k.removeprefix(f"{name}."): v for k, v in given.items() if k.startswith(f"{name}.")} for name in names
    }
    if "hybrid" in parts:
        raise InvalidInputError("a hybrid is none of the retrievers that a hybrid fuses")
    return Hybrid([open_retriever(name, place, of_name) for name, of_name in parts.items()], settings)
