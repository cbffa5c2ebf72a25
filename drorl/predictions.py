"""Predictions of a run for the questions of a file: made in shards, kept as `drorl score` reads them, measured."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from .adapters import ROLES
from .data.fields import Row
from .data.files import records
from .data.prepare import Prepared, write_rows
from .data.reading import Reading
from .data.rows import RowError
from .errors import InvalidInputError
from .evaluation import evaluate_rows
from .metrics import KILT, MetricSettings
from .pipeline import SETTINGS_FILE, RAGPipeline
from .records import Record
from .scoring import DEPTHS, NATS, score_record
from .statistics import Interval, bootstrap_mean

SHARD_ROWS = 50


def predict_file(
    pipeline: RAGPipeline,
    run_dir: Path,
    reading: Reading,
    output: Path,
    answer_target: str = "surface",
    num_samples: int = 8,
    quiet: bool = False,
) -> Prepared:
    """Writes what a run predicts for each row, greedily; one that was killed goes on after its last 50 questions.

    A line is the row with its `prediction`; its candidates in the order in which the run ranks them (the chosen ones,
    then the others that it read, then those that it did not), `predicted_support_idxs` (the chosen ones by their
    places in the row that was read) and `support_idxs` (the golds), `answer_logp` and `iw_elbo`, in nats.

    Args:
        pipeline ([`RAGPipeline`]): the run.
        run_dir (`Path`): where it was loaded from.
        reading ([`Reading`]): the rows. Each has K candidates and an answer.
        output (`Path`): the file.
        answer_target (`str`): the y of `answer_logp`, see [`DROConfig`].
        num_samples (`int`): permutations of `iw_elbo`.
        quiet (`bool`): no progress on stderr.

    Raises:
        InvalidInputError: a row, or a file, cannot be used.
    """

    def predicted(rows: list[Row]) -> list[Row]:
        found = evaluate_rows(pipeline, rows, answer_target, num_samples)
        return [_with_prediction(*pair) for pair in zip(rows, found, strict=True)]

    depends = [_identity(run_dir), str(pipeline.model.dtype), answer_target, num_samples]
    return write_rows(reading, output, predicted, depends, quiet, SHARD_ROWS)


def _identity(run_dir: Path) -> str:
    """A hash of the run's settings and adapters."""
    digest = hashlib.sha256((run_dir / SETTINGS_FILE).read_bytes())
    for role in ROLES:
        digest.update((run_dir / role / "adapter_model.safetensors").read_bytes())
    return digest.hexdigest()


def _with_prediction(row: Row, record: Record) -> Row:
    candidates = row["candidates"]
    unread = [i for i in range(len(candidates)) if i not in record.order]
    golds = [i for i, candidate in enumerate(candidates) if candidate.get("is_gold")]
    return {
        **row,
        "prediction": record.prediction,
        "candidates": [candidates[i] for i in [*record.order, *unread]],
        **({"predicted_support_idxs": record.chosen, "support_idxs": golds} if golds else {}),
        **{name: value if math.isfinite(value := getattr(record, name)) else None for name in NATS},
    }


def measure_file(
    path: Path, num_candidates: int, settings: MetricSettings = KILT
) -> tuple[int, dict[str, tuple[Interval, int]]]:
    """Returns how many predictions a file has, and of each score the mean with its interval, and of how many it is.

    Args:
        path (`Path`): see [`predict_file`].
        num_candidates (`int`): N; recall at more is left out.
        settings ([`MetricSettings`]): what a score means.

    Raises:
        InvalidInputError: if there are none.
    """
    count, values = 0, defaultdict[str, list[float]](list)
    for number, row in records(path):
        count += 1
        found = score_record(number, row, settings)
        if isinstance(found, RowError):
            raise found.of(path)
        likelihoods = {name: row[name] for name in NATS if row[name] is not None}
        for name, value in (found.measured | likelihoods).items():
            values[name].append(value)
    if not count:
        raise InvalidInputError("there is no question to evaluate on")
    too_deep = tuple(f"recall@{k}" for k in DEPTHS if k > num_candidates)
    kept = {name: of for name, of in values.items() if not name.endswith(too_deep)}
    return count, {name: (bootstrap_mean(of), len(of)) for name, of in kept.items()}


def as_json(count: int, scores: Mapping[str, tuple[Interval, int]]) -> str:
    """Returns one line of JSON; an interval of a single question, which has no ends, is `null`."""
    means = {
        name: {**asdict(of), "ci95": of.ci95 if all(map(math.isfinite, of.ci95)) else None, "n": n}
        for name, (of, n) in scores.items()
    }
    return json.dumps({"n": count, **means})
