"""Candidates from what another system has retrieved."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from drorl.data.fields import Row
from drorl.data.formats import PASSAGES
from drorl.data.reading import Reading
from drorl.data.trec import Ranking
from drorl.errors import InvalidInputError


class Ranked:
    """Puts the candidates of a run into rows.

    Args:
        run (`dict`): see [`read_run`].
        corpus (`Path`): a file of passages, read once; those that the run names are kept in memory.
        qrels (`dict`, *optional*): see [`read_qrels`]: marks the candidates that are relevant, and names all golds.
        top_k (`int`): candidates of each row.
    """

    def __init__(
        self, run: Mapping[str, Ranking], corpus: Path, qrels: Mapping[str, list[str]] | None = None, top_k: int = 20
    ):
        self.run = {query: ranking[:top_k] for query, ranking in run.items()}
        self.qrels = qrels
        wanted = {passage for ranking in self.run.values() for passage, _ in ranking}
        self.passages = {p["id"]: p for p in Reading(corpus, PASSAGES) if p["id"] in wanted}
        if missing := sorted(wanted - self.passages.keys()):
            raise InvalidInputError(
                f"{corpus} lacks {len(missing):,} of {len(wanted):,} passages of the run, such as {missing[0]!r}"
            )

    def __call__(self, rows: Iterable[Row]) -> list[Row]:
        """Returns the rows with their candidates; a row that the run lacks has none.

        What is relevant is also named in `metadata`: it counts where the run has not found it.
        """
        return [
            {**row, "candidates": self._candidates(row["id"]), "metadata": row["metadata"] | self._golds(row["id"])}
            for row in rows
        ]

    def _golds(self, query: str) -> dict[str, list[str]]:
        gold = (self.qrels or {}).get(query)
        return {"gold_ids": gold} if gold else {}

    def _candidates(self, query: str) -> list[dict[str, Any]]:
        gold = None if self.qrels is None else self.qrels.get(query, [])
        return [
            {**self.passages[passage], "score": score, "rank": rank}
            | ({} if gold is None else {"is_gold": passage in gold})
            for rank, (passage, score) in enumerate(self.run.get(query, []), start=1)
        ]
