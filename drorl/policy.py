"""The selector's policy over permutations, and how permutations are drawn from it.

The constrained policy is a product of experts over the candidates that are still allowed:

    log p_s(z_t = i | z_<t) = log_softmax_i( log p_LM(i | z_<t) / selector_temperature
                                             + retrieval_prior_weight * score_i )

with p_LM normalised over the valid continuations (see [`permutations`]). Temperature 1 and weight 0 are the paper.

A prompt is encoded once: sampling asks its states for one decision after the other, for all permutations of all
queries together, and the loss asks the same states, with gradient, for the decisions that were passed through.

Shapes: B queries, N candidates, K chosen, m permutations of one query, D decisions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .errors import DivergedError
from .likelihood import PromptStates
from .permutations import DecisionTable, Permutation, prefixes_of
from .ppo import ValueHead
from .prompts import SelectorPrompt

Prefixes = Sequence[Permutation]
MADE_WITHOUT_GRADIENT = "these decisions were made without gradient: make new ones to train on"


@dataclass(frozen=True)
class Draw:
    """Permutations drawn for one query, with what is needed to weigh them."""

    permutations: list[Permutation]
    proposal_logps: torch.Tensor
    """(m, K): log q of each decision, nats."""
    old_selector_logps: torch.Tensor
    """(m, K): log p_s of each decision, nats."""

    def first(self) -> "Draw":
        """Returns the first choices alone."""
        firsts = [permutation[:1] for permutation in self.permutations]
        return Draw(firsts, self.proposal_logps[:, :1], self.old_selector_logps[:, :1])

    @property
    def log_ratio(self) -> torch.Tensor:
        """(m,): log p_s(z) - log q(z)."""
        return (self.old_selector_logps - self.proposal_logps).sum(dim=-1)


@dataclass(frozen=True)
class SelectorPolicy:
    """The constrained policy p_s(z|x,d), given the selector's model.

    Args:
        temperature (`float`): `selector_temperature`.
        retrieval_prior_weight (`float`): weight of the retriever's scores.
    """

    temperature: float = 1.0
    retrieval_prior_weight: float = 0.0

    def logps(self, candidate_logps: torch.Tensor, scores: Sequence[float | None]) -> torch.Tensor:
        """Returns log p_s `(D, N)` from log p_LM `(D, N)`; `-inf` for candidates already chosen."""
        logps = candidate_logps / self.temperature
        if self.retrieval_prior_weight:
            if not scores or None in scores:
                raise ValueError("retrieval_prior_weight needs a `score` for each candidate")
            logps = logps + self.retrieval_prior_weight * logps.new_tensor(scores)
        return torch.log_softmax(logps, dim=-1)


def gather_decisions(
    logps: torch.Tensor, prefixes: Prefixes, permutations: Sequence[Permutation]
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Returns log p_s of each decision of each permutation, `(m, K)`, and the entropy along each, `(m,)`, nats.

    The sum over K is log p_s(z|x,d), exactly (Eq. 1). The entropy $\sum_t H(p_s(\cdot|z_{<t}))$ averages over
    samples to the entropy of the permutation.

    Args:
        logps (`torch.Tensor` of shape `(D, N)`): log p_s(z_t = i | z_<t) of each decision.
        prefixes (`list` of length D): the decisions of its rows.
        permutations (`list` of length m): complete permutations.
    """
    row = {prefix: d for d, prefix in enumerate(prefixes)}
    decisions = torch.tensor([[row[z[:t]] for t in range(len(z))] for z in permutations], device=logps.device)
    chosen = torch.tensor(permutations, device=logps.device)
    entropies = torch.special.entr(logps.detach().exp()).sum(dim=-1)
    return logps[decisions, chosen], entropies[decisions].sum(dim=-1)


class Drawing(ABC):
    """Draws permutations of B queries from the policy, one decision at a time for all of them together.

    Args:
        policy ([`SelectorPolicy`]): settings of the policy.
        prompts (`list` of B [`~prompts.SelectorPrompt`]): prompts and slates.
    """

    def __init__(self, policy: SelectorPolicy, prompts: Sequence[SelectorPrompt]):
        self.policy = policy
        self.prompts = prompts
        self._known: list[dict[Permutation, torch.Tensor]] = [{} for _ in prompts]

    def tables(self, prefixes: Sequence[Prefixes]) -> list[DecisionTable]:
        """Returns the decisions that follow each query's prefixes."""
        return [prompt.slate.decisions(asked) for prompt, asked in zip(self.prompts, prefixes, strict=True)]

    @abstractmethod
    def _ask(self, prefixes: Sequence[Prefixes]) -> list[torch.Tensor]:
        """Returns log p_s(z_t = i | z_<t), `(D, N)` of each query, without gradient."""

    @torch.no_grad()
    def logps(self, prefixes: Sequence[Prefixes]) -> list[torch.Tensor]:
        """Returns log p_s(z_t = i | z_<t) of each query's prefixes, `(D, N)` each, on the CPU, without gradient.

        Each is computed once, whoever asks; `-inf` for candidates already chosen.
        """
        pairs = list(zip(self._known, prefixes, strict=True))
        missing = [[p for p in dict.fromkeys(asked) if p not in known] for known, asked in pairs]
        if any(missing):
            for known, new, rows in zip(self._known, missing, self._ask(missing), strict=True):
                known.update(zip(new, rows.cpu(), strict=True))
        return [torch.stack([known[p] for p in asked]) for known, asked in pairs]

    def permutation_logps(
        self, permutations: Sequence[Sequence[Permutation]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns log p_s of each decision `(m, K)` and the entropies `(m,)` of each query, see [`gather_decisions`].

        With gradient where that is enabled, and the model is here.

        Raises:
            ValueError: if that is enabled now, but was not when the prompts were encoded.
        """
        prefixes = [prefixes_of(drawn) for drawn in permutations]
        rows = self._with_gradient(prefixes) if torch.is_grad_enabled() else self.logps(prefixes)
        return [gather_decisions(*query) for query in zip(rows, prefixes, permutations, strict=True)]

    def _with_gradient(self, prefixes: Sequence[Prefixes]) -> list[torch.Tensor]:
        """Returns log p_s(z_t = i | z_<t), `(D, N)` of each query; the first of its `prefixes` is `()`."""
        return self.logps(prefixes)

    def values(self, permutations: Sequence[Sequence[Permutation]]) -> torch.Tensor | None:
        """Returns a critic's value of the state before each decision of permutations, `(B, m, K)`; `None`: no critic.

        The decisions have been asked for before.
        """
        return None

    def sample(
        self,
        num_generations: int,
        temperature: float = 1.0,
        every_first_choice: bool = False,
        generators: Sequence[torch.Generator] | None = None,
    ) -> list[Draw]:
        """Draws permutations of each query.

        Args:
            num_generations (`int`): m; ignored with `every_first_choice`, where it is N.
            temperature (`float`): `proposal_temperature`, q_t is proportional to p_s^(1/temperature).
            every_first_choice (`bool`): takes each candidate once as first choice, q(z_1) = 1/N, and samples the rest:
                the exact expectation over first choices, and for K = 1 over permutations.
            generators (`list` of B `torch.Generator`, *optional*): each query's randomness; default: torch's own.
        """
        slates = [prompt.slate for prompt in self.prompts]
        counts = [slate.num_candidates if every_first_choice else num_generations for slate in slates]
        uniform = [
            torch.rand(count, slate.num_selected, generator=generator, dtype=torch.float64)
            for count, slate, generator in zip(counts, slates, generators or [None] * len(slates), strict=True)
        ]
        permutations: list[list[Permutation]] = [[()] * count for count in counts]
        steps: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in slates]
        for step in range(slates[0].num_selected):
            for query, rows in enumerate(self.logps(permutations)):
                if rows.isnan().any():
                    raise DivergedError("the selector's probabilities are NaN: start again with a lower learning_rate")
                if every_first_choice and step == 0:
                    choices, logq = torch.arange(len(rows)), torch.full((len(rows),), -math.log(len(rows)))
                else:
                    choices, logq = _invert(torch.log_softmax(rows / temperature, dim=-1), uniform[query][:, step])
                permutations[query] = [(*z, int(i)) for z, i in zip(permutations[query], choices, strict=True)]
                steps[query].append((logq, rows[torch.arange(len(rows)), choices]))
        logps = [[torch.stack(column, dim=1) for column in zip(*of_query, strict=True)] for of_query in steps]
        return [Draw(drawn, *pair) for drawn, pair in zip(permutations, logps, strict=True)]

    def greedy(self) -> list[Permutation]:
        """Returns the permutation of the most likely decisions of each query."""
        permutations: list[Permutation] = [()] * len(self.prompts)
        for _ in range(self.prompts[0].slate.num_selected):
            rows = self.logps([[z] for z in permutations])
            permutations = [(*z, int(row[0].argmax())) for z, row in zip(permutations, rows, strict=True)]
        return permutations


class Decisions(Drawing):
    """The policy's decisions under a model here. Made with gradient, it can draw permutations and then train on them.

    Args:
        policy ([`SelectorPolicy`]): settings of the policy.
        model (`nn.Module`): the selector, its adapter active.
        prompts (`list` of B [`~prompts.SelectorPrompt`]): prompts and slates.
        keep (`bool`): keeps the prompts' states for more than one question; see [`~likelihood.PromptStates`].
        critic ([`~ppo.ValueHead`], *optional*): values the state before each decision that is asked for.
    """

    def __init__(
        self,
        policy: SelectorPolicy,
        model: nn.Module,
        prompts: Sequence[SelectorPrompt],
        keep: bool = True,
        critic: ValueHead | None = None,
    ):
        super().__init__(policy, prompts)
        self._critic = critic
        self._values: list[dict[Permutation, torch.Tensor]] = [{} for _ in prompts]
        self._states = PromptStates(model, [prompt.ids for prompt in prompts], keep, critic)
        self._drawing: PromptStates | None = None
        # Every permutation passes through the first decision, so it is made in the prompts' own pass.
        self._first: list[torch.Tensor] | None = None
        if self._states.cache is not None:
            self._first = self._compute(self._states, [[()] for _ in prompts])
            self._first_has_gradient = torch.is_grad_enabled()
            self._known = [{(): rows[0].detach().cpu()} for rows in self._first]

    def _ask(self, prefixes: Sequence[Prefixes]) -> list[torch.Tensor]:
        self._drawing = self._drawing or self._states.fork()
        return self._compute(self._drawing, prefixes)

    def _compute(self, states: PromptStates, prefixes: Sequence[Prefixes]) -> list[torch.Tensor]:
        """Returns log p_s(z_t = i | z_<t), `(D, N)` of each query, from one pass over the branches."""
        tables = self.tables(prefixes)
        branches = [(query, context) for query, table in enumerate(tables) for context in table.contexts]
        valued = [] if self._critic is None else [(q, prefix) for q, t in enumerate(tables) for prefix in t.prefixes]
        before = [(query, self.prompts[query].slate.token_ids(prefix)) for query, prefix in valued]
        # Where everything is forced there is nothing to ask, but a loss of it is to have a graph.
        logits = states.logits_after([*branches, *before] or [(0, ())])
        for (query, prefix), value in zip(valued, logits[len(branches) :, -1], strict=self._critic is not None):
            self._values[query][prefix] = value
        sizes = [len(table.contexts) for table in tables]
        parts = logits[: sum(sizes)].split(sizes)
        return [
            self.policy.logps(table.log_probs(table.children_scores(part)), prompt.scores) + 0.0 * logits[0, 0]
            for table, part, prompt in zip(tables, parts, self.prompts, strict=True)
        ]

    def values(self, permutations: Sequence[Sequence[Permutation]]) -> torch.Tensor | None:
        """The critic's, with gradient after `permutation_logps` with gradient."""
        if self._critic is None:
            return None
        return torch.stack(
            [
                torch.stack([torch.stack([known[z[:t]] for t in range(len(z))]) for z in drawn])
                for known, drawn in zip(self._values, permutations, strict=True)
            ]
        )

    def _with_gradient(self, prefixes: Sequence[Prefixes]) -> list[torch.Tensor]:
        if self._first is None:
            return self._compute(self._states, prefixes)
        if not self._first_has_gradient:
            raise ValueError(MADE_WITHOUT_GRADIENT)
        later = [of_query[1:] for of_query in prefixes]
        if not any(later):
            return self._first
        return [torch.cat(rows) for rows in zip(self._first, self._compute(self._states, later), strict=True)]


def _invert(logps: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the choice that each uniform number in [0, 1) falls on, `(m,)`, and its log-probability, `(m,)`."""
    cumulated = logps.double().exp().cumsum(dim=-1)
    # The first whose cumulated probability exceeds the number: one of probability 0 never does.
    choices = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
    return choices[:, 0], logps.gather(1, choices)[:, 0]
