"""Reciprocal rank fusion: the paper's sum, and an order that nothing leaves open."""

from collections.abc import Sequence
from typing import Any

import pytest

from drorl.errors import InvalidInputError
from drorl.retrieval.hybrid import Hybrid, HybridSettings, open_hybrid
from drorl.retrieval.retrievers import Place


class Ranking:
    """Finds what it was given, whatever is asked."""

    def __init__(self, key: str, names: str):
        self.key, self.names, self.asked = key, names, 0

    def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
        self.asked = k
        found = [
            {"id": name, "title": "", "text": name, "score": 9.0 - i, "rank": i + 1}
            for i, name in enumerate(self.names)
        ]
        return [found[:k] for _ in queries]


def test_scores_are_the_papers() -> None:
    """Sums of 1 / (60 + rank) written out; who is in both lists comes first; both queries are fused."""
    parts = [Ranking("a", "xyz"), Ranking("b", "zw")]
    found, again = Hybrid(parts).search(["q", "r"], 10)
    assert found == again
    assert {c["id"]: c["score"] for c in found} == {
        "z": 1 / 63 + 1 / 61,
        "x": 1 / 61,
        "y": pytest.approx(1 / 62),
        "w": pytest.approx(1 / 62),
    }
    assert "".join(c["id"] for c in found) == "zxyw"  # y before w: the first retriever found it
    assert [c["rank"] for c in found] == [1, 2, 3, 4] and found[0]["text"] == "z"


def test_depth_and_k() -> None:
    """Retrievers are asked for more than are wanted, and only as many as are wanted come back."""
    parts = [Ranking("a", "xyz"), Ranking("b", "zw")]
    assert [c["id"] for c in Hybrid(parts).search(["q"], 2)[0]] == ["z", "x"] and parts[0].asked == 100
    shallow = Hybrid(parts, HybridSettings(depth=1))
    assert [c["id"] for c in shallow.search(["q"], 1)[0]] == ["x"] and parts[1].asked == 1
    assert Hybrid(parts, HybridSettings(constant=0)).search(["q"], 1)[0][0]["score"] == 1 / 3 + 1


def test_the_key_holds_all_that_matters() -> None:
    """Each retriever's key in order, and the settings."""
    a, b = Ranking("a", "x"), Ranking("b", "y")
    hybrids = [Hybrid([a, b]), Hybrid([b, a]), Hybrid([a]), Hybrid([a, b], HybridSettings(constant=1))]
    assert len({hybrid.key for hybrid in hybrids}) == 4
    assert Hybrid([a, b]).search(["q"], 1)[0][0]["id"] == "x" and Hybrid([b, a]).search(["q"], 1)[0][0]["id"] == "y"
    with pytest.raises(InvalidInputError, match="no retrievers"):
        Hybrid([])
    with pytest.raises(InvalidInputError, match="not to be negative"):
        HybridSettings(constant=-1)
    with pytest.raises(InvalidInputError, match="of=bm25,bm25 names a retriever twice"):
        open_hybrid(Place(None), {"of": "bm25,bm25"})
