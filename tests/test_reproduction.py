"""A run says where it comes from; repeated, it is the same bit for bit, and what is not the same is named."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from runs import recipe_flags
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from drorl import provenance, reproduction
from drorl.cli import app
from drorl.clock import read_clock
from drorl.errors import InvalidInputError
from drorl.reproduction import changes, compare, read_run

RECIPE = Path(__file__).parent.parent / "recipes" / "nq.py"
ADAPTER = "selector/adapter_model.safetensors"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nq", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nq"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(
    recipe: ModuleType, tiny_model: Any, tokenizer: Any, rows: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a run that was bounded by minutes, and the files that it was made from."""
    folder = tmp_path_factory.mktemp("made")
    flags = recipe_flags(folder, tiny_model(), tokenizer, rows)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [str(RECIPE), *flags])
        assert recipe.run() == 0
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of the run's results, to be changed."""
    return Path(shutil.copytree(made / "run", tmp_path / "copy"))


@pytest.fixture
def data_as_they_were(made: Path) -> Iterator[None]:
    before = (made / "train.jsonl").read_text()
    yield
    (made / "train.jsonl").write_text(before)


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path: Path, tensor: int = 0) -> None:
    """Changes the last bit of one weight."""
    tensors = load_file(path)
    name = sorted(tensors)[tensor]
    tensors[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, path)


# ------------------------------------------------------------------------------------------------------------ run.json
def test_a_run_says_where_it_comes_from(made: Path) -> None:
    """Command, settings, seed, versions, hashes of data, model and code, threads: all that its result depends on."""
    run = read_run(made / "run")
    assert run["command"][0] == str(RECIPE) and "--max_minutes" in run["command"]
    assert (run["seed"], run["settings"]["max_steps"], run["settings"]["lora_first_layer"]) == (42, 2, 1)
    assert run["versions"]["torch"] == torch.__version__
    assert run["data"]["train"] == [provenance.sha256_of(made / "train.jsonl")]
    assert run["data"]["test"] == [provenance.sha256_of(made / "test.jsonl")]
    assert run["machine"]["threads"] == torch.get_num_threads()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RECIPE.parent, check=False)
    assert run["commit"] == (head.stdout.strip() or None)
    assert "output_dir" not in run["settings"]


def test_secrets_are_not_kept(made: Path, recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token given as a setting or in the environment is not in the record."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for token in (["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]):
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *read_run(made / "run")["command"][1:], *token])
        record = recipe.described(*recipe.parse())
        assert "hf_secret" not in json.dumps(record)
        assert record["command"][-1].endswith("<hidden>")


def test_a_resumed_run_keeps_its_first_record(copied: Path) -> None:
    """Going on adds to the record; with other settings there is no one command that repeats it, which is said."""
    first = json.loads((copied / "run.json").read_text())
    provenance.keep_record(copied, first, resumed=True)
    assert json.loads((copied / "run.json").read_text()) == {**first, "resumed": [first]}
    read_run(copied)
    other = {**first, "settings": {**first["settings"], "max_steps": 9}}
    provenance.keep_record(copied, other, resumed=True)
    with pytest.raises(InvalidInputError, match="other settings than it began with: settings.max_steps: 2 -> 9"):
        read_run(copied)


# ------------------------------------------------------------------------------------------------- before it starts
def test_nothing_has_changed_at_once(made: Path) -> None:
    """A run that has just ended depends on nothing that is different now."""
    assert changes(read_run(made / "run"), RECIPE) == []


def test_a_changed_data_file_is_named(made: Path, data_as_they_were: None) -> None:
    """One letter of one row, and only that file is named."""
    text = (made / "train.jsonl").read_text()
    (made / "train.jsonl").write_text(text.replace("Danube", "Donube", 1))
    (change,) = changes(read_run(made / "run"), RECIPE)
    assert change.startswith("data.train: ")


def test_another_number_of_threads_is_named(made: Path) -> None:
    """Sums are taken in another order then, so the last bits differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        found = changes(read_run(made / "run"), RECIPE)
    finally:
        torch.set_num_threads(threads)
    assert found == [f"machine.threads: {threads} -> {threads + 1}"]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("versions", "torch", "2.6.0"), ("settings", "learning_rate", 0.5), ("environment", "MKL_NUM_THREADS", "7")],
)
def test_what_a_record_says_is_compared(copied: Path, part: str, name: str, value: Any) -> None:
    """Versions, settings and the environment are named with what they were and are."""
    rewrite(copied / "run.json", lambda run: run[part].update({name: value}))
    (change,) = changes(read_run(copied), RECIPE)
    assert change.startswith(f"{part}.{name}: {value!r} -> ")


def test_changed_code_is_named(tmp_path: Path) -> None:
    """The hash of the code knows each file's name and content."""
    path = tmp_path / "nq.py"
    path.write_text("a = 1\n")
    first = provenance.code_hash([path])
    path.write_text("a = 2\n")
    second = provenance.code_hash([path])
    assert len({first, second, provenance.code_hash([path.rename(tmp_path / "other.py")])}) == 3


# ------------------------------------------------------------------------------------------------------- the results
def test_a_run_equals_itself(made: Path, copied: Path) -> None:
    """Nothing is found where nothing is different."""
    assert compare(made / "run", copied) == []


@pytest.mark.parametrize("place", [ADAPTER, f"warmup/generator/{Path(ADAPTER).name}"])
def test_one_bit_of_an_adapter_is_found(made: Path, copied: Path, place: str) -> None:
    """The last bit of one weight makes two runs different, and its size is said."""
    flip(copied / place)
    (found,) = compare(made / "run", copied)
    assert found.startswith(f"{place}: 1 of ") and "at most by" in found


def test_signs_of_zero_are_bits(made: Path, copied: Path) -> None:
    """-0.0 equals 0.0, and is another result."""
    for folder, zero in ((made, 0.0), (copied, -0.0)):
        pair = {"weight": torch.full((3,), zero)}
        (folder / "x").mkdir(exist_ok=True)
        save_file(pair, folder / "x" / "a.safetensors")
    assert reproduction._tensor_differences(made / "x", copied / "x", Path("a.safetensors"))


def test_metrics_and_predictions_are_compared_with_intervals(made: Path, copied: Path) -> None:
    """An answer that is another, and better, is counted; the mean difference has its interval."""

    def change(kept: dict[str, Any]) -> None:
        kept["records"][0].update(prediction="Rhine", f1=kept["records"][0]["f1"] + 0.5)

    rewrite(copied / "records/dro.json", change)
    f1, answers = compare(made / "run", copied)
    assert f1.startswith("dro, f1: 1 of 5 questions") and "Interval(mean=0.1, ci95=(0.0" in f1
    assert answers == "dro: 1 answers and 0 choices of 5 questions differ"


def test_the_log_says_where_two_runs_part(made: Path, copied: Path) -> None:
    """The first step of another loss is named; times are not compared."""

    def change(history: list[dict[str, Any]]) -> None:
        for entry in history:
            entry |= {name: 0.0 for name in entry if "time" in name}
            if entry.get("step") == 2:
                entry |= {"selector/loss": 7.0}

    rewrite(copied / "log_history.json", change)
    (found,) = compare(made / "run", copied)
    assert found.startswith("log, from step 2 on: selector/loss ") and found.endswith("-> 7.0")


# --------------------------------------------------------------------------------------------------------- the repeat
def test_a_run_bounded_by_a_clock_is_repeated_bit_for_bit(made: Path, recipe: ModuleType, tmp_path: Path) -> None:
    """With the readings of the first run's clock the second has its learning rates to the bit, and so all else."""
    command = read_run(made / "run")["command"][1:]
    again = [*command, "--output_dir", str(tmp_path / "again")]
    assert recipe.main(*recipe.parse([*again, "--clock_of", str(made / "run")])) == 0
    first = read_clock(made / "run", "DRO")
    assert first[0] < 1.0, "the clock has no part in this run, so there is nothing to repeat"
    assert read_clock(tmp_path / "again", "DRO") == first
    assert compare(made / "run", tmp_path / "again") == []


def test_what_cannot_be_repeated_is_exit_code_2(made: Path, copied: Path, tmp_path: Path) -> None:
    """No record, no result, several processes, data that are gone: one line says which."""
    said = []

    def refused(folder: Path) -> None:
        done = CliRunner().invoke(app, ["reproduce", str(folder), "--output", str(tmp_path / "out")])
        assert done.exit_code == 2, done.output
        said.append(done.stderr)

    refused(tmp_path)
    rewrite(copied / "run.json", lambda run: run["machine"].update(processes=2))
    refused(copied)
    rewrite(copied / "run.json", lambda run: run["machine"].update(processes=1))
    rewrite(copied / "run.json", lambda run: run["command"].extend(["--test_file", str(tmp_path / "none.jsonl")]))
    refused(copied)
    (copied / "summary.json").unlink()
    refused(copied)
    reasons = ("no run.json", "2 processes", "none.jsonl is not there", "no summary.json")
    assert all(reason in line for reason, line in zip(reasons, said, strict=True)), said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_repeats_a_run_and_notices(tiny_model: Any, tokenizer: Any, rows: Any, tmp_path: Path) -> None:
    """In processes of its own: equal is exit code 0; on other data it is 1, and these are named."""
    flags = recipe_flags(tmp_path, tiny_model(), tokenizer, rows)
    # `PYTHONPATH`: the package of this checkout, whatever is installed.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPE.parent.parent)}
    subprocess.run([sys.executable, RECIPE, *flags], env=environment, check=True, cwd=tmp_path)

    def reproduced(**more: str) -> subprocess.CompletedProcess[str]:
        call = "from drorl.cli import main; main()"
        command = [sys.executable, "-c", call, "reproduce", "run", "--output", "again"]
        return subprocess.run(
            command, env=environment | more, capture_output=True, text=True, cwd=tmp_path, check=False
        )

    same = reproduced()
    assert same.returncode == 0, same.stderr
    assert "equal, bit for bit" in same.stdout and "changed since" not in same.stderr
    text = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(text.replace("The Danube", "A Danube"))
    other = reproduced(OMP_NUM_THREADS="2")
    assert other.returncode == 1, other.stderr
    assert "changed since the run: data.train" in other.stderr and "machine.threads: 1 -> 2" in other.stderr
    assert "tensors differ, at most by" in other.stdout and "log, from step 1 on" in other.stdout
