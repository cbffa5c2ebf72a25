"""Checkpoints that are whole or not there, and runs that go on from them as if they had not been interrupted."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from .adapters import REFERENCE, ROLES, SELECTOR, load_adapter_weights, remember_selector
from .errors import UserError
from .pipeline import RAGPipeline
from .randomness import RandomState

CRITIC_FILE = "critic.safetensors"
# The device of one of several processes on a CPU is `cpu:0` to accelerate, and the Trainer hands that to `torch.load`,
# which knows `cpu` only: no such run could go on.
torch.serialization.register_package(0, lambda _: None, lambda storage, place: storage if place == "cpu:0" else None)


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
    shutil.rmtree(run_dir / name, ignore_errors=True)
    os.replace(staging / name, run_dir / name)
    if (staging / "README.md").exists():  # the model card
        os.replace(staging / "README.md", run_dir / "README.md")
    shutil.rmtree(staging)
    rotate_checkpoints(
        output_dir=str(run_dir),
        save_total_limit=save_total_limit,
        best_model_checkpoint=state.best_model_checkpoint,
        use_mtime=True,
    )


class AtomicCheckpoints(GRPOTrainer):
    """The part of [`DROTrainer`] that saves both adapters and goes on from them."""

    pipeline: RAGPipeline
    _step_began: tuple[int, RandomState] | None = None

    def _get_train_sampler(self, dataset: Dataset | None = None) -> ResumableSampler:
        self._train_sampler = ResumableSampler(super()._get_train_sampler(dataset))
        return self._train_sampler

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.pipeline.save_pretrained(output_dir or self.args.output_dir, state_dict)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in `transformers.Trainer`; a KL penalty is towards the selector as it is now, or was when a run began."""
        if self.beta:
            remember_selector(self.pipeline.owner(SELECTOR))
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

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
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    @contextmanager
    def saving_on(self, loss: type[UserError]) -> Generator[None]:
        """Saves the run as it was at the beginning of the step before it stops for a `loss` from outside.

        Entered for each micro-batch, of which the first is that beginning. An epoch's first step begins before its
        data loader does, which takes a random number, and takes it again when the run goes on from there.
        """
        step, first = self.state.global_step, float(self.state.epoch or 0).is_integer()
        if self._step_began is None or self._step_began[0] != step:
            self._step_began = step, self._train_sampler.epoch_began if first else RandomState()
        try:
            yield
        except loss as error:
            if step == 0:
                raise
            self._step_began[1].restore()
            self._save_checkpoint(self.model, None)
            raise loss(f"{error}. The run is saved at step {step}: go on with resume_from_checkpoint") from error

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint aside and renames it, so that a full disk or a kill leaves the previous one whole."""
        run_dir = Path(self.args.output_dir)
        staging = run_dir / ".incomplete"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(run_dir)
        if self.args.should_save:
            self._save_helpers(staging / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
        if self.args.should_save:
            publish_checkpoint(staging, run_dir, self.state, self.args.save_total_limit)
        best = broadcast_object_list([self.state.best_model_checkpoint])  # other processes know its staging place
        self.state.best_model_checkpoint = best[0]
