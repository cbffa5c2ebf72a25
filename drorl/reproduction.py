"""Repeats a run from its `run.json`, and says what has become different: before it starts, and in its results.

On a CPU with the same threads, versions, code and data a run is repeated bit for bit, also where `max_minutes` has
bounded it: the clock's readings are kept, see [`clock`], and stand for the clock.
"""

import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .adapters import ROLES
from .errors import InvalidInputError
from .provenance import RUN_FILE
from .records import METRICS, Record, per_question
from .statistics import paired_bootstrap

COMPARED = ("settings", "versions", "commit", "dirty", "code", "data", "models", "environment", "machine")
_MEASURED = ("machine.gflops", "machine.gflops_bfloat16")  # speeds, which are never twice the same
_TIMED = ("time", "runtime", "per_second", "gib", "flos", "memory")  # in the names of what a log says of the machine


def read_run(run_dir: Path) -> dict[str, Any]:
    """Returns a run's `run.json`.

    Raises:
        InvalidInputError: if the run is not finished, has none, or cannot be repeated by one command.
    """
    for name in (RUN_FILE, "summary.json", *(f"{role}/adapter_model.safetensors" for role in ROLES)):
        if not (run_dir / name).is_file():
            raise InvalidInputError(f"{run_dir} has no {name}: it is no finished run of drorl train or recipes/nq.py")
    run = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
    if not Path(run["directory"]).is_dir():
        raise InvalidInputError(f"the run was started in {run['directory']}, which is not there")
    if (processes := run["machine"]["processes"]) > 1:
        raise InvalidInputError(
            f"the run had {processes} processes, and this repeats those of one: launch its command again, with "
            f"--output_dir and --clock_of {run_dir}: {' '.join(run['command'])}"
        )
    for later in run["resumed"]:
        if changed := _differences({"settings": run["settings"]}, {"settings": later["settings"]}, ("settings",)):
            raise InvalidInputError(f"the run went on with other settings than it began with: {'; '.join(changed)}")
    return run


def arguments_of(run: Mapping[str, Any]) -> list[str]:
    """Returns the command's arguments; the data type is the one that `auto` chose, which was measured then."""
    return [*run["command"][1:], "--dtype", run["settings"]["dtype"]]


def changes(run: Mapping[str, Any], recipe: Path) -> list[str]:
    """Returns what a run's result depends on and is no longer what it was.

    Raises:
        InvalidInputError: if its command is none of the recipe as it is now, or its data are not there.
    """
    module = runpy.run_path(str(recipe), run_name="recipe")
    with chdir(run["directory"]):
        try:
            now = module["described"](*module["parse"](arguments_of(run)))
        except (SystemExit, ValueError, OSError) as error:
            raise InvalidInputError(f"the command cannot be run again: {error}") from error
    return _differences(run, now, COMPARED)


def repeat(run: Mapping[str, Any], recipe: Path, run_dir: Path, output: Path) -> None:
    """Runs the same command into another directory.

    Raises:
        InvalidInputError: if it fails.
    """
    command = [sys.executable, str(recipe), *arguments_of(run)]
    command += ["--output_dir", str(output.resolve()), "--clock_of", str(run_dir.resolve())]
    command += ["--push_to_hub", "false"]  # the first one's place is taken
    done = subprocess.run(command, cwd=run["directory"], env=environment_of(run), check=False)
    if done.returncode:
        raise InvalidInputError(f"the repeated run has failed, with exit code {done.returncode}")


def environment_of(run: Mapping[str, Any]) -> dict[str, str]:
    """Returns the environment of this process, completed by that of the run; threads are as many, unless set."""
    threads = {"OMP_NUM_THREADS": str(run["machine"]["threads"])}
    return threads | run["environment"] | os.environ


def compare(run_dir: Path, output: Path) -> list[str]:
    """Returns in what the results of two runs differ, and by how much: adapters, log, metrics, predictions."""
    found = []
    for place in (".", "warmup"):
        for role in ROLES:
            file = Path(place, role, "adapter_model.safetensors")
            if (run_dir / file).is_file() or (output / file).is_file():
                found += _tensor_differences(run_dir, output, file)
    found += _log_differences(*(_json(place / "log_history.json") for place in (run_dir, output)))
    then, now = (_json(place / "summary.json") for place in (run_dir, output))
    for name in sorted(then["systems"].keys() | now["systems"].keys()):
        found += _system_differences(name, run_dir, output)
    return found


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], parts: tuple[str, ...]) -> list[str]:
    old, new = (dict(_leaves({part: of[part] for part in parts})) for of in (then, now))
    names = [name for name in dict.fromkeys([*old, *new]) if name not in _MEASURED]
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _tensor_differences(run_dir: Path, output: Path, file: Path) -> list[str]:
    if missing := [str(place / file) for place in (run_dir, output) if not (place / file).is_file()]:
        return [f"{missing[0]} is missing"]
    then, now = load_file(run_dir / file), load_file(output / file)
    if {name: t.shape for name, t in then.items()} != {name: t.shape for name, t in now.items()}:
        return [f"{file}: other tensors, or of other shapes"]
    # Bit for bit: 0.0 and -0.0 are equal to torch, and are not here.
    changed = [n for n in then if then[n].dtype != now[n].dtype or not _bits(then[n]).equal(_bits(now[n]))]
    if not changed:
        return []
    largest = max((now[name].double() - then[name].double()).abs().max().item() for name in changed)
    return [f"{file}: {len(changed)} of {len(then)} tensors differ, at most by {largest:.3g}"]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _log_differences(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """The first entry in which two logs differ, but for times and memory."""
    for old, new in zip(then, now, strict=False):
        for name in dict.fromkeys([*old, *new]):
            if not any(word in name for word in _TIMED) and not _equal(old.get(name), new.get(name)):
                return [f"log, from step {old.get('step')} on: {name} {old.get(name)} -> {new.get(name)}"]
    return [] if len(then) == len(now) else [f"log: {len(then)} entries -> {len(now)}"]


def _equal(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # NaN is NaN


def _system_differences(name: str, run_dir: Path, output: Path) -> list[str]:
    """A system's metrics, each with the interval of the difference over questions, and its predictions."""
    files = [place / "records" / f"{name}.json" for place in (run_dir, output)]
    if missing := [str(file) for file in files if not file.is_file()]:
        return [f"{missing[0]} is missing"]
    then, now = ([Record(**record) for record in _json(file)["records"]] for file in files)
    if len(then) != len(now):
        return [f"{name}: {len(then)} questions -> {len(now)}"]
    found = []
    for metric in METRICS:
        pairs = list(zip(per_question(then, metric), per_question(now, metric), strict=True))
        if changed := [pair for pair in pairs if not _equal(*pair)]:
            finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
            gap = paired_bootstrap([old for old, _ in finite], [new for _, new in finite]) if finite else "no number"
            found.append(f"{name}, {metric}: {len(changed)} of {len(pairs)} questions; mean and 95 % interval: {gap}")
    answers = sum(old.prediction != new.prediction for old, new in zip(then, now, strict=True))
    choices = sum(old.chosen != new.chosen for old, new in zip(then, now, strict=True))
    if answers or choices:
        found.append(f"{name}: {answers} answers and {choices} choices of {len(then)} questions differ")
    return found
