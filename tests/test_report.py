"""The report of a run: complete, self-contained, escaped, and worded as the intervals allow."""

import io
import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import headless
from rich.console import Console

from drorl.curves import curves, style
from drorl.errors import InvalidInputError
from drorl.report import COLUMNS, Metric, ahead_of_dro, headline, summary_table, verdict, write_report
from drorl.runs import different_settings, names_of, read_run


def system(label, exact_match, f1, recall, iw_elbo, answer_logp=-6.0):
    values = {"exact_match": exact_match, "f1": f1, "recall@1": recall, "iw_elbo": iw_elbo, "answer_logp": answer_logp}
    ends = {key: [value - 0.06, value + 0.06] for key, value in values.items() if value is not None}
    return {"label": label, **values, "ci95": ends}


@pytest.fixture(scope="module")
def summary():
    systems = {
        "zero_shot": system("Retriever's order + zero-shot generator", 0.125, 0.211, 0.715, None, -9.31),
        "sft": system("Retriever's order + SFT generator", 0.255, 0.342, 0.715, None, -6.42),
        "warmup": system("Warm-up", 0.235, 0.311, 0.58, -6.21, -6.88),
        "dro": system("DRO", 0.25, 0.352, 0.66, -5.47, -6.01),
    }
    return {
        "n_eval": 200,
        "minutes": 24.1,
        "machine": {"gflops": {"float32": 140.0}, "dtype": "float32", "cpu": "made up", "threads": 2, "device": "cpu"},
        "versions": {"torch": "2.13.0", "trl": "1.16.0"},
        "command": "accelerate launch recipes/nq.py --config recipes/configs/nq_demo.yaml",
        "commit": "0123abc",
        "config": {"num_generations": 8, "learning_rate": 0.0005, "lora": {"r": 16}},
        "dataset": {
            "name": "VitalQA",
            "split": "test",
            "facts": {
                "rows": 2460,
                "recall": {"bm25@1": 0.71},
                "warning": "From public dev and test splits: never quote these numbers as NQ or TriviaQA scores.",
                "licences": ["passages: CC BY-SA 4.0", "model: Apache-2.0"],
            },
        },
        "systems": systems,
        "warmup": systems["warmup"],
        "dro": systems["dro"],
        "delta": {
            "exact_match": {"mean": 0.015, "ci95": [-0.025, 0.055]},
            "f1": {"mean": 0.041, "ci95": [0.008, 0.075]},
            "recall@1": {"mean": 0.08, "ci95": [0.02, 0.14]},
            "iw_elbo": {"mean": 0.74, "ci95": [0.41, 1.08]},
            "answer_logp": {"mean": 0.87, "ci95": [-0.2, 1.9]},
        },
        "num_samples_iw_elbo": 8,
    }


@pytest.fixture(scope="module")
def history():
    training = [
        {
            "step": step,
            "epoch": step / 40,
            "loss": 2.0 - 0.01 * step,
            "selector/loss": -0.01 * math.sin(step),
            "generator/loss": 7.0 * 0.99**step + math.sin(7 * step),
            "effective_sample_size": 2 + math.cos(step),
            "importance_weights/max": 0.7 + 0.1 * math.sin(step),
            "frac_degenerate_weights": 0.3 + 0.1 * math.cos(step),
            "selector/entropy": 1.2 - 0.01 * step,
            "generator/logps": -7 + 0.02 * step,
            "iw_elbo": -6.5 + 0.02 * step,
            "learning_rate": 5e-4 * (1 - step / 41),
        }
        for step in range(1, 41)
    ]
    evaluation = [
        {
            "step": step,
            "eval_exact_match": 0.23 + step / 2000,
            "eval_f1": 0.31 + step / 1000,
            "eval_recall@1": 0.58 + step / 500,
            "eval_iw_elbo": -6.2 + step / 60,
        }
        for step in (0, 10, 20, 30, 40)
    ]
    return [*training, *evaluation, {"step": 40, "train_runtime": 1400.0, "generator/loss": math.nan}]


@pytest.fixture(scope="module")
def examples():
    passages = [
        ("Paris", "Paris is the capital of France and its largest city, on the river Seine.", True),
        ("Lyon <script>alert(1)</script>", "Lyon & its <b>bridges</b>; <img src=https://example.com/x.png>", False),
        ("Marseille", "Marseille is the second most populous city of France, on the Mediterranean coast.", False),
        ("Île-de-France", "The region around the capital, Paris, is home to a fifth of the country.", True),
    ]
    after = {
        "chosen": [0],
        "probabilities": [0.7, 0.1, 0.05, 0.15],
        "answer": "Paris",
        "importance_weights": [0.5, 0.05, 0.4, 0.05],
        "permutations": [[0, 3], [1, 0], [2, 1], [3, 0]],
    }
    before = {**after, "chosen": [1], "probabilities": [0.3, 0.4, 0.2, 0.1], "answer": "Lyon </td><i>"}
    example = {
        "query": "What is the capital of <France>?",
        "answers": ["Paris", "City of Paris"],
        "candidates": [{"title": title, "text": text, "has_answer": has} for title, text, has in passages],
        "before": before,
        "after": after,
    }
    return [example, {**example, "query": "And where does the Seine pass?"}]


def write_run(run_dir, **files):
    for name, content in files.items():
        (run_dir / f"{name}.json").write_text(json.dumps(content))
    return run_dir


@pytest.fixture(scope="module")
def page(tmp_path_factory, summary, history, examples):
    run_dir = tmp_path_factory.mktemp("run")
    write_run(run_dir, summary=summary, log_history=history, examples=examples)
    return write_report(run_dir).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees: no style, no drawings, no tags, single spaces."""
    return " ".join(re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL).split())


class Attributes(HTMLParser):
    """Collects `(tag, attribute, value)` of a page, so that text that merely looks like markup is not counted."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, name, value or "") for name, value in attrs]


def drawings(page: str) -> list[str]:
    """The curves, which are images given in their own addresses."""
    sources = [value for tag, name, value in Attributes(page).found if (tag, name) == ("img", "src")]
    prologue = "data:image/svg+xml,"
    assert all(source.startswith(prologue) for source in sources)
    return [unquote(source.removeprefix(prologue)) for source in sources]


def test_page_loads_nothing_from_elsewhere(page):
    """The curves are part of the page and refer to themselves only; what a passage says about images stays text."""
    for document in (page, *drawings(page)):
        found = Attributes(document).found
        loads = [value for _, name, value in found if name in ("src", "href", "xlink:href", "srcset", "data")]
        styles = " ".join(value for _, _, value in found) + document.split("</style>")[0]
        loads += re.findall(r"url\(([^)]*)\)", styles)
        assert loads, "the page holds the curves, and these refer to their own parts: none means that none was seen"
        assert [target for target in loads if not target.startswith(("#", "data:image/svg+xml,"))] == []
        assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _, _ in found}
        assert "@import" not in document
    assert "https://example.com/x.png" in page


def test_text_of_data_and_models_is_escaped(page):
    for text in ("Lyon &lt;script&gt;alert(1)", "&lt;b&gt;bridges", "&lt;/td&gt;&lt;i&gt;", "&lt;France&gt;"):
        assert text in page
    assert "Lyon &amp; its" in page


def test_every_metric_of_every_system_is_shown_with_its_interval(page, summary):
    text = text_of(page)
    cells = 0
    known = [metric for metric in COLUMNS if metric.key in summary["delta"]]
    for row in summary["systems"].values():
        for metric in known:
            if row[metric.key] is not None:
                assert f"{metric.format(row[metric.key])} {metric.format_interval(row['ci95'][metric.key])}" in text
                cells += 1
    assert cells == 18
    for metric in known:
        delta = summary["delta"][metric.key]
        assert f"{metric.format(delta['mean'], True)} {metric.format_interval(delta['ci95'], True)}" in text


def test_wording_follows_the_intervals(page):
    """Improved where the interval is above 0; not shown where it includes 0, however large the mean."""
    text = text_of(page).replace("&#39;", "'")
    assert "DRO against its warm-up: improved F1, recall@1, IW-ELBO " in text
    assert "F1 points +4.1 [+0.8, +7.5] improved" in text
    assert "exact match points +1.5 [−2.5, +5.5] not shown" in text
    assert "recall@1 (Retriever's order + zero-shot generator: 71.5 against 66.0 %)" in text


def test_every_metric_in_which_another_system_is_ahead_is_named(summary):
    assert ahead_of_dro(summary["systems"]) == (
        "DRO does not have the highest value of the table in exact match (Retriever's order + SFT generator: 25.5 "
        "against 25.0 %); recall@1 (Retriever's order + zero-shot generator: 71.5 against 66.0 %)."
    )
    unknown = {**summary["systems"]["sft"], "recall@1": None, "exact_match": math.nan}
    assert ahead_of_dro({"sft": unknown, "dro": summary["systems"]["dro"]}) == ""
    lost = {**summary["systems"]["dro"], "f1": None}
    assert "F1 (" in ahead_of_dro({"sft": unknown, "dro": lost})  # DRO has none: the other is ahead


def deltas(**ends):
    known = {metric.key: {"mean": 0.0, "ci95": [-1.0, 1.0]} for metric in COLUMNS if metric.key != "all_gold@2"}
    return known | {key: {"mean": sum(pair) / 2, "ci95": pair} for key, pair in ends.items()}


@pytest.mark.parametrize(
    ("ends", "word", "title"),
    [
        ([0.01, 0.2], "improved", "improved F1"),
        ([-0.2, -0.01], "worsened", "worsened F1"),
        ([-0.01, 0.9], "not shown", "no difference shown"),
        ([0.0, 0.9], "not shown", "no difference shown"),
        ([-math.inf, math.inf], "not shown", "no difference shown"),
    ],
)
def test_verdicts(ends, word, title):
    assert verdict({"mean": sum(ends) / 2, "ci95": ends}) == word
    assert headline(deltas(f1=ends)) == f"DRO against its warm-up: {title}"


def test_mixed_results_name_both_directions():
    mixed = deltas(f1=[0.05, 0.15], iw_elbo=[0.5, 1.5], **{"recall@1": [-0.15, -0.05]})
    assert headline(mixed) == "DRO against its warm-up: improved F1, IW-ELBO; worsened recall@1"


def test_curves_are_drawn_and_told_in_numbers(page):
    """One drawing per panel, in words for those who do not see it; of values that are missing, nothing is said."""
    told = [value for tag, name, value in Attributes(page).found if (tag, name) == ("img", "alt")]
    assert len(drawings(page)) == len(told) == 10
    assert told[0].startswith("Validation, %: exact match 23 at step 0, 25 at step 40; F1 31 at step 0")
    assert "recall@1" in drawings(page)[0] and "nan" not in " ".join(told)


def test_curves_without_points_are_left_out():
    history = [{"step": 1, "loss": 1.0, "iw_elbo": -1.0}, {"step": 2, "loss": 2.0, "iw_elbo": -math.inf}]
    history += [{"step": 2, "loss": 3.0}, {"step": 2, "train_runtime": 1.0}]
    assert [curve["caption"] for curve in curves(history)] == ["loss 1 at step 1, 3 at step 2"]
    assert curves([]) == []


def test_answers_are_marked_by_exact_match(page):
    text = text_of(page)
    assert "Before (warm-up) Lyon &lt;/td&gt;&lt;i&gt; Importance" in text
    assert "After (DRO) Paris ✓ matches a gold answer" in text


def test_permutations_are_listed_by_falling_weight(page):
    listed = "[1] &gt; [4] 0.500 [3] &gt; [2] 0.400 [4] &gt; [1] 0.050 [2] &gt; [1] 0.050"
    assert "Importance weights of the 4 permutations" in text_of(page) and listed in text_of(page)


def test_warning_and_licences_of_the_data_are_shown(page):
    text = text_of(page)
    assert "never quote these numbers as NQ or TriviaQA scores" in text
    assert "passages: CC BY-SA 4.0, model: Apache-2.0" in text
    assert "recall.bm25@1 0.71" in text and "lora.r 16" in text and "machine.gflops.float32 140" in text


def test_missing_and_unbounded_values_are_shown_as_such(tmp_path, summary):
    """A value may be missing, and the interval of a single question is unbounded; a run may say less of its data."""
    dro = {**summary["systems"]["dro"], "f1": None, "iw_elbo": math.nan}
    systems = {**summary["systems"], "dro": {**dro, "ci95": {"exact_match": [-math.inf, math.inf]}}}
    unbounded = deltas(f1=[-math.inf, math.inf])
    rest = {**summary, "systems": systems, "delta": unbounded, "commit": None}
    rest["dataset"] = {"name": "own", "split": "test", "facts": {"name": "own"}}
    write_run(tmp_path, summary=rest, log_history=[], examples=[])
    text = text_of(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "F1 points – [−∞, +∞] not shown" in text
    assert "DRO 25.0 [−∞, ∞] – 66.0 – −6.01 What the metrics mean" in text


def test_gold_passages_are_shown_where_they_are_known(tmp_path, summary, page):
    """A column of both golds for data that mark them, which fits into a terminal; other data have none."""
    assert "both golds" not in text_of(page)
    found = {"zero_shot": 0.263, "sft": 0.263, "warmup": 0.45, "dro": 0.65}
    systems = {name: {**row, "all_gold@2": found[name]} for name, row in summary["systems"].items()}
    gain = {"all_gold@2": {"mean": 0.2, "ci95": [0.05, 0.35]}}
    rest = {**summary, "systems": systems, "delta": summary["delta"] | gain}
    write_run(tmp_path, summary=rest, log_history=[], examples=[])
    text = text_of(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "both golds points +20.0 [+5.0, +35.0] improved" in text
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(rest))
    table = console.export_text()
    assert all(shown in table for shown in ("both golds", "26.3", "65.0", "+20.0", "[+0.41, +1.08]"))
    assert "…" not in table


def test_missing_summary_is_a_clear_error(tmp_path):
    with pytest.raises(InvalidInputError, match="is no run's directory: summary.json is missing"):
        write_report(tmp_path)


# -------------------------------------------------------------------------------------------- runs that are not whole
def state_of(history, step, **more):
    return {"global_step": step, "max_steps": 40, "log_history": [e for e in history if e["step"] <= step], **more}


def write_checkpoint(run_dir, state, settings=None):
    folder = run_dir / f"checkpoint-{state['global_step']}"
    folder.mkdir(parents=True)
    write_run(folder, trainer_state=state, drorl={"settings": settings or {"num_candidates": 8}})


def record(query, f1=0.5, iw_elbo=-5.0):
    return {
        "query": query,
        "prediction": "x",
        "exact_match": float(f1 == 1),
        "f1": f1,
        "recall": [1.0, 1.0],
        "answer_logp": -6.0,
        "iw_elbo": iw_elbo,
        "chosen": [0],
    }


def write_records(run_dir, records, system="dro", **key):
    (run_dir / "records").mkdir(parents=True, exist_ok=True)
    key = {"answer_target": "surface", "metric_preset": "kilt"} | key
    write_run(run_dir / "records", **{system: {"key": key, "seconds": 1.0, "records": records}})


def test_a_run_of_a_bare_trainer_has_its_curves_and_says_what_is_missing(tmp_path, history):
    """From the newest checkpoint that can be read, by step and not by name; one that was cut off is passed by."""
    for step in (5, 20):
        write_checkpoint(tmp_path, state_of(history, step), {"num_candidates": step})
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-30/trainer_state.json").write_text('{"global_step": 30, "log_hist')
    page = write_report(tmp_path).read_text()
    told = [value for tag, name, value in Attributes(page).found if (tag, name) == ("img", "alt")]
    assert len(told) == 10 and all("at step 20" in words for words in told)
    text = text_of(page)
    assert f"{tmp_path.name}: 20 steps" in text and "not finished" not in text  # it may well be
    assert "There is no run.json" in text and "No system was evaluated" in text and "log ends with step 20" in text
    assert "num_candidates 20" in text and "Environment and command" not in text


def test_an_interrupted_run_shows_what_it_evaluated(tmp_path, history):
    """Means of its records, in per cent, before there is a summary; settings and command from run.json."""
    write_checkpoint(tmp_path, state_of(history, 10))
    write_records(tmp_path, [record("a", f1=1.0), record("b", f1=0.2)], system="warmup")
    run = {"settings": {"learning_rate": 0.003}, "command": ["recipes/nq.py", "--seed", "1"], "commit": None}
    write_run(tmp_path, run=run)
    text = text_of(write_report(tmp_path).read_text())
    assert "warm-up 50.0 [0.0, 100.0] 60.0 [20.0, 100.0]" in text
    assert f"{tmp_path.name}: 10 steps, not finished" in text
    assert "not come to its end (the last checkpoint is of step 10)" in text
    assert "Evaluated on held-out questions so far: warm-up;" in text
    assert "learning_rate 0.003" in text and "command recipes/nq.py --seed 1" in text
    assert "improved" not in text and "IW-ELBO" in text


def test_a_run_that_saved_nothing_yet_has_a_page(tmp_path):
    """run.json is written before the first step: that is all there is, and the page says so."""
    write_run(tmp_path, run={"settings": {"seed": 7}})
    text = text_of(write_report(tmp_path).read_text())
    assert "(no checkpoint yet)" in text and "There is no log" in text and "seed 7" in text


def test_a_run_that_has_gone_on_since_it_was_evaluated_says_so(tmp_path, summary, history, examples):
    """A finished run was resumed, and is not evaluated yet: its curves go on, and the page says what is older."""
    finished = [entry for entry in history if entry["step"] <= 20]
    write_run(tmp_path, summary=summary, log_history=finished, examples=examples, run={"settings": {"max_steps": 40}})
    write_checkpoint(tmp_path, state_of(history, 20))
    assert "gone on" not in write_report(tmp_path).read_text()
    write_checkpoint(tmp_path, state_of(history, 30))
    page = write_report(tmp_path).read_text()
    told = [value for tag, name, value in Attributes(page).found if (tag, name) == ("img", "alt")]
    assert told and any("at step 30" in words for words in told)
    assert "it was evaluated after step 20, as below, and the last checkpoint is of step 30." in text_of(page)


@pytest.mark.parametrize(
    "files",
    [
        {"summary": {}},
        {"run": []},
        {"run": {}},
        {"run": {"settings": {}}, "log_history": [{"loss": 1.0}]},
        {"run": {"settings": {}}, "log_history": [1]},
        {"run": {"settings": {}, "machine": 7}},
    ],
)
def test_files_of_other_programs_are_one_line(tmp_path, files):
    write_run(tmp_path, **files)
    with pytest.raises(InvalidInputError, match=f"^{tmp_path}.* no run wrote: "):
        write_report(tmp_path)


def test_records_of_no_question_are_named(tmp_path):
    write_records(tmp_path, [])
    with pytest.raises(InvalidInputError, match="dro.json has no records"):
        write_report(tmp_path)


# ------------------------------------------------------------------------------------------------------- comparisons
@pytest.fixture
def pair(tmp_path, summary, history, examples):
    """Two finished runs that were asked the same questions; b's F1 is 0.1 above, in each but one, and two settings."""
    questions = [f"q{i}" for i in range(30)]
    for name, gain, setting in (("a", 0.0, 8), ("b <i>", 0.1, 16)):
        folder = tmp_path / name
        folder.mkdir()
        config = {**summary["config"], "num_generations": setting, "baseline": name}
        longer = [entry for entry in history if name != "a" or entry["step"] <= 30]
        write_run(folder, summary={**summary, "config": config}, log_history=longer, examples=examples)
        records = [record(q, f1=0.3 + (gain if i else 0.0), iw_elbo=-5 - i) for i, q in enumerate(questions)]
        write_records(folder, records)
    return tmp_path / "a", tmp_path / "b <i>"


def compared(pair):
    return write_report(*pair, output=pair[0].parent / "page.html").read_text()


def test_two_runs_are_compared_question_by_question(pair):
    """The difference is the mean over the questions, 29 of 30 times 0.1; equal values are no improvement."""
    text = text_of(compared(pair))
    assert "b &lt;i&gt; against a: improved F1" in text
    assert "F1 points +9.7 [+9.0, +10.0] improved" in text
    assert "exact match points +0.0 [+0.0, +0.0] not shown" in text
    swapped = text_of(compared(pair[::-1]))
    assert "a against b &lt;i&gt;: worsened F1" in swapped and "F1 points −9.7 [−10.0, −9.0] worsened" in swapped


def test_the_data_type_that_was_found_is_compared(pair, summary):
    """Only the summary knows what `dtype: auto` has come to; run.json has the rest of the machine."""
    for run_dir, dtype in zip(pair, ("bfloat16", "float32"), strict=True):
        write_run(run_dir, summary={**summary, "machine": {"cpu": "x", "dtype": dtype}})
        write_run(run_dir, run={"settings": {"dtype": "auto"}, "machine": {"cpu": "x", "threads": 2}})
    assert different_settings([read_run(run_dir) for run_dir in pair]) == {"machine.dtype": ["bfloat16", "float32"]}


def test_other_questions_give_no_paired_difference(pair, summary):
    """One question less, or another one: it is said, and nothing is called better, nor is any value bold."""
    records = [record(f"q{i}", f1=1.0) for i in range(1, 31)]
    write_records(pair[1], records)
    page = compared(pair)
    text = text_of(page)
    assert "No paired difference: the questions are not the same: 30 and 30, of which 29 are in both." in text
    assert "improved" not in text and 'class="best"' not in page


def test_metrics_that_mean_something_else_are_left_out(pair):
    """Of another normaliser, another scored answer, or another number of samples: by name, with the reason."""
    page = compared(pair)
    text = text_of(page)
    assert "iw_elbo is left out: from another number of samples" in text and "IW-ELBO nats +" not in text
    best = set(re.findall(r'data-label="([^,]*), [^"]*"><span class="best"', page))
    assert best == {"exact match", "F1", "recall@1", "answer log-likelihood"}
    write_records(pair[1], [record(f"q{i}") for i in range(30)], answer_target="first", metric_preset="hotpot")
    text = text_of(compared(pair))
    for name, setting in (("f1", "metric_preset"), ("exact_match", "metric_preset"), ("answer_logp", "answer_target")):
        assert f"{name} is left out: {setting} is another" in text
    assert "F1 points" not in text and "recall@1 points +0.0" in text


def test_only_settings_that_differ_are_listed(pair):
    """With both values; a setting that one run does not say is no difference."""
    table = compared(pair).split('<table class="different">')[1].split("</table>")[0]
    rows = dict(re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', table))
    assert rows == {
        "num_generations": "<td>8</td><td>16</td>",
        "baseline": "<td>a</td><td>b &lt;i&gt;</td>",
    }


def test_curves_are_laid_over_each_other(pair):
    """One chart a quantity, told in numbers for each run; lines differ in colour and in dashes, thirty of them."""
    page = compared(pair)
    told = [value for tag, name, value in Attributes(page).found if (tag, name) == ("img", "alt")]
    assert len(told) == len(drawings(page)) == 14
    assert any(re.match(r"Validation: F1, %: A 31 at step 0, 34 at step 30; B 31 at step 0, 35 at", t) for t in told)
    for drawing in drawings(page):
        assert {">A<", ">B<"} <= set(re.findall(r">[AB]<", drawing))
        for colour, dashes in map(style, (0, 1)):
            lines = re.findall(rf'style="fill: none;([^"]*)stroke: {colour}; stroke-width: 1.8', drawing)
            assert lines and all(bool(dashes) == ("stroke-dasharray" in line) for line in lines)
    assert len({style(i) for i in range(30)}) == 30


def test_a_comparison_loads_nothing_and_escapes_names(pair):
    """As the page of one run."""
    page = compared(pair)
    loads = [value for _, name, value in Attributes(page).found if name in ("src", "href", "xlink:href", "srcset")]
    assert [target for target in loads if not target.startswith(("#", "data:image/svg+xml,"))] == []
    assert not {"script", "link", "iframe"} & {tag for tag, _, _ in Attributes(page).found}
    assert "b <i>" not in page


def test_runs_of_one_name_are_told_apart():
    """By as much of their paths as is needed, and no more."""
    assert names_of([Path("x/a/run"), Path("x/b/run"), Path("x/c")]) == ["a/run", "b/run", "c"]
    assert names_of([Path("run"), Path("run")]) == [str(Path("run").resolve()).lstrip("/")] * 2


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_shows_every_value_uncut(summary, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for shown in ("exact match", "IW-ELBO", "71.5", "[65.5, 77.5]", "−5.47", "[+0.8, +7.5]", "[+0.41, +1.08]"):
        assert shown in text


def test_terminal_table_marks_the_best_and_only_shown_differences(summary):
    columns = {str(column.header).split("\n")[0]: list(column.cells) for column in summary_table(summary).columns}
    bold = [
        cell.plain.split("\n")[0] for cell in columns["F1"] if any("bold" in str(span.style) for span in cell.spans)
    ]
    assert bold == ["35.2", "+4.1"]
    assert [str(span.style) for span in columns["exact match"][-1].spans] == ["dim"]


@pytest.mark.parametrize(
    ("unit", "value", "signed", "shown"),
    [
        ("%", 0.314, False, "31.4"),
        ("%", -0.005, True, "−0.5"),
        ("%", 0.0, True, "+0.0"),
        ("nats", -5.678, False, "−5.68"),
        ("nats", math.inf, True, "+∞"),
        ("nats", math.nan, False, "–"),
        ("nats", None, False, "–"),
    ],
)
def test_numbers_as_shown(unit, value, signed, shown):
    assert Metric("key", "Label", unit, "").format(value, signed) == shown


# ------------------------------------------------------------------------------------------------------ in a browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REACHABLE = "[...document.querySelectorAll('a[href], summary, [tabindex]')].filter(e => e.checkVisibility())"
LOW_CONTRAST = """
(() => {
  const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const luminance = c => {
    const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
  };
  const seen = [...document.body.querySelectorAll('*')].filter(
    e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  const low = seen.map(e => {
    const [a, b] = [luminance(rgb(getComputedStyle(e).color)), luminance(behind(e))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), e.outerHTML.slice(0, 80)];
  }).filter(([ratio]) => ratio < 4.5);
  return {seen: seen.length, low};
})()
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH")
    with headless(CHROMIUM, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(params=["one run", "stopped", "comparison"])
def shown_page(request, tmp_path, pair, summary, history, examples):
    """Each kind of page, with names and settings that are long."""
    if request.param == "comparison":
        long = tmp_path / ("a_name_that_says_all_of_" * 4)
        write_checkpoint(long, state_of(history, 20), {"max_passage_tokens": "q" * 80})
        return write_report(*pair, long, output=tmp_path / "page.html")
    if request.param == "stopped":
        write_checkpoint(tmp_path / "run", state_of(history, 20), {"lora_target_modules": ["q_proj"] * 30})
        return write_report(tmp_path / "run")
    return write_report(write_run(tmp_path, summary=summary, log_history=history, examples=examples))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_can_be_read_by_everyone(shown_page, tab, width, scheme):
    """No page is wider than its window, all text has a contrast of 4.5, the keyboard reaches all there is to reach, in
    order and visibly, and the browser neither complains nor asks for anything but the page."""
    tab.open(shown_page, width, scheme=scheme)
    background = re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (max(map(int, background)) < 60) == (scheme == "dark")
    for state in ("as it is", "unfolded"):
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, state
        contrast = tab.evaluate(LOW_CONTRAST)
        assert contrast["seen"] > 25 and contrast["low"] == [], state
        tab.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    count = tab.evaluate(f"{REACHABLE}.length")
    assert count >= 4
    for i in range(count):
        tab.press_tab()
        assert tab.evaluate(f"{REACHABLE}.indexOf(document.activeElement)") == i
        focus = tab.evaluate(
            "(e => [getComputedStyle(e).outlineStyle, parseFloat(getComputedStyle(e).outlineWidth), "
            "e.getBoundingClientRect().left])(document.activeElement)"
        )
        assert focus[0] == "solid" and focus[1] >= 2 and focus[2] >= 0
    heard = {event["method"] for event in tab.events}
    assert not heard & {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    asked = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert asked and [url for url in asked if url != shown_page.as_uri() and not url.startswith("data:")] == []


@pytest.mark.slow
def test_the_structure_of_pages_is_announced(shown_page, tab):
    """Landmarks, one first heading, none skipped; tables have a caption and headers a scope, images have words."""
    tab.open(shown_page, 1280)
    levels = tab.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])")
    assert levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    for missing in (
        "['header', 'nav[aria-label]', 'main'].filter(name => document.querySelectorAll(name).length !== 1)",
        "[...document.querySelectorAll('table')].filter(t => !t.caption?.textContent.trim()).map(t => t.outerHTML)",
        "[...document.querySelectorAll('th')].filter(t => !t.scope).map(t => t.outerHTML)",
        "[...document.querySelectorAll('img')].filter(i => !i.alt).map(i => i.outerHTML)",
        "[...document.querySelectorAll('svg')].filter(i => !i.ariaHidden).map(i => i.outerHTML)",
        "[...document.querySelectorAll('a')].filter(a => !document.querySelector(a.getAttribute('href'))).map(String)",
    ):
        assert tab.evaluate(missing) == []
