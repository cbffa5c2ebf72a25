"""`recipes/nq.py` that stands still at one moment of one step, and says so: there `test_kill.py` kills it.

python tests/stopping.py MOMENT STEP --config ... (what the recipe takes)
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nq
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers.trainer_callback import CallbackHandler

import drorl.checkpoints
import drorl.trainer
from drorl.experiment import Experiment
from drorl.pipeline import RAGPipeline

REACHED = "reached"


class Stop:
    """Stands still at `moment`, from the step `step` on, counted from 1."""

    def __init__(self, moment: str, step: int):
        self.moment, self.wanted, self.step = moment, step, 0
        self.before(CallbackHandler, "on_step_begin", self._begin)

    def _begin(self, handler: CallbackHandler, args: Any, state: Any, control: Any) -> None:
        self.step = state.global_step + 1 if state.max_steps > 1 else 0  # the warm-up has a single step
        self.at("anywhere")

    def at(self, moment: str) -> None:
        """Called wherever it might stand still; to be killed anywhere, it goes on from the beginning of a step."""
        if moment == self.moment and self.step >= self.wanted:
            sys.stdout.write(f"{REACHED}\n")
            sys.stdout.flush()
            time.sleep(3600 if moment != "anywhere" else 0)

    def before(self, owner: Any, name: str, act: Callable[..., None]) -> None:
        """Makes a function do something first, given what it is given."""
        original = getattr(owner, name)

        def replaced(*arguments: Any, **named: Any) -> Any:
            act(*arguments)
            return original(*arguments, **named)

        setattr(owner, name, replaced)

    def after(self, owner: Any, name: str, act: Callable[..., None]) -> None:
        """Makes a function do something last."""
        original = getattr(owner, name)

        def replaced(*arguments: Any, **named: Any) -> Any:
            result = original(*arguments, **named)
            act(*arguments)
            return result

        setattr(owner, name, replaced)


def half_an_optimizer(stop: Stop, path: Any) -> None:
    if str(path).endswith("optimizer.pt") and stop.moment == "half an optimizer" and stop.step >= stop.wanted:
        os.truncate(path, os.path.getsize(path) // 2)
        stop.at("half an optimizer")


def half_a_rotation(stop: Stop, run_dir: Path) -> None:
    if stop.moment == "half a rotation" and stop.step >= stop.wanted:
        steps = sorted(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        for path in steps[:-2]:  # what save_total_limit would remove
            (path / "selector/adapter_model.safetensors").unlink()
        stop.at("half a rotation")


def place_stops(stop: Stop) -> None:
    """Puts all moments where they belong."""
    stop.after(drorl.trainer, "draw_rollouts", lambda *_: stop.at("sampling"))
    stop.before(Accelerator, "backward", lambda _, loss, *__: loss.register_hook(lambda _: stop.at("backward")))
    stop.after(AcceleratedOptimizer, "step", lambda *_: stop.at("optimizer"))
    stop.after(RAGPipeline, "save_pretrained", lambda *_: stop.at("adapters are saved"))
    stop.after(torch, "save", lambda _, path, *__: half_an_optimizer(stop, path))
    stop.before(drorl.checkpoints, "write_manifest", lambda *_: stop.at("no manifest yet"))
    stop.after(drorl.checkpoints, "write_manifest", lambda *_: stop.at("not in its place yet"))
    stop.before(drorl.checkpoints, "rotate_checkpoints", lambda *_: stop.at("not rotated yet"))
    publish = drorl.checkpoints.rotate_checkpoints

    def rotate(output_dir: str, **named: Any) -> None:
        half_a_rotation(stop, Path(output_dir))
        publish(output_dir=output_dir, **named)

    drorl.checkpoints.rotate_checkpoints = rotate
    stop.before(Experiment, "evaluate", lambda _, name, *__: name == "dro" and stop.at("trained"))


if __name__ == "__main__":
    place_stops(Stop(sys.argv[1], int(sys.argv[2])))
    sys.argv = ["nq.py", *sys.argv[3:]]
    sys.exit(nq.run())
