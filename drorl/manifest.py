"""Checkpoints that are known to be whole: their files are listed with their SHA-256, and checked before one is loaded.

The manifest is written last, before the checkpoint is renamed to its place. So one that a kill, a full disk or a bad
sector has damaged is told from one that can be gone on from, and nothing is unpickled that training did not write.
"""

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from .errors import InvalidInputError, OutputError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STAGING = ".incomplete"
"""Where a checkpoint is written, in the run's directory."""
LOADED = (".bin", ".pt", ".pth", ".safetensors")
"""Files that a loader may look for by their names: none may lie in a checkpoint that is not in its manifest."""


def write_manifest(folder: Path) -> None:
    """Writes the SHA-256 of every file of a checkpoint, once all of them are on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): _sha256(path, to_disk=True) for path in files}
    with open(folder / MANIFEST, "w") as file:
        json.dump({"sha256": digests}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path, to_disk: bool = False) -> str:
    with open(path, "rb") as file:
        if to_disk:  # or a power cut could leave the rename, and not what was renamed
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem_of(checkpoint: Path) -> str | None:
    """Returns why a checkpoint cannot be gone on from; `None`: it is what was written."""
    try:
        digests = json.loads((checkpoint / MANIFEST).read_text())["sha256"]
        if TRAINER_STATE_NAME not in digests:
            return f"its {MANIFEST} does not list {TRAINER_STATE_NAME}"
        for name, digest in digests.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _sha256(checkpoint / name) != digest:
                return f"{name} is not what was written"
        found = [path for path in checkpoint.rglob("*") if path.suffix in LOADED]
        names = [path.relative_to(checkpoint).as_posix() for path in found]
        return next((f"{name} is not in its {MANIFEST}" for name in sorted(names) if name not in digests), None)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except OSError as error:
        return f"it cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"


def newest_whole(run_dir: Path) -> Path | None:
    """Returns the checkpoint of the latest step that is whole, and warns of the later ones that are not."""
    for checkpoint in map(Path, reversed(sort_checkpoints(str(run_dir)))):
        problem = problem_of(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, problem)
    return None


def find_checkpoint(run_dir: str | Path, wanted: str) -> str:
    """Returns the checkpoint to go on from, which is whole; all processes get what the main one has found.

    Args:
        run_dir (`str` or `Path`): of the run.
        wanted (`str`): its directory, or `"last"`: the newest one in `run_dir` that is whole.

    Raises:
        InvalidInputError: in all processes, if there is none, or the one that is named is not what was written.
    """
    answer = _found(Path(run_dir), wanted) if PartialState().is_main_process else None
    [(checkpoint, complaint)] = broadcast_object_list([answer])
    if complaint is not None:
        raise InvalidInputError(complaint)
    return checkpoint


def _found(run_dir: Path, wanted: str) -> tuple[str | None, str | None]:
    """Returns a checkpoint, or why there is none."""
    if wanted == "last":
        finish_publishing(run_dir)
        newest = newest_whole(run_dir)
        if newest is not None:
            return str(newest), None
        whole = "whole " if sort_checkpoints(str(run_dir)) else ""
        return None, f"there is no {whole}checkpoint 'last' in {run_dir} to resume from"
    if not Path(wanted).is_dir():
        return None, f"there is no checkpoint {wanted!r} to resume from"
    problem = problem_of(Path(wanted))
    complaint = problem and f"{wanted} cannot be resumed from: {problem}. 'last' takes the newest one that is whole"
    return wanted, complaint


def finish_publishing(run_dir: Path) -> None:
    """Renames a checkpoint that is whole, but was killed before it got to its place."""
    for checkpoint in map(Path, sort_checkpoints(str(run_dir / STAGING))):
        if not (run_dir / checkpoint.name).exists() and problem_of(checkpoint) is None:
            os.replace(checkpoint, run_dir / checkpoint.name)


def check_writable(folder: str | Path) -> None:
    """Checks that files can be written to a directory, which is made.

    Raises:
        OutputError: if they cannot, before anything has been computed that would be lost.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise OutputError(f"nothing can be written to output_dir {folder}: {error.strerror}") from error
