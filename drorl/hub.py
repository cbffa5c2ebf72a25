"""A run on the hub: its model card, and what of it is pushed."""

import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from httpx import HTTPError
from huggingface_hub import CommitInfo, ModelCard, upload_folder
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from trl import GRPOTrainer

from .card import TAGS, model_card
from .manifest import STAGING
from .pipeline import RAGPipeline

CARD = "README.md"
RESULTS = ("summary.json", "report.html")
logger = logging.get_logger(__name__)


class SharedOnHub(GRPOTrainer):
    """The part of [`DROTrainer`] that tells of itself, and pushes.

    What is pushed is what `save_model` writes, and the results that the card tells of. Questions and answers, records,
    `run.json` and `training_args.bin`, in which transformers leaves the token, stay here.
    """

    _tag_names = list(TAGS)
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
            **kwargs: `license` (`str`), of the adapters, and `summary`, the content of `summary.json`.
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
        """As in `transformers.Trainer`; of the output directory only the pair, its card and its results are pushed.

        `kwargs` are those of [`create_model_card`]; the results are pushed if there is a `summary` among them.
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
        how = {"token": token, "revision": revision, "run_as_future": not blocking}
        return self._upload_pair(beside, commit_message, **how)

    def _upload_pair(self, beside: Sequence[str], message: str | None, **how: Any) -> Any:
        """Uploads the pair and files of the output directory, from a folder in which there is nothing else."""
        folder = TemporaryDirectory(prefix="drorl-")
        self.pipeline.save_pretrained(folder.name)
        for name in beside:
            shutil.copy(Path(self.args.output_dir) / name, folder.name)
        pushed = self._upload(folder.name, message, **how)
        if isinstance(pushed, Future):
            pushed.add_done_callback(lambda _: folder.cleanup())
        else:
            folder.cleanup()
        return pushed

    def _upload(
        self,
        folder: str | Path,
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
        **how: Any,
    ) -> Any:
        return upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            commit_message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            **how,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: the checkpoint is still being written aside. [`push_checkpoint`] comes when it is in place."""

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Pushes what `hub_strategy` asks for at a checkpoint; a hub out of reach does not end the training."""
        strategy = self.args.hub_strategy
        if not self.args.push_to_hub or strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        message = f"Training in progress, step {self.state.global_step}"
        try:
            self._upload_pair([CARD], message)
            if strategy in places:
                self._upload(checkpoint, f"{message}, checkpoint", path_in_repo=places[strategy])
        except (HTTPError, OSError) as error:
            logger.warning(f"{checkpoint} could not be pushed: {str(error).splitlines()[0]}. Training goes on")
