"""results/README.md and its plots, from the results files of recipes/compare.py; no number in it is typed by hand."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from drorl.comparison import METRICS, RATES, Cell, Results
from drorl.errors import InvalidInputError
from drorl.statistics import Interval

NAMES = {name: f"{name} %" for name in RATES} | {"exact_match": "EM %", "f1": "F1 %", "iw_elbo": "iw_elbo, nats"}
HEAD = """# Results

Written by `python recipes/compare.py report` from the files beside it; no number here is typed by hand. Means over
seeds and questions with 95 % intervals in brackets, from a bootstrap in which both seeds and questions are resampled;
in the last column of a difference the questions alone: what other questions would do to these very models. With one
seed every interval is of questions alone. A difference is paired: the same seed, the same question. An interval that
leaves 0 out is bold, if no cell diverged.
A cell that diverged answers no question: it counts as 0. A selector has collapsed if its entropy over the last quarter
of training is below 0.05 nats: it makes one choice with probability .99, right or wrong.

The settings of every method are in the grid file that is named, on top of its base. DRO trains both models with the
importance weights of its samples. A policy gradient (GRPO, RLOO, PPO, REINFORCE) maximises the expected log-likelihood
of the answer, in both models: its generator learns from all samples alike. Where a name says "dro generator" only the
selector's estimator differs. Not shown: other models, and so no second size of the selector (PyPI packages that we
know of hold no other), the data sets of the paper, and settings that were not tried.

A budget of minutes is the queries that a method gets through in them at a pace that is measured once, by turns, on 2
cores (`compare.py pace`; how far its rounds are apart stands below its table); the tuning cells of commits 5f40c694
and 7570c518 were stopped by the clock instead. So a cell trains on the same queries wherever it runs, but not to the
same bits: a GPU rounds otherwise, and TRL's default there is autocast, in which the adapters, too, compute in
bfloat16. (Ablation's "dro" and iterations' 200 queries are one cell on both.) The column "minutes" says how long its
training took where it did run: on those cores, or on a GPU beside a dozen others, which is no measurement of that GPU.

VitalQA is a filtered mixture of public development and test questions with the texts of a PyPI package: its scores
are no scores of NQ, TriviaQA or WebQuestions. Where a grid says nothing else: VitalQA, K = 1 of N = 8, BM25
candidates, KILT's normaliser, greedy decoding, SmolLM2-135M, LoRA. What the paper reports stands beside it where there
is a counterpart, on another scale: Llama-3-8B or Mistral-7B, ColBERTv2, K = 5 of N = 20, 8 A100 GPUs for 20 hours.
"""


COLLAPSED = 0.05  # nats: a policy that chooses one passage with probability .99
APART = {  # what other recipes have written: title, command, what follows
    "variance": ("Gradients on real rows", "python recipes/variance.py --run outputs/nq_demo", ""),
    "lab": ("The laboratory", "make lab", "![convergence, and what a prejudice does](lab.svg)\n"),
}


def _shown(interval: Interval | None, metric: str, signed: bool = False, bold: bool = False) -> str:
    if interval is None:
        return "-"
    factor = 100 if metric in RATES else 1
    digits = 1 if metric in RATES else 2
    sign = "+" if signed else ""
    text = f"{factor * interval.mean:{sign}.{digits}f}"
    if all(map(math.isfinite, interval.ci95)):
        low, high = (f"{factor * end:{sign}.{digits}f}" for end in interval.ci95)
        text += f" [{low}, {high}]"
    return f"**{text}**" if bold and interval.ci95[0] * interval.ci95[1] > 0 else text


def _known(results: Results, budget: str) -> list[str]:
    """The metrics that the methods of a budget have: `all_gold` only where gold passages are known."""
    cells = [cell for method in results.methods(budget) for cell in results.of(method, budget)]
    return [m for m in METRICS if any(m in cell.predictions for cell in cells if not cell.diverged)]


def _mean(cells: Sequence[Cell], name: str) -> str:
    values = [cell.metrics[name] for cell in cells if cell.metrics.get(name) is not None]
    return f"{sum(v for v in values if v is not None) / len(values):.3f}" if values else "-"


def _table(results: Results, budget: str, paper: dict[str, Any]) -> list[str]:
    """The methods of one budget."""
    metrics = _known(results, budget)
    columns = [*(NAMES[m] for m in metrics), "position bias", "queries", "minutes", "seeds", "diverged"]
    columns += ["paper"] if paper else []
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method in results.methods(budget):
        cells = results.of(method, budget)
        values = [_shown(results.mean(method, budget, metric), metric) for metric in metrics]
        values += [_mean(cells, "position_bias"), f"{sum(c.query_steps for c in cells) / len(cells):.0f}"]
        values += [f"{sum(c.minutes for c in cells) / len(cells):.1f}", str(len(cells))]
        values += [str(sum(c.diverged for c in cells))] + ([str(paper.get(method, "-"))] if paper else [])
        lines.append(f"| {method} | {' | '.join(values)} |")
    return lines


def _differences(results: Results, budget: str, reference: str) -> list[str]:
    """What one method adds to every other."""
    metrics = _known(results, budget)
    several = any(len(results.of(method, budget)) > 1 for method in results.methods(budget))
    columns = [*(NAMES[m] for m in metrics), *(["F1 % of these seeds"] if several else [])]
    lines = [f"| {reference} minus | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method in results.methods(budget):
        if method != reference:
            sound = not any(cell.diverged for name in (method, reference) for cell in results.of(name, budget))
            found = [(results.difference(method, reference, budget, m), m) for m in metrics]
            if several:
                found.append((results.difference(method, reference, budget, "f1", other_seeds=False), "f1"))
            shown = [_shown(interval, m, True, sound) for interval, m in found]
            lines.append(f"| {method} | {' | '.join(shown)} |")
    return lines


def _quarters(cell: Cell, name: str) -> tuple[float, float] | None:
    """Means of what a cell logged over the first and the last quarter of its training."""
    values = [value for value in cell.curves.get(name, []) if value is not None]
    quarter = max(1, len(values) // 4)
    return (fmean(values[:quarter]), fmean(values[-quarter:])) if values else None


def _training(results: Results, budget: str) -> list[str]:
    """What became of the weights and of the policy in training."""
    columns = {"effective_sample_size": "effective sample size", "importance_weights/max": "largest weight"}
    columns |= {"selector/entropy": "entropy of the selector, nats"}
    lines = [
        f"| in training, first to last quarter | {' | '.join(columns.values())} | seeds collapsed |",
        "|---" * 5 + "|",
    ]
    for method in results.methods(budget):
        cells = [cell for cell in results.of(method, budget) if "selector/entropy" in cell.curves]
        if cells:
            shown = []
            for name in columns:
                found = [quarters for cell in cells if (quarters := _quarters(cell, name)) is not None]
                ends = [fmean(values) for values in zip(*found, strict=True)]
                shown.append(" to ".join(f"{value:.2f}" for value in ends) or "-")
            entropies = [quarters[1] for cell in cells if (quarters := _quarters(cell, "selector/entropy"))]
            collapsed = sum(entropy < COLLAPSED for entropy in entropies)
            lines.append(f"| {method} | {' | '.join(shown)} | {collapsed} of {len(cells)} |")
    return [*lines, ""] if len(lines) > 2 else []


def _draw(results: Results, budget: str, path: Path) -> None:
    """F1 and recall@1 of every method, and the effective sample size over training."""
    import matplotlib.pyplot as plt
    import pandas as pd

    methods = results.methods(budget)[::-1]
    figure, axes = plt.subplots(1, 3, figsize=(12, 0.35 * len(methods) + 1.6), layout="constrained")
    for ax, metric in zip(axes, ("f1", "recall@1"), strict=False):
        for y, method in enumerate(methods):
            if (interval := results.mean(method, budget, metric)) is not None:
                ax.plot([100 * end for end in interval.ci95], [y, y], color="0.6", clip_on=False)
                ax.plot(100 * interval.mean, y, "o", color="C0", clip_on=False)
        ax.set_yticks(range(len(methods)), methods if metric == "f1" else [""] * len(methods))
        ax.set_xlabel(NAMES[metric])
    for method in methods[::-1]:
        curves = [c.curves.get("effective_sample_size", []) for c in results.of(method, budget)]
        curves = [curve for curve in curves if max((v for v in curve if v is not None), default=0) > 1]
        if curves:
            means = pd.DataFrame(curves, dtype=float).mean()
            smooth = means.rolling(max(1, len(means) // 20), min_periods=1).mean()
            axes[2].plot(smooth.index / max(len(means) - 1, 1), smooth, label=method, clip_on=False)
    axes[2].set(xlabel="share of training", ylabel="effective sample size")
    axes[2].legend(fontsize=6, frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    with plt.rc_context({"svg.hashsalt": path.name}):  # the same bytes for the same cells, with clip_on=False
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _machine(machine: dict[str, Any]) -> str:
    """Names what a cell ran on."""
    on_gpu = machine.get("device", "cpu") != "cpu"
    return f"{machine['device' if on_gpu else 'cpu']}, {machine['dtype']}"


def _paces(path: Path) -> list[str]:
    """How long a query takes each method, where budgets of minutes are made of it."""
    if not path.exists():
        return []
    paces = json.loads(path.read_text()).values()
    lines = ["| pace | batch | seconds a query | rounds |", "|---|---|---|---|"]
    for pace in paces:
        rounds = ", ".join(f"{seconds:.2f}" for seconds in pace["rounds"])
        names = ", ".join(pace["methods"])
        lines.append(f"| {names} | {pace['batch']} | {pace['seconds_per_query']:.2f} | {rounds} |")
    on = {f"{pace['machine']['cpu']}, {pace['machine']['threads']} threads" for pace in paces}
    apart = max(max(pace["rounds"]) / min(pace["rounds"]) - 1 for pace in paces)
    return [*lines, "", f"Pace of {'; '.join(sorted(on))}. The rounds of one differ by up to {apart:.0%}.", ""]


def _section(path: Path, grid_file: Path) -> list[str]:
    """What one results file shows, budget by budget."""
    grid, name = yaml.safe_load(grid_file.read_text()), grid_file.stem
    results, is_tuning = Results(path), path.stem != name
    place = {method: i for i, method in enumerate([*grid["methods"], *grid.get("readings", {})])}
    by_grid = sorted(results.cells.values(), key=lambda c: (place.get(c.method.split(" / ")[0], len(place)), c.seed))
    results.cells = {cell.key: cell for cell in by_grid}
    command = f"python recipes/compare.py {'tune' if is_tuning else 'run'} --grid recipes/grids/{name}.yaml"
    lines = [f"## {path.stem}", "", *([] if is_tuning else [grid.get("about", ""), ""]), "```sh", command, "```", ""]
    for budget in results.budgets():
        methods = results.methods(budget)
        questions = max(len(cell.predictions["prediction"]) for cell in results.cells.values())
        lines += [f"### {budget} of training, {questions} questions", ""]
        if not is_tuning and budget not in grid["budgets"]:
            trained = [method for method in methods if method in grid["methods"]]
            seeds = sorted({cell.seed for method in trained for cell in results.of(method, budget)})
            asked = f"--methods {shlex.join(trained)} --seeds {shlex.join(map(str, seeds))}"
            lines += ["```sh", f'{command} --budgets "{budget}" {asked}', "```", ""]
        lines += [*_table(results, budget, grid.get("paper", {})), "", *_training(results, budget)]
        if not is_tuning and len(methods) > 1:
            for reference in [m for m in grid.get("references", methods[:1]) if m in methods]:
                lines += [*_differences(results, budget, reference), ""]
            figure = path.with_name(f"{path.stem}-{budget.replace(' ', '-')}.svg")
            _draw(results, budget, figure)
            lines += [f"![{path.stem}, {budget}]({figure.name})", ""]
    lines += [] if is_tuning else _paces(grid_file.with_suffix(".pace.json"))
    cells = results.cells.values()
    machines = sorted({_machine(c.machine) for c in cells if c.machine})
    commits = sorted({(c.commit or "unknown")[:8] for c in cells})
    return [*lines, f"Machines: {'; '.join(machines)}. Commits: {', '.join(commits)}.", ""]


def write_report(folder: Path, grids: Path) -> Path:
    """Writes README.md and a figure for each results file and budget in `folder`; returns the former.

    Raises:
        InvalidInputError: if there are no results.
    """
    lines = [HEAD]
    for grid in sorted(grids.glob("*.yaml")):
        for suffix in ("", "-tuning"):
            if (path := folder / f"{grid.stem}{suffix}.json").exists():
                lines += _section(path, grid)
    if len(lines) == 1:
        lines.append("**No cell of a grid has been run yet.**\n")
    for name, (title, command, end) in APART.items():
        if (path := folder / f"{name}.md").exists():
            lines += [f"## {title}", "", "```sh", command, "```", "", path.read_text(), end]
    if len(lines) == 2:
        raise InvalidInputError(f"{folder} holds no results: run `python recipes/compare.py run` first")
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n")
    return folder / "README.md"
