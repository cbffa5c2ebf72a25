"""What the E-step sees in one row: its permutations, and what each of them is worth to both models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .evaluation import score_permutations
from .losses import Scores, Weighting, weigh
from .permutations import Permutation
from .pipeline import Passage, RAGPipeline
from .weights import effective_sample_size, iw_elbo, log_importance_weights


@dataclass(frozen=True)
class Weighed:
    """The permutations drawn for one query, the weightiest first. Tensors are `(m,)`, in main memory."""

    query: str
    permutations: list[Permutation | None]
    """m, as indices into the row's candidates; `None` for a free text in which no identifier was recognised."""
    selector_logps: torch.Tensor
    """log p_s(z|x,d), nats."""
    generator_logps: torch.Tensor
    """log p_g(y|x,d_z), nats."""
    importance_weights: torch.Tensor
    advantages: torch.Tensor
    """What the selector's loss multiplies each permutation's log-likelihood with; of PPO, which has one for each
    decision, and of a selector that is not trained: DRO's."""
    effective_sample_size: float
    iw_elbo: float
    """nats"""

    @property
    def texts(self) -> list[str]:
        """The permutations as numbers of the row's candidates: `[3] > [1]`; empty where there is none."""
        return [" > ".join(f"[{i + 1}]" for i in z or ()) for z in self.permutations]


def weigh_row(
    pipeline: RAGPipeline,
    row: Mapping[str, Any],
    num_generations: int = 8,
    answer_target: str = "surface",
    seed: int = 0,
    proposal_temperature: float = 1.0,
) -> Weighed:
    """Draws permutations of a row's candidates and weighs them, as the trainer does.

    Args:
        pipeline ([`RAGPipeline`]): both models.
        row (mapping): `query`, `answers`, `candidates`.
        num_generations (`int`): m.
        answer_target (`str`): the y that is scored, see [`DROConfig`].
        seed (`int`): of the draws.
        proposal_temperature (`float`): of what is drawn from; the weights are corrected for it.
    """
    shown = pipeline.present(row["query"], row["candidates"], seed)
    with pipeline.evaluating():
        decisions = pipeline.decisions([row["query"]], [shown])
        generators = [torch.Generator().manual_seed(seed)]
        [draw] = decisions.sample(num_generations, proposal_temperature, generators=generators)
        [generator_logps] = score_permutations(pipeline, [row], [shown], [draw.permutations], answer_target)
    selector_logps = draw.old_selector_logps.sum(dim=-1)
    scores = Scores(generator_logps[None], selector_logps[None], draw.proposal_logps.sum(dim=-1)[None])
    return weighed(row, shown, draw.permutations, weigh(scores), 0)


def weighed(
    row: Mapping[str, Any],
    shown: Sequence[Passage],
    permutations: Sequence[Permutation | None],
    weighting: Weighting,
    index: int,
) -> Weighed:
    """Returns what the permutations of a query are worth.

    Args:
        row (mapping): `query`, `candidates`.
        shown (sequence of passages): its candidates in the order in which the selector read them.
        permutations (sequence of m): as indices into `shown`.
        weighting ([`~losses.Weighting`]): of several queries.
        index (`int`): which of them it is.
    """
    scores, weights = weighting.scores, weighting.importance_weights[index]
    order = weights.argsort(descending=True, stable=True)
    places = [row["candidates"].index(passage) for passage in shown]
    log_weights = log_importance_weights(scores.generator_logps[index], scores.log_ratio[index])
    drawn = [permutations[z] for z in order.tolist()]
    return Weighed(
        query=row["query"],
        permutations=[None if z is None else tuple(places[i] for i in z) for z in drawn],
        selector_logps=scores.selector_logps[index][order].cpu(),
        generator_logps=scores.generator_logps[index][order].cpu(),
        importance_weights=weights[order].cpu(),
        advantages=weighting.advantages[index][order].cpu(),
        effective_sample_size=float(effective_sample_size(weights)),
        iw_elbo=float(iw_elbo(log_weights)),
    )
