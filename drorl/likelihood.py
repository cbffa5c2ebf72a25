"""Log-likelihoods of token sequences, with every shared prefix encoded once.

One prefix tree holds the sequences of a call ([`tree`]); its distinct tokens pass through the model once. There are
two ways to do that exactly, and a third that is always right:

    packed     all tokens in one row; attention follows the tree, by blocks ([`attention`]), or by a 4-D mask where the
               model's attention cannot be replaced
    cached     one unbranched run of the tree after the other, in rounds; the states of what stands above are gathered
               from a `DynamicCache` that keeps its gradient
    repeated   every sequence by itself, as if nothing were shared

[`backend_of`] takes the first that gives this model the right numbers, in the order of what they cost (docs/
performance.md): a self-check of a few tokens compares each with the third at first use. Exact, not an approximation:
tests/test_likelihood.py compares values and gradients with the repeated computation.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .backends import backend_of
from .ppo import ValueHead
from .states import TreeStates


class PromptStates(TreeStates):
    """Prompts encoded once, so that the model can be asked again and again what follows them.

    Args:
        model (`nn.Module`): see [`TreeStates`].
        prompts (`list` of B token sequences): none is empty.
        keep (`bool`): keeps what a question has encoded for the next one, which otherwise encodes the prompts again.
        critic ([`~ppo.ValueHead`], *optional*): see [`TreeStates`].
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        keep: bool = True,
        critic: ValueHead | None = None,
    ):
        super().__init__(model, backend_of(model), keep, critic)
        self._ends = [self.tree.add(prompt)[-1] for prompt in prompts]

    def logits_after(self, branches: Sequence[tuple[int, Sequence[int]]]) -> torch.Tensor:
        """Returns the next-token logits after each `(prompt, tokens)`, `(len(branches), V)`; `tokens` may be empty."""
        nodes = []
        for prompt, tokens in branches:
            *_, node = self._ends[prompt], *self.tree.add(tokens, self._ends[prompt])
            # A node that was encoded before has no logits any more: its twin has.
            nodes.append(self.tree.twin(node) if node < len(self.slots) else node)
        return self.logits(nodes)


def sequence_logps(
    model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
) -> list[torch.Tensor]:
    r"""Returns log p(completion_t | prompt, completion_<t) of each (prompt, completion) pair, in nats.

    One tensor of shape `(T,)` per pair, T being the length of its completion; float32 or wider, differentiable. Equal
    prefixes of any two pairs are encoded once, so equal pairs cost nothing. `temperature` divides the logits.

    Raises:
        ValueError: if a prompt or a completion is empty.
    """
    logits, lengths, targets = _scored(model, pairs)
    logps = torch.log_softmax(logits / temperature, dim=-1).gather(1, targets[:, None])[:, 0]
    return list(logps.split(lengths))


def totals_and_values(
    model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], critic: ValueHead | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns log p(completion | prompt) of each pair, `(n,)`, nats, and a critic's values of their ends, `(n,)`."""
    logits, lengths, targets = _scored(model, pairs, critic)
    values = None
    if critic is not None:
        logits, column = logits[:, :-1], logits[:, -1]
        values = column[torch.tensor(lengths).cumsum(dim=0) - 1]
    logps = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
    return torch.stack([tokens.sum() for tokens in logps.split(lengths)]), values


def _scored(
    model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], critic: ValueHead | None = None
) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Returns what predicts each token of the completions, `(tokens, V)`, their lengths, and the tokens."""
    states = TreeStates(model, backend_of(model), critic=critic)
    scored: list[int] = []
    targets: list[int] = []
    for prompt, completion in pairs:
        if not prompt or not completion:
            raise ValueError("a prompt and its completion need at least one token each")
        # The last token predicts nothing that is scored, so it is not encoded.
        scored += states.tree.add([*prompt, *completion[:-1]])[len(prompt) - 1 :]
        targets += completion
    logits = states.logits(scored)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits, [len(completion) for _, completion in pairs], torch.tensor(targets, device=logits.device)
