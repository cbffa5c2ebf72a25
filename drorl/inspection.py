"""What the E-step sees in one row: its permutations, and what each of them is worth to both models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .evaluation import score_permutations
from .losses import Scores, weigh
from .permutations import Permutation
from .pipeline import RAGPipeline
from .weights import effective_sample_size


@dataclass(frozen=True)
class Weighed:
    """The permutations drawn for one query, the weightiest first. Tensors are `(m,)`."""

    permutations: list[Permutation]
    """m, as indices into the row's candidates."""
    selector_logps: torch.Tensor
    """log p_s(z|x,d), nats."""
    generator_logps: torch.Tensor
    """log p_g(y|x,d_z), nats."""
    importance_weights: torch.Tensor
    effective_sample_size: float
    iw_elbo: float
    """nats"""


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
    weighting = weigh(scores)
    [weights] = weighting.importance_weights
    order = weights.argsort(descending=True, stable=True)
    places = [row["candidates"].index(passage) for passage in shown]
    return Weighed(
        [tuple(places[i] for i in draw.permutations[z]) for z in order.tolist()],
        selector_logps[order],
        generator_logps[order],
        weights[order],
        float(effective_sample_size(weights)),
        float(weighting.metrics["iw_elbo"]),
    )
