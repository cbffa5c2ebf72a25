"""The curves of a report: the trainer's log as line charts in SVG that take font, width and colours from the page."""

import io
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
MANY = 24  # more points than this are drawn thin, with their running mean
# matplotlib writes colours as they are; these stand for the page's own, which differ between light and dark.
_INK, _GRID, _SERIES = "#010101", "#010102", ("#010103", "#010104", "#010105")
_PAGE_COLOURS = {_INK: "currentColor", _GRID: "var(--line)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, start=1)
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _GRID,
    "grid.color": _GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def curves(history: list[dict]) -> list[dict[str, Any]]:
    """Returns a title, a drawing (inline SVG) and a caption in numbers for every panel that the log has points for."""
    panels = []
    for title, labels in PANELS.items():
        scale = 100 if title.endswith("%") else 1
        lines = {label: points for key, label in labels.items() if len(points := _points(history, key, scale)) > 1}
        if lines:
            caption = "; ".join(_in_numbers(label, points) for label, points in lines.items())
            panels.append({"title": title, "caption": caption, "svg": _draw(title, caption, lines)})
    return panels


def _points(history: list[dict], key: str, scale: float) -> dict[int, float]:
    """Returns step -> value of one key without missing and non-finite values; of two entries of a step, the later."""
    rows = [row for row in history if key in row and row[key] is not None and math.isfinite(row[key])]
    return {row["step"]: scale * row[key] for row in sorted(rows, key=lambda row: row["step"])}


def _in_numbers(label: str, points: Mapping[int, float]) -> str:
    (first, start), *_, (last, end) = points.items()
    return f"{label} {_short(start)} at step {first}, {_short(end)} at step {last}"


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _smoothed(values: list[float]) -> list[float]:
    """Returns the mean over each point and its neighbours, an eighth of the curve wide and narrower at its ends.

    >>> _smoothed([0.0, 3.0, 0.0] * 8)[:3]
    [0.0, 1.0, 1.0]
    """
    reach = len(values) // 16
    windows = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - w : i + w + 1]) / (2 * w + 1) for i, w in enumerate(windows)]


def _draw(title: str, caption: str, lines: Mapping[str, Mapping[int, float]]) -> Markup:
    """Returns a line chart as SVG that takes its font, its width and its colours from the page."""
    import matplotlib as mpl  # slow to import, and only in the demo extra
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):  # the salt keeps the ids of two drawings apart
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for (label, points), colour, dash in zip(lines.items(), _SERIES, ("-", "--", ":"), strict=False):
            _plot(axes, points, color=colour, linestyle=dash, label=label)
        axes.set_xlabel("step")
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(lines) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderpad=0)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", transparent=True)
    return _inline(drawing.getvalue(), f"{title}: {caption}")


def _plot(axes: "Axes", points: Mapping[int, float], **style: Any) -> None:
    """Draws few points as a marked line, and many as a thin line with their running mean."""
    steps, values = list(points), list(points.values())
    if len(points) > MANY:
        axes.plot(steps, values, color=style["color"], alpha=0.35, linewidth=0.8)
        axes.plot(steps, _smoothed(values), **style)
    else:
        axes.plot(steps, values, marker="o", markersize=3, **style)


def _inline(svg: str, description: str) -> Markup:
    """Returns a matplotlib SVG for use inside a page: no prologue, no metadata, no fixed size, the page's colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every drawing, and nothing refers to them
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    head = Markup('<svg {} role="img" aria-label="{}">').format(Markup(viewbox[0] if viewbox else ""), description)
    svg = head + Markup(svg[svg.index(">") + 1 :])
    for placeholder, colour in _PAGE_COLOURS.items():
        svg = svg.replace(placeholder, colour)
    return Markup(svg)
