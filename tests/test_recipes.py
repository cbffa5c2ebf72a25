"""The recipe: every shipped configuration parses, mistakes fail, and the whole of it runs on a tiny model."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import deepspeed, launched
from runs import recipe_flags
from trl import TrlParser
from typer.testing import CliRunner

from drorl import DROConfig, RAGPipeline
from drorl.cli import app

RECIPES = Path(__file__).parent.parent / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def recipe():
    """recipes/nq.py as a module."""
    spec = importlib.util.spec_from_file_location("nq", RECIPES / "nq.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nq"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def parse(recipe, *arguments):
    """What the recipe makes of a command line."""
    return TrlParser((recipe.ScriptArguments, DROConfig)).parse_args_and_config([str(a) for a in arguments])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_parses(recipe, path):
    """Each YAML file gives valid settings in which every one of its keys has arrived."""
    # bf16 is refused where no device has it: on a CPU the GPU configuration is parsed without it.
    script, config = parse(recipe, "--config", path, "--bf16", "false")
    for key, value in yaml.safe_load(path.read_text()).items():
        if key not in ("bf16", "report_to"):  # transformers turns report_to: none into an empty list
            holder = script if key in vars(script) else config
            assert getattr(holder, key) == value or str(getattr(holder, key)) == str(value), key


def test_the_command_line_beats_the_file(recipe):
    """A flag overrides the YAML file, which overrides the default."""
    script, config = parse(
        recipe, "--config", RECIPES / "configs" / "nq_demo.yaml", "--max_steps", "3", "--max_minutes", "1.5"
    )
    assert (config.max_steps, script.max_minutes) == (3, 1.5)
    assert config.identifiers == "query" != DROConfig.identifiers


def test_an_unknown_key_fails(recipe, tmp_path, capsys):
    """A misspelt setting stops the run instead of being ignored, in the file as on the command line."""
    path = tmp_path / "typo.yaml"
    path.write_text("model_name_or_path: x\nnum_candidate: 3\n")
    with pytest.raises((ValueError, SystemExit)):
        parse(recipe, "--config", path)
    with pytest.raises((ValueError, SystemExit)):
        parse(recipe, "--model_name_or_path", "x", "--num_candidate", "3")


def test_a_missing_model_is_named(recipe):
    """Without a model the message says which setting is missing and what it may be."""
    with pytest.raises(ValueError, match="model_name_or_path.*smollm2-135m"):
        recipe.ScriptArguments()


def test_help_is_quick():
    """`--help` loads no model and answers in under three seconds; the best of three, since machines are shared."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, RECIPES / "nq.py", "--help"], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert all(f"--{name}" in done.stdout for name in ("retrieval_prior_weight", "max_minutes", "help_all"))
    assert min(seconds) < 3


@pytest.fixture
def flags(tiny_model, tokenizer, rows, tmp_path):
    """A command line that runs the demo's configuration on a tiny model and made-up files, in seconds."""
    return recipe_flags(tmp_path, tiny_model(), tokenizer, rows)


def test_the_demo_that_names_titles_runs(recipe, flags, tmp_path):
    """What `make demo-vllm` adds to the configuration is valid, and warms up the selector too."""
    makefile = (RECIPES.parent / "Makefile").read_text()
    (named,) = re.findall(r"^NAMED := (.*)$", makefile, flags=re.MULTILINE)
    script, config = parse(recipe, *flags, *named.split())
    assert (config.identifiers, config.selector_temperature, script.warmup_selector) == ("title", 3.0, True)
    assert recipe.main(script, config) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["warmup"]["iw_elbo"] != summary["dro"]["iw_elbo"]


def test_the_recipe_runs_and_resumes(recipe, flags, rows, tmp_path, capsys):
    """Warm-up, DRO, evaluation and report run from files on a tiny model; the run can be resumed and loaded."""
    assert recipe.main(*parse(recipe, *flags)) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["n_eval"] == 5
    assert set(summary["systems"]) == {"warmup", "retriever_sft", "retriever_zero_shot", "dro"}
    for metric in ("exact_match", "f1", "recall@1", "iw_elbo"):
        difference = summary["dro"][metric] - summary["warmup"][metric]
        assert summary["delta"][metric]["mean"] == pytest.approx(difference, abs=1e-9)
        low, high = summary["delta"][metric]["ci95"]
        assert low <= summary["delta"][metric]["mean"] <= high
    assert summary["warmup"]["iw_elbo"] != summary["dro"]["iw_elbo"]
    assert "DRO" in (tmp_path / "run/report.html").read_text()
    assert "recall@1" in capsys.readouterr().out

    answer = RAGPipeline.from_pretrained(tmp_path / "run", dtype="float32").answer(
        "Which river?", rows(1)[0]["candidates"]
    )
    assert len(answer.citations) == 1

    assert recipe.main(*parse(recipe, *flags, "--max_steps", 3, "--resume_from_checkpoint", "last")) == 0
    history = json.loads((tmp_path / "run/log_history.json").read_text())
    steps = [entry for entry in history if "selector/loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    rates = [entry["learning_rate"] for entry in steps]
    assert rates == sorted(rates, reverse=True) and rates[2] < 0.5 * rates[0] <= 0.5e-3  # annealed, and so logged


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero2", marks=deepspeed)])
def test_the_recipe_is_launched_in_two_processes(engine, flags, tmp_path):
    """`accelerate launch` with a shipped configuration: warm-up, DRO, evaluations; one process loads the run."""
    demo = yaml.safe_load((RECIPES / "configs" / "nq_demo.yaml").read_text())
    half = ["--per_device_train_batch_size", demo["per_device_train_batch_size"] // 2, "--warmup_queries", 4]
    command = [*launched(engine, 2), RECIPES / "nq.py", *flags, *half, "--use_cpu", "true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["n_eval"] == 5
    assert summary["systems"].keys() == {"warmup", "retriever_sft", "retriever_zero_shot", "dro"}
    row = json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])
    answer = RAGPipeline.from_pretrained(tmp_path / "run").answer(row["query"], row["candidates"])
    records = json.loads((tmp_path / "run" / "records" / "dro.json").read_text())["records"]
    assert [row["candidates"].index(c.passage) for c in answer.citations] == records[0]["chosen"]


def test_drorl_train_is_this_recipe(flags, tmp_path, monkeypatch):
    """The same options, help, output and exit codes; the recipe is found from wherever the command is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["drorl"])  # the command puts the recipe's in its place
    help_text = CliRunner().invoke(app, ["train", "--help"])
    assert help_text.exit_code == 0 and "--retrieval_prior_weight" in help_text.stdout
    assert CliRunner().invoke(app, ["train", *map(str, flags), "--num_selected", "9"]).exit_code == 2
    done = CliRunner().invoke(app, ["train", *map(str, flags), "--max_steps", "1"])
    assert done.exit_code == 0, done.exception
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["n_eval"] == 5
    assert summary["command"].startswith(f"{RECIPES / 'nq.py'} --config")


def test_a_second_run_sets_the_first_aside(recipe, flags, tmp_path):
    """Running again in the same directory loses nothing: the earlier run is renamed, its figures unchanged."""
    assert recipe.main(*parse(recipe, *flags)) == 0
    first = (tmp_path / "run/summary.json").read_text()
    assert recipe.main(*parse(recipe, *flags, "--max_steps", 1)) == 0
    (aside,) = tmp_path.glob("run.*")
    assert (aside / "summary.json").read_text() == first
    assert len(json.loads((tmp_path / "run/log_history.json").read_text())) < len(
        json.loads((aside / "log_history.json").read_text())
    )


@pytest.mark.parametrize(
    "phase, resumable, number, code",
    [
        ("warm-up", False, signal.SIGINT, 130),
        ("DRO", True, signal.SIGINT, 130),
        pytest.param("DRO", True, signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("DRO", True, signal.SIGUSR1, 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_exits(recipe, flags, tmp_path, monkeypatch, phase, resumable, number, code):
    """A signal ends the step that runs, with its exit code; what DRO has done so far can be resumed."""
    from drorl.callbacks import RichProgressCallback

    def send(self, *_, **__):
        if self.title == phase:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(RichProgressCallback, "on_step_begin", send)
        assert recipe.main(*parse(recipe, *flags)) == code
    assert (tmp_path / "run/checkpoint-1").is_dir() == resumable
    assert not (tmp_path / "run/summary.json").exists()
    if resumable:
        assert recipe.main(*parse(recipe, *flags, "--resume_from_checkpoint", "last")) == 0
        history = json.loads((tmp_path / "run/log_history.json").read_text())
        assert [entry["step"] for entry in history if "selector/loss" in entry] == [1, 2]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_a_signal_outside_of_training_exits_at_once(recipe, flags, monkeypatch, number, code):
    """Where there is nothing to save, the exit code is the same, and the handlers are those of before."""
    from drorl.experiment import Experiment

    before = signal.getsignal(number)
    monkeypatch.setattr(sys, "argv", ["nq.py", *map(str, flags)])
    monkeypatch.setattr(Experiment, "evaluate", lambda *_, **__: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as exit:
        recipe.run()
    assert exit.value.code == code
    assert signal.getsignal(number) is before


def test_an_output_directory_that_cannot_be_written_is_one_line(recipe, flags, monkeypatch, caplog):
    """Nothing is loaded or trained when its result could not be kept; /proc takes no files, whoever asks."""
    monkeypatch.setattr(sys, "argv", ["nq.py", *map(str, flags), "--output_dir", "/proc/run"])
    assert recipe.run() == 2
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert re.fullmatch(r"nothing can be written to output_dir /proc/run: .+", line)


@pytest.mark.parametrize(
    "mistake, message",
    [
        (["--num_selected", "9"], "K=9.*is larger than num_candidates"),
        (["--resume_from_checkpoint", "last"], "there is no checkpoint 'last'"),
        (["--identifiers", "colour"], "identifiers"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(recipe, flags, monkeypatch, caplog, mistake, message):
    """A user's mistake is answered by one line that names it, not by a traceback."""
    monkeypatch.setattr(sys, "argv", ["nq.py", *map(str, flags), *mistake])
    try:
        code = recipe.run()
    except SystemExit as error:  # argparse's own answer to a value that is no choice
        code = error.code
    assert code == 2
    if caplog.text:
        assert re.search(message, caplog.text)


def test_an_unhealthy_run_is_saved_and_exits_with_2(recipe, flags, tmp_path, monkeypatch, caplog):
    """With `on_unhealthy: stop` weights that are all on one sample end the run: one line, and a checkpoint."""
    given = ["--max_steps", "22", "--weight_temperature", "0.01", "--save_steps", "50", "--on_unhealthy", "stop"]
    monkeypatch.setattr(sys, "argv", ["nq.py", *map(str, flags), *given])
    assert recipe.run() == 2
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert re.search(r"stopped at step 20; the run is saved in .*checkpoint-20\. effective_sample_size", line)
    assert (tmp_path / "run/checkpoint-20/selector").is_dir()


def test_a_bad_row_is_named_before_anything_runs(recipe, flags, monkeypatch, caplog, tmp_path):
    """A row without answers stops the recipe at the start, with its number and field."""
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {"answers": [""]})
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "argv", ["nq.py", *map(str, flags)])
    assert recipe.run() == 2
    assert "row 4, field 'answers'" in caplog.text
    assert not (tmp_path / "run/records").exists()
