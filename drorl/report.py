"""The report of a run, or of several in comparison: one self-contained HTML page; and the table for the terminal.

`write_report` shows what [`runs`] finds in the directories. Where a run was interrupted, or no recipe made it, that is
less, and the page says what is missing.

The wording follows the intervals: a difference is called an improvement only when its 95 % interval excludes 0. The
page loads nothing from elsewhere, and what comes from data or models is escaped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from drorl.curves import curves, overlaid, style
from drorl.errors import OutputError
from drorl.metrics import exact_match
from drorl.runs import TRAINED, Run, different_settings, incomparable, names_of, paired_differences, read_run


@dataclass(frozen=True)
class Metric:
    """One column of the tables. Larger is better in all of them."""

    key: str
    label: str
    unit: str  # "%": stored as a fraction, shown in per cent; "nats": shown as it is
    meaning: str

    def format(self, value: float | None, signed: bool = False) -> str:
        """Returns the value as shown: `0.314` -> `31.4`, `-5.678` nats -> `−5.68`, missing -> a dash."""
        if value is None or math.isnan(value):
            return "–"
        scale, digits = (100, 1) if self.unit == "%" else (1, 2)
        text = f"{scale * value:{'+' if signed else ''}.{digits}f}"
        return text.replace("inf", "∞").replace("-", "−")

    def format_interval(self, ends: Sequence[float] | None, signed: bool = False) -> str:
        """Returns both ends, `[25.0, 37.5]`, or nothing when there is no interval."""
        return f"[{', '.join(self.format(end, signed) for end in ends)}]" if ends else ""

    def rank(self, system: Mapping[str, Any]) -> float:
        """Returns a system's value to compare it by; a system without one comes last."""
        value = system.get(self.key)
        return -math.inf if value is None or math.isnan(value) else value


COLUMNS = (
    Metric("exact_match", "exact match", "%", "the answer equals a gold answer after normalisation"),
    Metric("f1", "F1", "%", "overlap of the answer's words with the closest gold answer's"),
    Metric("recall@1", "recall@1", "%", "the first chosen passage contains a gold answer"),
    Metric("all_gold@2", "both golds", "%", "the first two passages hold all that are marked gold"),
    Metric("iw_elbo", "IW-ELBO", "nats", "log of the gold answer's mean likelihood over sampled permutations"),
    Metric("answer_logp", "answer log-likelihood", "nats", "of the gold answer, given the greedily chosen passages"),
)


def known(values: Mapping[str, Any]) -> list[Metric]:
    """Returns the metrics that a system, or a difference of two, has: not every data set marks gold passages."""
    return [metric for metric in COLUMNS if values.get(metric.key) is not None]


def leaders(systems: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns for each metric the system with the highest value, the first of several."""
    return {metric.key: max(systems.values(), key=metric.rank) for metric in COLUMNS}


def verdict(delta: Mapping[str, Any]) -> str:
    """Returns `improved` or `worsened` when the 95 % interval of a difference excludes 0, else `not shown`."""
    low, high = delta["ci95"]
    return "improved" if low > 0 else "worsened" if high < 0 else "not shown"


def headline(deltas: Mapping[str, Any]) -> str:
    """Returns the title of the report: what improved and what worsened, by the intervals."""
    return f"DRO against its warm-up: {changes(deltas)}"


def changes(deltas: Mapping[str, Any]) -> str:
    """Returns which metrics improved and which worsened, by the intervals of their differences."""
    labels = {
        word: [metric.label for metric in known(deltas) if verdict(deltas[metric.key]) == word]
        for word in ("improved", "worsened")
    }
    return "; ".join(f"{word} {', '.join(of)}" for word, of in labels.items() if of) or "no difference shown"


def ahead_of_dro(systems: Mapping[str, Any]) -> str:
    """Returns a sentence naming the metrics in which another system is ahead of DRO, empty when DRO leads in all."""
    leading, dro = leaders(systems), systems["dro"]
    ahead = [
        f"{metric.label} ({leader['label']}: {metric.format(leader[metric.key])} against "
        f"{metric.format(dro.get(metric.key))} {metric.unit})"
        for metric in COLUMNS
        if metric.rank(leader := leading[metric.key]) > metric.rank(dro)
    ]
    return f"DRO does not have the highest value of the table in {'; '.join(ahead)}." if ahead else ""


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Returns the systems with their metrics and 95 % intervals for the terminal; the best of a column is bold.

    Args:
        summary (`Mapping`): content of `summary.json`. The last row is DRO minus warm-up, green or red only when the
            interval of the difference excludes 0.
    """
    metrics = known(summary["delta"])
    left_out = ("answer_logp", "recall@1" if "all_gold@2" in summary["delta"] else "")  # fits 80 columns
    metrics = [metric for metric in metrics if metric.key not in left_out]
    samples = f"IW-ELBO from {summary['num_samples_iw_elbo']} samples."
    caption = f"Brackets: 95 % bootstrap intervals over questions. Bold: best. {samples}"
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title = f"{summary['n_eval']} held-out questions"
    table.add_column("system", ratio=1)
    for metric in metrics:
        table.add_column(f"{metric.label}\n{metric.unit}", justify="right", no_wrap=True)
    systems, best = summary["systems"], leaders(summary["systems"])
    for row in systems.values():
        values = [(metric, row.get(metric.key), row["ci95"].get(metric.key)) for metric in metrics]
        bold = ["bold" if value == best[metric.key].get(metric.key) else "" for metric, value, _ in values]
        table.add_row(Text(row["label"]), *(_cell(*value, style) for value, style in zip(values, bold, strict=True)))
    table.add_section()
    colours = {"improved": "bold green", "worsened": "bold red", "not shown": ""}
    deltas = [(metric, summary["delta"][metric.key]) for metric in metrics]
    cells = [_cell(metric, d["mean"], d["ci95"], colours[verdict(d)], signed=True) for metric, d in deltas]
    table.add_row("DRO minus warm-up", *cells)
    return table


def _cell(metric: Metric, value: float | None, ends: Sequence[float] | None, style: str, signed: bool = False) -> Text:
    return Text.assemble((metric.format(value, signed), style), ("\n" + metric.format_interval(ends, signed), "dim"))


def write_report(*run_dirs: Path, output: Path | None = None) -> Path:
    """Writes the report of a run, or of several in comparison, and returns its path.

    Args:
        run_dirs (one `Path` or more): directories of runs, finished or not; of several the first is what the others
            are compared with.
        output (`Path`, *optional*): the file. Default: `report.html` in the run; of several `comparison.html` here.

    Raises:
        InvalidInputError: if one of them is no run's directory.
        OutputError: if the file cannot be written.
    """
    runs = [read_run(run_dir) for run_dir in run_dirs]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    name, content = ("report", _report(*runs)) if len(runs) == 1 else ("comparison", _comparison(runs))
    page = environment.get_template(f"{name}.html").render(content, exact_match=exact_match, verdict=verdict, zip=zip)
    file = output or (runs[0].directory / "report.html" if len(runs) == 1 else Path("comparison.html"))
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}") from error
    return file


def _report(run: Run) -> dict[str, Any]:
    summary = run.summary
    return {
        "run": run,
        "summary": summary,
        "title": headline(summary["delta"])
        if summary
        else f"{run.name}: {run.steps} steps{', not finished' * run.stopped}",
        "ahead": "" if summary is None else ahead_of_dro(summary["systems"]),
        "metrics": _of_any(run.systems) if summary is None else known(summary["delta"]),
        "leaders": leaders(run.systems) if run.systems else {},
        "curves": curves(run.history),
    }


def _of_any(systems: Mapping[str, Any]) -> list[Metric]:
    return [metric for metric in COLUMNS if any(row.get(metric.key) is not None for row in systems.values())]


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    first, *others = runs
    letters = [ascii_uppercase[i] if i < len(ascii_uppercase) else f"Z{i}" for i in range(len(runs))]
    names = names_of([run.directory for run in runs])
    trained = {
        x: {**run.systems[TRAINED], "label": f"{x}  {name}"}
        for x, name, run in zip(letters, names, runs, strict=True)
        if TRAINED in run.systems
    }
    differences = {x: paired_differences(first, run) for x, run in zip(letters[1:], others, strict=True)}
    paired = {x: deltas for x, deltas in differences.items() if not isinstance(deltas, str)}
    unlike = {x: incomparable(first, runs[letters.index(x)]) for x in paired}
    left_out = {name for reasons in unlike.values() for name in reasons}
    best = leaders(trained) if len(paired) == len(others) else {}
    title = f"{len(others)} runs against {names[0]}"
    if len(runs) == 2:
        title = f"{names[1]} against {names[0]}" + (f": {changes(paired['B'])}" if paired else "")
    return {
        "runs": dict(zip(letters, runs, strict=True)),
        "names": dict(zip(letters, names, strict=True)),
        "styles": {x: style(i) for i, x in enumerate(letters)},
        "title": title,
        "trained": trained,
        "comparable": len(paired) == len(others) and not left_out,
        "metrics": _of_any(trained),
        "leaders": {name: leader for name, leader in best.items() if name not in left_out},
        "differences": differences,
        "known": known,
        "incomparable": unlike,
        "different": different_settings(runs),
        "curves": overlaid({x: run.history for x, run in zip(letters, runs, strict=True)}),
    }
