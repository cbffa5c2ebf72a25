r"""Compares DRO with PPO, GRPO, RLOO, REINFORCE, SFT and its own ablations, at equal wall-clock or equal queries.

    python recipes/compare.py run                       # every cell that is not done; stop and start at any time
    python recipes/compare.py run --methods dro grpo --seeds 1 --budgets "10 minutes"
    python recipes/compare.py tune                      # the same number of settings for each method, on validation
    python recipes/compare.py pace                      # how many queries each method gets through in a minute
    python recipes/compare.py report                    # results/README.md and its figures, from the results files

A grid (`--grid`, default recipes/grids/compare.yaml) names methods, each a few settings of the one trainer on top
of a base configuration. A cell is a method, a seed and a budget: a process of its own, from the same warm-up of that
seed, on the same held-out questions. It is kept in results/<grid>.json as soon as it is done.

A budget is `N queries`, or `N minutes` of training: the queries that a method gets through in them at the pace that is
kept beside the grid, see compare_pace.py. The rates are annealed over them. Warm-up and evaluation are not counted;
the warm-up is the same for all. A cell that diverges is kept as one that did.
"""

import argparse
import asyncio
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from compare_cell import Asked, pace_key, run_cell
from filelock import FileLock, Timeout

from drorl.comparison import Cell, Results
from drorl.errors import InvalidInputError, UserError

logger = logging.getLogger("drorl.compare")
HERE = Path(__file__).parent


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
        self.tuned: dict[str, dict[str, Any]] = content.get("tuned", {})
        self.pace_file = path.with_suffix(".pace.json")
        self.paces = json.loads(self.pace_file.read_text()) if self.pace_file.exists() else {}

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


def queries_of(budget: str, method: str, settings: dict[str, Any], paces: dict[str, dict]) -> int:
    """Returns how many queries of training a budget is for a method.

    Raises:
        InvalidInputError: if it is neither `N minutes` nor `N queries`, or the method's pace is not known.
    """
    number, _, unit = budget.partition(" ")
    try:
        if unit == "queries":
            return int(number)
        minutes = float(number)
    except ValueError:
        unit = ""
    if unit != "minutes":
        raise InvalidInputError(f"a budget is 'N minutes' or 'N queries', not {budget!r}")
    pace = paces.get(pace_key(settings))
    if pace is None:
        raise InvalidInputError(f"the pace of {method!r} is not known: recipes/compare.py pace --grid ... measures it")
    return round(60 * minutes / pace["seconds_per_query"])


# ------------------------------------------------------------------------------------------------------------ the grid
def cells_of(grid: Grid, args: argparse.Namespace) -> Iterator[Asked]:
    """Yields what was asked for, all methods of a seed together."""
    methods = args.methods or list(grid.methods)
    for budget in args.budgets or grid.budgets:
        for seed in args.seeds or grid.seeds:
            for method in methods:
                settings = grid.settings(method, grid.tuned.get(method))
                queries = queries_of(budget, method, settings, grid.paces)
                yield Asked(method, settings, seed, budget, queries, "test", grid.readings_of(method))


def tuning_cells(grid: Grid, args: argparse.Namespace) -> Iterator[Asked]:
    """Yields the cells in which each method tries the same settings."""
    budget, seed = grid.tuning["budget"], grid.seeds[0]
    for method in args.methods or grid.tuning["methods"]:
        for extra in grid.tuning["settings"]:
            name = f"{method} / " + ", ".join(f"{key} {value:g}" for key, value in extra.items())
            settings = grid.settings(method, extra)
            yield Asked(name, settings, seed, budget, queries_of(budget, name, settings, grid.paces), "validation", {})


def paced_cells(grid: Grid, args: argparse.Namespace) -> Iterator[Asked]:
    """Yields every method as it is, and with the settings that tuning tries, to be timed."""
    for method in args.methods or list(grid.methods):
        tried = grid.tuning["settings"] if method in grid.tuning.get("methods", ()) else []
        for extra in (grid.tuned.get(method, {}), *tried):
            yield Asked(method, grid.settings(method, extra), grid.seeds[0], "", 0, "", {})


async def run_all(todo: list[Asked], results: Results, work: Path, workers: int) -> list[str]:
    """Runs cells, each in a process of its own, and keeps each as soon as it is done; returns those that failed."""
    failed: list[str] = []
    free = asyncio.Semaphore(workers)

    async def run_one(number: int, asked: Asked) -> None:
        title = f"{asked.method}, seed {asked.seed}, {asked.budget}"
        command = [sys.executable, __file__, "cell", json.dumps(asdict(asked)), "--work", str(work)]
        async with free:
            logger.info("cell %d of %d: %s", number, len(todo), title)
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=HERE.parent)
            try:
                output, _ = await process.communicate()
            finally:
                if process.returncode is None:  # the grid is being stopped
                    process.kill()
                    await process.wait()
        try:
            cells = [Cell(**content) for content in json.loads(output.splitlines()[-1])]
        except (IndexError, ValueError, TypeError):
            cells = []
        if process.returncode or not cells:
            failed.append(title)
            logger.error("%s failed with exit code %d", title, process.returncode)
            return
        results.add(*cells)
        for cell in cells:
            shown = {k: round(v, 3) for k, v in cell.metrics.items() if v is not None}
            logger.info("%s: %s%s", cell.method, shown, " (diverged)" * cell.diverged)

    async with asyncio.TaskGroup() as group:
        for number, asked in enumerate(todo, start=1):
            group.create_task(run_one(number, asked))
    return failed


def run(cells: Iterator[Asked], path: Path, args: argparse.Namespace) -> int:
    """Runs the cells that are not done; one grid at a time in a folder."""
    failed: list[str] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the cells' processes too
    try:
        with FileLock(path.parent / ".lock", timeout=0):
            results, todo = Results(path), []
            for asked in cells:  # all are looked at before the first one is run
                done = [
                    results.done(name, asked.seed, asked.budget, asked.kept(ranking), args.force)
                    for name, ranking in asked.rankings.items()
                ]
                if not all(done):
                    todo.append(asked)
            logger.info("%d cells to run, %d done", len(todo), len(results.cells))
            failed = asyncio.run(run_all(todo, results, args.work, args.workers))
    except Timeout as error:
        raise InvalidInputError(f"another grid is being run in {path.parent}") from error
    if failed:
        logger.error("%d cells failed, start again to repeat them: %s", len(failed), "; ".join(failed))
    return 1 if failed else 0


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def grid_options(parser: argparse.ArgumentParser, work: Path) -> None:
    """Adds what every recipe that runs a grid can be asked."""
    parser.add_argument("--results", type=Path, default=HERE.parent / "results", help="folder; default: results/")
    parser.add_argument("--work", type=Path, default=work, help="warm-ups are kept here")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--budgets", nargs="+")
    parser.add_argument(
        "--workers",
        type=_positive,
        default=1,
        help="cells at a time, where an accelerator has room; OMP_NUM_THREADS each",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="make cells again whose settings have changed, or measure a known pace again",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "action", choices=("run", "tune", "pace", "report", "cell"), help="cell is for the grid itself"
    )
    parser.add_argument("cell", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--grid", type=Path, default=HERE / "grids" / "compare.yaml")
    grid_options(parser, HERE.parent / "outputs" / "compare")
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
        if args.action == "pace":
            from compare_pace import measure

            measure(paced_cells(grid, args), grid.pace_file, args.work, force=args.force)
            return 0
        cells = tuning_cells(grid, args) if args.action == "tune" else cells_of(grid, args)
        name = f"{grid.path.stem}{'-tuning' * (args.action == 'tune')}.json"
        return run(cells, args.results / name, args)
    except UserError as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.warning("stopped; what is done is kept, start again to go on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
