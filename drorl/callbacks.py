"""Callbacks: EM iterations with early stopping, a budget in minutes, Ctrl-C, a progress bar."""

import signal
import threading
import time
from types import FrameType
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from .clock import BudgetReadings

logger = logging.get_logger(__name__)


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
    """Turns the first Ctrl-C into "finish this step, save, stop"; a second one stops at once."""

    EXIT_CODE = 130  # 128 + SIGINT, as a shell reports it

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            signal.signal(signal.SIGINT, self._previous)  # training ends here, without `on_train_end`
            raise KeyboardInterrupt
        self.interrupted = True
        logger.warning("Interrupted: finishing this step, then saving. Press Ctrl-C again to stop at once.")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._previous = signal.signal(signal.SIGINT, self._handle)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.interrupted = any(gather_object([self.interrupted]))  # one stops, all stop
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)


class RichProgressCallback(TrainerCallback):
    """One line while training: steps, time left, losses, effective sample size.

    Args:
        title (`str`): what is being trained.
        console (`rich.console.Console`, *optional*): where to.
    """

    SHOWN = {
        "selector/loss": "selector",
        "generator/loss": "generator",
        "effective_sample_size": "ESS",
        "iw_elbo": "iw_elbo",
    }

    def __init__(self, title: str, console: Console | None = None):
        self.title = title
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console or Console(stderr=True),
            speed_estimate_period=600,  # steps take many seconds; the default of 30 would forget all but the last
        )
        self._task = self.progress.add_task(title, start=False, metrics="")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.disable = not state.is_world_process_zero
        self.progress.reset(self._task, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict, **_: Any) -> None:
        if shown := [f"{label} {logs[name]:.2f}" for name, label in self.SHOWN.items() if name in logs]:
            self.progress.update(self._task, metrics="  ".join(shown))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.stop()
