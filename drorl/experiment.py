"""One experiment: the same held-out questions for every system, the summary, the worked examples, the report."""

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .adapters import ROLES
from .config import DROConfig
from .data.rows import validate_rows
from .errors import OutputError
from .evaluation import evaluate_rows, score_permutations
from .manifest import find_checkpoint
from .metrics import contains_answer
from .pipeline import RAGPipeline
from .provenance import PACKAGES, command, commit, machine
from .records import METRICS, Record, describe, difference
from .settings import DROSettings
from .weights import importance_weights, log_importance_weights

logger = logging.getLogger(__name__)

MIN_QUESTIONS = 150
SHAPING = (
    *(setting.name for setting in dataclasses.fields(DROSettings)),
    "num_generations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "lr_scheduler_type",
    "seed",
)
"""The settings that shape a run: drorl's own, and some of TRL's and transformers'."""


class Experiment:
    """Evaluates systems on the same questions and writes what the report reads.

    A system that was evaluated before in the same run directory is not evaluated again, so that an interrupted run
    goes on where it stopped.

    Args:
        config ([`DROConfig`]): of the run; `records/<system>.json`, `predictions/<system>.jsonl` (for `drorl score`),
            `summary.json` and `examples.json` go to its `output_dir`, and every system's `iw_elbo` takes its
            `num_generations` samples.
        rows (`Dataset`): held-out questions.
    """

    def __init__(self, config: DROConfig, rows: Dataset):
        self.config = config
        self.run_dir = Path(config.output_dir)
        self.rows, _ = validate_rows(rows, config.num_selected, require_scores=config.retrieval_prior_weight != 0)
        self.answer_target = config.answer_target
        self.num_samples = config.num_generations
        self.dtype: str | None = None
        self.systems: dict[str, tuple[str, list[Record]]] = {}
        self.seconds: dict[str, float] = {}

    def evaluate(
        self, name: str, label: str, pipeline: RAGPipeline, ranking: str | None = None, seconds: float | None = None
    ) -> list[Record]:
        """Evaluates one system and keeps its records.

        Args:
            name (`str`): key in `summary.json`.
            label (`str`): how the table calls it.
            pipeline ([`RAGPipeline`]): the system.
            ranking (`str`, *optional*): of a system without a selector, see [`~evaluation.ranked`].
            seconds (`float`, *optional*): time for it; fewer questions are asked when they do not fit (but at least
                150), by this system and by all that follow.
        """
        path = self.run_dir / "records" / f"{name}.json"
        key = self._key(pipeline, name)
        start = time.monotonic()
        kept = json.loads(path.read_text()) if path.is_file() else {}
        if kept.get("key") == key:
            records, self.seconds[name] = [Record(**r) for r in kept["records"]], kept["seconds"]
        else:
            records = self._evaluate(label, pipeline, ranking, seconds)
            self.seconds[name] = time.monotonic() - start
            kept = {"key": key, "seconds": self.seconds[name], "records": [dataclasses.asdict(r) for r in records]}
            self._write(path, _indented(kept))
        self.rows = self.rows.select(range(len(records)))
        self._write(self.run_dir / "predictions" / f"{name}.jsonl", self._predictions(records))
        self.systems[name] = (label, records)
        return records

    def _predictions(self, records: Sequence[Record]) -> str:
        """Returns what `drorl score` reads."""
        pairs = zip(records, self.rows["answers"], strict=True)
        lines = ({"query": r.query, "prediction": r.prediction, "answers": answers} for r, answers in pairs)
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _key(self, pipeline: RAGPipeline, name: str) -> dict[str, Any]:
        """What a system's records depend on; records with another key are not used again."""
        adapters = {role: float(sum(p.detach().float().norm() for p in pipeline.parameters(role))) for role in ROLES}
        settings = dataclasses.asdict(pipeline.settings)
        asked = {"answer_target": self.answer_target, "metric_preset": self.config.metric_preset}
        return {"system": name, "settings": settings, **asked, "adapters": adapters}

    def _write(self, path: Path, text: str) -> None:
        """Writes a text aside and renames it, from the main process alone."""
        if PartialState().is_main_process:
            aside = path.with_suffix(".tmp")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                aside.write_text(text)
                aside.replace(path)
            except OSError as error:
                raise OutputError(f"{path} cannot be written: {error.strerror}") from error

    def _evaluate(self, label: str, pipeline: RAGPipeline, ranking: str | None, seconds: float | None) -> list[Record]:
        self.dtype = str(pipeline.model.dtype).removeprefix("torch.")
        deadline = None if seconds is None else time.monotonic() + seconds
        records: list[Record] = []
        block = 50
        for first in range(0, len(self.rows), block):
            expired = deadline is not None and first >= MIN_QUESTIONS and time.monotonic() > deadline
            if broadcast_object_list([expired])[0]:
                break
            part = self.rows.select(range(first, min(first + block, len(self.rows))))
            text = f"{label}: questions {first + 1}-{first + len(part)} of {len(self.rows)}"
            scored = self.answer_target, self.num_samples, ranking
            records += evaluate_rows(pipeline, part, *scored, description=text, metrics=self.config.metrics)
        return records

    def examples(self, name: str, pipeline: RAGPipeline, count: int = 3) -> list[dict[str, Any]]:
        """Returns what one system did with the first `count` questions: probabilities, weights, answer."""
        _, records = self.systems[name]
        return [self._example(pipeline, self.rows[i], records[i]) for i in _instructive(self.rows, records, count)]

    def _example(self, pipeline: RAGPipeline, row: Mapping[str, Any], record: Record) -> dict[str, Any]:
        candidates = row["candidates"][: pipeline.settings.num_candidates]
        shown = pipeline.present(row["query"], candidates)
        with pipeline.evaluating():
            decisions = pipeline.decisions([row["query"]], [shown])
            [draw] = decisions.sample(len(shown), every_first_choice=True)
            # All that is asked of the decisions comes before the generator's adapter is active.
            probabilities = decisions.logps([[()]])[0][0].exp()
            [logps] = score_permutations(pipeline, [row], [shown], [draw.permutations], self.answer_target)
        weights = importance_weights(log_importance_weights(logps, draw.log_ratio))
        order = [candidates.index(passage) for passage in shown]
        place = [order.index(i) for i in range(len(order))]
        return {
            "query": row["query"],
            "answers": row["answers"][:5],
            "candidates": [
                {"title": c["title"], "text": c["text"], "has_answer": contains_answer(c["text"], row["answers"])}
                for c in candidates
            ],
            "chosen": record.chosen,
            "answer": record.prediction,
            "probabilities": probabilities[place].tolist(),
            "permutations": [[order[i] for i in draw.permutations[p]] for p in place],
            "importance_weights": weights[place].tolist(),
        }

    def write(
        self,
        before: str,
        after: str,
        script: Mapping[str, Any],
        log_history: Sequence[Mapping[str, Any]],
        examples: Sequence[Mapping[str, Any]],
        minutes: float,
        facts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Writes `summary.json`, `log_history.json` and `examples.json`, and returns the summary."""
        systems = {name: {"label": label, **describe(records)} for name, (label, records) in self.systems.items()}
        pair = self.systems[before][1], self.systems[after][1]
        summary = {
            "n_eval": len(self.rows),
            "minutes": minutes,
            "machine": {**machine(), "dtype": self.dtype},
            "versions": {name: version(name) for name in PACKAGES},
            "command": " ".join(command()),
            "commit": commit(),
            "config": {**script, **{name: getattr(self.config, name) for name in SHAPING}},
            "dataset": {"name": facts["name"], "split": "test", "facts": facts},
            "num_samples_iw_elbo": self.num_samples,
            "answer_target": self.answer_target,
            "systems": systems,
            "warmup": systems[before],
            "dro": systems[after],
            "delta": {m: difference(*pair, m) for m in METRICS if systems[before][m] is not None},
        }
        for name, content in (("summary", summary), ("log_history", log_history), ("examples", examples)):
            self._write(self.run_dir / f"{name}.json", _indented(content))
        return summary


def _indented(content: Any) -> str:
    return json.dumps(content, indent=2, default=str) + "\n"


def warmup_config(
    config: DROConfig, num_queries: int, learning_rate: float, warmup_selector: bool = True
) -> DROConfig:
    """Returns the settings of the supervised warm-up, from the retriever's order alone.

    It is DRO with one sample, the retriever's order, whose weight is 1: the selector learns to write that order (which
    a retrieval prior gives it anyway), the generator to answer from its first K passages. No gold passage is used, so
    nothing leaks.
    """
    queries_per_step = min(8, num_queries)  # on each process
    return dataclasses.replace(
        config,
        output_dir=str(Path(config.output_dir) / "warmup"),
        proposal="retriever",
        proposal_temperature=1.0,
        constrained=True,
        selector_objective="dro" if warmup_selector else "none",
        generator_objective="dro",
        reward="log_likelihood",
        beta=0.0,
        num_iterations=1,
        baseline="none",
        rollout_backend="transformers",  # nothing is sampled
        use_vllm=False,
        num_generations=1,
        num_generations_eval=None,
        per_device_train_batch_size=queries_per_step,
        gradient_accumulation_steps=1,
        generation_batch_size=None,
        steps_per_generation=None,
        max_steps=-(-num_queries // (queries_per_step * config.world_size)),
        learning_rate=learning_rate,
        generator_learning_rate=None,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        push_to_hub=False,
        hub_model_id=None,
    )


def last_checkpoint(config: DROConfig) -> str | None:
    """Returns the checkpoint to resume from: `resume_from_checkpoint`, where `last` is the newest one that is whole.

    Raises:
        InvalidInputError: if there is none, or it is not what was written.
    """
    wanted = config.resume_from_checkpoint
    return None if wanted is None else find_checkpoint(config.output_dir, wanted)


def set_aside(run_dir: Path) -> None:
    """Renames the directory of an earlier run, so that a new one neither mixes with it nor deletes it."""
    if PartialState().is_main_process and (run_dir / "records").is_dir():
        aside = run_dir.with_name(f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        run_dir.rename(aside)
        logger.warning("the earlier run in %s is now %s", run_dir, aside)
    PartialState().wait_for_everyone()


def example_table(example: Mapping[str, Any]) -> Table:
    """Returns a worked example for the terminal: what was chosen, how likely, and answered, before and after."""
    gold = ", ".join(example["answers"][:3])
    table = Table("", "first choice", "p(choice)", "weight", "answer", box=SIMPLE_HEAD, title_justify="left")
    table.title = Text(f"{example['query']}  (gold: {gold})")
    for when in ("before", "after"):
        side, first = example[when], example[when]["chosen"][0]
        candidate = example["candidates"][first]
        mark = "✓" if candidate["has_answer"] else "✗"
        weight = f"{side['importance_weights'][first]:.2f}"
        row = (
            when,
            f"{mark} [{first + 1}] {candidate['title']}",
            f"{side['probabilities'][first]:.2f}",
            weight,
            side["answer"],
        )
        table.add_row(*(Text(cell) for cell in row))
    return table


def _instructive(rows: Dataset, records: Sequence[Record], count: int) -> list[int]:
    """Returns questions whose candidates hold the answer, but not the retriever's first one: there is a choice."""
    found = [
        i
        for i, record in enumerate(records)
        if record.recall[-1] and not contains_answer(rows[i]["candidates"][0]["text"], rows[i]["answers"])
    ]
    return (found + [i for i in range(len(records)) if i not in found])[:count]


def before_after(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Returns one worked example of two systems from [`Experiment.examples`] of each."""
    shared = ("query", "answers", "candidates")
    parts = {
        name: {k: v for k, v in e.items() if k not in shared} for name, e in (("before", before), ("after", after))
    }
    return {**{key: before[key] for key in shared}, **parts}
