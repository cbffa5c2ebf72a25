"""Evaluation of a system on held-out questions, question by question, so that systems can be compared in pairs."""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import track

from .adapters import GENERATOR
from .answers import answer_logps, scored_answers
from .errors import InvalidInputError
from .metrics import contains_answer, exact_match, f1
from .permutations import Permutation
from .pipeline import Passage, RAGPipeline
from .weights import iw_elbo, log_importance_weights

_STDERR = Console(stderr=True)


@dataclass(frozen=True)
class Record:
    """What one system did with one question."""

    query: str
    prediction: str
    exact_match: float
    f1: float
    recall: dict[int, float]
    """k -> whether one of the first k chosen passages contains an answer."""
    answer_logp: float
    """log p_g(y | x, chosen passages), nats."""
    iw_elbo: float
    """The bound on log p(y|x), nats; NaN for a system without a selector."""
    chosen: list[int]
    """The chosen passages, as indices into the row's candidates."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Returns the record that `dataclasses.asdict` and JSON made of one."""
        recall = {int(k): value for k, value in record["recall"].items()}
        return dataclasses.replace(cls(**record), recall=recall)


def evaluate_rows(
    pipeline: RAGPipeline,
    rows: Iterable[Mapping[str, Any]],
    answer_target: str = "surface",
    num_samples: int = 8,
    use_selector: bool = True,
    batch_size: int = 16,
    description: str | None = None,
) -> list[Record]:
    """Returns one record per row, decoded greedily.

    Args:
        pipeline ([`RAGPipeline`]): the system.
        rows (iterable of rows): `query`, `answers`, `candidates`.
        answer_target (`str`): the y of `answer_logp` and `iw_elbo`; exact match and F1 always use all gold answers.
        num_samples (`int`): permutations of `iw_elbo`. With K = 1 all N of them are enumerated instead, and the bound
            is the log marginal likelihood.
        use_selector (`bool`): `False`: the retriever's first K passages, no selector and no bound.
        batch_size (`int`): answers generated together.
        description (`str`, *optional*): shows a progress bar with this text.

    With several processes each takes its share, and all return all records.
    """
    state = PartialState()
    rows = list(rows)
    shard = rows[state.process_index :: state.num_processes]
    progress = shard if description is None else track(shard, description, transient=True, console=_STDERR)
    records: list[Record] = []
    pending: list[_Pending] = []
    with pipeline.evaluating():
        for row in progress:
            pending.append(_select(pipeline, row, answer_target, num_samples, use_selector))
            if len(pending) == batch_size:
                records += _answer(pipeline, pending)
                pending = []
        records += _answer(pipeline, pending)
    gathered = [records]
    if state.num_processes > 1:
        gathered = gather_object([records])
    return [gathered[i % state.num_processes][i // state.num_processes] for i in range(len(rows))]


@dataclass(frozen=True)
class _Pending:
    """A question whose passages are chosen and whose answer is not written yet."""

    row: Mapping[str, Any]
    chosen: list[int]
    answer_logp: float
    iw_elbo: float

    @property
    def passages(self) -> list[Passage]:
        return [self.row["candidates"][i] for i in self.chosen]


def score_permutations(
    pipeline: RAGPipeline,
    row: Mapping[str, Any],
    shown: Sequence[Passage],
    permutations: Sequence[Permutation],
    answer_target: str,
) -> torch.Tensor:
    """Returns log p_g(y|x,d_z) of each permutation of the candidates as shown, `(m,)`, nats, on the CPU."""
    prompts = pipeline.generator_prompts
    contexts = [prompts.generator(row["query"], [shown[i] for i in z]) for z in permutations]
    targets = scored_answers(row, answer_target, pipeline.settings.num_candidates)
    answers = [prompts.answer(a) for a in targets]
    return answer_logps(pipeline.role(GENERATOR), contexts, [answers] * len(contexts)).cpu()


def _select(
    pipeline: RAGPipeline, row: Mapping[str, Any], answer_target: str, num_samples: int, use_selector: bool
) -> _Pending:
    """Chooses passages for one question, and scores its answer under them."""
    settings, candidates = pipeline.settings, list(row["candidates"])
    if not use_selector:
        order = tuple(range(settings.num_selected))
        logps = score_permutations(pipeline, row, candidates, [order], answer_target)
        return _Pending(row, list(order), float(logps[0]), math.nan)
    shown = pipeline.present(row["query"], candidates)
    decisions = pipeline.decisions([row["query"]], [shown])
    [greedy] = decisions.greedy()
    # The same randomness for every system and every time, and none of the training's.
    generator = torch.Generator().manual_seed(zlib.crc32(row["query"].encode()))
    [draw] = decisions.sample(num_samples, every_first_choice=settings.num_selected == 1, generators=[generator])
    logps = score_permutations(pipeline, row, shown, [greedy, *draw.permutations], answer_target)
    [(selector_logps, _)] = decisions.permutation_logps([draw.permutations])
    log_ratio = (selector_logps - draw.proposal_logps).sum(dim=-1)
    bound = iw_elbo(log_importance_weights(logps[1:], log_ratio))
    return _Pending(row, [candidates.index(shown[i]) for i in greedy], float(logps[0]), float(bound))


def _answer(pipeline: RAGPipeline, pending: Sequence[_Pending]) -> list[Record]:
    if not pending:
        return []
    prompts = pipeline.generator_prompts
    predictions = pipeline.generate([prompts.generator(p.row["query"], p.passages) for p in pending])
    return [
        Record(
            query=p.row["query"],
            prediction=prediction,
            exact_match=exact_match(prediction, p.row["answers"]),
            f1=f1(prediction, p.row["answers"]),
            recall=recalls(p.passages, p.row["answers"]),
            answer_logp=p.answer_logp,
            iw_elbo=p.iw_elbo,
            chosen=p.chosen,
        )
        for p, prediction in zip(pending, predictions, strict=True)
    ]


def recalls(passages: Sequence[Passage], answers: Sequence[str]) -> dict[int, float]:
    """Returns recall@k for each k up to K: whether a normalised answer occurs in one of the first k passages."""
    found = [contains_answer(p["text"], answers) for p in passages]
    return {k: float(any(found[:k])) for k in range(1, len(found) + 1)}


def per_question(records: Sequence[Record], metric: str) -> list[float]:
    """Returns one value per question of `exact_match`, `f1`, `recall@k`, `answer_logp` or `iw_elbo`."""
    if metric.startswith("recall@"):
        return [record.recall[int(metric.removeprefix("recall@"))] for record in records]
    return [getattr(record, metric) for record in records]


def aggregate(records: Sequence[Record]) -> dict[str, float]:
    """Returns the mean of every metric over the questions; metrics that a system does not have are left out.

    Raises:
        InvalidInputError: if there are no records.
    """
    if not records:
        raise InvalidInputError("there is no question to evaluate on")
    depths = sorted(records[0].recall)
    names = ["exact_match", "f1", *(f"recall@{k}" for k in depths if k in (1, 3, 5)), "answer_logp", "iw_elbo"]
    means = {name: mean_of_finite(per_question(records, name)) for name in names}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def mean_of_finite(values: Sequence[float]) -> float:
    """Returns the mean of the finite values, NaN if there are none; -inf would be a question without a likelihood."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
