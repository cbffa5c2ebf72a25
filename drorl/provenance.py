"""Where a run comes from: `run.json`, written before the first step, holds all that its result depends on.

    {started, command, directory, settings, seed, versions, commit, dirty, code, data, models, environment, machine,
     resumed}

`settings` are all of them, so a configuration file that changes later changes nothing here. Data, models and code are
known by hashes of their contents, not by their names or dates. [`reproduction`] repeats a run from this file.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from .data.packages import sha256_of
from .data.reading import Reading
from .errors import InvalidInputError
from .models import measure_gflops, resolve_model
from .runs import RUN_FILE

PACKAGES = ("drorl", "torch", "trl", "transformers", "peft", "datasets", "accelerate", "tokenizers", "numpy")
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "PYTHONHASHSEED",
    "HF_HUB_OFFLINE",
)
"""Of the environment: what numbers may depend on. None of them is a secret, as others may be."""
PLACES = ("output_dir", "clock_of")
"""Settings that say where a run is, and change nothing of it."""
HIDDEN = "<hidden>"
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def describe_run(
    settings: Mapping[str, Any],
    sources: Mapping[str, str],
    embedded: Mapping[str, str],
    models: Iterable[str],
    code: Sequence[Path] = (),
) -> dict[str, Any]:
    """Returns the content of `run.json`, as JSON.

    Args:
        settings (mapping): all of them, by name.
        sources (mapping): split -> file, folder of `datasets` or name on the hub of the rows.
        embedded (mapping): name -> build key of an embedded data set.
        models (iterable of `str`): base models, as they are given to `from_pretrained`.
        code (sequence of `Path`): files that run beside the package, such as the recipe.
    """
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "directory": os.getcwd(),
        "settings": {name: value for name, value in settings.items() if name not in PLACES},
        "seed": settings["seed"],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "dirty": dirty(),
        "code": code_hash(code),
        "data": {**{split: data_hashes(source, split) for split, source in sources.items()}, **embedded},
        "models": {name: model_hash(name) for name in models},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "machine": machine(),
        "resumed": [],
    }
    return json.loads(json.dumps(record, default=str))


def keep_record(run_dir: Path, record: Mapping[str, Any], resumed: bool) -> None:
    """Writes `run.json`; of a run that goes on, the first record stays, and this one is added to its `resumed`."""
    if not PartialState().is_main_process:
        return
    path = run_dir / RUN_FILE
    if resumed and path.is_file():
        first = json.loads(path.read_text(encoding="utf-8"))
        record = {**first, "resumed": [*first["resumed"], record]}
    run_dir.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def command() -> list[str]:
    """Returns the command of this process; what follows an option that ends in `_token` is hidden."""
    kept: list[str] = []
    for argument in sys.argv:
        name, equals, _ = argument.partition("=")
        if kept and kept[-1].startswith("--") and kept[-1].endswith("_token"):
            kept.append(HIDDEN)
        else:
            kept.append(f"{name}={HIDDEN}" if equals and name.endswith("_token") else argument)
    return kept


def machine() -> dict[str, Any]:
    """Returns what timings and the last bits depend on: processor, threads, processes, speed of matrix products."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
        "gflops": None if gpu else round(measure_gflops(torch.float32)),
        "gflops_bfloat16": None if gpu else round(measure_gflops(torch.bfloat16, at_least=1000)),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Returns the commit of the code that runs; `None` where it is no checkout, such as an installed package."""
    # A package in a virtual environment inside some repository is ignored there, and not of its commit.
    return _git("rev-parse", "HEAD") if _git("ls-files", "__init__.py") else None


def dirty() -> bool | None:
    """Returns whether the checkout has changes that are not committed, new files included."""
    return bool(_git("status", "--porcelain")) if commit() else None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def code_hash(beside: Sequence[Path] = ()) -> str:
    """Returns a hash of drorl's own sources, and of files beside them: what ran, committed or not."""
    package = Path(__file__).parent
    sources = {str(path.relative_to(package)): path for path in package.rglob("*.py") if "recipes" not in path.parts}
    return _digest(sources | {path.name: path for path in beside})


def data_hashes(source: str, split: str) -> list[str]:
    """Returns the SHA-256 of each file of a source, or the fingerprint of a data set.

    Raises:
        InvalidInputError: if it is not there.
    """
    if found := Reading(Path(source), split=split).depends[0]:
        return found
    raise InvalidInputError(f"{source} is not there")


def model_hash(name: str) -> str | None:
    """Returns a hash of a base model's files in a folder, or the revision of one on the hub."""
    folder = Path(resolve_model(name))
    if folder.is_dir():
        return _digest({path.name: path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(name), "_commit_hash", None)


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()
