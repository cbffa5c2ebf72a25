"""What the directory of a run says of it, whoever made it and however it ended, and how two runs compare.

    run.json                                    settings, command, commit, data, machine; before a recipe's first step
    records/<system>.json                       one record a question of each system that was evaluated
    {summary,log_history,examples}.json         at the end of a recipe
    checkpoint-<step>/trainer_state.json        the log, by any trainer that saves; beside it drorl.json, some settings

A run that was interrupted, or was made with a bare [`DROTrainer`], has some of them; `Run.missing` says which not.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import InvalidInputError
from .records import METRICS, Record, describe, difference, per_question

RUN_FILE, STATE_FILE = "run.json", "trainer_state.json"
TRAINED = "dro"
"""The system that a recipe has trained, whatever its objective."""
_LABELS = {
    "warmup": "warm-up",
    "retriever_sft": "retriever's order, SFT generator",
    "retriever_zero_shot": "retriever's order, zero-shot",
    TRAINED: "DRO",
}
_ORIGIN = ("command", "commit", "started", "data", "models", "machine", "versions")
_COMPARED = ("commit", "data", "models", "versions", "machine.device", "machine.cpu", "machine.dtype")


@dataclass(frozen=True)
class Evaluated:
    """What one system did with each question."""

    key: dict[str, Any]
    """What the records depend on, see [`experiment.Experiment`]."""
    records: list[Record]

    @property
    def questions(self) -> list[str]:
        """The queries, in order."""
        return [record.query for record in self.records]


@dataclass(frozen=True)
class Run:
    """What a directory says of a run."""

    directory: Path
    settings: dict[str, Any]
    origin: dict[str, Any]
    """Command, commit, data, models, machine and versions, as far as they are known."""
    history: list[dict[str, Any]]
    """`TrainerState.log_history`."""
    state: dict[str, Any]
    """The newest checkpoint's; empty if there is none."""
    summary: dict[str, Any] | None
    """`None`: the run is not finished, or no recipe made it."""
    summary_step: int
    """The step after which the summary was made."""
    examples: list[dict[str, Any]]
    evaluated: dict[str, Evaluated]

    @property
    def name(self) -> str:
        """The directory's own."""
        return self.directory.resolve().name

    @property
    def stopped(self) -> bool:
        """Whether a recipe made it that has not come to its end."""
        return self.summary is None and (self.directory / RUN_FILE).is_file()

    @cached_property
    def systems(self) -> dict[str, dict[str, Any]]:
        """Each system that was evaluated: its label, its means and their intervals."""
        if self.summary is not None:
            return self.summary["systems"]
        return {
            name: {"label": _LABELS.get(name, name), **describe(of.records)} for name, of in self.evaluated.items()
        }

    @property
    def steps(self) -> int:
        """The last step that is in the log."""
        return last_step(self.history)

    @property
    def missing(self) -> list[str]:
        """Sentences that say what the directory does not."""
        said = []
        if self.summary is not None and self.steps > self.summary_step:
            said.append(
                f"The run has gone on: it was evaluated after step {self.summary_step}, as below, and the last "
                f"checkpoint is of step {self.state['global_step']}."
            )
        if self.stopped:
            step = self.state.get("global_step")
            last = "no checkpoint yet" if step is None else f"the last checkpoint is of step {step}"
            said.append(f"The recipe has not come to its end ({last}), so there is no summary.json.")
        elif self.summary is None:
            said.append(
                f"There is no {RUN_FILE}, which a recipe writes: of the settings only those of a checkpoint are "
                "known, and nothing of command, data and machine."
            )
        if not self.systems:
            said.append("No system was evaluated on held-out questions.")
        elif TRAINED not in self.systems:
            labels = ", ".join(system["label"] for system in self.systems.values())
            said.append(f"Evaluated on held-out questions so far: {labels}; not the system that is being trained.")
        if not self.history:
            said.append(
                f"There is no log that can be read, so there are no curves: a checkpoint has it ({STATE_FILE}), and "
                "so has the directory after trainer.save_state()."
            )
        elif self.summary is None:
            said.append(f"The log ends with step {self.steps}; what came after the last checkpoint is not in it.")
        return said


def read_run(run_dir: Path) -> Run:
    """Returns what a directory says of a run.

    Raises:
        InvalidInputError: if it is none, or a file of it cannot be read.
    """
    if not run_dir.is_dir():
        raise InvalidInputError(f"{run_dir} is not there")
    summary, made = (_read(run_dir / name) for name in ("summary.json", RUN_FILE))
    checkpoint, state = _newest_state(run_dir)
    evaluated = {path.stem: _evaluated(path) for path in sorted((run_dir / "records").glob("*.json"))}
    if summary is None and made is None and not state and not evaluated:
        raise InvalidInputError(
            f"{run_dir} is no run's directory: summary.json is missing, and so are {RUN_FILE} and a {STATE_FILE} "
            "that can be read"
        )
    finished, going_on = _read(run_dir / "log_history.json") or [], state.get("log_history", [])
    try:
        if made is not None:
            settings = made["settings"]
        elif summary is not None:
            settings = summary["config"]
        else:  # what the state says of steps and epochs is what they came to, and no setting
            settings = (_read(checkpoint / "drorl.json") or {}).get("settings", {})
        return Run(
            directory=run_dir,
            settings=settings,
            origin=_origin(summary or {}, made or {}),
            history=max(finished, going_on, key=last_step),
            state=state,
            summary=summary,
            summary_step=last_step(finished),
            examples=_read(run_dir / "examples.json") or [],
            evaluated=evaluated,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{run_dir} has files of these names that no run wrote: {error!r}") from error


def last_step(history: Sequence[Mapping[str, Any]]) -> int:
    """Returns the last step that a log tells of, 0 if it is empty."""
    return max((entry["step"] for entry in history), default=0)


def _origin(summary: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `run.json` says of where a run comes from, and what the summary adds: the data type found."""
    found = {**summary, **made, "machine": {**summary.get("machine", {}), **made.get("machine", {})}}
    if isinstance(found.get("command"), list):
        found["command"] = " ".join(found["command"])
    return {name: found[name] for name in _ORIGIN if found.get(name)}


def _read(path: Path) -> Any:
    """Returns the content of a JSON file, `None` if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read: {error}") from error


def _newest_state(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """Returns where the newest state of the trainer is, and what it says; a file that a kill has cut off is passed by.

    That a checkpoint is whole matters to who goes on from it: its log is read as it is.
    """
    checkpoints = [path for path in run_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    newest_first = sorted(checkpoints, key=lambda path: -int(path.name.rpartition("-")[2]))
    for folder in (run_dir, *newest_first):
        try:
            state = _read(folder / STATE_FILE)
        except InvalidInputError:
            continue
        if state is not None:
            return folder, state
    return run_dir, {}


def _evaluated(path: Path) -> Evaluated:
    kept = _read(path)
    try:
        if kept["records"]:
            return Evaluated(kept["key"], [Record(**record) for record in kept["records"]])
        raise KeyError("records")
    except (KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} has no records of an evaluation: {error}") from error


# -------------------------------------------------------------------------------------------------------- several runs
def names_of(run_dirs: Sequence[Path]) -> list[str]:
    """Returns as much of the end of each path as tells it from the others.

    >>> names_of([Path("outputs/a/run"), Path("outputs/b/run"), Path("outputs/other")])
    ['a/run', 'b/run', 'other']
    """
    parts = [path.resolve().parts for path in run_dirs]

    def shortest(of: tuple[str, ...]) -> str:
        for length in range(1, len(of)):
            if sum(other[-length:] == of[-length:] for other in parts) == 1:
                return "/".join(of[-length:])
        return "/".join(of[1:])

    return [shortest(of) for of in parts]


def different_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Returns what is not the same in all runs that say it, with each run's value; `None` where one does not say it.

    Settings by their names, then commit, data, models, versions and machine.
    """
    said = [flat(run.settings) | _compared(run) for run in runs]
    names = dict.fromkeys(name for of in said for name in of)
    known = {name: [of[name] for of in said if name in of] for name in names}
    different = [name for name, values in known.items() if any(value != values[0] for value in values)]
    return {name: [of.get(name) for of in said] for name in different}


def _compared(run: Run) -> dict[str, Any]:
    return {name: v for name, v in flat(run.origin).items() if name in _COMPARED or name.split(".")[0] in _COMPARED}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by their paths: `{"lora": {"r": 16}}` -> `{"lora.r": 16}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def incomparable(a: Run, b: Run, system: str = TRAINED) -> dict[str, str]:
    """Returns the metrics of a system that mean something else in one run than in the other, and why."""
    first, second = (run.evaluated[system].key for run in (a, b))
    found: dict[str, str] = {}
    if first.get("metric_preset", "kilt") != second.get("metric_preset", "kilt"):
        found |= dict.fromkeys(("exact_match", "f1"), "metric_preset is another")
    samples = [(run.settings.get("num_generations"), run.settings.get("num_selected")) for run in (a, b)]
    if samples[0] != samples[1] and any(chosen != 1 for _, chosen in samples):  # with one choice all are enumerated
        found["iw_elbo"] = "from another number of samples"
    if first.get("answer_target") != second.get("answer_target"):
        found |= dict.fromkeys(("answer_logp", "iw_elbo"), "answer_target is another")
    return found


def paired_differences(a: Run, b: Run, system: str = TRAINED) -> dict[str, dict[str, Any]] | str:
    """Returns `b - a` of each metric, paired by question, as `summary.json` has them; or why there is none.

    A system's questions have to be the same in both runs, in the same order.
    """
    for run in (a, b):
        if system not in run.evaluated:
            return f"no records of {_LABELS.get(system, system)} in {run.directory}"
    first, second = (run.evaluated[system] for run in (a, b))
    if first.questions != second.questions:
        shared = len(set(first.questions) & set(second.questions))
        return (
            f"the questions are not the same: {len(first.questions)} and {len(second.questions)}, of which {shared} "
            "are in both"
        )
    unlike = incomparable(a, b, system)
    differences = {name: difference(first.records, second.records, name) for name in _measured(first, second)}
    return {name: of for name, of in differences.items() if name not in unlike}


def _measured(a: Evaluated, b: Evaluated) -> list[str]:
    """Returns the metrics for which some question has a finite value in both."""
    values = {name: zip(per_question(a.records, name), per_question(b.records, name), strict=True) for name in METRICS}
    return [name for name, pairs in values.items() if any(all(map(math.isfinite, pair)) for pair in pairs)]
