"""The curves of a report: the trainer's log as line charts."""

import io
import math
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
_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.4,
    "svg.fonttype": "none",  # text stays text, in the reader's font
}


def curves(history: list[dict]) -> list[dict[str, str]]:
    """Returns a title, a drawing (SVG) and a caption in numbers for every panel that the log has points for.

    Args:
        history (`list[dict]`): `TrainerState.log_history`. Of two entries of a step the later counts; what is missing
            or not finite is left out.
    """
    keys = [key for labels in PANELS.values() for key in labels]
    log = pd.DataFrame(history, columns=["step", *keys]).replace([math.inf, -math.inf], math.nan)
    log = log.groupby("step").last()
    panels = []
    for title, labels in PANELS.items():
        lines = log[list(labels)].rename(columns=labels) * (100 if title.endswith("%") else 1)
        lines = lines.dropna(how="all").dropna(axis="columns", how="all")
        if len(lines) > 1:
            caption = "; ".join(_in_numbers(lines[label].dropna()) for label in lines)
            panels.append({"title": title, "caption": caption, "svg": _draw(lines)})
    return panels


def _in_numbers(line: pd.Series) -> str:
    first, last = line.index[[0, -1]]
    return f"{line.name} {line[first]:.3g} at step {first}, {line[last]:.3g} at step {last}"


def _draw(lines: pd.DataFrame) -> str:
    """Returns a line chart as SVG: what was logged thin, and its running mean over an eighth of the curve thick."""
    import matplotlib as mpl  # slow to import
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step")
        smooth = lines.rolling(max(1, len(lines) // 8), center=True, min_periods=1).mean()
        for label, colour, dash in zip(lines, ("C0", "C1", "C2"), ("-", "--", ":"), strict=False):
            axes.plot(lines.index, lines[label], color=colour, alpha=0.35, linewidth=0.8)
            axes.plot(lines.index, smooth[label], color=colour, linestyle=dash, label=label)
        if len(lines.columns) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderpad=0)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", transparent=True)
    return drawing.getvalue()
