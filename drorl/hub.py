"""A run on the hub: its model card, and what of it is pushed."""

import shutil
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, ModelCard, run_as_future, upload_folder
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress
from trl import GRPOTrainer

from .card import TAGS, model_card
from .manifest import STAGING
from .pipeline import RAGPipeline, one_line

CARD = "README.md"
RESULTS = ("summary.json", "report.html")
logger = logging.get_logger(__name__)


@contextmanager
def going_on(checkpoint: Path) -> Generator[None]:
    """A checkpoint that cannot be pushed is a warning."""
    try:
        yield
    except Exception as error:  # whatever the hub does, training goes on
        logger.warning(f"{checkpoint} could not be pushed: {one_line(error)}. Training goes on")


class SharedOnHub(GRPOTrainer):
    """The part of [`DROTrainer`] that tells of itself, and pushes.

    What is pushed is what `save_model` writes, where a base in a folder is named by its path, and the results that the
    card tells of: `summary.json` and `report.html`, both with the command and its paths, the report with three
    questions, their passages and answers. Records, predictions, `run.json` and `training_args.bin`, in which
    transformers leaves the token, stay here.
    """

    _tag_names = list(TAGS)
    push_in_progress: PushInProgress | None = None
    pipeline: RAGPipeline

    def _card(self, tags: str | Sequence[str] | None = None, **known: Any) -> ModelCard:
        """Returns the card of the pair as it is now; see [`~card.model_card`] for what may be known of it."""
        folder = Path(self.args.output_dir)
        folder = folder.parent if folder.name == STAGING else folder
        repo = self.hub_model_id or self.args.hub_model_id or folder.resolve().name
        tags = [tags] if isinstance(tags, str) else tags or ()
        return model_card(self.pipeline, self.args, repo, self.state.global_step, tags=tags, **known)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes `README.md` to the output directory.

        Args:
            model_name (`str`, *optional*): not read: the card is that of `hub_model_id`, or of the directory.
            dataset_name (`str`, *optional*): the training data's name on the hub.
            tags (`str` or `list[str]`, *optional*): beside the card's own.
            **kwargs: `license` (`str`), of the adapters, and `summary`, the content of `summary.json`; the others of
                `transformers.Trainer` (`language`, `finetuned_from`, ...) are a `TypeError`.
        """
        if self.is_world_process_zero():
            self._card(tags, dataset_name=dataset_name, **kwargs).save(Path(self.args.output_dir) / CARD)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Pushes the pair, its card and its results, and nothing else of the output directory.

        The arguments are those of `transformers.Trainer.push_to_hub`, except that `kwargs` are those of
        [`create_model_card`] here; the results are pushed if there is a `summary` among them.

        Returns:
            `CommitInfo`, or its `Future` with `blocking=False`; `None` in all processes but the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        results = [name for name in RESULTS if (Path(self.args.output_dir) / name).is_file()]
        beside = [CARD, *(results if kwargs.get("summary") else [])]  # they may be an earlier run's
        folder = self._set_aside({name: Path(self.args.output_dir) / name for name in beside})
        pushed = run_as_future(self._upload, folder, commit_message, token, revision)  # after any checkpoint's
        return pushed.result() if blocking else pushed

    def _set_aside(self, beside: Mapping[str, Path]) -> TemporaryDirectory:
        """Returns a folder of the pair as it is now, and of copies of what is to be beside it, by name."""
        folder = TemporaryDirectory(prefix="drorl-")
        self.pipeline.save_pretrained(folder.name)
        for name, path in beside.items():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, Path(folder.name) / name)
        return folder

    def _upload(
        self, folder: TemporaryDirectory, message: str | None, token: str | None = None, revision: str | None = None
    ) -> CommitInfo:
        with folder:
            return upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=folder.name,
                commit_message=message,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: the checkpoint is still being written aside. [`push_checkpoint`] comes when it is in place."""

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Pushes in the background what `hub_strategy` asks for at a checkpoint; whatever fails there is a warning.

        As in `transformers.Trainer` nothing is pushed while an earlier push is under way, unless `hub_always_push`,
        and the end of the training waits for the last one.
        """
        strategy, earlier = self.args.hub_strategy, self.push_in_progress
        if not self.args.push_to_hub or strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        if earlier is not None and not earlier.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        beside = {CARD: Path(self.args.output_dir) / CARD}
        if strategy in places:
            beside[places[strategy]] = checkpoint  # a copy, since it may be removed while it is uploaded
        with going_on(checkpoint):
            folder = self._set_aside(beside)
            upload = going_on(checkpoint)(self._upload)
            pushed = run_as_future(upload, folder, f"Training in progress, step {self.state.global_step}")
            self.push_in_progress = PushInProgress([pushed])  # uploads are made one after the other: it ends last
