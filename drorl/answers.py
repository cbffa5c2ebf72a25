"""Gold answers: which string y is scored, and how likely the generator finds it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .likelihood import sequence_logps
from .metrics import surface_form


def scored_answers(row: Mapping[str, Any], answer_target: str, num_candidates: int) -> list[str]:
    """Returns the gold answers whose likelihood is the signal, see `DROConfig.answer_target`.

    Looks at nothing but `answers` and the candidates that the selector sees.
    """
    answers = [answer for answer in row["answers"] if answer.strip()]
    if answer_target == "first":
        return answers[:1]
    if answer_target == "marginal":
        return list(dict.fromkeys(answers))
    return [surface_form(answers, [c["text"] for c in row["candidates"][:num_candidates]])]


def answer_logps(
    model: nn.Module, prompts: Sequence[Sequence[int] | None], answers: Sequence[Sequence[Sequence[int]]]
) -> torch.Tensor:
    r"""Returns $\log \sum_y p_g(y|x,d_z)$ over the tokenized answers y of each prompt, `(n,)`, nats, differentiable.

    With one answer this is its log-likelihood, summed over its tokens. A prompt that is `None` (no permutation) scores
    `-inf`. Whatever any two prompts share at their beginning is encoded once.

    Args:
        model (`nn.Module`): the generator, its adapter active.
        prompts (`list` of n token sequences or `None`): contexts of one or several queries.
        answers (`list` of n lists of token sequences): the answers that count for each prompt.
    """
    given = [(prompt, ys) for prompt, ys in zip(prompts, answers, strict=True) if prompt is not None]
    if not given:  # a pass with a graph all the same: processes may be waiting for it, and a loss for its gradient
        [nothing] = sequence_logps(model, [(answers[0][0], answers[0][0])])
        return 0.0 * nothing.sum().nan_to_num(0.0) + torch.full((len(prompts),), -torch.inf, device=nothing.device)
    logps = sequence_logps(model, [(prompt, answer) for prompt, ys in given for answer in ys])
    each = torch.stack([tokens.sum() for tokens in logps]).split([len(ys) for _, ys in given])
    scores = torch.stack([of_prompt.logsumexp(dim=0) for of_prompt in each])
    where = torch.tensor([prompt is not None for prompt in prompts], device=scores.device)
    return scores.new_full((len(prompts),), -torch.inf).masked_scatter(where, scores)
