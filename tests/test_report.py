"""The report of a run: complete, self-contained, escaped, and worded as the intervals allow."""

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from drorl.errors import InvalidInputError
from drorl.report import METRICS, Metric, flatten, headline, summary_table, verdict, write_report


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
        "permutations": [[0, 3], [1, 0], [0, 3], [2, 1]],
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


def test_page_loads_nothing_from_elsewhere(page):
    """References point into the page only; what a passage says about images stays text."""
    found = Attributes(page).found
    loads = [value for _, name, value in found if name in ("src", "href", "xlink:href", "srcset", "data", "action")]
    loads += re.findall(r"url\(([^)]*)\)", " ".join(value for _, _, value in found) + page.split("</style>")[0])
    assert len(loads) > 10, "the curves refer to their own clip paths and markers: fewer means that none were seen"
    assert [target for target in loads if not target.startswith("#")] == []
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _, _ in found}
    assert "@import" not in page and "https://example.com/x.png" in page


def test_text_of_data_and_models_is_escaped(page):
    for text in ("Lyon &lt;script&gt;alert(1)", "&lt;b&gt;bridges", "&lt;/td&gt;&lt;i&gt;", "&lt;France&gt;"):
        assert text in page
    assert "Lyon &amp; its" in page


def test_every_metric_of_every_system_is_shown_with_its_interval(page, summary):
    text = text_of(page)
    cells = 0
    for row in summary["systems"].values():
        for metric in METRICS:
            if row[metric.key] is not None:
                assert f"{metric.format(row[metric.key])} {metric.format_interval(row['ci95'][metric.key])}" in text
                cells += 1
    assert cells == 18
    for metric in METRICS[:4]:
        assert metric.format_interval(summary["delta"][metric.key]["ci95"], signed=True) in text


def test_wording_follows_the_intervals(page):
    """Improved where the interval is above 0; not shown where it includes 0, however large the mean."""
    text = text_of(page)
    assert "DRO improved F1, recall@1 and IW-ELBO over its warm-up" in text
    assert "F1 rose by 4.1 points (95 % interval +0.8 to +7.5)." in text
    assert (
        "No difference shown, the interval includes 0: exact match (+1.5 points; 95 % interval −2.5 to +5.5)." in text
    )
    assert "recall@1 (Retriever's order + zero-shot generator: 71.5 against 66.0 %)" in text.replace("&#39;", "'")


@pytest.mark.parametrize(
    ("ends", "word", "title"),
    [
        ([0.01, 0.2], "improved", "DRO improved F1 over its warm-up"),
        ([-0.2, -0.01], "worsened", "DRO worsened F1 against its warm-up"),
        ([-0.01, 0.9], "not shown", "No difference between DRO and its warm-up was shown"),
        ([0.0, 0.9], "not shown", "No difference between DRO and its warm-up was shown"),
        ([-math.inf, math.inf], "not shown", "No difference between DRO and its warm-up was shown"),
    ],
)
def test_verdicts(ends, word, title):
    delta = {"mean": sum(ends) / 2, "ci95": ends}
    assert verdict(delta) == word
    assert headline({"delta": {"f1": delta}})["title"] == title


def test_mixed_results_name_both_directions():
    delta = {"f1": {"mean": 0.1, "ci95": [0.05, 0.15]}, "recall@1": {"mean": -0.1, "ci95": [-0.15, -0.05]}}
    result = headline({"delta": delta})
    assert result["title"] == "DRO improved F1 and worsened recall@1 over its warm-up"
    assert result["sentences"][1] == "Recall@1 fell by 10.0 points (95 % interval −15.0 to −5.0)."


def test_curves_are_inline_and_accessible(page):
    """One drawing per panel, named for screen readers, in the page's colours, without ids that collide."""
    drawings = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]*)">', page)
    assert len(drawings) == 10
    assert "Validation, %: exact match 23 at step 0, 25 at step 40; F1 31 at step 0" in drawings[0]
    assert "currentColor" in page and "var(--series-2)" in page and "#0101" not in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert ids and len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_answers_are_marked_by_exact_match(page):
    text = text_of(page)
    assert "Before (warm-up) Lyon &lt;/td&gt;&lt;i&gt; Importance" in text
    assert "After (DRO) Paris ✓ matches a gold answer" in text


def test_equal_samples_are_one_row_with_their_count(page):
    assert "[1] &gt; [4] × 2 0.900" in text_of(page)


def test_warning_and_licences_of_the_data_are_shown(page):
    text = text_of(page)
    assert "never quote these numbers as NQ or TriviaQA scores" in text
    assert "passages: CC BY-SA 4.0, model: Apache-2.0" in text
    assert "recall.bm25@1 0.71" in text and "lora.r 16" in text and "machine.gflops.float32 140" in text


@pytest.mark.parametrize(
    "missing", ["minutes", "machine", "versions", "command", "commit", "config", "dataset", "delta"]
)
def test_optional_parts_may_be_missing(tmp_path, summary, missing):
    rest = {key: value for key, value in summary.items() if key != missing}
    assert len(rest) == len(summary) - 1
    assert "DRO" in text_of(write_report(write_run(tmp_path, summary=rest)).read_text(encoding="utf-8"))


def test_bare_run_still_makes_a_page(tmp_path):
    bare = {"n_eval": 1, "dro": {"f1": 0.5}, "delta": {"f1": {"mean": 0.5, "ci95": [-math.inf, math.inf]}}}
    write_run(tmp_path, summary=bare, examples=[{"query": "q"}], log_history=[{"step": 1, "loss": 1.0}])
    text = text_of(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "+50.0" in text and "[−∞, +∞]" in text and "not shown" in text


def test_missing_summary_is_a_clear_error(tmp_path):
    with pytest.raises(InvalidInputError, match="summary.json is missing: a recipe writes it"):
        write_report(tmp_path)


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_shows_every_value_uncut(summary, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for shown in ("Exact match", "IW-ELBO", "71.5", "[65.5, 77.5]", "−5.47", "[+0.8, +7.5]", "[+0.41, +1.08]"):
        assert shown in text


def test_terminal_table_marks_the_best_and_only_shown_differences(summary):
    columns = {str(column.header).split("\n")[0]: list(column.cells) for column in summary_table(summary).columns}
    bold = [
        cell.plain.split("\n")[0] for cell in columns["F1"] if any("bold" in str(span.style) for span in cell.spans)
    ]
    assert bold == ["35.2", "+4.1"]
    assert [str(span.style) for span in columns["Exact match"][-1].spans] == ["dim"]


@pytest.mark.parametrize(
    ("unit", "value", "signed", "shown"),
    [
        ("points", 0.314, False, "31.4"),
        ("points", -0.005, True, "−0.5"),
        ("points", 0.0, True, "+0.0"),
        ("nats", -5.678, False, "−5.68"),
        ("nats", math.inf, True, "+∞"),
        ("nats", math.nan, False, "–"),
        ("nats", None, False, "–"),
    ],
)
def test_numbers_as_shown(unit, value, signed, shown):
    assert Metric("key", "Label", unit, "").format(value, signed) == shown


def test_flatten_keeps_every_setting():
    assert flatten({"a": {"b": {"c": 1}}, "d": None, "e": []}) == [("a.b.c", "1"), ("d", "None"), ("e", "")]
