"""What logging, callbacks, the live view and checkpoints cost of a training step, with the demo's settings.

    PYTHONPATH=recipes python benchmarks/overhead.py --steps 20        # the last line is JSON

Shares are of the time that a step takes without them. A checkpoint, with the hashes of its manifest, is counted once
in `save_steps` steps of the demo's, however many of them are made.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nq
from rich.console import Console
from rich.live import Live
from transformers import PrinterCallback
from transformers.trainer_callback import CallbackHandler
from trl import TrlParser

from drorl import DROConfig, DROTrainer
from drorl.callbacks import InterruptCallback, RichProgressCallback, TimeBudgetCallback

CONFIG = Path(__file__).parent.parent / "recipes" / "configs" / "nq_demo.yaml"


class Meter:
    """Seconds in functions, by label; one that is called by another of them counts to its caller."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inside = False

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Measures a method of a class from now on."""
        original: Callable[..., Any] = getattr(owner, name)

        def measured(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return original(*arguments, **named)
            self._inside, start = True, time.perf_counter()
            try:
                return original(*arguments, **named)
            finally:
                self._inside = False
                self.seconds[label] += time.perf_counter() - start
                self.calls[label] += 1

        setattr(owner, name, measured)


def measure(steps: int) -> dict[str, Any]:
    """Trains so many steps of the demo, and returns what the last line says."""
    with tempfile.TemporaryDirectory() as run_dir:
        flags = ["--config", str(CONFIG), "--output_dir", run_dir, "--max_steps", str(steps)]
        script, config = TrlParser((nq.ScriptArguments, DROConfig)).parse_args_and_config(flags)
        rows, _ = nq.load_data(script)
        model, tokenizer, *_ = nq.load_model(script)
        callbacks = [InterruptCallback(), TimeBudgetCallback(3600)]
        trainer = DROTrainer(model, config, rows["train"], processing_class=tokenizer, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        terminal = Console(file=Path(os.devnull).open("w"), force_terminal=True, width=110, height=44)
        trainer.add_callback(RichProgressCallback("overhead", terminal, trainer))
        meter, drawing = Meter(), Meter()  # the view is drawn in a thread of its own
        drawing.watch(Live, "refresh", "live view")
        meter.watch(DROTrainer, "_log_means", "logging")
        meter.watch(DROTrainer, "log", "logging")
        meter.watch(DROTrainer, "_save_checkpoint", "checkpoints")
        meter.watch(CallbackHandler, "call_event", "callbacks")
        start = time.perf_counter()
        trainer.train()
        wall = time.perf_counter() - start
        saved = sum(path.stat().st_size for path in Path(run_dir).glob("checkpoint-*/**/*") if path.is_file())
    each = (wall - sum(meter.seconds.values())) / steps
    checkpoint = meter.seconds["checkpoints"] / meter.calls["checkpoints"]
    extra = {label: meter.seconds[label] / steps for label in ("logging", "callbacks")}
    extra["live view"] = drawing.seconds["live view"] / steps
    extra["checkpoints"] = checkpoint / config.save_steps
    shares = {label: round(seconds / each, 5) for label, seconds in extra.items()}
    return {
        "overhead": round(sum(shares.values()), 5),
        **shares,
        "step_seconds": round(each, 3),
        "checkpoint_seconds": round(checkpoint, 3),
        "checkpoint_mib": round(saved / 2**20, 1),
        "checkpoints_made": meter.calls["checkpoints"],
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    sys.argv = sys.argv[:1]
    print(json.dumps(measure(args.steps)))


if __name__ == "__main__":
    main()
