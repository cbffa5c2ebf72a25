"""VitalQA's rows with passages as long as those of 100 words that retrieval is mostly done on.

VitalQA's own have 25 words on average. Each is continued by the next two candidates' texts, and whoever measures cuts
them to one length.
"""

from typing import Any

from drorl.data.vitalqa import load_vitalqa


def long_rows(split: str, count: int) -> list[dict[str, Any]]:
    """Returns the first rows of a split, each candidate with the texts of three."""
    rows = []
    for row in load_vitalqa()[split].select(range(count)):
        around = [c["text"] for c in (*row["candidates"], *row["candidates"][:2])]
        candidates = [{**c, "text": " ".join(around[i : i + 3])} for i, c in enumerate(row["candidates"])]
        rows.append({**row, "candidates": candidates})
    return rows
