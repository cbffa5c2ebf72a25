r"""Two-hop questions: does it help to choose the second passage in the light of the first?

    python recipes/multihop.py                         # 33 minutes of 2 CPU cores; stop and start at any time
    python recipes/multihop.py --seeds 1 2 3 --budgets "160 queries"

On the embedded data set VitalHop, K = 2 of N = 9 passages: three selectors from the same warm-up on the same queries
(recipes/grids/multihop.yaml), asked the same held-out questions, about countries that training has not seen. The
second choice of *list-wise* DRO has read the first one; with *one by one* they do not know of each other; *pointwise
weights* learn from what the generator makes of each passage alone. `gold passages` is what a selector without a fault
would reach with the generator of the first.

The grid, the cells and their options are those of recipes/compare.py; the method itself is in drorl/trainer.py.
"""

import argparse
import logging
import sys

from compare import HERE, Grid, cells_of, grid_options, run
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from drorl.comparison import Results
from drorl.errors import UserError
from drorl.statistics import Interval

METRICS = {"all_gold@2": "both golds, %", "exact_match": "exact match, %", "f1": "F1, %"}


def shown(interval: Interval | None) -> str:
    """Returns a mean in per cent with its 95 % interval."""
    if interval is None:
        return "-"
    low, high = (100 * end for end in interval.ci95)
    return f"{100 * interval.mean:.1f} [{low:.1f}, {high:.1f}]"


def tables(results: Results, budget: str, reference: str) -> list[Table]:
    """Returns every method's metrics, and how much `reference` is above each, paired by question."""
    methods = results.methods(budget)
    means = Table("method", *METRICS.values(), "queries", box=SIMPLE_HEAD, title=f"VitalHop, {budget} of training")
    gains = Table(f"{reference} minus", *METRICS.values(), box=SIMPLE_HEAD, title="Paired differences")
    for method in methods:
        steps = sum(cell.query_steps for cell in results.of(method, budget))
        means.add_row(method, *(shown(results.mean(method, budget, m)) for m in METRICS), str(steps))
        if method != reference:
            gains.add_row(method, *(shown(results.difference(method, reference, budget, m)) for m in METRICS))
    return [means, gains]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    grid_options(parser, HERE.parent / "outputs" / "multihop")
    args = parser.parse_args()
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("drorl").setLevel(logging.INFO)
    grid, path = Grid(HERE / "grids" / "multihop.yaml"), args.results / "multihop.json"
    try:
        code = run(cells_of(grid, args), path, args)
        results = Results(path)
    except UserError as error:
        logging.getLogger("drorl.recipe").error("%s", error)
        return 2
    for budget in args.budgets or grid.budgets:
        for table in tables(results, budget, next(iter(grid.methods))):
            Console().print(table)
    return code


if __name__ == "__main__":
    sys.exit(main())
