"""Evaluation of a system on held-out questions, question by question, so that systems can be compared in pairs."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from rich.progress import track

from .adapters import GENERATOR
from .answers import answer_logps, scored_answers
from .losses import Scores, weigh
from .metrics import contains_answer, exact_match, f1
from .pipeline import Passage, RAGPipeline


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
    """
    rows = list(rows)
    if description is not None:
        rows = track(rows, description, transient=True)
    records: list[Record] = []
    pending: list[tuple[Mapping[str, Any], list[int], float, float]] = []
    for row in rows:
        pending.append((row, *_select(pipeline, row, answer_target, num_samples, use_selector)))
        if len(pending) == batch_size:
            records += _answer(pipeline, pending)
            pending = []
    return records + _answer(pipeline, pending)


@torch.no_grad()
def _select(
    pipeline: RAGPipeline, row: Mapping[str, Any], answer_target: str, num_samples: int, use_selector: bool
) -> tuple[list[int], float, float]:
    """Returns the chosen candidates' indices, the answer's log-likelihood given them, and the bound."""
    settings, prompts = pipeline.settings, pipeline.generator_prompts
    query, candidates = row["query"], list(row["candidates"])
    answers = [prompts.answer(a) for a in scored_answers(row, answer_target, settings.num_candidates)]
    if not use_selector:
        context = prompts.generator(query, candidates[: settings.num_selected])
        logps = answer_logps(pipeline.role(GENERATOR), [context], answers)
        return list(range(settings.num_selected)), float(logps[0]), math.nan
    shown = pipeline.present(query, candidates)
    decisions = pipeline.decisions(query, shown)
    greedy = decisions.greedy()
    draw = decisions.sample(num_samples, every_first_choice=settings.num_selected == 1)
    permutations = [greedy, *draw.permutations]
    selector_logps = decisions.permutation_logps(draw.permutations)[0].sum(dim=-1)
    contexts = [prompts.generator(query, [shown[i] for i in z]) for z in permutations]
    logps = answer_logps(pipeline.role(GENERATOR), contexts, answers).cpu()
    scores = Scores(logps[None, 1:], selector_logps[None], draw.proposal_logps.sum(dim=-1)[None])
    bound = weigh(scores).metrics["iw_elbo"]
    return [candidates.index(shown[i]) for i in greedy], float(logps[0]), float(bound)


def _answer(
    pipeline: RAGPipeline, pending: Sequence[tuple[Mapping[str, Any], list[int], float, float]]
) -> list[Record]:
    if not pending:
        return []
    chosen = [[row["candidates"][i] for i in indices] for row, indices, _, _ in pending]
    contexts = [
        pipeline.generator_prompts.generator(row["query"], passages)
        for (row, *_), passages in zip(pending, chosen, strict=True)
    ]
    predictions = pipeline.generate(contexts)
    return [
        Record(
            query=row["query"],
            prediction=prediction,
            exact_match=exact_match(prediction, row["answers"]),
            f1=f1(prediction, row["answers"]),
            recall=recalls(passages, row["answers"]),
            answer_logp=logp,
            iw_elbo=bound,
            chosen=indices,
        )
        for (row, indices, logp, bound), passages, prediction in zip(pending, chosen, predictions, strict=True)
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
    """Returns the mean of every metric over the questions; metrics that a system does not have are left out."""
    depths = sorted(records[0].recall)
    names = ["exact_match", "f1", *(f"recall@{k}" for k in depths if k in (1, 3, 5)), "answer_logp", "iw_elbo"]
    means = {name: sum(per_question(records, name)) / len(records) for name in names}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}
