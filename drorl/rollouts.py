"""Rollouts: what the E-step draws for one query, and hands to the M-step.

Shapes: N candidates, K chosen, m permutations of one query, T decisions (constrained: K) or tokens (free text).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from trl.trainer.utils import pad

from .adapters import GENERATOR, REFERENCE, SELECTOR
from .answers import answer_logps, scored_answers
from .config import DROConfig
from .errors import InvalidInputError
from .likelihood import sequence_logps
from .metrics import f1
from .permutations import Permutation, parse_permutation, prefixes_of
from .pipeline import Passage, RAGPipeline
from .policy import Drawing
from .prompts import SelectorPrompt
from .sharding import most
from .tree import TokenTree


@dataclass(frozen=True)
class Question:
    """A training row, its candidates in the order in which this step shows them."""

    row: Mapping[str, Any]
    shown: Sequence[Passage]
    seed: int
    """What its permutations are drawn with: the same ones whenever, and with whatever other questions, it is done."""


@dataclass(frozen=True)
class Rollout:
    """One query's permutations; nothing here has a gradient."""

    question: Question
    prompt: SelectorPrompt
    permutations: list[Permutation | None]
    """m: `None` for a free text in which no identifier was recognised."""
    contexts: list[list[int] | None]
    """m: the generator's prompt for each permutation."""
    supervised_context: list[int] | None
    """The generator's prompt over the retriever's first K passages, when `sft` needs it."""
    answers: list[list[int]]
    """The tokenized gold answers that are scored."""
    completion_ids: list[list[int]] | None = None
    """m: the sampled tokens, in free text only."""
    proposal_logps: torch.Tensor | None = None
    """(m, T): log q of each decision or token, nats; `None`: the selector's own."""
    old_selector_logps: torch.Tensor | None = None
    """(m, T): log p_s when the permutations were drawn, nats; `None`: as it is in the M-step."""
    old_values: torch.Tensor | None = None
    """(m, T): the critic's values then; `None`: as they are in the M-step, or there is no critic."""
    reference_logps: torch.Tensor | None = None
    """(m, T): log p_ref of the selector as it was when training began, nats; `None`: nothing asks for it."""
    valid_rate: float = 1.0
    """Share of the samples that needed no repair; 1 by construction when constrained."""
    sampling_logps: torch.Tensor | None = None
    """(m, T): log p_s of each decision or token according to the engine that drew it, nats; `None`: drawn here."""
    version: str | None = None
    """Of the selector's adapter in that engine; see [`engines.delivery`]."""
    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    """What was found out when the rollout was first trained on, and holds for later epochs: `rewards`, (m,)."""

    @property
    def drawn(self) -> list[Permutation]:
        """The permutations of the samples that have one: all of them, when constrained."""
        return [z for z in self.permutations if z is not None]

    @property
    def unique_ratio(self) -> float:
        """Distinct permutations per sample."""
        return len(set(self.permutations)) / len(self.permutations)

    @property
    def num_items(self) -> int:
        """Decisions or tokens of all samples together."""
        return sum(map(len, self.completion_ids or self.drawn))

    @property
    def size(self) -> int:
        """Distinct tokens that the larger of the two models encodes."""
        completions: Sequence[Sequence[int]] = self.completion_ids or []
        if not completions and not self.prompt.queries:
            completions = self.prompt.slate.decisions(prefixes_of(self.drawn)).contexts
        selector, generator = TokenTree(), TokenTree()
        queries = [pair for z in prefixes_of(self.drawn) for pair in self.prompt.queries_after(z)]
        for prompt, tokens in queries or [(self.prompt.ids, tokens) for tokens in completions or [()]]:
            selector.add([*prompt, *tokens])
        for context in filter(None, [*self.contexts, self.supervised_context]):
            end = generator.add(context)[-1]
            for answer in self.answers:
                generator.add(answer, end)
        return max(len(selector), len(generator))


@dataclass(frozen=True)
class SelectorScores:
    """What the selector says of permutations."""

    token_logps: torch.Tensor
    """(B, m, T): log p_s of each decision or token, nats; `-inf` in the padding."""
    metrics: dict[str, torch.Tensor]
    values: torch.Tensor | None = None
    """(B, m, T): the critic's values of the states before each decision, if there is a critic."""


def batches(rollouts: Sequence[Rollout], limit: int | None) -> Iterator[list[Rollout]]:
    """Yields the rollouts in groups that have at most `limit` tokens (`max_tokens_per_forward`) for either model.

    Raises:
        InvalidInputError: if one query alone has more.
    """
    batch: list[Rollout] = []
    total = 0
    for rollout in rollouts:
        size = rollout.size if limit is not None else 0
        if limit is not None and size > limit:
            raise InvalidInputError(
                f"one query needs {size} distinct tokens in a forward pass, but max_tokens_per_forward is {limit}: "
                "raise it, or lower num_candidates, num_selected, max_passage_tokens or num_generations"
            )
        if batch and limit is not None and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(rollout)
        total += size
    yield batch


def draw_rollouts(
    pipeline: RAGPipeline,
    config: DROConfig,
    questions: Sequence[Question],
    decide: Callable[[Sequence[SelectorPrompt]], Drawing] | None = None,
) -> tuple[list[Rollout], Drawing | None]:
    """Draws permutations of each question from the constrained policy; returns them and what they were drawn from.

    From the retriever's order nothing is drawn, so the selector is not asked: `None`.

    Args:
        pipeline ([`RAGPipeline`]): both models.
        config ([`DROConfig`]): m, K and the proposal.
        questions (`list` of B [`Question`]): what to draw for.
        decide (*optional*): makes the decisions after prompts; default: the pipeline's own selector.
    """
    prompts = [pipeline.prompts.selector(q.row["query"], q.shown) for q in questions]
    decisions: Drawing | None = None
    drawn: list[dict[str, Any]]
    if config.proposal == "retriever":
        # The weight of a single sample is 1, however likely it is, so no probability is computed.
        orders = [tuple(map(q.shown.index, q.row["candidates"][: config.num_selected])) for q in questions]
        drawn = [{"permutations": [order]} for order in orders]
    else:
        decisions = decide(prompts) if decide else pipeline.decide(prompts)
        every_first_choice = config.proposal == "first_choices"
        generators = [torch.Generator().manual_seed(question.seed) for question in questions]
        sampled = decisions.sample(config.num_generations, config.proposal_temperature, every_first_choice, generators)
        if config.selector_objective == "pointwise":  # weighs each passage by itself, however many are read later
            sampled = [draw.first() for draw in sampled]
        values = decisions.values([draw.permutations for draw in sampled])
        olds = [None] * len(sampled) if values is None else values.detach()
        drawn = [{**vars(draw), "old_values": old} for draw, old in zip(sampled, olds, strict=True)]
    triples = zip(questions, prompts, drawn, strict=True)
    return [rollout_of(pipeline, config, question, prompt, **draw) for question, prompt, draw in triples], decisions


def read_rollout(
    pipeline: RAGPipeline, config: DROConfig, question: Question, completion_ids: list[list[int]], **drawn: Any
) -> Rollout:
    """Reads permutations of one question from sampled free texts, `completion_ids`; see [`draw_rollouts`]."""
    prompt = pipeline.prompts.selector(question.row["query"], question.shown)
    texts = pipeline.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    parsed = [parse_permutation(text, prompt.identifiers, config.num_selected) for text in texts]
    drawn |= {"completion_ids": completion_ids, "valid_rate": sum(p.valid for p in parsed) / len(parsed)}
    return rollout_of(pipeline, config, question, prompt, [p.permutation for p in parsed], **drawn)


def remember(pipeline: RAGPipeline, config: DROConfig, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Returns rollouts with how likely they are under the selector as it is; free texts were drawn from it."""
    scores = score_selector(pipeline, config, rollouts)
    values = [None] * len(rollouts) if scores.values is None else scores.values
    return [
        replace(
            r,
            old_selector_logps=old,
            old_values=value,
            proposal_logps=old if r.proposal_logps is None else r.proposal_logps,
        )
        for r, old, value in zip(rollouts, scores.token_logps, values, strict=True)
    ]


@torch.no_grad()
def compare_with_reference(pipeline: RAGPipeline, config: DROConfig, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Returns rollouts with how likely they are under the adapter `reference`."""
    logps = score_selector(pipeline, config, rollouts, role=REFERENCE).token_logps
    return [replace(r, reference_logps=of) for r, of in zip(rollouts, logps, strict=True)]


def score_selector(
    pipeline: RAGPipeline,
    config: DROConfig,
    rollouts: Sequence[Rollout],
    decisions: Drawing | None = None,
    role: str = SELECTOR,
) -> SelectorScores:
    """Returns log p_s of each decision or token, with gradient where that is enabled; `-inf` where a text has ended.

    Args:
        pipeline ([`RAGPipeline`]): both models.
        config ([`DROConfig`]): the temperature of free text.
        rollouts (`list` of B [`Rollout`]): all constrained, or all free text.
        decisions ([`~policy.Drawing`], *optional*): what the rollouts were drawn from, to use its states again.
        role (`str`): the adapter that is asked.
    """
    if rollouts[0].completion_ids is not None:
        pairs = [(r.prompt.ids, tokens) for r in rollouts for tokens in r.completion_ids or []]
        tokens = iter(sequence_logps(pipeline.role(role), pairs, config.selector_temperature))
        texts = [stack([next(tokens) for _ in r.permutations]) for r in rollouts]
        return SelectorScores(stack(texts), {})
    decisions = decisions or pipeline.decide([r.prompt for r in rollouts], keep=False, role=role)
    drawn = [r.drawn for r in rollouts]
    logps, entropies = zip(*decisions.permutation_logps(drawn), strict=True)
    metrics = {"selector/entropy": torch.stack([e.mean() for e in entropies]).mean()}
    # Without gradient they come from what is known of the decisions, which is kept on the CPU.
    return SelectorScores(stack(logps).to(pipeline.owner(role).device), metrics, decisions.values(drawn))


def answer_logps_of(
    pipeline: RAGPipeline, rollouts: Sequence[Rollout], contexts: Sequence[Sequence[list[int] | None]]
) -> torch.Tensor:
    """Returns the answers' log-likelihoods under contexts of each query, `(B, n)`, nats, from one pass.

    A query with a NaN is left out and scores `-inf`: a weight of 0 would not stop it, since 0 * NaN is NaN.
    """
    model = pipeline.role(GENERATOR)
    answers = [r.answers for r, of_query in zip(rollouts, contexts, strict=True) for _ in of_query]
    logps = answer_logps(model, [*chain.from_iterable(contexts)], answers)
    parts = logps.split([len(of_query) for of_query in contexts])
    if most(int(logps.isnan().any()), model):
        pairs = zip(contexts, parts, strict=True)
        contexts = [[None] * len(of_query) if part.isnan().any() else of_query for of_query, part in pairs]
        return answer_logps_of(pipeline, rollouts, contexts)
    return stack(parts).to(model.device)


def rollout_of(
    pipeline: RAGPipeline,
    config: DROConfig,
    question: Question,
    prompt: SelectorPrompt,
    permutations: list[Permutation | None],
    **drawn: Any,
) -> Rollout:
    """Returns a rollout with what the generator reads under each permutation, and what it is to answer."""
    prompts, row, shown = pipeline.generator_prompts, question.row, question.shown
    query, supervised = row["query"], None
    if config.generator_objective == "sft":
        supervised = prompts.generator(query, row["candidates"][: config.num_selected])
    contexts = [None if z is None else prompts.generator(query, [shown[i] for i in z]) for z in permutations]
    answers = [prompts.answer(a) for a in scored_answers(row, config.answer_target, config.num_candidates)]
    return Rollout(question, prompt, permutations, contexts, supervised, answers, **drawn)


def stack(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stacks one tensor per query, `(m', T')` or `(m',)`, into `(B, m, T)` or `(B, m)`, padded with `-inf`."""
    return pad(list(rows), padding_value=-torch.inf)


def stacked(rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Stacks one `(m', T')` per query into `(B, m, T)`; `None` if they are not all there."""
    known = [row for row in rows if row is not None]
    return stack(known) if len(known) == len(rows) else None


def stacked_sums(rows: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    """Returns the sums over T of one `(m', T')` per query, `(B, m)`; `None` if they are not all there."""
    known = stacked(rows)
    return None if known is None else sum_over_tokens(known.to(device))


def sum_over_tokens(token_logps: torch.Tensor) -> torch.Tensor:
    """Sums `(B, m, T)` over T without its padding; a sample that is all padding stays `-inf`."""
    mask = token_logps.isfinite()
    total = token_logps.masked_fill(~mask, 0.0).sum(dim=-1)
    return total.masked_fill(~mask.any(dim=-1), -torch.inf)


def rewards_of(
    pipeline: RAGPipeline, reward: str, rollouts: Sequence[Rollout], generator_logps: torch.Tensor
) -> torch.Tensor:
    """Returns what a policy gradient maximises, `(B, m)`: see `DROConfig.reward`.

    Of rollouts that are trained on again, what it was the first time: the generator has learned since.

    Args:
        pipeline ([`RAGPipeline`]): both models.
        reward (`str`): `log_likelihood`, `likelihood` or `f1`.
        rollouts (`list` of B [`Rollout`]): the permutations.
        generator_logps (`torch.Tensor` of shape `(B, m)`): log p_g(y|x,d_z), nats.
    """
    rewards = stacked([r.seen.get("rewards") for r in rollouts])
    if rewards is None:
        rewards = _rewards_now(pipeline, reward, rollouts, generator_logps)
        for rollout, of_query in zip(rollouts, rewards, strict=True):
            rollout.seen["rewards"] = of_query
    return rewards.to(generator_logps)


def _rewards_now(
    pipeline: RAGPipeline, reward: str, rollouts: Sequence[Rollout], generator_logps: torch.Tensor
) -> torch.Tensor:
    if reward == "log_likelihood":
        return generator_logps
    if reward == "likelihood":
        return generator_logps.exp()
    keys = [[None if c is None else tuple(c) for c in r.contexts] for r in rollouts]
    distinct = list(dict.fromkeys(key for of in keys for key in of if key is not None))
    with pipeline.evaluating():
        answers = dict(zip(distinct, pipeline.generate(distinct), strict=True))
    scores = [
        [f1(answers[key], r.question.row["answers"]) if key is not None else 0.0 for key in of]
        for r, of in zip(rollouts, keys, strict=True)
    ]
    return generator_logps.new_tensor(scores)
