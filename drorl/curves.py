"""The curves of a report: the logs of one trainer, or of several, as line charts."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

PANELS: dict[str, dict[str, str]] = {  # title -> {key of the log: label}
    "Validation, %": {"eval_exact_match": "exact match", "eval_f1": "F1", "eval_recall@1": "recall@1"},
    "Validation IW-ELBO, nats": {"eval_iw_elbo": "IW-ELBO"},
    "Answer log-likelihood in training, nats": {"iw_elbo": "IW-ELBO", "generator/logps": "mean over samples"},
    "Effective sample size": {"effective_sample_size": "effective sample size"},
    "Weights": {"importance_weights/max": "largest weight", "frac_degenerate_weights": "share with ESS < 1.5"},
    "Selector entropy, nats": {"selector/entropy": "entropy"},
    "Selector loss": {"selector/loss": "selector loss"},
    "Generator loss": {"generator/loss": "generator loss"},
    "Total loss": {"loss": "loss"},
    "Learning rate": {"learning_rate": "learning rate"},
}
# Told apart by colour-blind eyes and without colour, on white and, inverted, on black: 3:1 against either.
COLOURS = ("#0072b2", "#d55e00", "#007a5c", "#aa4499", "#6b5900", "#1c1e21")
DASHES = ((), (5, 2), (1, 1.5), (6, 2, 1, 2), (3, 1, 1, 1, 1, 1))
_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.4,
    "svg.fonttype": "none",  # text stays text, in the reader's font
}


def style(index: int) -> tuple[str, tuple[float, ...]]:
    """Returns colour and dashes of the n-th line; thirty lines have thirty different pairs."""
    return COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]


def curves(history: list[dict]) -> list[dict[str, str]]:
    """Returns a title, a drawing (SVG) and a caption in numbers for every panel that the log has points for.

    Args:
        history (`list[dict]`): `TrainerState.log_history`. Of two entries of a step the later counts; what is missing
            or not finite is left out.
    """
    log = _by_step(history)
    return [
        panel
        for title, labels in PANELS.items()
        if (panel := _panel(title, {label: log[key] for key, label in labels.items()}))
    ]


def overlaid(histories: Mapping[str, list[dict]]) -> list[dict[str, str]]:
    """Returns the same for several logs: one panel a quantity, and in it one line a log that has points for it.

    Args:
        histories (mapping): what a log is called -> its entries.
    """
    logs = {name: _by_step(history) for name, history in histories.items()}
    panels = []
    for title, labels in PANELS.items():
        subject, comma, unit = title.partition(", ")
        for key, label in labels.items():
            of_one = title if len(labels) == 1 else f"{subject}: {label}{comma}{unit}"
            if panel := _panel(of_one, {name: log[key] for name, log in logs.items()}):
                panels.append(panel)
    return panels


def _by_step(history: list[dict]) -> pd.DataFrame:
    keys = [key for labels in PANELS.values() for key in labels]
    log = pd.DataFrame(history, columns=["step", *keys]).replace([math.inf, -math.inf], math.nan)
    return log.groupby("step").last()


def _panel(title: str, lines: Mapping[str, pd.Series]) -> dict[str, str] | None:
    """Returns a chart of the lines with more than one point; each keeps its style where another has none."""
    scale = 100 if title.endswith("%") else 1
    points = {label: scale * line.dropna() for label, line in lines.items()}
    styles = {label: style(i) for i, label in enumerate(points)}
    points = {label: line for label, line in points.items() if len(line) > 1}
    if not points:
        return None
    caption = "; ".join(_in_numbers(label, line) for label, line in points.items())
    return {"title": title, "caption": caption, "svg": _draw(points, styles, legend=len(lines) > 1)}


def _in_numbers(label: str, line: pd.Series) -> str:
    first, last = line.index[[0, -1]]
    return f"{label} {line[first]:.3g} at step {first}, {line[last]:.3g} at step {last}"


def _draw(lines: Mapping[str, pd.Series], styles: Mapping[str, tuple[str, Sequence[float]]], legend: bool) -> str:
    """Returns a line chart as SVG: what was logged thin, and its running mean over an eighth of the curve thick."""
    import matplotlib as mpl  # slow to import
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step")
        for label, line in lines.items():
            colour, dashes = styles[label]
            smooth = line.rolling(max(1, len(line) // 8), center=True, min_periods=1).mean()
            axes.plot(line.index, line, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(line.index, smooth, color=colour, linewidth=1.8, linestyle=(0, dashes or None), label=label)
        if legend:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderpad=0, handlelength=2.6)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", transparent=True)
    return drawing.getvalue()
