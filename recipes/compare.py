r"""Compares DRO with PPO, GRPO, RLOO, REINFORCE, SFT and its own ablations, at equal wall-clock or equal queries.

    python recipes/compare.py run                       # every cell that is not done; stop and start at any time
    python recipes/compare.py run --methods dro grpo --seeds 1 --budgets "10 minutes"
    python recipes/compare.py tune                      # the same number of settings for each method, on validation
    python recipes/compare.py report                    # results/README.md and its figures, from the results files

A grid (`--grid`, default recipes/grids/compare.yaml) names methods, each a few settings of the one trainer on top
of a base configuration. A cell is a method, a seed and a budget: a process of its own, from the same warm-up of that
seed, on the same held-out questions. It is kept in results/<grid>.json as soon as it is done.

A budget is `N minutes` of training (the rates are annealed over it) or `N queries`. Warm-up and evaluation are not
counted; the warm-up is the same for all. A cell that diverges is kept as one that did.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from drorl.comparison import Cell, Results
from drorl.errors import DivergedError, InvalidInputError, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from nq import ScriptArguments

    from drorl import DROConfig, DROTrainer

logger = logging.getLogger("drorl.compare")
HERE = Path(__file__).parent
CURVES = ("effective_sample_size", "iw_elbo", "selector/entropy", "importance_weights/max", "reward")
POSITION_QUESTIONS = 12


class Grid:
    """A grid file.

    Args:
        path (`Path`): YAML, see recipes/grids/compare.yaml.

    Raises:
        InvalidInputError: if it is not such a file.
    """

    def __init__(self, path: Path):
        self.path = path
        content = yaml.safe_load(path.read_text())
        try:
            self.base = yaml.safe_load((path.parent / content["base"]).read_text())
            self.shared, self.methods = content.get("shared", {}), content["methods"]
            self.seeds, self.budgets = content["seeds"], content["budgets"]
        except (KeyError, TypeError, OSError) as error:
            raise InvalidInputError(f"{path} is not a grid: {error!r}") from error
        self.readings: dict[str, list[str | None]] = content.get("readings", {})
        self.tuning: dict[str, Any] = content.get("tuning", {})

    def settings(self, method: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns every setting of a method.

        Raises:
            InvalidInputError: if the grid does not have it.
        """
        if method not in self.methods:
            raise InvalidInputError(
                f"{self.path} has no method {method!r}; it has {', '.join(map(repr, self.methods))}"
            )
        own = self.methods[method] or {}
        return {**self.base, **self.shared, **own, **(extra or {})}

    def readings_of(self, method: str) -> dict[str, str | None]:
        """Returns the systems that read with this method's generator, and their rankings."""
        return {name: ranking for name, (ranking, of) in self.readings.items() if of == method}


def data_of(settings: dict[str, Any]) -> str:
    """Names the data of a cell: a new build of the embedded set makes other cells, and other warm-ups."""
    from drorl.data.vitalqa import build_key

    return settings.get("train_file") or build_key()


def seconds_or_queries(budget: str) -> tuple[float | None, int | None]:
    """Reads a budget.

    Raises:
        InvalidInputError: if it is neither `N minutes` nor `N queries`.
    """
    number, _, unit = budget.partition(" ")
    try:
        if unit == "minutes":
            return 60 * float(number), None
        if unit == "queries":
            return None, int(number)
    except ValueError:
        pass
    raise InvalidInputError(f"a budget is 'N minutes' or 'N queries', not {budget!r}")


def queries_per_step(config: "DROConfig") -> float:
    """Returns how many queries are drawn for an optimization step; later epochs over them draw none."""
    steps = config.num_iterations * config.steps_per_generation / config.gradient_accumulation_steps
    return config.generation_batch_size / config.num_generations / steps


def finite(value: float) -> float | None:
    """A figure as JSON can hold it."""
    return round(value, 4) if math.isfinite(value) else None


# -------------------------------------------------------------------------------------------------------------- a cell
@dataclass(frozen=True)
class Asked:
    """A cell that is asked for."""

    method: str
    settings: dict[str, Any]
    seed: int
    budget: str
    split: str
    readings: dict[str, str | None]
    """Other systems that read with the generator of this one, and their rankings."""

    def kept(self, ranking: str | None) -> dict[str, Any]:
        """The settings as a cell keeps them."""
        return {**self.settings, "ranking": ranking, "split": self.split, "data": data_of(self.settings)}

    @property
    def rankings(self) -> dict[str, str | None]:
        """Every system of this cell, and its ranking."""
        return {self.method: self.settings.get("ranking"), **self.readings}


def configured(asked: Asked, work: Path) -> tuple["ScriptArguments", "DROConfig"]:
    """Returns the settings of a cell as the recipe takes them."""
    from nq import ScriptArguments
    from trl import TrlParser

    from drorl import DROConfig

    settings = {name: value for name, value in asked.settings.items() if name != "ranking"}
    folder = work / asked.method.replace("/", "-") / str(asked.seed)
    try:
        script, config = TrlParser((ScriptArguments, DROConfig)).parse_dict(
            {**settings, "seed": asked.seed, "output_dir": str(folder)}
        )
    except ValueError as error:
        raise InvalidInputError(f"{asked.method}: {error}") from error
    _, queries = seconds_or_queries(asked.budget)
    if queries is not None:
        config.max_steps = max(1, round(queries / queries_per_step(config)))
    return script, config


def warmup_folder(asked: Asked, script: "ScriptArguments", config: "DROConfig", dtype: str, work: Path) -> Path:
    """Returns where the warm-up is kept that all methods of a seed start from: by what it depends on."""
    from drorl.settings import PipelineSettings

    asked_later = ("num_eval_questions", "max_minutes", "em_patience")  # no part of the warm-up
    depends = [
        data_of(asked.settings),
        dtype,
        {name: value for name, value in asdict(script).items() if name not in asked_later},
        asdict(PipelineSettings.from_config(config)),
        config.answer_target,
        config.weight_decay,
        asked.seed,
    ]
    text = json.dumps(depends, sort_keys=True, default=str)
    return work / "warmup" / hashlib.sha256(text.encode()).hexdigest()[:12]


def warmed_up(
    asked: Asked, script: "ScriptArguments", config: "DROConfig", train: "Dataset", work: Path
) -> "DROTrainer":
    """Returns the trainer of a cell, after the warm-up."""
    import torch
    from nq import load_model

    from drorl import DROTrainer
    from drorl.callbacks import RichProgressCallback, TimeBudgetCallback
    from drorl.experiment import warmup_config

    torch.manual_seed(asked.seed)
    model, tokenizer, *generator = load_model(script)

    def trainer_for(title: str, config: "DROConfig") -> DROTrainer:
        shown = RichProgressCallback(f"{title}, seed {asked.seed}")
        return DROTrainer(model, config, train, None, tokenizer, *generator, callbacks=[shown])

    folder = warmup_folder(asked, script, config, str(model.dtype), work)
    if script.warmup_queries and not (folder / "drorl.json").exists():
        first = trainer_for("warm-up", warmup_config(config, *script.warmup))
        first.add_callback(TimeBudgetCallback(math.inf))  # anneals the rate over the steps
        first.train()
        first.save_model(str(folder))
        # Once more from the start: a method that comes first is no warmer, and draws what it would have drawn.
        os.execv(sys.executable, [sys.executable, *sys.argv])
    trainer = trainer_for(asked.method, config)
    if script.warmup_queries:
        trainer.load_adapters(folder)
    return trainer


def trained(asked: Asked, trainer: "DROTrainer") -> tuple[float, bool]:
    """Trains within the budget; returns the minutes that it took, and whether it diverged."""
    import torch

    from drorl.callbacks import TimeBudgetCallback

    # The linear decay of both kinds of budget: over the minutes, or over the steps.
    seconds, _ = seconds_or_queries(asked.budget)
    trainer.add_callback(TimeBudgetCallback(math.inf if seconds is None else seconds))
    torch.manual_seed(asked.seed)
    start, diverged = time.monotonic(), False
    try:
        trainer.train()
    except DivergedError as error:
        logger.error("%s, seed %d: %s", asked.method, asked.seed, error)
        diverged = True
    return (time.monotonic() - start) / 60, diverged


def evaluated(
    name: str, ranking: str | None, trainer: "DROTrainer", questions: "Dataset"
) -> tuple[dict[str, float | None], dict[str, list], bool]:
    """Returns the metrics and the predictions of a system, and whether its generator is lost."""
    from drorl.comparison import describe, nothing
    from drorl.evaluation import evaluate_rows, position_bias, position_shares

    config, pipeline = trainer.args, trainer.pipeline
    scored = config.answer_target, config.num_generations, ranking
    try:
        records = evaluate_rows(pipeline, questions, *scored, description=name, metrics=config.metrics)
        metrics, predictions = describe(records)
        if ranking is None:
            asked = questions.select(range(min(POSITION_QUESTIONS, len(questions))))
            metrics["position_bias"] = position_bias(position_shares(pipeline, asked))
    except DivergedError as error:
        logger.error("%s, seed %d: %s", name, config.seed, error)
        return *nothing(len(questions)), True
    return metrics, predictions, False


def run_cell(asked: Asked, work: Path) -> list[Cell]:
    """Trains one method and evaluates it; returns its cell, and one for each other ranking its generator reads."""
    from nq import load_data

    from drorl.comparison import nothing
    from drorl.experiment import commit, machine

    script, config = configured(asked, work)
    rows, _ = load_data(script)
    questions = rows[asked.split]
    questions = questions.select(range(min(script.num_eval_questions or len(questions), len(questions))))
    trainer = warmed_up(asked, script, config, rows["train"], work)
    minutes, diverged = trained(asked, trainer)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = {name: [finite(entry[name]) for entry in log if name in entry] for name in CURVES}
    common: dict[str, Any] = {
        "seed": asked.seed,
        "budget": asked.budget,
        "minutes": round(minutes, 2),
        "query_steps": round(trainer.state.global_step * queries_per_step(config)),
        "commit": commit(),
        "curves": {name: values for name, values in curves.items() if values},
        "machine": {**machine(), "dtype": str(trainer.model.dtype).removeprefix("torch.")},
    }
    cells = []
    for name, ranking in asked.rankings.items():
        lost = (*nothing(len(questions)), True)
        metrics, predictions, is_lost = lost if diverged else evaluated(name, ranking, trainer, questions)
        settings = asked.kept(ranking)
        cells.append(
            Cell(name, metrics=metrics, predictions=predictions, diverged=is_lost, settings=settings, **common)
        )
    return cells


# ------------------------------------------------------------------------------------------------------------ the grid
def cells_of(grid: Grid, args: argparse.Namespace) -> Iterator[Asked]:
    """Yields what was asked for, all methods of a seed together."""
    methods = args.methods or list(grid.methods)
    for budget in args.budgets or grid.budgets:
        seconds_or_queries(budget)
        for seed in args.seeds or grid.seeds:
            for method in methods:
                yield Asked(method, grid.settings(method), seed, budget, "test", grid.readings_of(method))


def tuning_cells(grid: Grid, args: argparse.Namespace) -> Iterator[Asked]:
    """Yields the cells in which each method tries the same settings."""
    for method in args.methods or list(grid.methods):
        for extra in grid.tuning["settings"]:
            name = f"{method} / " + ", ".join(f"{key} {value:g}" for key, value in extra.items())
            yield Asked(name, grid.settings(method, extra), grid.seeds[0], grid.tuning["budget"], "validation", {})


def run(cells: Iterator[Asked], path: Path, work: Path, force: bool) -> int:
    """Runs the cells that are not done, each in a process of its own; one grid at a time in a folder."""
    failed: list[str] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the cell's process too
    try:
        with FileLock(path.parent / ".lock", timeout=0):
            results, todo = Results(path), []
            for asked in cells:  # all are looked at before the first one is run
                done = [
                    results.done(name, asked.seed, asked.budget, asked.kept(ranking), force)
                    for name, ranking in asked.rankings.items()
                ]
                if not all(done):
                    todo.append(asked)
            logger.info("%d cells to run, %d done", len(todo), len(results.cells))
            for number, asked in enumerate(todo, start=1):
                title = f"{asked.method}, seed {asked.seed}, {asked.budget}"
                logger.info("cell %d of %d: %s", number, len(todo), title)
                command = [sys.executable, __file__, "cell", json.dumps(asdict(asked)), "--work", str(work)]
                process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
                if process.returncode:
                    failed.append(title)
                    logger.error("%s failed with exit code %d", title, process.returncode)
                    continue
                contents = json.loads(process.stdout.splitlines()[-1])
                results.add(*(Cell(**content) for content in contents))
                for content in contents:
                    shown = {k: round(v, 3) for k, v in content["metrics"].items() if v is not None}
                    logger.info("%s: %s%s", content["method"], shown, " (diverged)" * content["diverged"])
    except Timeout as error:
        raise InvalidInputError(f"another grid is being run in {path.parent}") from error
    if failed:
        logger.error("%d cells failed, start again to repeat them: %s", len(failed), "; ".join(failed))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "tune", "report", "cell"), help="cell is for the grid itself")
    parser.add_argument("cell", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--grid", type=Path, default=HERE / "grids" / "compare.yaml")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results", help="folder; default: results/")
    parser.add_argument(
        "--work", type=Path, default=HERE.parent / "outputs" / "compare", help="warm-ups are kept here"
    )
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--budgets", nargs="+")
    parser.add_argument("--force", action="store_true", help="make cells again whose settings have changed")
    args = parser.parse_args()
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("drorl").setLevel(logging.INFO)
    try:
        if args.action == "cell":
            cells = run_cell(Asked(**json.loads(args.cell)), args.work)
            sys.stdout.write("\n" + json.dumps([asdict(cell) for cell in cells]) + "\n")
            return 0
        if args.action == "report":
            from compare_report import write_report

            logger.info("%s", write_report(args.results, args.grid.parent))
            return 0
        grid = Grid(args.grid)
        cells = tuning_cells(grid, args) if args.action == "tune" else cells_of(grid, args)
        name = f"{grid.path.stem}{'-tuning' * (args.action == 'tune')}.json"
        return run(cells, args.results / name, args.work, args.force)
    except UserError as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.warning("stopped; what is done is kept, start again to go on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
