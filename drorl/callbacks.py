"""Callbacks: EM iterations with early stopping, a budget in minutes, Ctrl-C and preemption, a live view."""

import atexit
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import SegmentLines
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils.logging import get_logger

from .clock import BudgetReadings
from .terminal import training_view

if TYPE_CHECKING:
    from .trainer import DROTrainer

logger = get_logger(__name__)


class EMIterationCallback(TrainerCallback):
    """Counts EM iterations and stops when validation no longer improves (Alg. 1 of the paper).

    An EM iteration is one pass of E- and M-steps between two evaluations: with `eval_strategy="epoch"`, one pass over
    the training queries, as in the paper. What each reached is read from the trainer's log, which a checkpoint keeps.

    Args:
        metric (`str`): evaluation metric to maximise, e.g. `eval_f1`.
        patience (`int`): iterations without improvement before training stops.
    """

    def __init__(self, metric: str = "eval_f1", patience: int = 1):
        self.metric = metric
        self.patience = patience

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict, **_: Any) -> None:
        if self.metric not in metrics:
            raise KeyError(f"{self.metric} is not among the evaluation metrics {', '.join(metrics)}")
        values = [entry[self.metric] for entry in state.log_history if self.metric in entry]
        since_best = len(values) - 1 - values.index(max(values))
        logger.info(f"EM iteration {len(values)}: {self.metric} {values[-1]:.4f} (best {max(values):.4f})")
        if since_best >= self.patience:
            logger.info(f"{self.metric} has not improved for {since_best} EM iterations: stopping")
            control.should_training_stop = True


class TimeBudgetCallback(TrainerCallback):
    """Anneals the learning rates to zero over a budget of wall-clock time, and stops when it is spent.

    How many steps fit depends on the machine; a decay over steps would end too early or never. The factor is the
    smaller of the share of the steps and the share of the time that is left, so with time to spare it is the linear
    schedule. Use it with `lr_scheduler_type="constant"`.

    Args:
        seconds (`float`): from the first step on.
        readings ([`~clock.BudgetReadings`], *optional*): keeps what is left at each step, or knows it.
    """

    def __init__(self, seconds: float, readings: BudgetReadings | None = None):
        self.seconds = seconds
        self.readings = readings
        self._start = 0.0
        self._rate = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._start = time.monotonic()

    def _left(self, state: TrainerState) -> float:
        time_left = 1 - (time.monotonic() - self._start) / self.seconds
        left = max(0.0, min(time_left, 1 - state.global_step / state.max_steps))
        return broadcast_object_list([left])[0]  # by one clock, or the processes would drift apart

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any, **_: Any) -> None:
        left = self._left(state)
        if self.readings is not None:
            left = self.readings.at_beginning(state.global_step, left)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * left
        self._rate = optimizer.param_groups[0]["lr"]

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if "learning_rate" in state.log_history[-1]:  # the Trainer has logged the constant schedule's
            state.log_history[-1]["learning_rate"] = self._rate

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        left = self._left(state)
        if left == 0.0 if self.readings is None else self.readings.is_spent(state.global_step, left):
            control.should_save = True
            control.should_training_stop = True


class InterruptCallback(TrainerCallback):
    """Turns a signal into "finish this step, save, stop"; a second Ctrl-C stops at once.

    Schedulers warn before they kill, some more than once: SIGTERM (Kubernetes, `scancel`), and SIGUSR1 where a job has
    asked for it (Slurm's `--signal=USR1@120`), which is to end as a success, so that it may be queued again.
    """

    EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 0}
    """128 + the signal's number, as a shell reports it; 0 for the one that was asked for."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def interrupted(self) -> bool:
        """Whether training has stopped, or is about to, because of a signal."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """What the program is to exit with; 0 without a signal."""
        return 0 if self.received is None else self.EXIT_CODES[signal.Signals(self.received)]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            self._give_back()  # training ends here, without `on_train_end`
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            at_once = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
            logger.warning(f"{signal.Signals(number).name}: finishing this step, then saving.{at_once}")

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._previous = {number: signal.signal(number, self._handle) for number in self.EXIT_CODES}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.received = next(filter(None, gather_object([self.received])), None)  # one stops, all stop
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False  # time may be short; the resumed run makes up for it

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.interrupted:  # the epoch is not over, or is evaluated by the resumed run; all is saved
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._give_back()


@contextmanager
def leaving_on_signals() -> Generator[None]:
    """Outside of training there is nothing to save: a scheduler's signal ends the program, with its exit code."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(InterruptCallback.EXIT_CODES[signal.Signals(number)])

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class TrainingProgress(Progress):
    """A line with a bar; below it, in a terminal, what `view` returns for its width and height."""

    view: Callable[[int, int], RenderableType] | None = None
    _laid_out: tuple[Any, SegmentLines] | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Returns what is shown. The view is laid out once, and again when the terminal has been resized."""
        yield from super().get_renderables()
        view = self.view  # another thread draws than sets it
        if view is not None and self.console.is_terminal:
            asked = view, self.console.size
            if self._laid_out is None or self._laid_out[0] != asked:
                lines = self.console.render_lines(view(*self.console.size), pad=False)
                self._laid_out = asked, SegmentLines(lines, new_lines=True)
            yield self._laid_out[1]


def _handlers_to(stream: TextIO) -> list[logging.StreamHandler]:
    """Returns the handlers of all loggers that write to a stream."""
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler) and handler.stream is stream]


class RichProgressCallback(TrainerCallback):
    """While training: steps, time left, losses; below, in a terminal, curves of the last steps and a query's samples.

    What is logged or printed meanwhile appears above. In a file there is one line at the end.

    Args:
        title (`str`): what is being trained.
        console (`rich.console.Console`, *optional*): where to.
        trainer ([`DROTrainer`], *optional*): whose samples are shown.
    """

    SHOWN = {
        "selector/loss": "selector",
        "generator/loss": "generator",
        "effective_sample_size": "ESS",
        "iw_elbo": "iw_elbo",
    }
    SECONDS = 2.0
    """Between two views, at least: one takes some milliseconds, for which a short step would have to wait."""

    def __init__(self, title: str, console: Console | None = None, trainer: "DROTrainer | None" = None):
        self.title = title
        self.trainer = trainer
        self.progress = TrainingProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console or Console(stderr=True),
            refresh_per_second=1,
            redirect_stdout=sys.stdout.isatty(),  # what goes to a file is to arrive there
            speed_estimate_period=600,  # steps take many seconds; the default of 30 would forget all but the last
        )
        self._task = self.progress.add_task(title, start=False, metrics="")
        self._viewed = -math.inf
        self._redirected: list[tuple[logging.StreamHandler, TextIO]] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.disable = not state.is_world_process_zero
        self.progress.reset(self._task, total=state.max_steps, completed=state.global_step)
        stderr = sys.stderr
        self.progress.start()
        if sys.stderr is not stderr:  # rich took it; handlers hold on to the old one, and would write into the view
            self._redirected = [(handler, stderr) for handler in _handlers_to(stderr)]
            for handler, _stream in self._redirected:
                handler.setStream(sys.stderr)
        atexit.register(self._leave)  # an error ends training without `on_train_end`, and the cursor is hidden

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict, **_: Any) -> None:
        if shown := [f"{label} {logs[name]:.2f}" for name, label in self.SHOWN.items() if name in logs]:
            self.progress.update(self._task, metrics="  ".join(shown))
            if self.progress.console.is_terminal and time.monotonic() - self._viewed >= self.SECONDS:
                self._viewed = time.monotonic()
                samples = self.trainer.samples if self.trainer is not None else []
                history = state.log_history[-self.progress.console.width :]
                self.progress.view = partial(training_view, history, samples[0] if samples else None)

    def _leave(self) -> None:
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._redirected = []
        self.progress.view = None  # the bar stays
        self.progress.stop()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        atexit.unregister(self._leave)
        self._leave()
