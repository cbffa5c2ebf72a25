"""Cells are kept whole, are not mixed up, and any two methods can be compared long after."""

import argparse
import asyncio
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare as compare_recipe
import compare_pace
import multihop
import numpy as np
import pytest
import torch
import yaml
from compare import Grid, cells_of, paced_cells, queries_of, tuning_cells
from compare_cell import Asked, pace_key
from compare_report import write_report
from filelock import FileLock
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from drorl.comparison import Cell, Results
from drorl.errors import InvalidInputError
from drorl.evaluation import (
    _parts,
    evaluate_rows,
    gold_recalls,
    position_bias,
    position_shares,
    ranked,
    score_permutations,
)
from drorl.records import Record, aggregate, per_question
from drorl.statistics import crossed_bootstrap
from drorl.trainer import DROTrainer

COMPARE = Path(__file__).parent.parent / "recipes" / "compare.py"
Rows = list[dict[str, Any]]


def made(method: str, seed: int, f1: list[float], **changes: Any) -> Cell:
    """A cell of some questions."""
    predictions = {"prediction": ["x"] * len(f1), "chosen": [[0]] * len(f1), "f1": f1}
    metrics = {"f1": sum(f1) / len(f1), "exact_match": None}
    cell = Cell(method, seed, "4 queries", metrics, 0.1, 4, {"learning_rate": 0.1}, "abc", predictions)
    return replace(cell, **changes)


# ---------------------------------------------------------------------------------------------------------- statistics
def test_the_crossed_bootstrap_is_the_plain_one_for_one_seed_and_wider_for_seeds_that_differ() -> None:
    """Variance of a resampled mean: of one seed s2/Q (no more), of S seeds as far apart as the whole spread, more.

    Against the closed formula of a balanced table whose seeds differ by a constant: v = v_seeds / S + v_questions / Q.
    """
    random = np.random.default_rng(0)
    questions = random.normal(size=400)
    half = 1.96 * questions.std() / 20
    low, high = crossed_bootstrap([questions.tolist()]).ci95
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    seeds = [(questions + shift).tolist() for shift in (-1.0, 0.0, 1.0)]
    means = np.array([np.mean(s) for s in seeds])
    spread = np.sqrt(means.var(ddof=1) / 3 + questions.var() / 400)
    low, high = crossed_bootstrap(seeds).ci95
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)


@pytest.mark.parametrize("values", [[], [[]], [[1.0], [1.0, 2.0]], [[float("nan")]]], ids=str)
def test_the_crossed_bootstrap_refuses_what_has_no_mean(values: list) -> None:
    """No seeds, no questions, different questions, a NaN."""
    with pytest.raises(ValueError):
        crossed_bootstrap(values)


# ------------------------------------------------------------------------------------------------------------- results
def test_what_is_added_is_read_again(tmp_path: Path) -> None:
    """Cells come back equal and in order; a cell of the same key takes the place of the earlier one."""
    results = Results(tmp_path / "compare.json")
    for cell in (made("dro", 1, [0.5, 1.0]), made("grpo", 1, [0.0, 1.0]), made("dro", 1, [0.25, 1.0])):
        results.add(cell)
    again = Results(tmp_path / "compare.json")
    assert list(again.cells.values()) == [made("dro", 1, [0.25, 1.0]), made("grpo", 1, [0.0, 1.0])]
    assert again.methods("4 queries") == ["dro", "grpo"]
    again.add(
        replace(made("dro", 1, [0.5]), budget="10 queries"), replace(made("dro", 1, [0.5]), budget="200 queries")
    )
    assert again.budgets() == ["4 queries", "10 queries", "200 queries"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_difference_is_paired_by_seed_and_question(tmp_path: Path) -> None:
    """b - a on the seeds that both have; a metric that one lacks has none."""
    results = Results(tmp_path / "compare.json")
    for cell in (
        made("a", 1, [0.0, 0.5]),
        made("a", 2, [0.0, 0.0]),
        made("b", 1, [1.0, 0.5]),
        made("b", 3, [9.0, 9.0]),
    ):
        results.add(cell)
    difference = results.difference("a", "b", "4 queries", "f1")
    assert difference is not None
    assert difference.mean == 0.5
    assert results.difference("a", "b", "4 queries", "iw_elbo") is None


def test_an_interval_may_be_of_other_questions_alone(tmp_path: Path) -> None:
    """Seeds that differ where questions do not: nothing is left of them in an interval of these seeds."""
    results = Results(tmp_path / "compare.json")
    for seed, gain in ((1, 0.0), (2, 0.3), (3, 0.6)):
        results.add(
            made("a", seed, [0.0, 0.5, 0.25, 0.125]), made("b", seed, [gain, 0.5 + gain, 0.25 + gain, 0.125 + gain])
        )
    everything = results.difference("a", "b", "4 queries", "f1")
    questions = results.difference("a", "b", "4 queries", "f1", other_seeds=False)
    assert everything is not None and questions is not None
    assert everything.mean == pytest.approx(0.3) == questions.mean
    assert questions.ci95 == pytest.approx((0.3, 0.3))
    assert everything.ci95[0] < 0.1


def test_data_types_are_not_compared(tmp_path: Path) -> None:
    """Steps in bfloat16 round otherwise than steps in float32; another machine makes no difference."""
    results = Results(tmp_path / "compare.json")
    for method, (cpu, dtype) in {"a": ("x", "float32"), "b": ("y", "float32"), "c": ("x", "bfloat16")}.items():
        results.add(made(method, 1, [0.0, 1.0], machine={"cpu": cpu, "dtype": dtype}))
    assert results.difference("a", "b", "4 queries", "f1") is not None
    assert results.difference("a", "c", "4 queries", "f1") is None


def test_cells_with_other_questions_are_not_compared(tmp_path: Path) -> None:
    """Neither fewer questions nor another build of the data make a pair."""
    results = Results(tmp_path / "compare.json")
    for cell in (
        made("a", 1, [0.0, 1.0]),
        made("fewer", 1, [0.0]),
        made("other data", 1, [0.0, 1.0], settings={"data": "vitalqa-v1"}),
    ):
        results.add(cell)
    assert results.difference("a", "fewer", "4 queries", "f1") is None
    assert results.difference("a", "other data", "4 queries", "f1") is None


def test_a_cell_with_other_settings_is_not_taken_for_done(tmp_path: Path) -> None:
    """The same settings: done. Others, or one more: refused by name; forced: made again. Another seed: not done."""
    results = Results(tmp_path / "compare.json")
    results.add(made("dro", 1, [1.0]))
    assert results.done("dro", 1, "4 queries", {"learning_rate": 0.1})
    assert not results.done("dro", 2, "4 queries", {"learning_rate": 0.1})
    for changed in ({"learning_rate": 0.2}, {"learning_rate": 0.1, "baseline": "mean"}):
        with pytest.raises(InvalidInputError, match="other settings.*--force"):
            results.done("dro", 1, "4 queries", changed)
        assert not results.done("dro", 1, "4 queries", changed, force=True)


@pytest.mark.parametrize(
    "content", ['{"cells": [{"method": "dro"', '{"cells": [{"method": "dro"}]}', "[]", '{"x": 1}']
)
def test_a_results_file_that_was_cut_off_is_named(content: str, tmp_path: Path) -> None:
    """Whatever is in it, it is not overwritten and not half believed."""
    path = tmp_path / "compare.json"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match="compare.json is not a results file, or was cut off"):
        Results(path)
    assert path.read_text() == content


def test_a_report_shows_every_method_and_says_what_diverged(tmp_path: Path) -> None:
    """Means, paired differences to the first method, figures; a lead that leaves 0 out is bold."""
    results = Results(tmp_path / "compare.json")
    better = {"curves": {"effective_sample_size": [2.0, 1.8, 1.6, 1.5], "selector/entropy": [1.0, 0.5, None, 0.04]}}
    for seed in (1, 2, 3):
        results.add(made("dro", seed, [1.0, 0.9, 0.8, 1.0], **better))
        results.add(made("grpo", seed, [0.5, 0.4, 0.2, 0.6], curves={"selector/entropy": [0.04, 0.04 * seed]}))
        results.add(made("ppo", seed, [0.5, 0.4, 0.2, 0.6], diverged=seed == 3))
    on_gpu = {"device": "a GPU", "cpu": "its host", "dtype": "bfloat16"}
    results.add(made("rloo", 1, [0.5, 0.4, 0.2, 0.6], machine=on_gpu))
    (tmp_path / "compare.yaml").write_text("methods: {rloo: {}, dro: {}, grpo: {}}\nreferences: [dro]\nbudgets: []")
    pace = {"methods": ["dro", "grpo"], "batch": 8, "seconds_per_query": 2.0, "rounds": [1.9, 2.0, 2.3]}
    pace["machine"] = {"cpu": "made up", "threads": 2}
    (tmp_path / "compare.pace.json").write_text(json.dumps({"abc": pace}))
    text = write_report(tmp_path, tmp_path).read_text()
    order = [text.index(f"| {row} [") for row in ("rloo | 42.5", "dro | 92.5", "ppo | 42.5")]
    assert order == sorted(order)  # the grid's; what it does not name comes last
    assert "| dro, grpo | 8 | 2.00 | 1.90, 2.00, 2.30 |" in text
    assert "Pace of made up, 2 threads. The rounds of one differ by up to 21%." in text
    assert "a GPU, bfloat16" in text
    figure = (tmp_path / "compare-4-queries.svg").read_bytes()
    write_report(tmp_path, tmp_path)
    assert (tmp_path / "compare-4-queries.svg").read_bytes() == figure  # the same bytes for the same cells
    assert '--budgets "4 queries" --methods rloo dro grpo --seeds 1 2 3' in text
    assert "| dro | 92.5 [" in text
    assert "| grpo | **+50.0 [" in text
    assert "| dro | 2.00 to 1.50 | - | 1.00 to 0.04 | 3 of 3 |" in text
    assert "| grpo | - | - | 0.04 to 0.08 | 1 of 3 |" in text
    assert "| ppo | +50.0 [" in text  # no verdict on a method that may diverge
    assert "| 4 | 0.1 | 3 | 1 |" in text
    assert (tmp_path / "compare-4-queries.svg").stat().st_size > 1000
    with pytest.raises(InvalidInputError, match="holds no results"):
        write_report(tmp_path / "nothing", tmp_path)
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "lab.md").write_text("| a table |")
    alone = write_report(tmp_path / "apart", tmp_path).read_text()
    assert "No cell of a grid has been run yet" in alone
    assert "| a table |" in alone


# --------------------------------------------------------------------------------------------------------- the systems
def test_rankings_read_only_what_their_names_say(rows: Callable[..., Rows]) -> None:
    """The retriever's order; an answer, or what is marked, first; nothing; titles in the query; length: of one row."""
    [row] = rows(1, 5)
    row["candidates"][3]["title"] = "flows through"
    row["candidates"][4]["text"] += " It is long."
    row["candidates"][2]["is_gold"] = row["candidates"][4]["is_gold"] = True
    gold = next(i for i, c in enumerate(row["candidates"]) if row["answers"][0] in c["text"])
    assert ranked(row, "retriever", 5) == [0, 1, 2, 3, 4]
    assert ranked(row, "oracle", 5) == [gold, *(i for i in range(5) if i != gold)]
    assert ranked(row, "gold", 5) == [2, 4, 0, 1, 3]
    assert ranked(row, "closed_book", 5) == []
    assert ranked(row, "title", 5) == [3, 0, 1, 2, 4]
    assert ranked(row, "longest", 5)[0] == 4
    assert sorted(ranked(row, "longest", 4)) == [0, 1, 2, 3]  # beyond N a passage is not seen


def test_all_gold_asks_for_every_gold_passage() -> None:
    """The place of the last one in the order counts; one that is no candidate is never found; no gold, no value."""
    golds = [{"id": str(i), "is_gold": i in (1, 3)} for i in range(5)]
    row = {"candidates": golds, "metadata": {"gold_ids": ["1", "3"]}}
    assert gold_recalls(row, [golds[i] for i in (3, 0, 1, 2, 4)]) == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert gold_recalls(row, golds[:3]) == [0.0, 0.0, 0.0]  # N = 3 leaves one of them out
    assert gold_recalls({**row, "metadata": {"gold_ids": ["1", "3", "9"]}}, golds) == [0.0] * 5
    assert gold_recalls({"candidates": [{"id": "1"}]}, [{"id": "1"}]) == []
    # Golds by title: several passages of an article are one gold, and a title that was not retrieved is missed.
    titled = [{"id": str(i), "title": title, "is_gold": title == "A"} for i, title in enumerate("AAB")]
    of_titles = {"candidates": titled, "metadata": {"gold_ids": [], "gold_titles": ["A"]}}
    assert gold_recalls(of_titles, titled[::-1]) == [0.0, 1.0, 1.0]
    assert gold_recalls({**of_titles, "metadata": {"gold_titles": ["A", "C"]}}, titled) == [0.0] * 3
    record = Record("q", "", 0.0, 0.0, [0.0], 0.0, 0.0, [])
    values = per_question([record, replace(record, all_gold=[0.0, 1.0])], "all_gold@2")
    assert math.isnan(values[0]) and values[1] == 1.0
    assert aggregate([record, replace(record, all_gold=[0.0, 1.0])])["all_gold@2"] == 1.0
    assert "all_gold@2" not in aggregate([record])


def test_the_recipe_of_two_hops_prints_means_and_paired_differences(tmp_path: Path) -> None:
    """In per cent, of what the cells hold; a method without a metric has a dash."""
    results = Results(tmp_path / "multihop.json")
    for method, found in {"list-wise": [1.0, 1.0], "one by one": [0.0, 0.5]}.items():
        predictions = {"prediction": ["x"] * 2, "all_gold@2": found}
        results.add(made(method, 1, [0.0, 0.0], predictions=predictions))
    console = Console(file=io.StringIO(), width=200)
    for table in multihop.tables(results, "4 queries", "list-wise"):
        console.print(table)
    text = console.file.getvalue()  # ty: ignore[unresolved-attribute]
    assert "100.0 [100.0, 100.0]" in text and "75.0 [" in text
    assert "list-wise minus" in text and " - " in text


def test_position_bias_tells_a_place_from_a_passage(
    make_trainer: Callable[..., DROTrainer], rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selector of one passage, wherever it stands, has none when all places are tried; one of the first place all.

    Against stand-ins for the policy whose truth is known: 0 and 1 - 1/N.
    """
    trainer = make_trainer(num_selected=1)
    data = rows(3, 6)

    class Decided:
        def __init__(self, orders: list[Rows], by_place: bool):
            self.rows = torch.full((len(orders), 1, 6), -torch.inf)
            for row, shown in zip(self.rows, orders, strict=True):
                ids = [c["id"] for c in shown]
                row[0, 0 if by_place else ids.index(min(ids))] = 0.0

        def logps(self, prefixes: list) -> list[torch.Tensor]:
            return list(self.rows)

    for by_place, expected in ((False, 0.0), (True, 1 - 1 / 6)):
        monkeypatch.setattr(trainer.pipeline, "decisions", lambda queries, shown, by=by_place: Decided(shown, by))
        shares = position_shares(trainer.pipeline, data)
        assert position_bias(shares) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_selected", [1, 2])
@pytest.mark.parametrize("identifiers", ["number", "query", "expanded_query"])
def test_questions_that_are_asked_together_are_answered_as_alone(
    make_trainer: Callable[..., DROTrainer], rows: Callable[..., Rows], num_selected: int, identifiers: str
) -> None:
    """Nine questions, of which four share a pass: the same choices, answers and bounds; and what recall@k counts.

    To 1e-4 nats of float32. The first K of the order are the choice, and at k = N every passage is there.
    """
    trainer = make_trainer(num_selected=num_selected, identifiers=identifiers, shuffle_candidates=True)
    data = rows(9, 6)
    together = evaluate_rows(trainer.pipeline, data, num_samples=3)
    alone = [record for row in data for record in evaluate_rows(trainer.pipeline, [row], num_samples=3)]
    for a, b, row in zip(together, alone, data, strict=True):
        assert (a.query, a.prediction, a.chosen, a.recall) == (b.query, b.prediction, b.chosen, b.recall)
        assert (a.answer_logp, a.iw_elbo) == pytest.approx((b.answer_logp, b.iw_elbo), abs=1e-4)
        assert len(a.chosen) == num_selected
        assert len(a.recall) == 6
        # Behind the choice come the others, by the probability of being the first, in whatever order they are shown.
        shown = trainer.pipeline.present(row["query"], row["candidates"])
        [first] = trainer.pipeline.decisions([row["query"]], [shown]).logps([[()]])
        best = [row["candidates"].index(shown[i]) for i in sorted(range(6), key=lambda i: -first[0][i])]
        order = [*a.chosen, *(i for i in best if i not in a.chosen)]
        holds = [row["answers"][0] in row["candidates"][i]["text"] for i in order]
        assert a.recall == [any(holds[:k]) for k in range(1, 7)]
        if num_selected == 1:  # every choice is enumerated: the bound is log sum_i p_s(i) p_g(y|x,d_i)
            [scores] = score_permutations(trainer.pipeline, [row], [shown], [[(i,) for i in range(6)]], "surface")
            assert a.iw_elbo == pytest.approx(torch.logsumexp(first[0] + scores, dim=0).item(), abs=1e-4)
            assert a.answer_logp == pytest.approx(scores[shown.index(row["candidates"][a.chosen[0]])].item(), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ the grid
def test_a_budget_is_minutes_or_queries() -> None:
    """Minutes are the queries that fit in at the method's pace; what is neither, or has no pace, is refused."""
    paces = {pace_key({"proposal": "policy", "learning_rate": 1.0}): {"seconds_per_query": 2.5}}
    settings = {"proposal": "policy", "learning_rate": 0.5}  # which computes the same
    assert queries_of("1.5 minutes", "dro", settings, paces) == 36
    assert queries_of("40 queries", "anything", {}, {}) == 40
    for budget in ("10", "10 hours", "x minutes", "1.5 queries"):
        with pytest.raises(InvalidInputError, match="N minutes"):
            queries_of(budget, "dro", settings, paces)
    with pytest.raises(InvalidInputError, match="pace of 'grpo' is not known"):
        queries_of("1 minutes", "grpo", {**settings, "proposal": "first_choices"}, paces)


def test_the_shipped_grids_are_valid() -> None:
    """Every method of every grid is a configuration of the trainer, and readings name methods that there are."""
    from nq import ScriptArguments
    from trl import TrlParser

    from drorl import DROConfig

    grids = list((COMPARE.parent / "grids").glob("*.yaml"))
    assert grids
    for path in grids:
        grid = Grid(path)
        assert all(of in grid.methods for _, of in grid.readings.values())
        for method in grid.methods:
            for extra in [grid.tuned.get(method), *grid.tuning.get("settings", [])]:
                settings = {k: v for k, v in grid.settings(method, extra).items() if k != "ranking"}
                TrlParser((ScriptArguments, DROConfig)).parse_dict({**settings, "use_cpu": True})
        assert grid.tuned.keys() <= grid.methods.keys()
        for budget in grid.budgets:  # minutes have a pace
            for method in grid.methods:
                queries_of(budget, method, grid.settings(method, grid.tuned.get(method)), grid.paces)
        with pytest.raises(InvalidInputError, match="no method 'nonsense'"):
            grid.settings("nonsense")


def test_a_pace_that_is_known_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells were made with it: only what is new is timed, in turns; `force` times everything again."""
    timed: list[str] = []

    def seconds(asked: Asked, work: Path) -> float:
        timed.append(asked.method)
        return float(len(timed))

    monkeypatch.setattr(compare_pace, "seconds_per_query", seconds)

    def paces(*methods: str, force: bool = False) -> dict[str, float]:
        settings = [{"proposal": method, "per_device_train_batch_size": 8} for method in methods]
        asked = [Asked(m, s, 1, "", 0, "", {}) for m, s in zip(methods, settings, strict=True)]
        compare_pace.measure(asked, tmp_path / "pace.json", tmp_path, force=force)
        kept = json.loads((tmp_path / "pace.json").read_text())
        return {pace["methods"][0]: pace["seconds_per_query"] for pace in kept.values()}

    assert paces("a") == {"a": 2.0}
    assert paces("a", "b", "c") == {"a": 2.0, "b": 6.0, "c": 7.0}
    assert timed == ["a"] * 3 + ["b", "c"] * 3
    assert paces("a", force=True) == {"a": 11.0, "b": 6.0, "c": 7.0}


def test_a_pass_is_larger_on_a_gpu_alone() -> None:
    """Whatever is no CUDA device, of which nothing was measured, takes what a CPU takes."""
    for device, size in {"cpu": 4, "mps": 4, "cuda": 16}.items():
        pipeline: Any = SimpleNamespace(model=SimpleNamespace(device=torch.device(device)))
        assert [len(part) for part in _parts(range(18), pipeline)][:2] == [size, min(size, 18 - size)]


def test_what_tuning_chose_is_for_the_grid_alone(tmp_path: Path) -> None:
    """A cell has the chosen settings and its pace is measured with them; tuning tries its own, whatever was chosen."""
    tuning = {"budget": "8 queries", "methods": ["dro"], "settings": [{"learning_rate": 0.1}, {"learning_rate": 0.2}]}
    grid = {"base": "base.yaml", "methods": {"dro": {}, "sft": {}}, "seeds": [1], "budgets": ["8 queries"]}
    (tmp_path / "base.yaml").write_text("learning_rate: 0.1")
    tuned = {"dro": {"learning_rate": 0.2}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**grid, "tuning": tuning, "tuned": tuned}))
    args = argparse.Namespace(methods=None, seeds=None, budgets=None)

    def rates(cells: Callable[..., Iterator[Asked]]) -> list[tuple[str, float]]:
        found = cells(Grid(tmp_path / "grid.yaml"), args)
        return [(asked.method.split(" / ")[0], asked.settings["learning_rate"]) for asked in found]

    assert rates(cells_of) == [("dro", 0.2), ("sft", 0.1)]
    assert rates(tuning_cells) == [("dro", 0.1), ("dro", 0.2)]
    assert rates(paced_cells) == [("dro", 0.2), ("dro", 0.1), ("dro", 0.2), ("sft", 0.1)]


STUB = """import json, os, sys, time
asked = json.loads(sys.argv[2])
made = {"method": asked["method"], "seed": asked["seed"], "budget": asked["budget"], "metrics": {"f1": 0.5}}
made |= {"minutes": 0.1, "query_steps": 4, "settings": {}, "commit": None, "predictions": {"prediction": ["x"]}}
if asked["method"] == "sleeps":
    open(sys.argv[4], "w").write(str(os.getpid()))
    time.sleep(600)
open(sys.argv[4] + ".log", "a").write("+")
time.sleep(0.1)
open(sys.argv[4] + ".log", "a").write("-")
print("a line of somebody else's")
print({"good": json.dumps([made]), "bad": json.dumps([made]), "odd": "no cell"}.get(asked["method"], ""))
sys.exit(3 * (asked["method"] == "bad"))
"""


def test_a_cell_that_fails_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it prints or returns, it is named; the others are kept. A grid that is stopped leaves no process."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(compare_recipe, "__file__", str(tmp_path / "stub.py"))
    results, pid = Results(tmp_path / "results.json"), tmp_path / "pid"

    def run(*methods: str, workers: int = 1) -> Coroutine[None, None, list[str]]:
        todo = [Asked(method, {}, 1, "4 queries", 4, "test", {}) for method in methods]
        return compare_recipe.run_all(todo, results, pid, workers)

    failed = asyncio.run(run("bad", "good", "odd", "none"))
    log = pid.with_suffix(".log")
    assert log.read_text() == "+-" * 4  # one at a time
    log.unlink()
    asyncio.run(run("good", "good", workers=2))
    assert log.read_text() == "++--"
    assert sorted(failed) == [f"{method}, seed 1, 4 queries" for method in ("bad", "none", "odd")]
    assert Results(results.path).methods("4 queries") == ["good"]

    async def stopped() -> None:
        task = asyncio.create_task(run("sleeps"))
        while not (pid.exists() and pid.read_text()):
            await asyncio.sleep(0.05)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=30)
        assert done

    asyncio.run(stopped())
    assert not Path("/proc", pid.read_text()).exists()


@pytest.fixture(scope="module")
def small_grid(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    rows: Callable[..., Rows],
) -> Path:
    """A grid over a tiny model and rows in files."""
    folder = tmp_path_factory.mktemp("grid")
    tiny_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8, 6)))
    base = {
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "train.jsonl"),
        "test_file": str(folder / "test.jsonl"),
        "num_candidates": 6,
        "num_selected": 1,
        "num_generations": 6,
        "per_device_train_batch_size": 12,
        "warmup_queries": 2,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "dtype": "float32",
        "use_cpu": True,
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    sft = {"proposal": "retriever", "selector_objective": "none", "num_generations": 1, "ranking": "retriever"}
    grid = {
        "base": "base.yaml",
        "seeds": [1],
        "budgets": ["4 queries"],
        "methods": {
            "dro": {"proposal": "first_choices", "num_eval_questions": 6},  # asked later: the same warm-up
            "sft": {**sft, "per_device_train_batch_size": 2},
            "broken": {"learning_rate": 1e30, "max_grad_norm": 1e30},
        },
        "readings": {"closed book": ["closed_book", "sft"], "untrained selector": [None, "sft"]},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return folder


def compare(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Runs the recipe in the folder of a grid."""
    places = ["--grid", folder / "small.yaml", "--results", folder / "results", "--work", folder / "work"]
    command = [sys.executable, COMPARE, *arguments, *places]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_grid_from_nothing_to_a_report(small_grid: Path) -> None:
    """Three methods, one of which diverges and is kept as such; then nothing is left to do; changes are refused."""
    done = compare(small_grid, "run", "--workers", 3)
    assert done.returncode == 0, done.stderr
    results = Results(small_grid / "results" / "small.json")
    assert sorted(results.methods("4 queries")) == ["broken", "closed book", "dro", "sft", "untrained selector"]
    cells = {cell.method: cell for cell in results.cells.values()}
    assert [cells[name].diverged for name in ("dro", "sft", "broken")] == [False, False, True]
    assert cells["dro"].query_steps == cells["sft"].query_steps == 4
    assert 0 <= (cells["dro"].metrics["position_bias"] or 0.0) < 1
    assert cells["broken"].metrics["f1"] == 0.0  # it answers nothing, and is not left out of a mean
    assert cells["closed book"].predictions["chosen"] == [[]] * 8
    assert "iw_elbo" in cells["untrained selector"].predictions.keys() - cells["sft"].predictions.keys()
    assert {"f1", "exact_match", "iw_elbo", "recall@1"} <= cells["dro"].predictions.keys()
    assert len(list((small_grid / "work" / "warmup").glob("*/drorl.json"))) == 1  # for all methods of a seed

    again = compare(small_grid, "run")
    assert (again.returncode, "0 cells to run" in again.stderr) == (0, True)
    assert Results(results.path).cells == results.cells
    grid = yaml.safe_load((small_grid / "small.yaml").read_text())
    grid["methods"]["dro"]["learning_rate"] = 1e-4
    (small_grid / "small.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    changed = compare(small_grid, "run")
    assert (changed.returncode, "other settings (learning_rate): --force" in changed.stderr) == (2, True)
    assert compare(small_grid, "run", "--methods", "ppo").returncode == 2
    with FileLock(results.path.parent / ".lock"):
        assert "another grid is being run" in compare(small_grid, "run", "--force").stderr

    measured = compare(small_grid, "pace", "--methods", "dro", "sft")
    assert measured.returncode == 0, measured.stderr
    paces = json.loads((small_grid / "small.pace.json").read_text())
    by_method = {pace["methods"][0]: pace for pace in paces.values()}
    assert by_method.keys() == {"dro", "sft"}
    for pace in paces.values():
        assert len(pace["rounds"]) == 3
        assert min(pace["rounds"]) <= pace["seconds_per_query"] <= max(pace["rounds"])
    minutes = 4.4 * by_method["sft"]["seconds_per_query"] / 60  # two steps of two queries
    by_time = compare(small_grid, "run", "--methods", "sft", "--budgets", f"{minutes} minutes")
    assert by_time.returncode == 0, by_time.stderr
    assert Results(results.path).cells["sft", 1, f"{minutes} minutes"].query_steps == 4

    assert compare(small_grid, "report").returncode == 0
    assert "| broken |" in (small_grid / "results" / "README.md").read_text()
    assert asdict(Results(results.path).cells["dro", 1, "4 queries"])["settings"]["proposal"] == "first_choices"
