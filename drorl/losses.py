r"""The losses: pure tensors in, `LossOutput(loss, metrics)` out.

The M-step of DRO (https://huggingface.co/papers/2505.03075) maximises, with the weights w held constant,

    L_s = - sum_i w_i log p_s(z_i | x, d)           selector     (Eq. 10)
    L_g = - sum_i w_i log p_g(y | x, d_z_i)         generator    (Eq. 11)

Seen as a policy gradient (Eq. 14), w is the reward and the selector the policy. GRPO, RLOO and REINFORCE differ from
DRO in the advantage, so they stand beside it in `ADVANTAGES`. A new estimator is one function and one line there.

Shapes: B queries, m permutations of each, T decisions (constrained) or tokens (free text) of a permutation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .weights import (
    baseline_weights,
    effective_sample_size,
    frac_degenerate_weights,
    importance_weights,
    iw_elbo,
    log_importance_weights,
)


@dataclass(frozen=True)
class Scores:
    """What is known of the sampled permutations once both models have scored them; nothing here has a gradient."""

    generator_logps: torch.Tensor
    """(B, m): log p_g(y|x,d_z), nats, summed over the answer's tokens; `-inf` or NaN for an invalid sample."""
    selector_logps: torch.Tensor
    """(B, m): log p_s(z|x,d) under the current selector, nats."""
    proposal_logps: torch.Tensor
    """(B, m): log q(z) of the proposal that the sample was drawn from, nats; equal to `selector_logps` on-policy."""
    rewards: torch.Tensor | None = None
    """(B, m): what a policy gradient maximises; `None`: `generator_logps`. DRO's weights do not read it."""

    @property
    def valid_rewards(self) -> torch.Tensor:
        """(B, m): the rewards, NaN for an invalid sample."""
        rewards = self.generator_logps if self.rewards is None else self.rewards
        return rewards.masked_fill(~self.valid, torch.nan)

    @property
    def log_ratio(self) -> torch.Tensor:
        """(B, m): log p_s(z) - log q(z)."""
        return self.selector_logps - self.proposal_logps

    @property
    def valid(self) -> torch.Tensor:
        """(B, m) bool: samples with a permutation and a finite likelihood."""
        return torch.isfinite(self.generator_logps) & torch.isfinite(self.log_ratio)


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss, averaged over this call's queries, and scalars to log."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    """How many values a metric is the mean of, where these are not the queries: batches and processes differ in it."""


@dataclass(frozen=True)
class Weighting:
    """What each sampled permutation is worth to either model. All `(B, m)`, no gradient."""

    scores: Scores
    """What this follows from."""
    importance_weights: torch.Tensor
    prior_weights: torch.Tensor
    """What they would be without any answer: 1/m on-policy."""
    advantages: torch.Tensor
    rewards: torch.Tensor
    """NaN for an invalid sample."""
    metrics: dict[str, torch.Tensor]
    counts: dict[str, torch.Tensor]
    """See [`LossOutput`]."""


# -------------------------------------------------------------------------------------------------------- advantages
def dro_advantages(scores: Scores, weights: torch.Tensor, baseline: str = "none", **_) -> torch.Tensor:
    r"""Returns $w_i - b_i$, `(B, m)`.

    `none` (paper): b = 0. `mean`: b = 1/m on-policy, in general [`~weights.baseline_weights`]. `leave_one_out`: the
    mean weight of the other samples, $(1 - w_i)/(m - 1)$; since the weights of a query sum to 1 this is the
    mean baseline times m/(m-1), RLOO's rule for this reward.
    """
    if baseline == "none":
        return weights
    advantages = weights - baseline_weights(scores.log_ratio, scores.valid)
    if baseline == "leave_one_out":
        count = scores.valid.sum(dim=-1, keepdim=True)
        advantages = advantages * count / (count - 1).clamp(min=1)
    return advantages


def grpo_advantages(scores: Scores, weights: torch.Tensor, scale_rewards: str = "group", **_) -> torch.Tensor:
    r"""Returns $(r_i - \bar r) / (\sigma_r + 10^{-4})$ of the rewards r of a query, `(B, m)`.

    As in TRL's `GRPOTrainer` (https://huggingface.co/papers/2402.03300, Eq. 3): unbiased standard deviation,
    `scale_rewards` in {`group`, `none`}. An invalid sample has advantage 0 and does not enter the statistics.
    """
    centred = scores.valid_rewards - scores.valid_rewards.nanmean(dim=-1, keepdim=True)
    if scale_rewards != "none":
        count = (~centred.isnan()).sum(dim=-1, keepdim=True)
        std = (centred.square().nansum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + 1e-4)
    return centred.nan_to_num(0.0)


def rloo_advantages(scores: Scores, weights: torch.Tensor, **_) -> torch.Tensor:
    r"""Returns $r_i - \frac{1}{m-1} \sum_{j \ne i} r_j$, `(B, m)`; https://huggingface.co/papers/2402.14740, Eq. 6."""
    count = scores.valid.sum(dim=-1, keepdim=True)
    centred = scores.valid_rewards - scores.valid_rewards.nanmean(dim=-1, keepdim=True)
    return (centred * count / (count - 1).clamp(min=1)).nan_to_num(0.0)


def reinforce_advantages(scores: Scores, weights: torch.Tensor, **_) -> torch.Tensor:
    """Returns the rewards themselves, `(B, m)`: no baseline. Source: Williams, Machine Learning 8 (1992), Eq. 4."""
    return scores.valid_rewards.nan_to_num(0.0)


def pointwise_advantages(scores: Scores, weights: torch.Tensor, weight_temperature: float = 1.0, **_) -> torch.Tensor:
    r"""Returns $\mathrm{softmax}_i\, \log p_g(y|x,d_i)/\tau$, `(B, m)`: each passage by itself, whatever the selector.

    The target of REPLUG (https://huggingface.co/papers/2301.12652, Eq. 5) and of Atlas' perplexity distillation
    (https://huggingface.co/papers/2208.03299, Eq. 2), for contexts of one passage, each candidate once. DRO's
    posterior differs by the selector's prior: $w_i \propto p_s(i)\, p_g(y|x,d_i)$.
    """
    return importance_weights(log_importance_weights(scores.generator_logps, None, weight_temperature))


ADVANTAGES: dict[str, Callable[..., torch.Tensor]] = {
    "dro": dro_advantages,
    "grpo": grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce": reinforce_advantages,
    "pointwise": pointwise_advantages,
}
WEIGHTED = ("dro", "pointwise")
"""Those whose loss is a weighted likelihood. The others maximise a reward, by a clipped surrogate."""


def weigh(
    scores: Scores,
    selector_objective: str = "dro",
    weight_temperature: float = 1.0,
    baseline: str = "none",
    scale_rewards: str = "group",
) -> Weighting:
    """Returns the weights and advantages of the sampled permutations, and their diagnostics.

    Args:
        scores ([`Scores`]): both models' log-probabilities, each of shape `(B, m)`.
        selector_objective (`str`): a key of `ADVANTAGES`.
        weight_temperature (`float`): see [`~weights.log_importance_weights`].
        baseline (`str`): see [`dro_advantages`].
        scale_rewards (`str`): see [`grpo_advantages`].
    """
    log_weights = log_importance_weights(scores.generator_logps, scores.log_ratio, weight_temperature)
    weights = importance_weights(log_weights)
    settings = {"baseline": baseline, "scale_rewards": scale_rewards, "weight_temperature": weight_temperature}
    advantages = ADVANTAGES[selector_objective](scores, weights, **settings)
    prior = baseline_weights(scores.log_ratio, scores.valid)
    return Weighting(scores, weights, prior, advantages, scores.valid_rewards, *_diagnostics(scores, weights))


def _diagnostics(scores: Scores, weights: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns means, most of them over what is valid, and of how many values."""
    scored = scores.valid.any(dim=-1)
    bound = iw_elbo(log_importance_weights(scores.generator_logps, scores.log_ratio))  # always at temperature 1
    queries, samples = scored.sum(), scores.valid.sum()
    metrics = {
        "effective_sample_size": _mean(effective_sample_size(weights), scored),
        "importance_weights/max": _mean(weights.amax(dim=-1), scored),
        "frac_degenerate_weights": frac_degenerate_weights(weights),
        "iw_elbo": _mean(bound, scored),
        "generator/logps": _mean(scores.generator_logps, scores.valid),
        "reward": _mean(scores.valid_rewards, scores.valid),
        "frac_skipped_queries": 1 - scored.float().mean(),
    }
    counts = dict.fromkeys(
        ("effective_sample_size", "importance_weights/max", "frac_degenerate_weights", "iw_elbo"), queries
    )
    return metrics, {**counts, "generator/logps": samples, "reward": samples}


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~where, 0.0).sum() / where.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------------------ losses
def weighted_mle_loss(logps: torch.Tensor, weights: torch.Tensor) -> LossOutput:
    r"""Returns $-\sum_i w_i \log p_i$, averaged over queries: both losses of DRO's M-step (Eq. 10, 11).

    Args:
        logps (`torch.Tensor` of shape `(B, m)`): log p_s(z_i|x,d) or log p_g(y|x,d_z_i), nats, summed over tokens,
            with gradient. Entries of weight 0 may be `-inf`.
        weights (`torch.Tensor` of shape `(B, m)`): importance weights or advantages, constant.

    >>> weighted_mle_loss(torch.tensor([[-1.0, -3.0]]), torch.tensor([[0.25, 0.75]])).loss
    tensor(2.5000)
    """
    weights = weights.detach()
    loss = -(weights * logps.masked_fill(weights == 0, 0.0)).sum(dim=-1).mean()
    return LossOutput(loss)


def clipped_surrogate_loss(
    token_logps: torch.Tensor,
    old_token_logps: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    num_items: torch.Tensor | float | None = None,
    max_completion_length: int = 1,
    sampling_ratio: torch.Tensor | None = None,
    reference_logps: torch.Tensor | None = None,
    beta: float = 0.0,
) -> LossOutput:
    r"""Returns GRPO's clipped surrogate, reduced as `loss_type` says.

    $$-\min(\rho_t A, \mathrm{clip}(\rho_t, 1 - \epsilon_l, 1 + \epsilon_h) A)
      + \beta \rho_t \left(\tfrac{p_\text{ref}}{p_s} - \log \tfrac{p_\text{ref}}{p_s} - 1\right)$$

    Args:
        token_logps (`torch.Tensor` of shape `(B, m, T)`): log-probabilities of decisions or tokens, with gradient.
        old_token_logps (`torch.Tensor` of shape `(B, m, T)`): the same when the permutations were drawn.
        mask (`torch.Tensor` of shape `(B, m, T)`): 1 where there is a decision or token.
        advantages (`torch.Tensor` of shape `(B, m)` or `(B, m, T)`): constant; of permutations, or (PPO) of decisions.
        epsilon_low (`float`): the ratio is clipped from below at 1 - this.
        epsilon_high (`float`): and from above at 1 + this.
        loss_type (`str`): `grpo` (mean of each sequence, then of the sequences), `bnpo` and `dapo` (sum over tokens
            divided by `num_items`, those of the micro-batch and of the generation batch), `dr_grpo` (sum divided by
            sequences times `max_completion_length`); the definitions of `trl.GRPOConfig.loss_type`.
        num_items (`torch.Tensor` or `float`): for `bnpo` and `dapo`; default: the tokens of this call.
        max_completion_length (`int`): for `dr_grpo`.
        sampling_ratio (`torch.Tensor` of shape `(B, m, T)` or `(B, m, 1)`, *optional*): p_s/q of each token for an
            engine's q, see [`~weights.log_sampling_ratio`]; constant.
        reference_logps (`torch.Tensor` of shape `(B, m, T)`, *optional*): log p_ref; needed unless `beta` is 0.
        beta (`float`): of the KL penalty, the estimator that is never negative (Eq. 4), times the ratio, which makes
            its gradient unbiased (TRL's `use_bias_correction_kl`; https://huggingface.co/papers/2512.02556).

    Source: https://huggingface.co/papers/2402.03300, Eq. 3; tests compare it with `trl.GRPOTrainer` step for step.
    """
    mask = mask.to(token_logps.dtype)
    ratio = torch.exp(token_logps - old_token_logps)
    advantages = advantages.detach() if advantages.dim() == 3 else advantages.detach()[..., None]
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    losses = -torch.min(ratio * advantages, clipped * advantages) * mask
    if sampling_ratio is not None:
        losses = losses * sampling_ratio
    tokens, metrics = mask.sum(), {}
    if reference_logps is not None:
        gap = (reference_logps - token_logps).masked_fill(mask == 0, 0.0)
        kl = ratio * (gap.exp() - gap - 1)
        losses = losses + beta * kl
        metrics["kl"] = kl.sum().detach() / tokens.clamp(min=1)
    if loss_type == "grpo":
        loss = (losses.sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)).mean()
    elif loss_type in ("bnpo", "dapo"):
        loss = losses.sum() / (tokens.clamp(min=1) if num_items is None else num_items)
    elif loss_type == "dr_grpo":
        loss = losses.sum() / (mask.shape[0] * mask.shape[1] * max_completion_length)
    else:
        raise ValueError(f"loss_type must be one of grpo, bnpo, dapo, dr_grpo, not {loss_type!r}")
    is_clipped = ((ratio < 1 - epsilon_low) & (advantages < 0)) | ((ratio > 1 + epsilon_high) & (advantages > 0))
    metrics["clip_ratio/region_mean"] = (is_clipped * mask).sum().detach() / tokens.clamp(min=1)
    return LossOutput(loss, metrics, dict.fromkeys(metrics, tokens))
