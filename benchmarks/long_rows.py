"""VitalQA's rows with passages of 100 words, as retrieval is mostly done on; its own have 27 on average."""

from itertools import chain, cycle, islice
from typing import Any

from drorl.data.vitalqa import load_vitalqa

NUM_WORDS = 100


def long_rows(split: str, count: int) -> list[dict[str, Any]]:
    """Returns the first rows of a split, each candidate's text continued by those of the candidates behind it."""
    rows = []
    for row in load_vitalqa()[split].select(range(count)):
        texts = [c["text"].split() for c in row["candidates"]]
        words = [islice(chain.from_iterable(cycle(texts[i:] + texts[:i])), NUM_WORDS) for i in range(len(texts))]
        candidates = [{**c, "text": " ".join(of)} for c, of in zip(row["candidates"], words, strict=True)]
        rows.append({**row, "candidates": candidates})
    return rows
