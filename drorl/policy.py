"""The selector's policy over permutations, and how permutations are drawn from it.

The constrained policy is a product of experts over the candidates that are still allowed:

    log p_s(z_t = i | z_<t) = log_softmax_i( log p_LM(i | z_<t) / selector_temperature
                                             + retrieval_prior_weight * score_i )

with p_LM normalised over the valid continuations (see [`permutations`]). Temperature 1 and weight 0 are the paper.

Shapes: N candidates, K chosen, m permutations of one query, D decisions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .likelihood import branch_logits
from .permutations import Permutation, prefixes_of
from .prompts import SelectorPrompt


@dataclass(frozen=True)
class Draw:
    """Permutations drawn for one query, with what is needed to weigh them."""

    permutations: list[Permutation]
    proposal_logps: torch.Tensor
    """(m, K): log q of each decision, nats."""


@dataclass(frozen=True)
class SelectorPolicy:
    """The constrained policy p_s(z|x,d), given the selector's model.

    Args:
        temperature (`float`): `selector_temperature`.
        retrieval_prior_weight (`float`): weight of the retriever's scores.
    """

    temperature: float = 1.0
    retrieval_prior_weight: float = 0.0

    def decision_logps(
        self,
        model: nn.Module,
        prompt: SelectorPrompt,
        prefixes: Sequence[Permutation],
        scores: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """Returns log p_s(z_t = i | z_<t) for each prefix z_<t, `(D, N)`; `-inf` for candidates already chosen.

        Args:
            model (`nn.Module`): the selector, its adapter active.
            prompt ([`~prompts.SelectorPrompt`]): the query's prompt and slate.
            prefixes (`list` of length D): distinct unfinished permutations.
            scores (`list[float]` of length N, *optional*): the retriever's scores; needed with a retrieval prior.
        """
        table = prompt.slate.decisions(prefixes)
        # Where everything is forced there is nothing to compute, but the prompt's pass keeps the graph whole.
        logits = branch_logits(model, prompt.ids, table.contexts or [()])
        logps = table.log_probs(logits[: len(table.contexts)]) / self.temperature + 0.0 * logits[0, 0]
        if self.retrieval_prior_weight:
            if scores is None:
                raise ValueError("retrieval_prior_weight needs a `score` for each candidate")
            logps = logps + self.retrieval_prior_weight * logps.new_tensor(scores)
        return torch.log_softmax(logps, dim=-1)

    def permutation_logps(
        self,
        model: nn.Module,
        prompt: SelectorPrompt,
        permutations: Sequence[Permutation],
        scores: Sequence[float] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log p_s of each decision, `(m, K)`, with gradient, and the entropies, see [`gather_decisions`]."""
        prefixes = prefixes_of(permutations)
        logps = self.decision_logps(model, prompt, prefixes, scores)
        return gather_decisions(logps, prefixes, permutations)


def gather_decisions(
    logps: torch.Tensor, prefixes: Sequence[Permutation], permutations: Sequence[Permutation]
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Returns log p_s of each decision of each permutation, `(m, K)`, and the entropy along each, `(m,)`, nats.

    The sum over K is log p_s(z|x,d), exactly (Eq. 1). The entropy $\sum_t H(p_s(\cdot|z_{<t}))$ averages over
    samples to the entropy of the permutation.

    Args:
        logps (`torch.Tensor` of shape `(D, N)`): see [`SelectorPolicy.decision_logps`].
        prefixes (`list` of length D): the decisions of its rows.
        permutations (`list` of length m): complete permutations.
    """
    row = {prefix: d for d, prefix in enumerate(prefixes)}
    decisions = torch.tensor([[row[z[:t]] for t in range(len(z))] for z in permutations], device=logps.device)
    chosen = torch.tensor(permutations, device=logps.device)
    entropies = torch.special.entr(logps.detach().exp()).sum(dim=-1)
    return logps[decisions, chosen], entropies[decisions].sum(dim=-1)


class Decisions:
    """The policy's decisions for one query, without gradient; each is computed once, whoever asks.

    Args:
        policy ([`SelectorPolicy`]): settings of the policy.
        model (`nn.Module`): the selector, its adapter active.
        prompt ([`~prompts.SelectorPrompt`]): the query's prompt and slate.
        scores (`list[float]` of length N, *optional*): the retriever's scores.
    """

    def __init__(
        self,
        policy: SelectorPolicy,
        model: nn.Module,
        prompt: SelectorPrompt,
        scores: Sequence[float] | None = None,
    ):
        self._policy, self._model = policy, model
        self.prompt, self.scores = prompt, scores
        self._rows: dict[Permutation, torch.Tensor] = {}

    @torch.no_grad()
    def logps(self, prefixes: Sequence[Permutation]) -> torch.Tensor:
        """Returns log p_s(z_t = i | z_<t) for each prefix, `(D, N)`, on the CPU."""
        missing = [prefix for prefix in dict.fromkeys(prefixes) if prefix not in self._rows]
        if missing:
            rows = self._policy.decision_logps(self._model, self.prompt, missing, self.scores)
            self._rows.update(zip(missing, rows.cpu(), strict=True))
        return torch.stack([self._rows[prefix] for prefix in prefixes])

    def permutation_logps(self, permutations: Sequence[Permutation]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log p_s of each decision `(m, K)` and the entropies `(m,)`, see [`gather_decisions`]."""
        prefixes = prefixes_of(permutations)
        return gather_decisions(self.logps(prefixes), prefixes, permutations)

    def sample(
        self,
        num_generations: int,
        temperature: float = 1.0,
        every_first_choice: bool = False,
        generator: torch.Generator | None = None,
    ) -> Draw:
        """Draws permutations, one decision at a time for all of them together.

        Args:
            num_generations (`int`): m; ignored with `every_first_choice`, where it is N.
            temperature (`float`): `proposal_temperature`, q_t is proportional to p_s^(1/temperature).
            every_first_choice (`bool`): takes each candidate once as first choice, q(z_1) = 1/N, and samples the rest:
                the exact expectation over first choices, and for K = 1 over permutations.
            generator (`torch.Generator`, *optional*): source of randomness; default: torch's own.
        """
        slate = self.prompt.slate
        count = slate.num_candidates if every_first_choice else num_generations
        permutations: list[Permutation] = [()] * count
        proposal_logps = []
        for step in range(slate.num_selected):
            if every_first_choice and step == 0:
                choices = torch.arange(count)[:, None]
                proposal_logps.append(torch.full((count, 1), -math.log(count)))
            else:
                logps = torch.log_softmax(self.logps(permutations) / temperature, dim=-1)
                choices = torch.multinomial(logps.exp(), 1, generator=generator)
                proposal_logps.append(logps.gather(1, choices))
            permutations = [(*z, int(i)) for z, i in zip(permutations, choices, strict=True)]
        return Draw(permutations, torch.cat(proposal_logps, dim=1))

    def greedy(self) -> Permutation:
        """Returns the permutation of the most likely decisions."""
        permutation: Permutation = ()
        for _ in range(self.prompt.slate.num_selected):
            permutation = (*permutation, int(self.logps([permutation]).argmax()))
        return permutation
