r"""What PPO needs beside a clipped ratio: a critic, and advantages and losses made of its values.

The selector's K decisions are an episode: the state is the prompt with the passages chosen so far, the action the next
passage, and the reward comes with the last one. A KL penalty towards the reference makes each decision cost
$\beta\,(\log p_s - \log p_\text{ref})$ as in InstructGPT. GRPO and RLOO compare the samples of a query instead, and
need no critic; the clipped ratio is the same ([`~losses.clipped_surrogate_loss`]).

Sources: Schulman et al., https://huggingface.co/papers/1506.02438 (GAE) and https://huggingface.co/papers/1707.06347
(PPO); Ouyang et al., https://huggingface.co/papers/2203.02155, for the reward with KL.

Shapes: B queries, m permutations of each, T decisions of a permutation.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .losses import LossOutput, clipped_surrogate_loss


class ValueHead(nn.Module):
    """The critic: a linear map of the selector's last hidden states, which train it and the selector's adapter alike.

    It learns standardised rewards, since answers' log-likelihoods have the scale of their length: the mean and the
    variance of all rewards so far, which are part of its state, turn one into the other.

    Args:
        hidden_size (`int`): of the selector's model.
    """

    moments: torch.Tensor

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)  # in float32, whatever the model computes in
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))  # count, sum, sum of squares

    def standardised(self, rewards: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        """Returns rewards with the running mean 0 and variance 1; NaN stays NaN.

        Args:
            rewards (`torch.Tensor` of shape `(B, m)`): NaN for an invalid sample.
            counted (`torch.Tensor` of shape `(3,)`, *optional*): [`moments_of`] new rewards, of all processes.
        """
        if counted is not None:
            self.moments += counted.to(self.moments)
        count, total, squares = self.moments
        mean = total / count.clamp(min=1)
        variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
        return (rewards - mean) / (variance.sqrt() + 1e-4)

    @contextmanager
    def reading(self, head: nn.Module) -> Generator[list[torch.Tensor]]:
        """Yields a list that gets the values `(..., 1)` of the states which a language model's `head` is given."""
        values: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(
            lambda _, inputs: values.append(self.linear(inputs[0].to(self.linear.weight.dtype)))
        )
        try:
            yield values
        finally:
            hook.remove()


def moments_of(rewards: torch.Tensor) -> torch.Tensor:
    """Returns count, sum and sum of squares of the finite rewards, `(3,)`, float64: they add up over processes."""
    finite = rewards[rewards.isfinite()].double()
    return torch.stack([torch.ones_like(finite).sum(), finite.sum(), finite.square().sum()])


def episode_rewards(rewards: torch.Tensor, mask: torch.Tensor, penalties: torch.Tensor | float = 0.0) -> torch.Tensor:
    r"""Returns the reward of each decision, `(B, m, T)`: minus its penalty, and the permutation's reward at the end.

    Args:
        rewards (`torch.Tensor` of shape `(B, m)`): of the permutation.
        mask (`torch.Tensor` of shape `(B, m, T)`): 1 where there is a decision; the first ones of each permutation.
        penalties (`torch.Tensor` of shape `(B, m, T)` or `float`): $\beta\,(\log p_s - \log p_\text{ref})$.
    """
    mask = mask.to(rewards.dtype)
    is_last = mask * (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return is_last * rewards[..., None] - mask * penalties


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> torch.Tensor:
    r"""Returns GAE's advantages of each decision, `(B, m, T)`; add `values` for the critic's targets.

    $$A_t = \sum_{l \ge 0} (\gamma\lambda)^l \delta_{t+l}, \qquad \delta_t = r_t + \gamma V_{t+1} - V_t$$

    Args:
        rewards (`torch.Tensor` of shape `(B, m, T)`): of each decision, see [`episode_rewards`].
        values (`torch.Tensor` of shape `(B, m, T)`): the critic's value of the state before each decision; behind the
            last one there is none.
        mask (`torch.Tensor` of shape `(B, m, T)`): 1 where there is a decision.
        gamma (`float`): discount; 1, because an episode has K decisions and no more.
        lam (`float`): 1 takes what followed for the return, 0 what the critic says of the next state. TRL's default.

    Source: https://huggingface.co/papers/1506.02438, Eq. 16. With lambda = 1 and V = 0 it is the return:

    >>> ones, zeros = torch.ones(1, 1, 3), torch.zeros(1, 1, 3)
    >>> generalized_advantages(episode_rewards(torch.tensor([[2.0]]), ones), zeros, ones, lam=1.0)
    tensor([[[2., 2., 2.]]])
    """
    mask = mask.to(values.dtype)
    values = values * mask
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    deltas = (rewards + gamma * following - values) * mask
    advantages, last = [], torch.zeros_like(deltas[..., 0])
    for t in reversed(range(deltas.shape[-1])):
        last = deltas[..., t] + gamma * lam * last
        advantages.append(last)
    return torch.stack(advantages[::-1], dim=-1) * mask


def whiten(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns advantages with mean 0 and variance 1 over all decisions of this call, 0 elsewhere."""
    mask = mask.to(advantages.dtype)
    count = mask.sum().clamp(min=1)
    centred = (advantages - (advantages * mask).sum() / count) * mask
    return centred * torch.rsqrt(centred.square().sum() / count + 1e-8)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float = 0.2
) -> torch.Tensor:
    r"""Returns the critic's loss, a scalar: a squared error from which a step beyond `clip` gains nothing.

    $$\tfrac12 \max\big[(V - R)^2, (\mathrm{clip}(V, V_\text{old} - c, V_\text{old} + c) - R)^2\big]$$

    averaged over decisions. As in TRL's last `PPOTrainer`.

    Args:
        values (`torch.Tensor` of shape `(B, m, T)`): the critic's, with gradient.
        old_values (`torch.Tensor` of shape `(B, m, T)`): when the permutations were drawn.
        returns (`torch.Tensor` of shape `(B, m, T)`): advantages plus `old_values`.
        mask (`torch.Tensor` of shape `(B, m, T)`): 1 where there is a decision.
        clip (`float`): in the unit of the rewards.
    """
    mask = mask.to(values.dtype)
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    errors = torch.max((values - returns).square(), (clipped - returns).square())
    return 0.5 * (errors * mask).sum() / mask.sum().clamp(min=1)


def ppo_loss(
    logps: torch.Tensor,
    values: torch.Tensor,
    old_logps: torch.Tensor,
    old_values: torch.Tensor,
    rewards: torch.Tensor,
    mask: torch.Tensor,
    reference_logps: torch.Tensor | None = None,
    beta: float = 0.0,
    vf_coef: float = 0.1,
    lam: float = 0.95,
    clip: float = 0.2,
    **surrogate: Any,
) -> LossOutput:
    r"""Returns PPO's loss: the clipped surrogate of whitened advantages, and `vf_coef` times the critic's loss.

    Args:
        logps (`torch.Tensor` of shape `(B, m, T)`): log p_s of each decision, with gradient.
        values (`torch.Tensor` of shape `(B, m, T)`): the critic's, with gradient.
        old_logps (`torch.Tensor` of shape `(B, m, T)`): log p_s when the permutations were drawn.
        old_values (`torch.Tensor` of shape `(B, m, T)`): the critic's then.
        rewards (`torch.Tensor` of shape `(B, m)`): NaN for a permutation that does not take part.
        mask (`torch.Tensor` of shape `(B, m, T)`, bool): where there is a decision.
        reference_logps (`torch.Tensor` of shape `(B, m, T)`, *optional*): log p_ref; needed unless `beta` is 0.
        beta (`float`): of the KL penalty.
        vf_coef (`float`): weight of the critic's loss; TRL's default.
        lam (`float`): see [`generalized_advantages`].
        clip (`float`): see [`clipped_value_loss`].
        **surrogate: of [`~losses.clipped_surrogate_loss`].
    """
    mask = mask & rewards.isfinite()[..., None]
    logps, values, old_logps, old_values = (t.masked_fill(~mask, 0.0) for t in (logps, values, old_logps, old_values))
    penalties = 0.0 if reference_logps is None else beta * (old_logps - reference_logps.masked_fill(~mask, 0.0))
    steps = episode_rewards(rewards.nan_to_num(0.0), mask, penalties)
    advantages = generalized_advantages(steps, old_values, mask, lam=lam)
    policy = clipped_surrogate_loss(logps, old_logps, mask, whiten(advantages, mask), **surrogate)
    value = clipped_value_loss(values, old_values, advantages + old_values, mask, clip)
    metrics = {**policy.metrics, "critic/loss": value.detach()}
    return LossOutput(policy.loss + vf_coef * value, metrics, dict.fromkeys(metrics, mask.sum()))
