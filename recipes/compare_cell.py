"""One cell of a comparison: a method is trained from the warm-up of its seed, for its budget, and evaluated.

Called by compare.py, in a process of its own for each cell.
"""

import hashlib
import json
import logging
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from drorl.comparison import Cell
from drorl.errors import DivergedError, InvalidInputError

if TYPE_CHECKING:
    from datasets import Dataset
    from nq import ScriptArguments

    from drorl import DROConfig, DROTrainer

logger = logging.getLogger("drorl.compare")
CURVES = ("effective_sample_size", "iw_elbo", "selector/entropy", "importance_weights/max", "reward")
POSITION_QUESTIONS = 12
SAME_PACE = (
    "learning_rate",
    "generator_learning_rate",
    "weight_temperature",
    "ranking",
    "num_eval_questions",
    "max_minutes",
    "warmup_queries",
)
"""Settings that change nothing of what a step costs."""


def data_of(settings: dict[str, Any]) -> str:
    """Names the data of a cell: a new build of the embedded set makes other cells, and other warm-ups."""
    embedded = import_module(f"drorl.data.{settings.get('embedded_data', 'vitalqa')}")
    return settings.get("train_file") or embedded.build_key()


def pace_key(settings: dict[str, Any]) -> str:
    """Names what decides how long a query takes; settings of equal keys compute the same."""
    computed = {name: value for name, value in settings.items() if name not in SAME_PACE}
    return hashlib.sha256(json.dumps(computed, sort_keys=True).encode()).hexdigest()[:12]


def queries_per_step(config: "DROConfig") -> float:
    """Returns how many queries are drawn for an optimization step; later epochs over them draw none."""
    steps = config.num_iterations * config.steps_per_generation / config.gradient_accumulation_steps
    return config.generation_batch_size / config.num_generations / steps


def finite(value: float) -> float | None:
    """A figure as JSON can hold it."""
    return round(value, 4) if math.isfinite(value) else None


@dataclass(frozen=True)
class Asked:
    """A cell that is asked for."""

    method: str
    settings: dict[str, Any]
    seed: int
    budget: str
    queries: int
    """Of training; a whole number of steps is made of them."""
    split: str
    readings: dict[str, str | None]
    """Other systems that read with the generator of this one, and their rankings."""

    def kept(self, ranking: str | None) -> dict[str, Any]:
        """The settings as a cell keeps them."""
        return {**self.settings, "ranking": ranking, "split": self.split, "data": data_of(self.settings)}

    @property
    def rankings(self) -> dict[str, str | None]:
        """Every system of this cell, and its ranking."""
        return {self.method: self.settings.get("ranking"), **self.readings}


def configured(asked: Asked, work: Path) -> tuple["ScriptArguments", "DROConfig"]:
    """Returns the settings of a cell as the recipe takes them."""
    from nq import ScriptArguments
    from trl import TrlParser

    from drorl import DROConfig

    settings = {name: value for name, value in asked.settings.items() if name != "ranking"}
    folder = work / asked.method.replace("/", "-") / str(asked.seed)
    try:
        script, config = TrlParser((ScriptArguments, DROConfig)).parse_dict(
            {**settings, "seed": asked.seed, "output_dir": str(folder)}
        )
    except ValueError as error:
        raise InvalidInputError(f"{asked.method}: {error}") from error
    config.max_steps = max(1, round(asked.queries / queries_per_step(config)))
    return script, config


def warmup_folder(asked: Asked, script: "ScriptArguments", config: "DROConfig", dtype: str, work: Path) -> Path:
    """Returns where the warm-up is kept that all methods of a seed start from: by what it depends on."""
    from drorl.settings import PipelineSettings

    # What is asked later is no part of the warm-up, and the data have a name.
    left_out = ("num_eval_questions", "max_minutes", "em_patience", "embedded_data", "license")
    depends = [
        data_of(asked.settings),
        dtype,
        {name: value for name, value in asdict(script).items() if name not in left_out},
        asdict(PipelineSettings.from_config(config)),
        config.answer_target,
        config.weight_decay,
        asked.seed,
    ]
    text = json.dumps(depends, sort_keys=True, default=str)
    return work / "warmup" / hashlib.sha256(text.encode()).hexdigest()[:12]


def warmed_up(
    asked: Asked, script: "ScriptArguments", config: "DROConfig", train: "Dataset", work: Path
) -> "DROTrainer":
    """Returns the trainer of a cell, after the warm-up."""
    import torch
    from nq import load_model

    from drorl import DROTrainer
    from drorl.callbacks import RichProgressCallback, TimeBudgetCallback
    from drorl.experiment import warmup_config

    torch.manual_seed(asked.seed)
    model, tokenizer, *generator = load_model(script)

    def trainer_for(title: str, config: "DROConfig") -> DROTrainer:
        trainer = DROTrainer(model, config, train, None, tokenizer, *generator)
        trainer.add_callback(RichProgressCallback(f"{title}, seed {asked.seed}", trainer=trainer))
        return trainer

    folder = warmup_folder(asked, script, config, str(model.dtype), work)
    if script.warmup_queries and not folder.exists():
        # Cells that run side by side wait for the first of them.
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                first = trainer_for("warm-up", warmup_config(config, *script.warmup))
                first.add_callback(TimeBudgetCallback(math.inf))  # anneals the rate over the steps
                first.train()
                first.save_model(str(aside := folder.with_suffix(".tmp")))
                aside.replace(folder)
        # Once more from the start: a method that comes first is no warmer, and draws what it would have drawn.
        os.execv(sys.executable, [sys.executable, *sys.argv])
    trainer = trainer_for(asked.method, config)
    if script.warmup_queries:
        trainer.load_adapters(folder)
    return trainer


def trained(asked: Asked, trainer: "DROTrainer") -> tuple[float, bool]:
    """Trains for the budget; returns the minutes that it took, and whether it diverged."""
    import torch

    from drorl.callbacks import TimeBudgetCallback

    trainer.add_callback(TimeBudgetCallback(math.inf))  # anneals the rates over the steps
    torch.manual_seed(asked.seed)
    start, diverged = time.monotonic(), False
    try:
        trainer.train()
    except DivergedError as error:
        logger.error("%s, seed %d: %s", asked.method, asked.seed, error)
        diverged = True
    return (time.monotonic() - start) / 60, diverged


def evaluated(
    name: str, ranking: str | None, trainer: "DROTrainer", questions: "Dataset"
) -> tuple[dict[str, float | None], dict[str, list], bool]:
    """Returns the metrics and the predictions of a system, and whether its generator is lost."""
    from drorl.comparison import describe, nothing
    from drorl.evaluation import evaluate_rows, position_bias, position_shares

    config, pipeline = trainer.args, trainer.pipeline
    scored = config.answer_target, config.num_generations, ranking
    try:
        records = evaluate_rows(pipeline, questions, *scored, description=name, metrics=config.metrics)
        metrics, predictions = describe(records)
        if ranking is None:
            asked = questions.select(range(min(POSITION_QUESTIONS, len(questions))))
            metrics["position_bias"] = position_bias(position_shares(pipeline, asked))
    except DivergedError as error:
        logger.error("%s, seed %d: %s", name, config.seed, error)
        return *nothing(len(questions)), True
    return metrics, predictions, False


def run_cell(asked: Asked, work: Path) -> list[Cell]:
    """Trains one method and evaluates it; returns its cell, and one for each other ranking its generator reads."""
    from nq import load_data

    from drorl.comparison import nothing
    from drorl.provenance import commit, machine

    script, config = configured(asked, work)
    rows, _ = load_data(script)
    questions = rows[asked.split]
    questions = questions.select(range(min(script.num_eval_questions or len(questions), len(questions))))
    trainer = warmed_up(asked, script, config, rows["train"], work)
    minutes, diverged = trained(asked, trainer)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = {name: [finite(entry[name]) for entry in log if name in entry] for name in CURVES}
    common: dict[str, Any] = {
        "seed": asked.seed,
        "budget": asked.budget,
        "minutes": round(minutes, 2),
        "query_steps": round(trainer.state.global_step * queries_per_step(config)),
        "commit": commit(),
        "curves": {name: values for name, values in curves.items() if values},
        "machine": {**machine(), "dtype": str(trainer.model.dtype).removeprefix("torch.")},
    }
    cells = []
    for name, ranking in asked.rankings.items():
        lost = (*nothing(len(questions)), True)
        metrics, predictions, is_lost = lost if diverged else evaluated(name, ranking, trainer, questions)
        settings = asked.kept(ranking)
        cells.append(
            Cell(name, metrics=metrics, predictions=predictions, diverged=is_lost, settings=settings, **common)
        )
    return cells
