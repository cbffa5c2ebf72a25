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
from .prompts import PromptBuilder


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
        completions: Sequence[str | Sequence[Mapping[str, str]]],
        query: Sequence[str],
        answers: Sequence[Sequence[str]],
        candidates: Sequence[Sequence[Mapping[str, Any]]],
        **_: Any,
    ) -> list[float | None]:
        """Returns one reward per completion; each argument has one entry per completion."""
        rewards: list[float | None] = []
        samples = zip(completions, query, answers, candidates, strict=True)
        for _, of_query in groupby(samples, key=itemgetter(1)):  # the completions of a query stand together
            rewards += self._rewards(list(of_query))
        return rewards

    def _rewards(self, samples: Sequence[tuple]) -> list[float | None]:
        contexts = [self._context(completion, query, candidates) for completion, query, _, candidates in samples]
        targets = [
            scored_answers({"answers": answers, "candidates": candidates}, self.answer_target, len(candidates))
            for _, _, answers, candidates in samples
        ]
        tokenized = [[self.prompts.answer(answer) for answer in ys] for ys in targets]
        logps = answer_logps(self.model, contexts, tokenized).tolist()
        return [logp if math.isfinite(logp) else None for logp in logps]

    def _context(
        self,
        completion: str | Sequence[Mapping[str, str]],
        query: str,
        candidates: Sequence[Mapping[str, Any]],
    ) -> list[int] | None:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        identifiers = identifier_texts(self.prompts.identifiers, [c["title"] for c in candidates])
        permutation = parse_permutation(text, identifiers, self.prompts.num_selected).permutation
        if permutation is None:
            return None
        return self.prompts.generator(query, [candidates[i] for i in permutation])
