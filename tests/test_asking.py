"""Commands that ask a run: what they print is what the pipeline does, and mistakes are one line."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CITIES, RIVERS
from helpers import randomise_adapters
from peft import LoraConfig
from processes import kill_once
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from drorl import RAGPipeline, predictions, terminal
from drorl.adapters import add_adapters
from drorl.cli import app, main
from drorl.evaluation import evaluate_rows, score_permutations
from drorl.inspection import weigh_row
from drorl.models import load_model_and_tokenizer
from drorl.pipeline import PipelineSettings
from drorl.statistics import bootstrap_mean

run = CliRunner().invoke
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    lora: LoraConfig,
) -> Path:
    """A run of a tiny random model: N = 6, K = 2, candidates shuffled, with a retrieval prior."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_model().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base, loaded = load_model_and_tokenizer(str(folder / "base"), dtype="float32")
    model = add_adapters(base, lora).eval()
    randomise_adapters(model)
    RAGPipeline(model, loaded, PipelineSettings(6, 2, True, "title", 0.7, 0.5, 20, 400, 5)).save_pretrained(
        folder / "run"
    )
    return folder / "run"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Passages about rivers, to be indexed in a cache of its own."""
    monkeypatch.setenv("DRORL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "corpus.jsonl"
    pairs = zip(RIVERS, CITIES, strict=True)
    path.write_text(
        "".join(
            json.dumps({"id": river, "title": river, "text": f"The {river} flows through {city}."}) + "\n"
            for river, city in pairs
        )
    )
    return path


def written(path: Path, rows: Rows) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def message_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """The one line that a command ends with, its exit code being 1."""
    monkeypatch.setattr(sys, "argv", ["drorl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, str)
    assert "\n" not in ended.value.code
    return ended.value.code


def lines_of(*arguments: object) -> list[dict]:
    """What a command prints as JSON lines."""
    done = run(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return [json.loads(line) for line in done.stdout.splitlines()]


# ------------------------------------------------------------------------------------------------------------ evaluate
def test_evaluate_is_evaluation_with_intervals(run_dir: Path, rows: Callable[..., Rows], tmp_path: Path) -> None:
    """Means and intervals are those of the library's records; the predictions score to the same figures."""
    data = [{**row, "id": str(i), "candidates": row["candidates"]} for i, row in enumerate(rows(7, 8))]
    for row in data:
        for passage in row["candidates"]:
            passage["is_gold"] = passage["title"] in row["answers"]
    source, output = written(tmp_path / "rows.jsonl", data), tmp_path / "predictions.jsonl"
    command = ["evaluate", run_dir, "--input", source, "--output", output, "--dtype", "float32", "--quiet"]
    [found] = lines_of(*command, "--json")
    records = evaluate_rows(RAGPipeline.from_pretrained(run_dir, "float32"), data)
    assert found["n"] == found["f1"]["n"] == 7
    for name in ("exact_match", "f1", "answer_logp", "iw_elbo"):
        interval = bootstrap_mean([getattr(record, name) for record in records])
        assert found[name]["mean"] == pytest.approx(interval.mean, abs=1e-5)
        assert found[name]["ci95"] == pytest.approx(interval.ci95, abs=1e-5)
    for k in (1, 3, 5):
        assert found[f"recall@{k}"]["mean"] == pytest.approx(sum(r.recall[k - 1] for r in records) / 7)
    assert not any(name.endswith(("@10", "@20")) and "recall" in name for name in found)

    kept = [json.loads(line) for line in output.read_text().splitlines()]
    for record, row, line in zip(records, data, kept, strict=True):
        assert line["predicted_support_idxs"] == record.chosen
        assert [row["candidates"][i]["title"] for i in line["support_idxs"]] == row["answers"]
        ranked = [row["candidates"].index({k: v for k, v in c.items() if k != "rank"}) for c in line["candidates"]]
        assert ranked[:6] == record.order and sorted(ranked) == list(range(8))
    *_, scored = lines_of("score", "--input", output, "--json")
    assert scored == {"exact_match": found["exact_match"]["mean"], "f1": found["f1"]["mean"], "n": 7}
    more, _ = lines_of("score", "--input", output, "--json", "--preset", "musique")
    assert more["support/recall"] == found["support/recall"]["mean"]

    shown = run(app, [*map(str, command)]).stdout
    assert "7 questions" in shown and "answer_logp" in shown and "nats" in shown
    written(source, data[:1])
    [one] = lines_of(*command, "--json")
    assert one["f1"]["ci95"] is None  # a single question has no interval


KILLED = """
import sys, time
from pathlib import Path
from drorl import RAGPipeline, predictions
from drorl.data.reading import Reading
predictions.SHARD_ROWS = 2
real = predictions.evaluate_rows
predictions.evaluate_rows = lambda *arguments: (time.sleep(0.3), real(*arguments))[1]
run_dir = Path(sys.argv[1])
reading = Reading(Path(sys.argv[2]))
predictions.predict_file(RAGPipeline.from_pretrained(run_dir, "float32"), run_dir, reading, Path(sys.argv[3]))
"""


def test_evaluate_goes_on_where_it_was_killed(
    run_dir: Path, rows: Callable[..., Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in the middle: what was predicted is kept, and the file is the same to the byte; not for another run."""
    monkeypatch.setattr(predictions, "SHARD_ROWS", 2)
    source = written(tmp_path / "rows.jsonl", rows(12, 6))
    command = ["evaluate", run_dir, "--input", source, "--dtype", "float32", "--quiet", "--json", "--output"]
    lines_of(*command, tmp_path / "whole.jsonl")
    output = tmp_path / "out.jsonl"
    shards = tmp_path / ".out.jsonl.shards"
    kill_once((shards / "000001.json").exists, [sys.executable, "-c", KILLED, run_dir, source, output], 300)
    finished = len(list(shards.glob("*.json")))
    assert 2 <= finished < 6
    asked: list[int] = []
    real = predictions.evaluate_rows
    monkeypatch.setattr(predictions, "evaluate_rows", lambda *a: (asked.append(len(a[1])), real(*a))[1])
    lines_of(*command, output)
    assert sum(asked) == 12 - 2 * finished
    shutil.copytree(run_dir, tmp_path / "other")
    for role, other in (("generator", "selector"), ("selector", "generator")):
        weights = (run_dir / other / "adapter_model.safetensors").read_bytes()
        (tmp_path / "other" / role / "adapter_model.safetensors").write_bytes(weights)
        assert predictions._identity(tmp_path / "other") != predictions._identity(run_dir)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    asked.clear()
    lines_of(*command, output)
    assert asked == []  # what is there already is not made again
    lines_of(*["bfloat16" if word == "float32" else word for word in command], output)
    assert sum(asked) == 12  # nor taken for that of another data type


# -------------------------------------------------------------------------------------------------------------- answer
def test_answer_is_the_pipelines(run_dir: Path, rows: Callable[..., Rows], tmp_path: Path, corpus: Path) -> None:
    """Rows with candidates, one question or a file of them with a corpus: ranking, answer and citations agree."""
    pipeline = RAGPipeline.from_pretrained(run_dir, "float32")
    data = rows(3, 6)
    source = written(tmp_path / "rows.jsonl", data)
    command = ["answer", run_dir, "--dtype", "float32", "--json"]
    for row, line in zip(data, lines_of(*command, "--input", source), strict=True):
        expected = pipeline.answer(row["query"], row["candidates"])
        assert (line["query"], line["answer"]) == (row["query"], expected.text)
        assert [c["title"] for c in line["citations"]] == [c.passage["title"] for c in expected.citations]
        assert [c["logp"] for c in line["citations"]] == pytest.approx([c.logp for c in expected.citations], abs=1e-5)
        assert sum(math.exp(passage["logp"]) for passage in line["passages"]) == pytest.approx(1, abs=1e-5)
        logps = [passage["logp"] for passage in line["passages"]]
        assert logps == sorted(logps, reverse=True)
        assert line["passages"][0]["title"] == line["citations"][0]["title"]
        assert line["passages"][0]["logp"] == pytest.approx(line["citations"][0]["logp"], abs=1e-5)

    question = "Which river flows through Vienna?"
    [alone] = lines_of(*command, "--query", question, "--corpus", corpus)
    questions = written(tmp_path / "questions.jsonl", [{"id": "a", "question": question}])
    [in_file] = lines_of(*command, "--input", questions, "--corpus", corpus)
    assert alone == {**in_file, "id": None}
    assert "Danube" in {passage["title"] for passage in alone["passages"]} and len(alone["passages"]) == 6
    shown = run(app, [*map(str, command[:-1]), "--query", question, "--corpus", str(corpus)]).stdout
    # A model that knows nothing may write a backspace, which no terminal is given.
    assert question in shown and str(terminal.shown(alone["answer"])) in shown and "[1] [2]" in shown


def test_chat_reads_lines_until_they_end(run_dir: Path, corpus: Path) -> None:
    """Piped questions are answered one by one; what cannot be is said, and the next one asked; no traceback."""
    command = ["chat", str(run_dir), "--corpus", str(corpus), "--dtype", "float32"]
    asked = b"\nWhich river flows through Vienna?\nzebra\nWhich Gr\xf6\xdfe [/bold] flows?\n"
    done = run(app, command, input=asked)
    assert done.exit_code == 0, done.exception
    assert done.stdout.count("[1] [2]") == 2
    assert "0 passages were found for 'zebra', and the run selects 2" in done.stdout
    assert "Danube" in done.stdout


# ------------------------------------------------------------------------------------------------------------- inspect
def test_inspect_shows_rows(rows: Callable[..., Rows], tmp_path: Path) -> None:
    """Any format: which candidates hold an answer, which are gold; markup in a text is text; the row that is asked."""
    data = rows(5, 3)
    data[1]["candidates"][0] |= {"text": "[red]Danube[/red] Rhine", "is_gold": True}
    data[1]["answers"] = ["Rhine"]
    source = written(tmp_path / "rows.jsonl", data)
    shown = run(app, ["inspect", str(source)]).stdout
    assert [f"row {i}" in shown for i in range(1, 6)] == [True, True, True, False, False]
    shown = run(app, ["inspect", str(source), "--row", "2"]).stdout
    assert "row 2" in shown and "row 1" not in shown
    [first] = [line for line in shown.splitlines() if "[1]" in line]
    assert "✓★" in first and "[red]Danube[/red] Rhine" in first
    assert "answers: Rhine" in shown


def test_inspect_controls_no_terminal_and_counts(rows: Callable[..., Rows], tmp_path: Path) -> None:
    """ESC of a question, an answer, a title or a text is written out; rows that were left out are counted."""
    [row] = rows(1, 3)
    row |= {"query": "\x1b]0;q\x07?", "answers": ["\x1b[31ma", "b\x9b"]}
    row["candidates"][0] |= {"title": "\x1b[2J", "text": "x \x1b[1m"}
    source = written(tmp_path / "rows.jsonl", [{"query": "why?"}, row])
    command = ["inspect", str(source), "--on-error", "skip", "--format", "drorl"]
    done = run(app, command)
    assert done.exit_code == 0 and {"\x1b", "\x9b", "\x07"}.isdisjoint(done.stdout)
    for said in (r"\x1b]0;q\x07?", r"answers: \x1b[31ma | b\x9b", r"\x1b[2J", r"x \x1b[1m"):
        assert said in done.stdout
    assert "skipped 1 rows: {'no list': 1}" in done.stderr
    assert run(app, [*command, "--quiet"]).stderr == ""


def test_inspect_weighs_as_the_trainer_does(run_dir: Path, rows: Callable[..., Rows], tmp_path: Path) -> None:
    """Weights are p_g p_s / q, normalised over the draws; written out here from the models' own probabilities."""
    pipeline = RAGPipeline.from_pretrained(run_dir, "float32")
    [row] = rows(1, 6)
    for temperature in (1.0, 3.0):
        found = weigh_row(pipeline, row, 16, seed=3, proposal_temperature=temperature)
        shown = pipeline.present(row["query"], row["candidates"], 3)
        drawn = [tuple(shown.index(row["candidates"][i]) for i in z) for z in found.permutations]
        with torch.no_grad():
            decisions = pipeline.decisions([row["query"]], [shown])
            each = decisions.permutation_logps([drawn])[0][0]
            steps = [[z[:t] for t in range(2)] for z in drawn]
            tempered = [torch.log_softmax(decisions.logps([s])[0] / temperature, -1) for s in steps]
            [answer] = score_permutations(pipeline, [row], [shown], [drawn], "surface")
        proposal = torch.stack(
            [rows_[torch.arange(2), list(z)].sum() for rows_, z in zip(tempered, drawn, strict=True)]
        )
        expected = torch.softmax(answer + each.sum(-1) - proposal, dim=0)
        torch.testing.assert_close(found.importance_weights, expected, atol=1e-5, rtol=0)
        assert found.effective_sample_size == pytest.approx(float(1 / expected.square().sum()), abs=1e-4)
        assert found.importance_weights.tolist() == sorted(found.importance_weights.tolist(), reverse=True)
    source = written(tmp_path / "rows.jsonl", rows(1, 6))
    options = ["--run", str(run_dir), "--dtype", "float32", "--num-generations", "16", "--seed", "3"]
    shown = run(app, ["inspect", str(source), *options]).stdout
    plain = weigh_row(pipeline, row, 16, seed=3)
    assert f"effective sample size {plain.effective_sample_size:.2f} of 16" in shown
    first = " > ".join(f"[{i + 1}]" for i in plain.permutations[0])
    assert first in shown and f"{plain.importance_weights[0]:.3f}" in shown


# -------------------------------------------------------------------------------------------------------------- errors
def test_mistakes_are_one_line(
    run_dir: Path, rows: Callable[..., Rows], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong run, one that is not whole, rows that do not do, an empty file, a Latin-1 byte: named, exit code 1."""
    data = rows(2, 6)
    good = written(tmp_path / "good.jsonl", data)
    few = written(tmp_path / "few.jsonl", [data[0], {**data[1], "candidates": data[1]["candidates"][:1]}])
    bare = written(tmp_path / "bare.jsonl", [{"question": "why?"}])
    unscored = [{name: c[name] for name in ("id", "title", "text")} for c in data[0]["candidates"]]
    unscored = written(tmp_path / "unscored.jsonl", [{**data[0], "candidates": unscored}])
    empty = written(tmp_path / "empty.jsonl", [])
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(good.read_bytes() + b'{"query": "Gr\xf6\xdfe?"}\n')
    cases = {
        (few, "evaluate"): r"few.jsonl, row 2, field 'candidates': fewer candidates than are selected: 1 < 2",
        (unscored, "evaluate"): r"field 'candidates\[0\].score': missing or non-finite score",
        (bare, "evaluate"): r"row 1, field 'answers': no answer that is not blank",
        (empty, "evaluate"): "there is no question to evaluate on",
        (latin, "evaluate"): r"latin.jsonl, row 3: byte 14 is no UTF-8",
        (few, "answer"): r"few.jsonl, row 2, field 'candidates': fewer candidates",
        (empty, "answer"): "empty.jsonl has no questions",
        (latin, "answer"): r"latin.jsonl, row 3: byte 14 is no UTF-8",
    }
    for (path, command), message in cases.items():
        said = message_of(monkeypatch, command, run_dir, "--input", path, "--dtype", "float32")
        assert re.search(message, said), said
    assert "good.jsonl has no row 9" in message_of(monkeypatch, "inspect", good, "--row", 9)
    assert "empty.jsonl has no rows" in message_of(monkeypatch, "inspect", empty)
    assert "0 passages were found for 'zebra'" in message_of(
        monkeypatch, "answer", run_dir, "--query", "zebra", "--corpus", corpus
    )

    broken = tmp_path / "broken"
    for missing, message in (
        ("drorl.json", "is not a drorl run: it has no drorl.json"),
        ("generator/adapter_config.json", "has no generator/adapter_config.json"),
        ("selector/adapter_model.safetensors", "has no selector/adapter_model.safetensors"),
    ):
        shutil.copytree(run_dir, broken, dirs_exist_ok=True)
        (broken / missing).unlink()
        assert message in message_of(monkeypatch, "evaluate", broken, "--input", good)
    shutil.copytree(run_dir, broken, dirs_exist_ok=True)
    settings = json.loads((broken / "drorl.json").read_text())
    for content, message in (
        ("{", "drorl.json is damaged"),
        (json.dumps({**settings, "settings": {"colour": 1}}), "drorl.json is damaged, or of another version"),
        (json.dumps({**settings, "base_model": str(tmp_path / "gone")}), "base model .*gone cannot be loaded"),
    ):
        (broken / "drorl.json").write_text(content)
        assert re.search(message, message_of(monkeypatch, "answer", broken, "--input", good))
    assert "no floating-point type" in message_of(monkeypatch, "answer", run_dir, "--input", good, "--dtype", "x")


def test_a_server_is_asked_without_a_corpus(
    run_dir: Path, rows: Callable[..., Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a retriever that has its own passages the candidates of a file are not taken; it needs its address."""
    source = written(tmp_path / "rows.jsonl", rows(2, 6))
    for question in (["--query", "x"], ["--input", source]):
        arguments = ["answer", run_dir, *question, "--retriever", "http"]
        assert "this retriever needs --set url=" in message_of(monkeypatch, *arguments)
        said = message_of(monkeypatch, *arguments, "--set", "url=http://127.0.0.1:9", "--set", "tries=1")
        assert "http://127.0.0.1:9 has failed 1 times" in said
    index = ["index", "--corpus", source, "--output", tmp_path / "o", "--retriever", "http"]
    assert "there is nothing to make here" in message_of(monkeypatch, *index, "--set", "url=http://127.0.0.1:9")


@pytest.mark.parametrize(
    "more",
    [[], ["--query", "x", "--input", "y"], ["--query", "x"], ["--query", "\udcf6"], ["--input", "y", "--set", "k1=1"]],
)
def test_options_that_do_not_fit_are_usage(run_dir: Path, corpus: Path, more: list[str]) -> None:
    """No question or two, one without a corpus, one that is no text, settings of no retriever: exit code 2."""
    extra = ["--corpus", str(corpus)] if "\udcf6" in more else []
    assert run(app, ["answer", str(run_dir), *more, *extra]).exit_code == 2
