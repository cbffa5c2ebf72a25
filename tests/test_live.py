"""What is seen of a run while it trains: the live view, and the sampled permutations with their weights."""

import io
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console, ConsoleDimensions
from test_trainer import sequence_logp
from transformers import TrainerCallback

from drorl.adapters import GENERATOR, activate
from drorl.callbacks import RichProgressCallback, TrainingProgress
from drorl.terminal import sparkline, training_view
from drorl.trainer import DROTrainer

Rows = list[dict[str, Any]]
Make = Callable[..., DROTrainer]


# ------------------------------------------------------------------------------------------------------------- samples
def places(text: str) -> list[int]:
    return [int(number) - 1 for number in re.findall(r"\[(\d+)\]", text)]


def test_samples_are_what_was_drawn_and_scored(make_trainer: Make, rows: Callable[..., Rows]) -> None:
    """A permutation's numbers are those of the row's candidates, whatever order was shown: after the passages that
    they name a plain pass finds the gold answer as likely. Weights are the likelihoods' shares."""
    train = rows(8, 6)
    trainer = make_trainer(train_rows=train, shuffle_candidates=True, learning_rate=0.0, max_steps=1)
    trainer.train()
    of_query = {row["query"]: row for row in train}
    assert len(trainer.samples) == 2
    activate(trainer.model, GENERATOR)
    for sample in trainer.samples:
        row = of_query[sample.query]
        assert len(sample.texts) == 4
        for text, logp in zip(sample.texts, sample.generator_logps.tolist(), strict=True):
            passages = [row["candidates"][i] for i in places(text)]
            context = trainer.pipeline.generator_prompts.generator(sample.query, passages)
            answer = trainer.pipeline.generator_prompts.answer(row["answers"][0])
            with torch.no_grad():
                assert logp == pytest.approx(float(sequence_logp(trainer.model, context, answer)), abs=1e-3)
        likelihoods = sample.generator_logps.exp()
        assert sample.importance_weights.tolist() == pytest.approx(
            (likelihoods / likelihoods.sum()).tolist(), abs=1e-4
        )
        assert sample.importance_weights.tolist() == sorted(sample.importance_weights.tolist(), reverse=True)


def test_log_completions_prints_and_keeps_the_samples_of_each_step(
    make_trainer: Make, rows: Callable[..., Rows], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL's table has every sample of a step, of all its micro-batches, and none of an evaluation; as many as
    `num_completions_to_print` are printed. The folder may have been set aside between the trainer and its training."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    asked = {"log_completions": True, "num_completions_to_print": 3}
    trainer = make_trainer(eval_rows=rows(2, 6), max_steps=2, **settings, **asked)
    shutil.rmtree(tmp_path / "run")
    trainer.train()
    files = sorted((tmp_path / "run/completions").iterdir())
    assert [path.name for path in files] == ["completions_00001.parquet", "completions_00002.parquet"]
    for step, path in enumerate(files, start=1):
        table = pd.read_parquet(path)
        assert set(table["step"]) == {step} and len(table) == 16
        sums = table.groupby("prompt")["importance_weights"].agg(["sum", "size"])
        assert sums["sum"].tolist() == pytest.approx((sums["size"] / 4).tolist())  # some queries are there twice
        assert (table["advantage"] == table["importance_weights"]).all()  # DRO's, without a baseline
        assert all(len(set(places(text))) == 2 and max(places(text)) < 6 for text in table["completion"])
        logged = [e for e in trainer.state.log_history if e["step"] == step and "loss" in e]
        assert table["generator_logps"].mean() == pytest.approx(logged[0]["generator/logps"], rel=1e-5)
    printed = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"Step (\d)", printed)] == [1, 2]
    assert len(re.findall(r"\[\d\] >", printed)) == 2 * 3


@pytest.mark.parametrize("generated, accumulated, samples", [(1, 4, 32), (2, 1, 8)])
def test_the_table_of_a_step_is_of_that_step(
    make_trainer: Make, tmp_path: Path, generated: int, accumulated: int, samples: int
) -> None:
    """However many micro-batches are drawn at a time; TRL keeps as many samples as that, of whatever step."""
    steps = {"steps_per_generation": generated, "gradient_accumulation_steps": accumulated}
    trainer = make_trainer(max_steps=3, log_completions=True, num_completions_to_print=0, **steps)
    trainer.train()
    tables = [pd.read_parquet(path) for path in sorted((tmp_path / "run/completions").iterdir())]
    assert [len(table) for table in tables] == 3 * [samples]
    for table, entry in zip(tables, trainer.state.log_history, strict=False):
        assert table["generator_logps"].mean() == pytest.approx(entry["generator/logps"], rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- live view
def screen(written: str) -> list[str]:
    """The lines that a terminal shows after all that was written to it."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part != "\r" and not part.startswith("\x1b"):
            lines[row] += part
    return [line.rstrip() for line in lines]


class Frames(TrainerCallback):
    """Keeps what the view shows at each log."""

    def __init__(self, shown: RichProgressCallback):
        self.shown, self.frames = shown, []
        shown.SECONDS = 0.0

    def on_log(self, *_: Any, **__: Any) -> None:
        console = self.shown.progress.console
        lines = console.render_lines(self.shown.progress.get_renderable(), pad=False)
        self.frames.append(["".join(segment.text for segment in line).rstrip() for line in lines])


def watched(make_trainer: Make, width: int, height: int, terminal: bool = True, **settings: Any) -> list[list[str]]:
    trainer = make_trainer(max_steps=3, **settings)
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal)
    frames = Frames(RichProgressCallback("Training", console, trainer))
    trainer.add_callback(frames.shown)
    trainer.add_callback(frames)
    trainer.train()
    return frames.frames


def test_the_view_shows_curves_and_the_samples_of_a_query(make_trainer: Make, rows: Callable[..., Rows]) -> None:
    """Below the bar: each curve with its last value, a query, and all its permutations with weights that sum to 1."""
    last = watched(make_trainer, 100, 30)[2]
    text = "\n".join(last)
    for label in ("iw_elbo", "effective sample size", "selector loss", "generator loss", "selector entropy"):
        assert re.search(rf"^{label} +-?\d+\.\d\d +[▁▂▃▄▅▆▇█]{{3}}$", text, re.MULTILINE), label
    assert any(row["query"] in last for row in rows(8, 6))
    weights = re.findall(r"^ *\[\d\] > \[\d\] .*(\d\.\d{3})", text, re.MULTILINE)
    assert len(weights) == 4 and sum(map(float, weights)) == pytest.approx(1, abs=0.003)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 16), (200, 50), (40, 100), (80, 10), (59, 24)])
def test_the_view_fits_every_terminal(make_trainer: Make, width: int, height: int) -> None:
    """With more samples than lines too: no line is cut, none is missing below the screen; where there is no place for
    curves, the bar alone."""
    settings = {"num_generations": 16, "per_device_train_batch_size": 16}
    for frame in watched(make_trainer, width, height, **settings):
        assert len(frame) <= height and max(map(len, frame)) <= width
    assert any(line.startswith("iw_elbo") for line in frame) == (width >= 60 and height >= 16)


def test_a_file_gets_one_line_and_no_view(make_trainer: Make) -> None:
    """Where there is no terminal nothing is drawn while training, and the bar at its end."""
    frames = watched(make_trainer, 200, 50, terminal=False)
    assert [len(frame) for frame in frames] == [1] * 4  # three steps, and the last entry of the log


def test_the_view_follows_the_size_of_the_terminal() -> None:
    """A terminal that is resized between two refreshes gets the layout of its new size."""
    history = [{"iw_elbo": -float(i)} for i in range(300)]
    for width in (60, 120, 80):
        console = Console(file=io.StringIO(), width=width, height=24, force_terminal=True)
        lines = console.render_lines(training_view(history, None, width, 24), pad=False)
        drawn = max("".join(segment.text for segment in line) for line in lines)
        assert len(re.findall("[▁-█]", drawn)) == width - 40


def test_the_view_may_go_while_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that draws has seen that there is one, and training ends before it is laid out."""
    progress = TrainingProgress(console=Console(force_terminal=True, width=80, height=24, file=io.StringIO()))
    progress.view, size = lambda width, height: "a view", ConsoleDimensions(80, 24)
    monkeypatch.setattr(Console, "size", property(lambda _: setattr(progress, "view", None) or size))
    assert len(list(progress.get_renderables())) == 2


def test_log_lines_stand_above_the_view(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that was made before, as logging.basicConfig's is, writes whole lines, and the bar is there once; the
    handler has its own stream again afterwards."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    handler, logger = logging.StreamHandler(stderr), logging.getLogger("drorl.test")
    logger.addHandler(handler)
    console = Console(stderr=True, width=100, height=30, force_terminal=True)

    class Say(TrainerCallback):
        def on_log(self, *_: Any, **__: Any) -> None:
            shown.progress.refresh()
            logger.warning("something to say")
            shown.progress.refresh()

    trainer = make_trainer(max_steps=2)
    shown = RichProgressCallback("Training", console, trainer)
    shown.SECONDS = 0.0
    trainer.add_callback(shown)
    trainer.add_callback(Say())
    trainer.train()
    logger.removeHandler(handler)
    lines = [line for line in screen(stderr.getvalue()) if line]
    assert lines[:-1] == ["something to say"] * 3  # two steps and the last entry of the log
    assert lines[-1].startswith("Training") and "2/2" in lines[-1]
    assert handler.stream is stderr and sys.stderr is stderr


def test_the_view_is_left_when_training_fails(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error ends training without `on_train_end`: what is registered for the process's end shows the cursor."""
    registered: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", registered.append)
    output = io.StringIO()
    shown = RichProgressCallback("Training", Console(file=output, force_terminal=True, width=100))

    class Fail(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        make_trainer(callbacks=[shown, Fail()]).train()
    hidden, visible = "\x1b[?25l", "\x1b[?25h"
    assert output.getvalue().rfind(hidden) > output.getvalue().rfind(visible)
    for leave in registered:
        leave()
    assert output.getvalue().rfind(visible) > output.getvalue().rfind(hidden)


def test_sparklines() -> None:
    """The lowest value is the lowest block, the highest the highest; two lines have twice the levels."""
    assert sparkline([1.0, 2.0, 3.0], 3).plain == "▁▅█"
    assert sparkline([5.0, 1.0, 2.0, 3.0], 2).plain == "▁█"
    assert sparkline([0.0, 15.0, 7.0, math.nan], 4, height=2).plain == " █  \n▁██ "
    assert sparkline([4.0, 4.0], 9).plain == "▁▁"
    assert sparkline([math.inf], 9).plain == " "


def test_texts_of_data_do_not_control_the_terminal() -> None:
    """A query with an escape sequence is shown with it written out, on one line."""
    tensor = torch.zeros(1)
    weighed = SimpleNamespace(
        query="a\x1b[2J\nb" + "c" * 200,
        texts=["[1]"],
        selector_logps=tensor,
        generator_logps=tensor,
        importance_weights=tensor + 1,
        effective_sample_size=1.0,
        iw_elbo=0.0,
    )
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, record=True)
    console.print(training_view([{"iw_elbo": 1.0}], weighed, 80, 24))
    [line] = [line for line in console.export_text().splitlines() if "ccc" in line]
    assert line.startswith(r"a\x1b[2J b") and len(line) <= 80
