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
from typing import Any

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
    logps, _, lengths = _scored(model, pairs, temperature)
    return list(logps.split(lengths))


def totals_and_values(
    model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], critic: ValueHead | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns log p(completion | prompt) of each pair, `(n,)`, nats, and a critic's values of their ends, `(n,)`."""
    logps, values, lengths = _scored(model, pairs, critic=critic)
    if values is not None:
        values = values[torch.tensor(lengths).cumsum(dim=0) - 1]
    return torch.stack([tokens.sum() for tokens in logps.split(lengths)]), values


def _scored(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    temperature: float = 1.0,
    critic: ValueHead | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
    """Returns log p of each token of the completions and a critic's values before it, `(tokens,)`; their lengths."""
    states = TreeStates(model, backend_of(model), critic=critic)
    scored: list[int] = []
    targets: list[int] = []
    for prompt, completion in pairs:
        if not prompt or not completion:
            raise ValueError("a prompt and its completion need at least one token each")
        # The last token predicts nothing that is scored, so it is not encoded.
        scored += states.tree.add([*prompt, *completion[:-1]])[len(prompt) - 1 :]
        targets += completion
    logits, places = states.distinct_logits(scored)
    values = None if critic is None else logits[places, -1].float()
    logits = logits if critic is None else logits[:, :-1]
    index = torch.tensor([places, targets], device=logits.device)
    logps = TokenLogps.apply(logits, *index, temperature)
    return logps, values, [len(completion) for _, completion in pairs]


class TokenLogps(torch.autograd.Function):
    """log softmax(logits / temperature) of some tokens, in float32 or wider.

    Where a whole query is scored after each passage, the rows of V logits are the largest tensors of a step. PyTorch's
    log_softmax would copy them twice in float32, and keep one for its backward pass; this goes through them in slices
    that fit into a cache, and computes the softmax again.

    Args:
        logits (`torch.Tensor` of shape `(U, V)`): of the distinct places.
        places (`torch.Tensor` of shape `(n,)`): the row of each token.
        targets (`torch.Tensor` of shape `(n,)`): the tokens.
        temperature (`float`): divides the logits.
    """

    SLICE = {"cpu": 2**22, "cuda": 2**27}  # logits: 16 MiB in float32; a GPU waits for the next kernel

    @staticmethod
    def slices(logits: torch.Tensor) -> range:
        """The first rows of the slices."""
        numbers = TokenLogps.SLICE.get(logits.device.type, TokenLogps.SLICE["cpu"])
        return range(0, len(logits), max(1, numbers // logits.shape[1]))

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """Returns the log-probabilities, `(n,)`, nats."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        step = TokenLogps.slices(logits).step
        normalisers = torch.cat([(rows.to(wide) / temperature).logsumexp(dim=-1) for rows in logits.split(step)])
        ctx.save_for_backward(logits, places, targets, normalisers)
        ctx.temperature = temperature
        return logits[places, targets].to(wide) / temperature - normalisers[places]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """d log p(t) / d logit(v) = ([t = v] - p(v)) / temperature, summed over the tokens of a row."""
        logits, places, targets, normalisers = ctx.saved_tensors
        grad = grads[0] / ctx.temperature
        of_row = torch.zeros_like(normalisers).index_add_(0, places, grad)
        result = torch.empty_like(logits)
        starts = TokenLogps.slices(logits)
        for start in starts:
            rows = slice(start, start + starts.step)
            logps = logits[rows].to(grad.dtype) / ctx.temperature - normalisers[rows, None]
            part = logps.exp_().mul_(-of_row[rows, None])
            [tokens] = torch.where((places >= start) & (places < start + starts.step))
            part.index_put_((places[tokens] - start, targets[tokens]), grad[tokens], accumulate=True)
            result[rows] = part
        return result, None, None, None
