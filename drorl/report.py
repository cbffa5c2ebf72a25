"""The report of a run: one self-contained HTML page, and the table of systems for the terminal.

`write_report` reads what a recipe leaves in its run directory and writes `report.html` beside it:

    summary.json       systems, metrics and intervals; data set, configuration, machine, versions
    log_history.json   `TrainerState.log_history` (optional): the curves
    examples.json      worked examples before and after training (optional)

The wording follows the intervals: a difference is called an improvement only when its 95 % interval excludes 0. The
page loads nothing from elsewhere, and what comes from data or models is escaped.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from drorl.curves import curves
from drorl.errors import InvalidInputError
from drorl.metrics import exact_match

WITHOUT_VALUE = "–"


# --------------------------------------------------------------------------------------------------- metrics in words
@dataclass(frozen=True)
class Metric:
    """One column of the tables. Larger is better in all of them."""

    key: str
    label: str
    unit: str  # "points": stored as a fraction, shown in per cent; "nats": shown as it is
    meaning: str

    def format(self, value: float | None, signed: bool = False) -> str:
        """Returns the value as shown: `0.314` -> `31.4`, `-5.678` nats -> `−5.68`, missing -> a dash."""
        if value is None or math.isnan(value):
            return WITHOUT_VALUE
        scaled = 100 * value if self.unit == "points" else value
        text = f"{scaled:{'+' if signed else ''}.{1 if self.unit == 'points' else 2}f}"
        return text.replace("inf", "∞").replace("-", "−")

    def format_interval(self, ends: Sequence[float] | None, signed: bool = False) -> str:
        """Returns both ends, `[25.0, 37.5]`, or a dash when there is no interval."""
        return f"[{', '.join(self.format(end, signed) for end in ends)}]" if ends else WITHOUT_VALUE

    @property
    def in_text(self) -> str:
        """The label inside a sentence: `exact match`, but `F1` and `IW-ELBO`."""
        return self.label if self.label[:2].isupper() or self.label[1].isdigit() else self.label.lower()

    @property
    def sign(self) -> str:
        """The unit behind a value, where a column head shows it."""
        return "%" if self.unit == "points" else self.unit


METRICS = (
    Metric("exact_match", "Exact match", "points", "the answer equals a gold answer after normalisation"),
    Metric("f1", "F1", "points", "overlap of the answer's words with the closest gold answer's"),
    Metric("recall@1", "Recall@1", "points", "the first chosen passage contains a gold answer"),
    Metric("iw_elbo", "IW-ELBO", "nats", "log of the gold answer's mean likelihood over sampled permutations"),
    Metric("answer_logp", "Answer log-likelihood", "nats", "of the gold answer, given the greedily chosen passages"),
)


def present_metrics(summary: Mapping[str, Any]) -> list[Metric]:
    """Returns the metrics for which at least one system has a value, in the order of the tables."""
    rows = system_rows(summary).values()
    return [metric for metric in METRICS if any(row.get(metric.key) is not None for row in rows)]


def system_rows(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the systems by name, the warm-up and DRO among them even where `systems` does not list them."""
    rows = {name: {"label": name, **row} for name, row in summary.get("systems", {}).items()}
    for name, label in (("warmup", "Warm-up"), ("dro", "DRO")):
        if name not in rows and summary.get(name):
            rows[name] = {"label": label, **summary[name]}
    return rows


def best_value(metric: Metric, rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Returns the largest value of a metric among the systems, `None` when no system has one."""
    values = [row[metric.key] for row in rows if row.get(metric.key) is not None]
    return max((value for value in values if not math.isnan(value)), default=None)


# ------------------------------------------------------------------------------------------------------------ verdicts
def verdict(delta: Mapping[str, Any]) -> str:
    """Returns `improved` or `worsened` when the 95 % interval of a difference excludes 0, else `not shown`."""
    low, high = delta.get("ci95") or (-math.inf, math.inf)
    return "improved" if low > 0 else "worsened" if high < 0 else "not shown"


def headline(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the title of the report and the sentences below it: what changed by how much, and what was not shown."""
    deltas = summary.get("delta", {})
    verdicts = {metric: verdict(deltas[metric.key]) for metric in METRICS if metric.key in deltas}
    improved, worsened, open_ = (
        [metric for metric, word in verdicts.items() if word == wanted]
        for wanted in ("improved", "worsened", "not shown")
    )
    sentences = [_change(metric, deltas[metric.key], verdicts[metric]) for metric in improved + worsened]
    if open_:
        listed = _join([_change(metric, deltas[metric.key], "not shown") for metric in open_])
        sentences.append(f"No difference shown, the interval includes 0: {listed}.")
    return {"title": _title(improved, worsened, bool(verdicts)), "sentences": sentences + _ahead_of_dro(summary)}


def _title(improved: list[Metric], worsened: list[Metric], compared: bool) -> str:
    if not compared:
        return "DRO was not compared with its warm-up"
    if not improved and not worsened:
        return "No difference between DRO and its warm-up was shown"
    parts = [
        f"{word} {_join([metric.in_text for metric in metrics])}"
        for word, metrics in (("improved", improved), ("worsened", worsened))
        if metrics
    ]
    return f"DRO {_join(parts)} over its warm-up" if improved else f"DRO {_join(parts)} against its warm-up"


def _change(metric: Metric, delta: Mapping[str, Any], word: str) -> str:
    """Returns one difference in words; a clause when it was not shown, a sentence otherwise."""
    ends = delta.get("ci95")
    interval = (
        f"95 % interval {' to '.join(metric.format(end, signed=True) for end in ends)}" if ends else "no interval"
    )
    if word == "not shown":
        return f"{metric.in_text} ({metric.format(delta['mean'], signed=True)} {metric.unit}; {interval})"
    direction = "rose" if word == "improved" else "fell"
    return f"{metric.label} {direction} by {metric.format(abs(delta['mean']))} {metric.unit} ({interval})."


def _ahead_of_dro(summary: Mapping[str, Any]) -> list[str]:
    """Returns a sentence naming the systems with a higher value than DRO's, none when DRO leads every column."""
    rows, ahead = system_rows(summary), []
    for metric in present_metrics(summary):
        dro, best = rows.get("dro", {}).get(metric.key), best_value(metric, rows.values())
        if dro is not None and best is not None and best > dro:
            label = next(row["label"] for row in rows.values() if row.get(metric.key) == best)
            ahead.append(
                f"{metric.in_text} ({label}: {metric.format(best)} against {metric.format(dro)} {metric.sign})"
            )
    return [f"DRO does not have the highest value of the table in {_join(ahead)}."] if ahead else []


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)


# ------------------------------------------------------------------------------------------------------------ terminal
def summary_table(summary: Mapping[str, Any]) -> Table:
    """Returns the systems with their metrics and 95 % intervals for the terminal; the best of a column is bold.

    Args:
        summary (`Mapping`): content of `summary.json`. The last row is DRO minus warm-up, green or red only when the
            interval of the difference excludes 0.
    """
    rows = system_rows(summary)
    metrics = [metric for metric in present_metrics(summary) if metric.key != "answer_logp"]  # fits 80 columns
    title, caption = f"{summary.get('n_eval', '?')} held-out questions", _table_caption(summary)
    table = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("System", ratio=1)
    for metric in metrics:
        table.add_column(f"{metric.label}\n{metric.sign}", justify="right", no_wrap=True)
    best = {metric.key: best_value(metric, rows.values()) for metric in metrics}
    for row in rows.values():
        table.add_row(Text(row["label"]), *(_terminal_cell(metric, row, best[metric.key]) for metric in metrics))
    if deltas := summary.get("delta"):
        table.add_section()
        table.add_row("DRO minus warm-up", *(_terminal_delta(metric, deltas.get(metric.key)) for metric in metrics))
    return table


def _table_caption(summary: Mapping[str, Any]) -> str:
    samples = summary.get("num_samples_iw_elbo")
    bound = f" IW-ELBO from {samples} samples." if samples else ""
    return f"Brackets: 95 % bootstrap intervals over questions. Bold: best.{bound}"


def _terminal_cell(metric: Metric, row: Mapping[str, Any], best: float | None) -> Text:
    value, ends = row.get(metric.key), row.get("ci95", {}).get(metric.key)
    style = "bold" if value is not None and value == best else ""
    return Text.assemble(
        (metric.format(value), style), *([("\n" + metric.format_interval(ends), "dim")] if ends else [])
    )


def _terminal_delta(metric: Metric, delta: Mapping[str, Any] | None) -> Text:
    if delta is None:
        return Text(WITHOUT_VALUE)
    style = {"improved": "bold green", "worsened": "bold red", "not shown": ""}[verdict(delta)]
    interval = metric.format_interval(delta.get("ci95"), signed=True)
    return Text.assemble((metric.format(delta["mean"], signed=True), style), ("\n" + interval, style or "dim"))


# ---------------------------------------------------------------------------------------------------------------- page
def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run directory and returns its path.

    Args:
        run_dir (`Path`): holds `summary.json` and, optionally, `log_history.json` and `examples.json`.

    Raises:
        InvalidInputError: when there is no `summary.json`.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "summary.json").is_file():
        raise InvalidInputError(f"{run_dir / 'summary.json'} is missing: a recipe writes it at the end of its run")
    summary, history, examples = (
        _read_json(run_dir / f"{name}.json", default)
        for name, default in (("summary", {}), ("log_history", []), ("examples", []))
    )
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(**page_content(summary, history, examples))
    report, unfinished = run_dir / "report.html", run_dir / "report.html.part"
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(report)
    return report


def _read_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def page_content(summary: Mapping[str, Any], history: list[dict], examples: list[dict]) -> dict[str, Any]:
    """Returns everything the template shows, in the order in which it shows it."""
    dataset = summary.get("dataset", {})
    facts = dict(dataset.get("facts", {}))
    warning, licences = facts.pop("warning", None), facts.pop("licences", None)
    return {
        "summary": {
            key: summary.get(key) for key in ("n_eval", "minutes", "num_samples_iw_elbo", "command", "commit")
        },
        "headline": headline(summary),
        "dataset": {"name": dataset.get("name", "the data set"), "split": dataset.get("split"), "warning": warning},
        "metrics": present_metrics(summary),
        "systems": system_table(summary),
        "deltas": delta_rows(summary.get("delta", {})),
        "curves": curves(history),
        "examples": [example_view(example) for example in examples],
        "facts": flatten(facts),
        "licences": flatten({"licences": licences}) if licences else [],
        "config": flatten(summary.get("config", {})),
        "environment": flatten({key: summary.get(key, {}) for key in ("machine", "versions")}),
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns nested settings as `(dotted name, text)` rows.

    >>> flatten({"lora": {"r": 16}, "seeds": [0, 1], "lr": 0.00025})
    [('lora.r', '16'), ('seeds', '0, 1'), ('lr', '0.00025')]
    """
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            rows.append((f"{prefix}{key}", f"{value:.4g}"))
        else:
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows


def system_table(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of the systems table: label, and value, interval and "is the best" for each metric."""
    rows, metrics = system_rows(summary), present_metrics(summary)
    best = {metric.key: best_value(metric, rows.values()) for metric in metrics}
    return [
        {
            "label": row["label"],
            "is_dro": name == "dro",
            "cells": [
                {
                    "metric": metric,
                    "value": metric.format(row.get(metric.key)),
                    "interval": metric.format_interval(row.get("ci95", {}).get(metric.key)),
                    "best": row.get(metric.key) is not None and row[metric.key] == best[metric.key],
                }
                for metric in metrics
            ],
        }
        for name, row in rows.items()
    ]


def delta_rows(deltas: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of the table of differences, with positions in -1..1 for their marks (one scale per unit)."""
    rows = []
    for metric in (metric for metric in METRICS if metric.key in deltas):
        delta = deltas[metric.key]
        largest = max(
            _reach(deltas[other.key]) for other in METRICS if other.key in deltas and other.unit == metric.unit
        )
        ends = delta.get("ci95") or (delta["mean"], delta["mean"])
        rows.append(
            {
                "metric": metric,
                "mean": metric.format(delta["mean"], signed=True),
                "interval": metric.format_interval(delta.get("ci95"), signed=True),
                "verdict": verdict(delta),
                "marks": [max(-1.0, min(1.0, end / largest)) for end in (ends[0], delta["mean"], ends[1])],
            }
        )
    return rows


def _reach(delta: Mapping[str, Any]) -> float:
    finite = [abs(end) for end in (delta["mean"], *(delta.get("ci95") or ())) if math.isfinite(end)]
    return max(finite, default=0.0) or 1.0


def example_view(example: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one worked example: its passages with both models' probabilities, and both models' samples by weight."""
    sides = {side: example.get(side, {}) for side in ("before", "after")}
    candidates = [
        {
            **candidate,
            "number": index + 1,
            **{
                side: {
                    "probability": _item(view.get("probabilities"), index),
                    "rank": view["chosen"].index(index) + 1 if index in view.get("chosen", ()) else None,
                }
                for side, view in sides.items()
            },
        }
        for index, candidate in enumerate(example.get("candidates", []))
    ]
    answers = example.get("answers", [])
    return {
        "query": example["query"],
        "answers": answers,
        "candidates": candidates,
        "sides": {
            side: {
                "answer": view.get("answer", ""),
                "correct": bool(answers) and exact_match(view.get("answer", ""), answers) == 1.0,
                "samples": _samples(view, len(candidates)),
            }
            for side, view in sides.items()
        },
    }


def _item(values: Sequence[float] | None, index: int) -> float | None:
    return values[index] if values and index < len(values) else None


def _samples(view: Mapping[str, Any], num_candidates: int) -> list[dict[str, Any]]:
    """Returns the distinct permutations by falling weight; equal samples are one row with their count and total."""
    weights = view.get("importance_weights") or []
    permutations = view.get("permutations") or [[index] for index in range(num_candidates)]
    totals, counts = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for permutation, weight in zip(map(tuple, permutations), weights, strict=False):
        totals[permutation] += weight
        counts[permutation] += 1
    return [
        {"text": " > ".join(f"[{index + 1}]" for index in z), "weight": weight, "count": counts[z]}
        for z, weight in totals.most_common()
    ]
