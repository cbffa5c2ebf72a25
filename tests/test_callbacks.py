"""When training stops, and that it stops in order."""

import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import assert_identical, both_adapters, measured
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import get_last_checkpoint

import drorl.callbacks
from drorl.callbacks import EMIterationCallback, InterruptCallback, RichProgressCallback, TimeBudgetCallback
from drorl.clock import BudgetReadings, read_clock
from drorl.trainer import DROTrainer

Rows = list[dict[str, Any]]
Make = Callable[..., DROTrainer]


# ------------------------------------------------------------------------------------------------------- EM iterations
@pytest.mark.parametrize(
    ("patience", "values", "stops_at"),
    [
        (1, [0.1, 0.3, 0.2], 3),
        (1, [0.1, 0.2, 0.3], None),
        (2, [0.3, 0.2, 0.25, 0.4], 3),
        (2, [0.3, 0.2, 0.4, 0.3], None),
        (1, [0.3, 0.3], 2),  # as good as the best is no improvement
    ],
)
def test_training_stops_when_validation_no_longer_improves(
    patience: int, values: list[float], stops_at: int | None
) -> None:
    """It stops at the first evaluation that is the `patience`-th in a row without a new best, and not before."""
    callback, control, state = EMIterationCallback("eval_f1", patience), TrainerControl(), TrainerState()
    stopped = []
    for value in values:
        state.log_history += [{"loss": 1.0}, {"eval_f1": value}]
        callback.on_evaluate(None, state, control, {"eval_f1": value})
        stopped.append(control.should_training_stop)
    assert (stopped.index(True) + 1 if True in stopped else None) == stops_at


def test_a_metric_that_is_not_evaluated_is_an_error() -> None:
    """A misspelt metric fails at the first evaluation, with the names that exist."""
    callback = EMIterationCallback("eval_accuracy")
    with pytest.raises(KeyError, match="eval_accuracy is not among .*eval_f1"):
        callback.on_evaluate(None, TrainerState(), TrainerControl(), {"eval_f1": 0.1})


def test_em_iterations_stop_a_real_run_and_survive_a_checkpoint(
    make_trainer: Make, rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of four epochs a run does two when validation falls; resumed, it still knows what it had reached before."""
    scores = iter([0.5, 0.4])
    monkeypatch.setattr(drorl.two_roles, "aggregate", lambda records: {"f1": next(scores)})
    settings: dict[str, Any] = {
        "train_rows": rows(4, 6),
        "eval_rows": rows(2, 6),
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "max_steps": 8,
    }
    trainer = make_trainer(callbacks=[EMIterationCallback("eval_f1")], **settings)
    trainer.train()
    assert trainer.state.global_step == 4

    scores = iter([0.45, 0.46])
    trainer = make_trainer(callbacks=[EMIterationCallback("eval_f1", patience=2)], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [entry["eval_f1"] for entry in trainer.state.log_history if "eval_f1" in entry] == [0.5, 0.45, 0.46]
    assert trainer.state.global_step == 6


# --------------------------------------------------------------------------------------------------------- time budget
class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the callbacks read."""
    clock = Clock()
    monkeypatch.setattr(drorl.callbacks, "time", clock)
    return clock


def test_a_time_budget_anneals_to_zero_and_stops(make_trainer: Make, clock: Clock) -> None:
    """Both learning rates fall with the time that is left, and the run ends with it, long before its last step."""
    rates: list[list[float]] = []

    class Step(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])
            clock.seconds += 25.0

    settings = {"learning_rate": 1e-2, "generator_learning_rate": 4e-2, "max_steps": 1000}
    trainer = make_trainer(callbacks=[TimeBudgetCallback(seconds=100.0), Step()], **settings)
    trainer.train()
    assert trainer.state.global_step == 4
    shares = [1.0, 0.75, 0.5, 0.25]
    assert rates == [[pytest.approx(1e-2 * share), pytest.approx(4e-2 * share)] for share in shares]


def test_a_budget_is_spent_again_without_a_clock(make_trainer: Make, clock: Clock, tmp_path: Path) -> None:
    """Given the readings, a run has the same rates and the same last step, however fast its machine is now."""
    rates: list[float] = []

    class Step(TrainerCallback):
        def __init__(self, seconds: float):
            self.seconds = seconds

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])
            clock.seconds += self.seconds

    for place, seconds, of in (("run", 30.0, None), ("again", 0.0, tmp_path / "run")):
        readings = BudgetReadings(tmp_path / place, "DRO", of)
        make_trainer(callbacks=[TimeBudgetCallback(100.0, readings), Step(seconds)], max_steps=1000).train()
    assert len(rates) == 8
    assert rates[:4] == rates[4:] == pytest.approx([1e-2 * left for left in (1.0, 0.7, 0.4, 0.1)])
    assert (tmp_path / "again/clock.jsonl").read_text() == (tmp_path / "run/clock.jsonl").read_text()


def test_steps_made_again_count_once(tmp_path: Path) -> None:
    """Of a run that was killed after its fourth step and went on from its second, the later readings hold."""
    for phase, step, left in (("DRO", 0, 1.0), ("DRO", 1, 0.9), ("DRO", 2, 0.8), ("DRO", 3, 0.7), ("DRO", 2, 0.6)):
        BudgetReadings(tmp_path, phase).at_beginning(step, left)
    BudgetReadings(tmp_path, "warm-up").at_beginning(3, 0.5)
    assert read_clock(tmp_path, "DRO") == {0: 1.0, 1: 0.9, 2: 0.6}


def test_with_time_to_spare_the_steps_decide(make_trainer: Make, clock: Clock) -> None:
    """A run that is faster than its budget has the linear schedule over its steps."""
    rates: list[float] = []

    class Step(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])
            clock.seconds += 1.0

    make_trainer(callbacks=[TimeBudgetCallback(seconds=1000.0), Step()], learning_rate=1e-2, max_steps=4).train()
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


# ------------------------------------------------------------------------------------------------------------- signals
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def handlers() -> list[Any]:
    """Who handles the signals now."""
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """Whatever a test leaves behind, the next one finds the handlers of before."""
    previous = handlers()
    yield
    for number, handler in zip(SIGNALS, previous, strict=True):
        signal.signal(number, handler)


class Send(TrainerCallback):
    """Sends signals to this process at the beginning of one step."""

    def __init__(self, step: int, *signals: int):
        self.step, self.signals = step, signals

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            for number in self.signals:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("signals", "exit_code"),
    [
        ((signal.SIGINT,), 130),
        ((signal.SIGTERM,), 143),
        ((signal.SIGUSR1,), 0),
        ((signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM), 0),  # the first one is answered, and none stops at once
        ((signal.SIGTERM, signal.SIGINT), 143),
    ],
)
def test_a_signal_saves_and_stops(
    signals: tuple[int, ...], exit_code: int, make_trainer: Make, tmp_path: Path
) -> None:
    """It finishes the step, saves a checkpoint that can be resumed, stops, and gives the signals back."""
    before, callback = handlers(), InterruptCallback()
    trainer = make_trainer(callbacks=[callback, Send(2, *signals)], max_steps=50)
    trainer.train()
    assert callback.interrupted
    assert callback.exit_code == exit_code
    assert trainer.state.global_step == 3
    assert handlers() == before
    assert get_last_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / "checkpoint-3")
    resumed = make_trainer(max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_a_signal_neither_adds_nor_loses_an_evaluation(
    strategy: str, step: int, make_trainer: Make, rows: Callable[..., Rows]
) -> None:
    """In an epoch's first step or in its last, after which it is evaluated: the resumed run's log is the same."""
    settings: dict[str, Any] = {
        "train_rows": rows(4, 6),
        "eval_rows": rows(2, 6),
        "eval_strategy": strategy,
        "eval_steps": 2,
        "save_strategy": strategy,
        "save_steps": 2,
        "max_steps": 4,
    }
    straight = make_trainer(output_dir="straight", **settings)
    straight.train()
    assert [entry["step"] for entry in straight.state.log_history if "eval_f1" in entry] == [2, 4]
    stopped = make_trainer(callbacks=[InterruptCallback(), Send(step, signal.SIGTERM)], **settings)
    stopped.train()
    assert [entry for entry in stopped.state.log_history if "eval_f1" in entry] == []
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint="last")
    assert measured(resumed.state.log_history) == measured(straight.state.log_history)
    assert_identical(both_adapters(resumed), both_adapters(straight))


def test_a_second_ctrl_c_stops_at_once(make_trainer: Make, tmp_path: Path) -> None:
    """Two of them in one step end the run there, without a checkpoint, and give the signals back all the same."""
    before = handlers()
    trainer = make_trainer(callbacks=[InterruptCallback(), Send(2, signal.SIGINT, signal.SIGINT)], max_steps=50)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    assert get_last_checkpoint(str(tmp_path / "run")) is None
    assert handlers() == before


def test_an_uninterrupted_run_gives_the_signals_back(make_trainer: Make, tmp_path: Path) -> None:
    """Without a signal the callback changes nothing: all steps, no checkpoint, the handlers of before."""
    before, callback = handlers(), InterruptCallback()
    trainer = make_trainer(callbacks=[callback], max_steps=2)
    trainer.train()
    assert not callback.interrupted
    assert callback.exit_code == 0
    assert trainer.state.global_step == 2
    assert handlers() == before
    assert get_last_checkpoint(str(tmp_path / "run")) is None


# ------------------------------------------------------------------------------------------------------------ progress
def test_the_progress_line_shows_steps_and_metrics(make_trainer: Make) -> None:
    """The line ends at all steps done, with the metrics that were logged last, under their short names."""
    output = io.StringIO()
    console = Console(file=output, width=200, force_terminal=True)
    trainer = make_trainer(callbacks=[RichProgressCallback("Training", console)], max_steps=2)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert "2/2" in output.getvalue()
    assert f"ESS {last['effective_sample_size']:.2f}" in output.getvalue()
    assert f"iw_elbo {last['iw_elbo']:.2f}" in output.getvalue()
