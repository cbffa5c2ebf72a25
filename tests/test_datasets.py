"""The paper's five data sets: from their own files, by the commands that their recipes name, to a trained run."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from datasets import Dataset, DatasetDict
from raw_data import write_raw
from trl import TrlParser
from typer.testing import CliRunner

from drorl import DROConfig
from drorl.cli import app
from drorl.data.load import load_rows
from drorl.data.reading import Reading
from drorl.data.rows import RowError, validate_rows
from drorl.errors import InvalidInputError

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"
NAMES = ("nq", "hotpotqa", "2wiki", "musique", "wow")
OWN = {"output_dir", "train_file", "validation_file", "test_file", "metric_preset"}
"""What each of them may set as it likes."""


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of all data sets, which is the current one; no table of an earlier run is found."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "tables")
    write_raw(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_rows(name: str) -> None:
    """Runs the commands in the head of a configuration; of eight questions four are held out, not a thousand."""
    head = (CONFIGS / f"{name}.yaml").read_text().split("\noutput_dir:")[0]
    commands = re.findall(r"^#   (.+)$", head, flags=re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        command = command.replace("-n 1000", "-n 4").replace("+1001", "+5")
        if command.startswith("drorl "):
            done = CliRunner().invoke(app, shlex.split(command)[1:])
            assert done.exit_code == 0, (command, done.exception)
        else:
            subprocess.run(command, shell=True, check=True)


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_from_raw_files_to_a_trained_run(raw: Path, name: str, tiny_model, tokenizer) -> None:
    """The commands give rows; two steps with the paper's settings, early stopping and metrics run on them."""
    import nq

    make_rows(name)
    tiny_model().save_pretrained(raw / "model")
    tokenizer.save_pretrained(raw / "model")
    changed: dict[str, Any] = {
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "warmup_queries": 4,
        "max_answer_length": 4,
    }
    changed |= {
        "model_name_or_path": raw / "model",
        "generator_model_name_or_path": raw / "model",
        "lora_r": 2,
        "bf16": False,
    }
    flags = [part for key, value in {**changed, "dtype": "float32"}.items() for part in (f"--{key}", str(value))]
    parser = TrlParser((nq.ScriptArguments, DROConfig))
    script, config = parser.parse_args_and_config(["--config", str(CONFIGS / f"{name}.yaml"), *flags])
    assert nq.main(script, config) == 0

    run = raw / "outputs" / name
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["n_eval"], summary["config"]["metric_preset"]) == (4, settings(name)["metric_preset"])
    log = json.loads((run / "log_history.json").read_text())
    assert sum("selector/loss" in entry for entry in log) == 2
    assert any("eval_f1" in entry for entry in log)
    # What the run says of its answers is what drorl score says of its predictions.
    preset = ["--preset", config.metric_preset, "--json"]
    scored = CliRunner().invoke(app, ["score", "--input", str(run / "predictions/dro.jsonl"), *preset])
    assert json.loads(scored.stdout) == {**{key: summary["dro"][key] for key in ("exact_match", "f1")}, "n": 4}


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_each_data_set(raw: Path, name: str) -> None:
    """K candidates at least, golds marked where the data set names them, everything in the files accounted for."""
    make_rows(name)
    own = settings(name)
    rows = {split: load_rows(own[f"{split}_file"], split) for split in ("train", "validation", "test")}
    sizes = (8, 4, 4) if name == "nq" else (4, 4, 4)
    assert tuple(map(len, rows.values())) == sizes
    assert validate_rows(rows["train"], own["num_selected"], require_scores=True)[1].total() == 0
    marks = {c["is_gold"] for c in rows["train"][1]["candidates"]}
    assert marks == {True, False}
    if name in ("2wiki", "musique"):
        assert any(answer.startswith("River ") for answer in rows["test"][1]["answers"])


def test_the_five_differ_only_in_their_data() -> None:
    """The paper trains on all of them alike; what a data set needs beside its files is listed here."""
    wow = {"answer_target", "max_answer_length"}
    first = settings(NAMES[0])
    for name in NAMES[1:]:
        other = settings(name)
        differing = {key for key in first.keys() | other.keys() if first.get(key) != other.get(key)}
        assert differing - OWN == (wow if name == "wow" else set()), name


@pytest.mark.parametrize("file", ["hotpot_train_v1.1.json", "2wiki/train.json", "musique_ans_v1.0_train.jsonl"])
def test_raw_files_are_read_like_prepared_ones(raw: Path, file: str) -> None:
    """A recipe takes a file that brings candidates as it is, by the reader of drorl prepare."""
    arguments = ["prepare", "--input", f"data/{file}", "--output", "rows.jsonl"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    prepared = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    names = ("id", "title", "text", "is_gold")
    expected = [[{name: c[name] for name in names} for c in row["candidates"]] for row in prepared]
    for source in (f"data/{file}", "rows.jsonl"):
        rows = load_rows(source)
        assert [(row["id"], row["query"], row["answers"]) for row in rows] == [
            (row["id"], row["query"], row["answers"]) for row in prepared
        ]
        assert [[{name: c[name] for name in names} for c in row["candidates"]] for row in rows] == expected
        for row, of in zip(rows, prepared, strict=True):
            for golds in ("gold_ids", "gold_titles"):
                assert row["metadata"][golds] == [str(name) for name in of["metadata"].get(golds, [])]
    assert sum(c["is_gold"] for c in rows[1]["candidates"]) >= 1


def test_a_table_is_made_again_when_its_file_changes(raw: Path) -> None:
    """What an earlier run has kept of a file is never taken for another content of it."""
    path = raw / "data" / "musique_ans_v1.0_train.jsonl"
    before = load_rows(str(path))
    assert len(before) == 8 and before[0]["query"] == load_rows(str(path))[0]["query"]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[3:]))
    assert load_rows(str(path))["query"] == before["query"][3:]


def test_data_sets_of_the_library(raw: Path) -> None:
    """A folder of save_to_disk, a folder of files, a slice of a split: read like the file that they were made of."""
    path = raw / "data" / "musique_ans_v1.0_train.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[2]["answer_aliases"]  # None in a table
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = list(load_rows(str(path)))
    records = Dataset.from_list(lines)
    records.save_to_disk("one")
    DatasetDict({"train": records, "validation": records.select(range(2))}).save_to_disk("two")
    Path("files").mkdir()
    records.to_parquet("files/train-00000-of-00001.parquet")
    assert list(load_rows("one")) == list(load_rows("two")) == list(load_rows("files?split=train")) == expected
    assert list(load_rows("two", "validation")) == expected[:2] == list(load_rows("files?split=train[:2]"))
    done = CliRunner().invoke(app, ["prepare", "--input", "two?split=validation", "--output", "rows.jsonl"])
    assert done.exit_code == 0
    assert list(load_rows("rows.jsonl")) == expected[:2]


@pytest.mark.parametrize(
    "source, message",
    [
        ("hotpotqa/hotpot_qa", "no file, and no data set that can be had: Couldn't reach 'hotpotqa/hotpot_qa'"),
        ("hotpotqa/hotpot_qa?name=distractor&split=train[:9]", "no file, and no data set that can be had"),
        ("hotpotqa/hotpot_qa?config=distractor", "config is none of name, split, revision"),
        ("data/missing.jsonl", "cannot be read: No such file"),
        ("data", "is a folder, and a file is needed"),
        ("data?split=x", "a folder, and no data set"),
        ("empty.jsonl", "has no rows"),
        ("data/nq-test.qa.csv", "the first question of data/nq-test.qa.csv has no candidates: drorl retrieve"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(raw: Path, source: str, message: str) -> None:
    """Without a network, a name on the hub is refused as what it is; files are never looked for there."""
    Path("empty.jsonl").touch()
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        load_rows(source)


def test_a_broken_record_is_named(raw: Path) -> None:
    """In the middle of a file, too: its number and field, as drorl prepare names it."""
    path = raw / "data" / "musique_ans_v1.0_train.jsonl"
    path.write_text(path.read_text().replace('"Which river flows through Turin?"', '" "'))
    for read in (lambda: load_rows(str(path)), lambda: list(Reading(path))):
        with pytest.raises(RowError, match="row 5, field 'query'"):
            read()
