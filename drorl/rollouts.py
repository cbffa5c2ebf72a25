"""Rollouts: what the E-step draws for one query, and hands to the M-step.

Shapes: N candidates, K chosen, m permutations of one query, T decisions (constrained: K) or tokens (free text).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .adapters import SELECTOR
from .answers import scored_answers
from .config import DROConfig
from .likelihood import sequence_logps
from .permutations import Permutation, parse_permutation
from .pipeline import Passage, RAGPipeline
from .policy import Draw
from .prompts import SelectorPrompt


@dataclass(frozen=True)
class Rollout:
    """One query's permutations; nothing here has a gradient."""

    prompt: SelectorPrompt
    scores: Sequence[float] | None
    """N: the retriever's scores, when the policy uses them."""
    permutations: list[Permutation | None]
    """m: `None` for a free text in which no identifier was recognised."""
    completion_ids: list[list[int]] | None
    """m: the sampled tokens, in free text only."""
    proposal_logps: torch.Tensor
    """(m, T): log q of each decision or token, nats."""
    old_selector_logps: torch.Tensor
    """(m, T): log p_s when the permutations were drawn, nats."""
    contexts: list[list[int] | None]
    """m: the generator's prompt for each permutation."""
    supervised_context: list[int] | None
    """The generator's prompt over the retriever's first K passages, when `sft` needs it."""
    answers: list[list[int]]
    """The tokenized gold answers that are scored."""
    valid_rate: float = 1.0
    """Share of the samples that needed no repair; 1 by construction when constrained."""

    @property
    def drawn(self) -> list[Permutation]:
        """The permutations of the samples that have one: all of them, when constrained."""
        return [z for z in self.permutations if z is not None]

    @property
    def unique_ratio(self) -> float:
        """Distinct permutations per sample."""
        return len(set(self.permutations)) / len(self.permutations)


def draw_rollout(
    pipeline: RAGPipeline, config: DROConfig, row: Mapping[str, Any], shown: Sequence[Passage]
) -> Rollout:
    """Draws permutations of one query from the constrained policy.

    Args:
        pipeline ([`RAGPipeline`]): both models.
        config ([`DROConfig`]): proposal and number of samples.
        row (mapping): `query`, `answers`, `candidates`.
        shown (`list`): the candidates as the prompt shows them.
    """
    decisions = pipeline.decisions(row["query"], shown)
    if config.proposal == "retriever":
        order = tuple(shown.index(candidate) for candidate in row["candidates"][: config.num_selected])
        # The weight of a single sample is 1, however likely it is, so no probability is computed.
        draw = Draw([order], torch.zeros(1, config.num_selected))
        logps = draw.proposal_logps
    else:
        every_first_choice = config.proposal == "first_choices"
        draw = decisions.sample(config.num_generations, config.proposal_temperature, every_first_choice)
        logps, _ = decisions.permutation_logps(draw.permutations)
    return Rollout(
        prompt=decisions.prompt,
        scores=decisions.scores,
        permutations=list(draw.permutations),
        completion_ids=None,
        proposal_logps=draw.proposal_logps,
        old_selector_logps=logps,
        **_generator_inputs(pipeline, config, row, shown, draw.permutations),
    )


def read_rollout(
    pipeline: RAGPipeline,
    config: DROConfig,
    row: Mapping[str, Any],
    shown: Sequence[Passage],
    completion_ids: list[list[int]],
) -> Rollout:
    """Reads permutations of one query from sampled free texts, `completion_ids`; see [`draw_rollout`]."""
    prompt = pipeline.prompts.selector(row["query"], shown)
    texts = pipeline.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    parsed = [parse_permutation(text, prompt.identifiers, config.num_selected) for text in texts]
    permutations = [p.permutation for p in parsed]
    logps = text_logps(pipeline.role(SELECTOR), prompt, completion_ids, config.selector_temperature)
    return Rollout(
        prompt=prompt,
        scores=None,
        permutations=permutations,
        completion_ids=completion_ids,
        proposal_logps=logps,
        old_selector_logps=logps,
        valid_rate=sum(p.valid for p in parsed) / len(parsed),
        **_generator_inputs(pipeline, config, row, shown, permutations),
    )


def text_logps(
    model: nn.Module, prompt: SelectorPrompt, completion_ids: Sequence[Sequence[int]], temperature: float
) -> torch.Tensor:
    """Returns the log-probability of each token of each text, `(m, T)`, nats, `-inf` where a text has ended."""
    logps = sequence_logps(model, [(prompt.ids, tokens) for tokens in completion_ids], temperature)
    return pad_sequence(logps, batch_first=True, padding_value=-torch.inf)


def _generator_inputs(
    pipeline: RAGPipeline,
    config: DROConfig,
    row: Mapping[str, Any],
    shown: Sequence[Passage],
    permutations: Sequence[Permutation | None],
) -> dict[str, Any]:
    """Returns what the generator reads under each permutation, and what it is to answer."""
    prompts, query = pipeline.generator_prompts, row["query"]
    supervised = None
    if config.generator_objective == "sft":
        supervised = prompts.generator(query, row["candidates"][: config.num_selected])
    return {
        "contexts": [None if z is None else prompts.generator(query, [shown[i] for i in z]) for z in permutations],
        "supervised_context": supervised,
        "answers": [prompts.answer(a) for a in scored_answers(row, config.answer_target, config.num_candidates)],
    }


def stack(rows: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Stacks one tensor per query, `(m', T')` or `(m',)`, into `(B, m, T)` or `(B, m)`, padded with `-inf`."""
    shape = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    stacked = rows[0].new_full((len(rows), *shape), -torch.inf, device=device)
    for i, row in enumerate(rows):
        stacked[(i, *map(slice, row.shape))] = row
    return stacked


def without_nan(logps: torch.Tensor) -> torch.Tensor:
    """Takes a query with a NaN out of the graph: a weight of 0 would not stop it, since 0 * NaN is NaN."""
    return logps.detach() if logps.isnan().any() else logps


def sum_over_tokens(token_logps: torch.Tensor) -> torch.Tensor:
    """Sums `(B, m, T)` over T without its padding; a sample that is all padding stays `-inf`."""
    mask = token_logps.isfinite()
    total = token_logps.masked_fill(~mask, 0.0).sum(dim=-1)
    return total.masked_fill(~mask.any(dim=-1), -torch.inf)
