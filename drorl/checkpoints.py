"""Checkpoints that are whole or not there, and runs that go on from them as if they had not been interrupted."""

import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, TrainOutput, rotate_checkpoints
from transformers.utils import logging
from trl.trainer.utils import RepeatSampler

from .adapters import REFERENCE, ROLES, SELECTOR, load_adapter_weights, remember_selector
from .buffer import packed, unpacked
from .errors import InvalidInputError, OutputError, UserError
from .hub import CARD, SharedOnHub
from .manifest import STAGING, check_writable, find_checkpoint, newest_whole, problem_of, write_manifest
from .randomness import RandomState

CRITIC_FILE = "critic.safetensors"
logger = logging.get_logger(__name__)


class ResumableSampler(RepeatSampler):
    """TRL's sampler of training rows, with the same orders, of which a resumed run gets the one of its epoch.

    TRL's own starts again with the order of the first epoch.

    Args:
        sampler (`RepeatSampler`): as TRL makes it.
    """

    def __init__(self, sampler: RepeatSampler):
        self.__dict__ |= vars(sampler)  # whatever arguments TRL's takes, and its random state
        self.epoch_began = RandomState()

    def set_epoch(self, epoch: int) -> None:
        """Goes to the order of an epoch; the data loader calls this at the beginning of each."""
        self.epoch_began = RandomState()
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


def publish_checkpoint(staging: Path, run_dir: Path, state: TrainerState, save_total_limit: int | None) -> None:
    """Moves the checkpoint of this step, written completely in `staging`, to its place in `run_dir` by a rename.

    Until then the previous checkpoints are untouched, so a full disk or a kill while writing costs nothing but the new
    one. Older checkpoints are removed afterwards, as `save_total_limit` says; the best one stays.
    """
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if best.name == name or best.is_dir():  # a step may be evaluated best without having been saved
        state.best_model_checkpoint = str(best)
    state.save_to_json(str(staging / name / TRAINER_STATE_NAME))  # it named the best checkpoint's place in `staging`
    write_manifest(staging / name)
    place, replaced = run_dir / name, staging / "replaced"
    if place.exists():  # the same step, saved before; a kill before the next rename is mended by `finish_publishing`
        os.replace(place, replaced)
    try:
        os.replace(staging / name, place)
    except OSError:
        if replaced.exists():
            os.replace(replaced, place)
        raise
    if (staging / CARD).exists():
        os.replace(staging / CARD, run_dir / CARD)
    shutil.rmtree(staging)
    rotate_checkpoints(
        output_dir=str(run_dir),
        save_total_limit=save_total_limit,
        best_model_checkpoint=state.best_model_checkpoint,
        use_mtime=True,
    )


class GoOn(TrainerCallback):
    """Goes on from a checkpoint once the Trainer has begun, which starts its counts anew."""

    def __init__(self, trainer: "AtomicCheckpoints", checkpoint: str):
        self.trainer, self.checkpoint = trainer, Path(checkpoint)
        self.began = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = state.global_step
        self.trainer.go_on_from(self.checkpoint)
        self.trainer.evaluate_what_is_owed()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.began:  # there was no step left to make, so there is nothing new
            control.should_save = control.should_evaluate = False


class AtomicCheckpoints(SharedOnHub):
    """The part of [`DROTrainer`] that saves both adapters and goes on from them."""

    _step_began: tuple[int, RandomState, dict[str, Any]] | None = None

    def _get_train_sampler(self, dataset: Dataset | None = None) -> ResumableSampler:
        self._train_sampler = ResumableSampler(super()._get_train_sampler(dataset))
        return self._train_sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """As in `transformers.Trainer`, which would make one step more of a run that is resumed from its last one."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self.args.output_dir
        self.pipeline.save_pretrained(folder, state_dict)
        self._card().save(Path(folder) / CARD)  # in place of PEFT's, which knows of one adapter

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in `transformers.Trainer`; a KL penalty is towards the selector as it is now, or was when a run began.

        `resume_from_checkpoint` may be `"last"` too, which is `True`: the newest checkpoint that is whole.

        Raises:
            InvalidInputError: if there is no such checkpoint, or it is not what was written.
            OutputError: if nothing can be written to `output_dir`, or a checkpoint cannot; the last one stays whole.
        """
        if self.args.should_save and self.args.save_strategy != "no":
            check_writable(self.args.output_dir)
        if self.beta:
            remember_selector(self.pipeline.owner(SELECTOR))
        if not resume_from_checkpoint:
            return super().train(None, trial, ignore_keys_for_eval)
        wanted = "last" if resume_from_checkpoint is True else resume_from_checkpoint
        checkpoint = find_checkpoint(self.args.output_dir, wanted)
        if self.args.device.type == "cpu":  # `cpu:0` for one of several processes, which torch.load does not know
            vars(self.args)["_setup_devices"] = torch.device("cpu")
        going_on = GoOn(self, checkpoint)
        self.add_callback(going_on)
        try:
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.remove_callback(going_on)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_adapters(resume_from_checkpoint)
        folder = Path(resume_from_checkpoint)
        if self.beta and (folder / REFERENCE).is_dir():
            load_adapter_weights(self.pipeline.owner(SELECTOR), folder / REFERENCE, REFERENCE)
        if self.pipeline.critic is not None and (folder / CRITIC_FILE).is_file():
            self.pipeline.critic.load_state_dict(load_file(folder / CRITIC_FILE))

    def load_adapters(self, directory: str | Path) -> None:
        """Copies both adapters from a checkpoint or a saved model into the ones being trained."""
        for role in ROLES:
            load_adapter_weights(self.pipeline.owner(role), os.path.join(directory, role), role)

    def _save_helpers(self, folder: Path) -> None:
        """Saves what training needs beside the two adapters: PPO's critic, the reference of a KL penalty."""
        if self.beta:
            self.pipeline.owner(SELECTOR).save_pretrained(folder, selected_adapters=[REFERENCE])
        if self.pipeline.critic is not None:
            save_file(self.pipeline.critic.state_dict(), folder / CRITIC_FILE)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if problem := problem_of(best):
            raise InvalidInputError(f"{best}, the best checkpoint, cannot be loaded: {problem}")
        self._load_from_checkpoint(str(best))

    def _progress(self) -> dict[str, Any]:
        """Returns what a step leaves to the next one besides what transformers saves.

        TRL's count of micro-batches and the rollouts that are still to be trained on; what has been measured since the
        last log, and the losses that the next and the last entry of the log report; how many passages were cut.
        """
        prompts, ends = self.pipeline.prompts, self.args.steps_per_generation * self.num_iterations
        return {
            "micro_batches": self._step,
            "buffer": self._buffered_inputs if self._step % ends else None,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "loss": self._tr_loss.clone(),
            "logged_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "passages": (prompts.num_passages, prompts.num_truncated_passages),
        }

    def _put_back(self, progress: dict[str, Any]) -> None:
        """Makes the progress what it was."""
        prompts, metrics = self.pipeline.prompts, self._metrics["train"]
        metrics.clear()
        metrics.update(progress["metrics"])
        self._step, self._buffered_inputs = progress["micro_batches"], progress["buffer"]
        self._tr_loss, self._total_loss_scalar = progress["loss"], progress["logged_loss"]
        self._globalstep_last_logged = progress["last_logged"]
        prompts.num_passages, prompts.num_truncated_passages = progress["passages"]

    def _progress_file(self, checkpoint: Path) -> Path:
        """Each process has its own, as with random numbers."""
        one_of_many = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return checkpoint / f"progress{one_of_many}.pt"

    def _save_progress(self, checkpoint: Path) -> None:
        progress = self._progress()
        if progress["buffer"] is not None:
            progress["buffer"] = [packed(batch) for batch in progress["buffer"]]
        torch.save(progress, self._progress_file(checkpoint))

    def go_on_from(self, checkpoint: Path) -> None:
        """Puts back the progress of a checkpoint; called when the Trainer has set all of it to that of a new run."""
        path = self._progress_file(checkpoint)
        if not path.is_file():
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            logger.warning(
                f"{checkpoint} has no {path.name}: rollouts that were still to be trained on are drawn anew"
            )
            return
        progress = torch.load(path, map_location=self.args.device, weights_only=True)
        if progress["buffer"] is not None:
            progress["buffer"] = [unpacked(self.pipeline, self.args, batch) for batch in progress["buffer"]]
        self._put_back(progress)

    def evaluate_what_is_owed(self) -> None:
        """Makes up for the evaluation of a checkpoint's step, if the run was stopped before it: an EM iteration."""
        args, state = self.args, self.state
        due = {
            IntervalStrategy.EPOCH: float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps,
            IntervalStrategy.STEPS: state.global_step % (state.eval_steps or 1) == 0,
        }
        if not due.get(args.eval_strategy, False) or (args.eval_delay or 0) > state.global_step:
            return
        logged = chain.from_iterable(entry for entry in state.log_history if entry["step"] == state.global_step)
        if not any(name.startswith("eval_") for name in logged):
            self._determine_best_metric(self._evaluate(None, None), None)

    @contextmanager
    def saving_on(self, loss: type[UserError]) -> Generator[None]:
        """Saves the run as it was at the beginning of the step before it stops for a `loss` from outside.

        Entered for each micro-batch, of which the first is that beginning. An epoch's first step begins before its
        data loader does, which takes a random number, and takes it again when the run goes on from there.
        """
        step, first = self.state.global_step, float(self.state.epoch or 0).is_integer()
        if self._step_began is None or self._step_began[0] != step:
            random = self._train_sampler.epoch_began if first else RandomState()
            self._step_began = step, random, self._progress()
        try:
            yield
        except loss as error:
            if step == 0:
                raise
            _, random, progress = self._step_began
            random.restore()
            self._put_back(progress)
            self._save_checkpoint(self.model, None)
            raise loss(f"{error}. The run is saved at step {step}: go on with resume_from_checkpoint") from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`: both adapters, the tokenizer, `drorl.json` and the card.

        Raises:
            OutputError: if they cannot be written.
        """
        if _internal_call:  # a part of a checkpoint
            return super().save_model(output_dir, _internal_call=True)
        with self._telling_why("the model", Path(output_dir or self.args.output_dir)):
            super().save_model(output_dir)

    @contextmanager
    def _telling_why(self, what: str, folder: Path) -> Generator[None]:
        """Says in one line why something could not be written, and from which checkpoint to go on."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a failed write as a RuntimeError
            run_dir = Path(self.args.output_dir)
            shutil.rmtree(run_dir / STAGING, ignore_errors=True)
            there = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
            failed = f"{what} cannot be written to {folder} ({shutil.disk_usage(there).free / 2**30:.2f} GiB free)"
            whole = newest_whole(run_dir)
            last = (
                f"{whole.name} is whole: go on from it with resume_from_checkpoint" if whole else "Nothing was saved"
            )
            raise OutputError(f"{failed}: {str(error).splitlines()[0]}. {last}") from error

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint aside and renames it, so that a full disk or a kill leaves the previous one whole."""
        run_dir = Path(self.args.output_dir)
        with self._telling_why(f"the checkpoint of step {self.state.global_step}", run_dir):
            self._write_aside(model, trial, run_dir / STAGING)
            if self.args.should_save:
                publish_checkpoint(run_dir / STAGING, run_dir, self.state, self.args.save_total_limit)
        best = broadcast_object_list([self.state.best_model_checkpoint])  # other processes know its staging place
        self.state.best_model_checkpoint = best[0]
        self.push_checkpoint(run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _write_aside(self, model: nn.Module, trial: Any, staging: Path) -> None:
        """Writes the checkpoint of this step, all processes their part of it, to a directory in `staging`."""
        run_dir, checkpoint = self.args.output_dir, staging / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = run_dir
        if self.args.should_save:
            self._save_helpers(checkpoint)
        if not self.args.save_only_model:
            self._save_progress(checkpoint)
        self.accelerator.wait_for_everyone()  # each process writes its random numbers and its progress
