"""Rows, weights, answers and scores as they are shown in a terminal. Texts of data are never read as markup."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .metrics import contains_answer
from .scoring import NATS
from .statistics import Interval

if TYPE_CHECKING:
    from .inspection import Weighed
    from .pipeline import Answer
    from .plan import Plan

_PREDICTED = {
    "cpu": "Predicted. Peaks of steps on a CPU were within 15 % of it (tests/test_plan.py).",
    "cuda": "A prediction that nobody has measured: memory was compared with steps on a CPU, and no GPU ran this.",
}


def _table(*columns: str) -> Table:
    """A table; titles and texts are cut, so that each row is a line: the text takes what the terminal leaves it."""
    table = Table(box=SIMPLE_HEAD, title_justify="left", expand="text" in columns)
    limits: dict[str, dict[str, Any]] = {"title": {"max_width": 28}, "text": {"ratio": 1}}
    for name in columns:
        table.add_column(name, no_wrap=name in ("", *limits), **limits.get(name, {}))
    return table


def shown(text: str, style: str = "") -> Text:
    """Returns a text of data as a terminal may have it: what would control it, such as ESC, is written out."""
    return Text(_CONTROL.sub(lambda found: repr(found[0])[1:-1], text), style)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def _add(table: Table, *cells: object) -> None:
    table.add_row(*(cell if isinstance(cell, Text) else shown(str(cell)) for cell in cells))


def row_view(row: Mapping[str, Any], num_candidates: int | None = None) -> RenderableType:
    """Returns a row: query, answers, and its candidates, marked `✓` where an answer stands and `★` where gold."""
    head = [shown(row["query"], "bold"), shown(f"answers: {' | '.join(row['answers']) or '-'}")]
    table = _table("", "", "score", "title", "text")
    for number, passage in enumerate(row["candidates"][:num_candidates], start=1):
        holds = bool(row["answers"]) and contains_answer(passage["text"], row["answers"])
        marks = ("✓" if holds else " ") + ("★" if passage.get("is_gold") else " ")
        score = "" if passage.get("score") is None else f"{passage['score']:.2f}"
        _add(table, f"[{number}]", marks, score, passage["title"], " ".join(passage["text"].split()))
    unread = len(row["candidates"]) - len(row["candidates"][:num_candidates])
    foot = [Text(f"{unread} more candidates are not read")] if unread else []
    return Group(*head, table, *foot)


def weights_view(weighed: "Weighed", most: int | None = None) -> RenderableType:
    """Returns what each sampled permutation got, or the weightiest `most` of them."""
    table = _table("permutation", "log p_s", "log p_g", "w", "")
    logps = zip(weighed.selector_logps.tolist(), weighed.generator_logps.tolist(), strict=True)
    found = list(zip(weighed.texts, logps, weighed.importance_weights.tolist(), strict=True))
    for text, (selector, generator), weight in found[:most]:
        _add(
            table,
            text or "-",
            f"{selector:.2f}",
            f"{generator:.2f}",
            f"{weight:.3f}",
            Text("█" * round(12 * weight), "cyan"),
        )
    size = f"effective sample size {weighed.effective_sample_size:.2f} of {len(found)}"
    return Group(table, Text(f"{size}, iw_elbo {weighed.iw_elbo:.2f} nats", no_wrap=True, overflow="ellipsis"))


def sparkline(values: Sequence[float], width: int, height: int = 1) -> Text:
    """Returns the last `width` values as columns in a text of `height` lines; a column is blank without a number.

    >>> print(sparkline([0, 1, 2, 3, 7], width=4))
    ▁▂▃█
    """
    last = values[-width:]
    finite = [value for value in last if math.isfinite(value)]
    low, span = min(finite, default=0.0), (max(finite, default=0.0) - min(finite, default=0.0)) or 1.0
    levels = [1 + round((8 * height - 1) * (v - low) / span) if math.isfinite(v) else 0 for v in last]
    lines = ["".join(_BLOCKS[min(max(level - 8 * floor, 0), 8)] for level in levels) for floor in range(height)]
    return Text("\n".join(reversed(lines)), style="cyan")


_BLOCKS = " ▁▂▃▄▅▆▇█"
CURVES = {
    "iw_elbo": "iw_elbo",
    "effective_sample_size": "effective sample size",
    "selector/loss": "selector loss",
    "generator/loss": "generator loss",
    "selector/entropy": "selector entropy",
}
_LEAST = 16  # lines of a terminal, below which there is no place but for the bar


def training_view(
    history: Sequence[Mapping[str, Any]], weighed: "Weighed | None", width: int, height: int
) -> RenderableType:
    """Returns curves of the last steps and one query's samples; nothing in a terminal that is too small for them.

    Args:
        history (sequence of mappings): `TrainerState.log_history`.
        weighed ([`~inspection.Weighed`], *optional*): of a query of the last step.
        width (`int`): of the terminal, columns.
        height (`int`): of the terminal, lines.
    """
    if height < _LEAST or width < 60:
        return Group()
    lines = 2 if height >= 40 else 1
    grid = Table.grid(padding=(0, 2, lines - 1, 0))
    for name, label in CURVES.items():
        values = [entry[name] for entry in history if name in entry]
        if values:
            curve = sparkline(values, width - 40, lines)
            grid.add_row(label, Text(f"{values[-1]:.2f}", justify="right"), curve)
    if weighed is None:
        return Group(Text(), grid)
    query = shown(" ".join(weighed.query.split()), "bold")
    query.no_wrap, query.overflow = True, "ellipsis"
    most = height - (2 * lines - 1) * grid.row_count - 10
    return Group(Text(), grid, Text(), query, weights_view(weighed, max(most, 1)))


def answer_view(answer: "Answer", most: int = 5) -> RenderableType:
    """Returns the passages that were read, how likely each was to be chosen first, and the answer with its sources."""
    table = _table("", "p", "title", "text")
    cited = {id(c.passage): f"[{number}]" for number, c in enumerate(answer.citations, start=1)}
    for place, ranked in enumerate(answer.ranking):
        if place < most or id(ranked.passage) in cited:
            passage, mark = ranked.passage, cited.get(id(ranked.passage), "")
            _add(table, mark, f"{math.exp(ranked.logp):.2f}", passage["title"], " ".join(passage["text"].split()))
    sources = " ".join(cited.values())
    return Group(table, Text.assemble(shown(answer.text or "(no answer)", "bold"), f"  {sources}"))


def answer_record(row: Mapping[str, Any], answer: "Answer") -> dict[str, Any]:
    """Returns an answer as JSON; each `logp` is a log-probability, nats: of a citation that of choosing it at its
    place, of a passage that of choosing it first."""

    def listed(passages: Sequence) -> list[dict[str, Any]]:
        return [
            {"rank": rank, **{name: p.passage.get(name) for name in ("id", "title", "text", "score")}, "logp": p.logp}
            for rank, p in enumerate(passages, start=1)
        ]

    citations = [{name: c[name] for name in ("id", "title", "logp")} for c in listed(answer.citations)]
    found = {"query": row["query"], "answer": answer.text, "citations": citations, "passages": listed(answer.ranking)}
    return {"id": row["id"], **found}


def scores_view(count: int, scores: Mapping[str, tuple[Interval, int]]) -> RenderableType:
    """Returns the means over questions with their intervals."""
    table = _table("", "mean", "95 % interval", "questions")
    for name, (interval, n) in scores.items():
        unit, scale = (" nats", 1) if name in NATS else (" %", 100)
        low, high = (f"{scale * end:.2f}" for end in interval.ci95)
        _add(table, name, f"{scale * interval.mean:.2f}{unit}", f"{low} to {high}" if n > 1 else "-", n)
    table.title = Text(f"{count:,} questions")
    return table


def plan_view(plan: "Plan", advice: "Plan | None", flops: float) -> RenderableType:
    """Returns the predicted memory by part, the time of a step, and the settings that fit."""
    parts = _table("memory of one device", "GiB", "")
    moment, peak = plan.peak
    alive = {*plan.fixed, *plan.moments[moment]}
    for name, size in (plan.fixed | plan.passing).items():
        if size:
            _add(parts, name, f"{size / 2**30:.2f}", "" if name in alive else "at another moment")
    fits = "fits" if plan.fits else "does NOT fit"
    _add(
        parts,
        Text("peak", style="bold"),
        f"{peak / 2**30:.2f}",
        f"{moment}; {fits} {plan.settings.memory / 2**30:.0f}",
    )
    names = ["at once", "in turn", "recomputed", *(["advice"] if advice else [])]
    records = [
        way.record(flops) for way in [*plan.alternatives(plan.settings.num_queries), *([advice] if advice else [])]
    ]
    ways = _table("", *names)
    for name in records[0]["settings"]:
        _add(ways, name, *("none" if r["settings"][name] is None else r["settings"][name] for r in records))
    _add(ways, "peak, GiB", *(f"{r['peak'] / 2**30:.1f}{'' if r['fits'] else ' ✗'}" for r in records))
    _add(ways, "queries a second", *(f"{r['queries_per_second']:.2f}" for r in records))
    work = plan.record(flops)
    tokens = "{selector:,} + {generator:,} distinct tokens".format(**work["tokens"])
    step = f"a step: {work['operations'] / 1e12:.1f} TFLOP, {work['seconds']:.2f} s; {tokens}, selector + generator"
    nothing = [] if advice else [Text("nothing fits: take a smaller model, or fewer or shorter passages")]
    return Group(parts, Text(step), ways, *nothing, Text(_PREDICTED[plan.settings.device], style="dim"))
