r"""The policy whose expert reads each passage alone: how likely does it make the query?

    log p_s(z_t = i | z_<t) = log_softmax_i( log p_LM(x_t | d_i) / selector_temperature
                                             + retrieval_prior_weight * score_i )        over what is not chosen yet

    x_t = x                      identifiers="query"
    x_t = x d_z1 ... d_z(t-1)    identifiers="expanded_query"

A passage is named by nothing but the query that it would lead to (query likelihood: Ponte and Croft, SIGIR 1998; of a
language model, zero-shot: UPR, https://huggingface.co/papers/2204.07496). The paper's policy reads all passages
together and can weigh them against each other. With `query` this one cannot: later decisions ask the scores of the
first one again, and a permutation is Plackett and Luce's. With `expanded_query` it can: what was chosen becomes part
of the query, as in retrieval of several hops (MDR, https://huggingface.co/papers/2009.12756), so that the next passage
has to fit both. Either way, a model that is too small to point at a passage can do it without any training, and DRO
trains it like the other.

Shapes: B queries, N candidates, D decisions, m permutations of one query, K chosen.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn

from .likelihood import totals_and_values
from .permutations import Permutation
from .policy import MADE_WITHOUT_GRADIENT, Drawing, Prefixes, SelectorPolicy
from .ppo import ValueHead
from .prompts import SelectorPrompt


class QueryLikelihoods(Drawing):
    """The policy's decisions by the query's likelihood under a model here.

    Args:
        policy ([`~policy.SelectorPolicy`]): settings of the policy.
        model (`nn.Module`): the selector, its adapter active.
        prompts (`list` of B [`~prompts.SelectorPrompt`]): with `queries`.
        critic ([`~ppo.ValueHead`], *optional*): values the state before a decision, by the mean over what is left.
    """

    def __init__(
        self,
        policy: SelectorPolicy,
        model: nn.Module,
        prompts: Sequence[SelectorPrompt],
        critic: ValueHead | None = None,
    ):
        super().__init__(policy, prompts)
        self._model = model
        counts = [len(prompt.queries) for prompt in prompts]
        scores, values = totals_and_values(model, [pair for prompt in prompts for pair in prompt.queries], critic)
        self._scores = scores.split(counts)
        self._passage_values = None if values is None else values.split(counts)

    def _ask(self, prefixes: Sequence[Prefixes]) -> list[torch.Tensor]:
        chosen = [_chosen(asked, len(s)).to(s.device) for asked, s in zip(prefixes, self._scores, strict=True)]
        rows = [scores.masked_fill(gone, -torch.inf) for scores, gone in zip(self._scores, chosen, strict=True)]
        later = [(q, d, z) for q, asked in enumerate(prefixes) for d, z in enumerate(asked) if z]
        if later and self.prompts[0].expansions:
            pairs = [self.prompts[q].queries_after(z) for q, _, z in later]
            scores, _ = totals_and_values(self._model, [*chain.from_iterable(pairs)], None)
            for (q, d, _), expanded in zip(later, scores.split([*map(len, pairs)]), strict=True):
                rows[q][d, ~chosen[q][d]] = expanded
        return [self.policy.logps(of_query, p.scores) for of_query, p in zip(rows, self.prompts, strict=True)]

    def _with_gradient(self, prefixes: Sequence[Prefixes]) -> list[torch.Tensor]:
        if not self._scores[0].requires_grad:
            raise ValueError(MADE_WITHOUT_GRADIENT)
        return self._ask(prefixes)

    def values(self, permutations: Sequence[Sequence[Permutation]]) -> torch.Tensor | None:
        """The critic's, with gradient where that is enabled."""
        if self._passage_values is None:
            return None
        rows = []
        for values, drawn in zip(self._passage_values, permutations, strict=True):
            before = [z[:t] for z in drawn for t in range(len(z))]
            chosen = _chosen(before, len(values)).to(values.device)
            means = values.masked_fill(chosen, 0.0).sum(dim=-1) / (~chosen).sum(dim=-1)
            rows.append(means.view(len(drawn), -1))
        return torch.stack(rows)


def _chosen(prefixes: Prefixes, num_candidates: int) -> torch.Tensor:
    """Returns which candidates are gone at each decision, `(D, N)` bool."""
    chosen = torch.zeros(len(prefixes), num_candidates, dtype=torch.bool)
    for row, prefix in zip(chosen, prefixes, strict=True):
        row[list(prefix)] = True
    return chosen
