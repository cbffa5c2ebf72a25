"""The generator's answer likelihood as an ordinary TRL reward function."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .answers import answer_logps, scored_answers
from .permutations import identifier_texts, parse_permutation
from .prompts import Passage, PromptBuilder

Completion = str | Sequence[Mapping[str, str]]


class AnswerLikelihoodReward:
    r"""Rewards a permutation with $\log p_g(y|x,d_z)$, the log-likelihood of the gold answer under it, nats.

    Works in any TRL trainer whose reward functions get the dataset's columns: the rows need `query`, `answers` and
    `candidates` beside `prompt`, and the completion is a permutation as text. A completion in which no identifier is
    recognised has no reward (`None`), which TRL leaves out of its statistics.

    Args:
        model (`nn.Module`): the generator; its parameters are left alone.
        tokenizer (`PreTrainedTokenizerBase`): of the generator.
        identifiers (`str`): `number`, `letter` or `title`; how the completions name passages.
        num_selected (`int`): K.
        answer_target (`str`): see [`DROConfig`].
        max_passage_tokens (`int`, *optional*): cuts each passage to this many tokens.

    Example:

    ```python
    reward = AnswerLikelihoodReward(generator, tokenizer, num_selected=2)
    trl.GRPOTrainer(model, reward_funcs=reward, train_dataset=rows_with_prompts)
    ```
    """

    __name__ = "answer_likelihood"  # TRL names the logged reward after it

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        identifiers: str = "number",
        num_selected: int = 5,
        answer_target: str = "surface",
        max_passage_tokens: int | None = None,
    ):
        self.model = model
        self.prompts = PromptBuilder(tokenizer, identifiers, num_selected, max_passage_tokens)
        self.answer_target = answer_target

    @torch.no_grad()
    def __call__(
        self,
        completions: Sequence[Completion],
        query: Sequence[str],
        answers: Sequence[Sequence[str]],
        candidates: Sequence[Sequence[Passage]],
        **_: Any,
    ) -> list[float | None]:
        """Returns one reward per completion; each argument has one entry per completion."""
        rewards: list[float | None] = []
        samples = zip(query, answers, candidates, completions, strict=True)
        for row, of_query in groupby(samples, key=itemgetter(0, 1, 2)):  # the completions of a query stand together
            rewards += self._rewards(*row, [completion for *_, completion in of_query])
        return rewards

    def _rewards(
        self, query: str, answers: Sequence[str], candidates: Sequence[Passage], completions: Sequence[Completion]
    ) -> list[float | None]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        identifiers = identifier_texts(self.prompts.identifiers, [c["title"] for c in candidates])
        permutations = [parse_permutation(text, identifiers, self.prompts.num_selected).permutation for text in texts]
        row = {"answers": answers, "candidates": candidates}
        targets = [self.prompts.answer(a) for a in scored_answers(row, self.answer_target, len(candidates))]
        contexts = [
            None if z is None else self.prompts.generator(query, [candidates[i] for i in z]) for z in permutations
        ]
        logps = answer_logps(self.model, contexts, [targets] * len(contexts)).tolist()
        return [logp if math.isfinite(logp) else None for logp in logps]
