r"""Importance weights of sampled permutations: this file is the method.

DRO (Direct Retrieval-augmented Optimization, https://huggingface.co/papers/2505.03075) treats the ordered choice of
passages z as a latent variable. Its posterior p(z|x,y) is proportional to p_s(z|x,d) p_g(y|x,d_z). Permutations z_i
are drawn from a proposal q (the paper: the selector itself), so each carries the self-normalised importance weight

    w_i = p_g(y|x,d_z_i) p_s(z_i)/q(z_i)  /  sum_j p_g(y|x,d_z_j) p_s(z_j)/q(z_j)              (Eq. 6, 7, 19)

and the ratio p_s/q is 1 in the paper. Everything is computed in log space: answer log-likelihoods differ by tens of
nats. A repeated permutation is evidence and keeps its weight as often as it was drawn; an invalid sample is dropped
before the softmax, not after it.

Differences from the paper: `weight_temperature` (1.0 = paper), the ratio p_s/q, baselines. All default to the paper.

Shapes: B queries, m sampled permutations of each. All values are in nats.
"""

import math

import torch


def log_importance_weights(
    generator_logps: torch.Tensor,
    log_ratio: torch.Tensor | None = None,
    weight_temperature: float = 1.0,
) -> torch.Tensor:
    r"""Returns the unnormalised log-weights, `(B, m)`.

    $$\log \tilde w_i = \tfrac{1}{\tau} \log p_g(y|x,d_{z_i}) + \log p_s(z_i) - \log q(z_i)$$

    Args:
        generator_logps (`torch.Tensor` of shape `(B, m)`): log-likelihood of the gold answer, nats, **summed** over
            its tokens (a mean would flatten the posterior by the answer's length). `-inf` and NaN mark invalid
            samples.
        log_ratio (`torch.Tensor` of shape `(B, m)`, *optional*): log p_s(z_i) - log q(z_i). `None`: on-policy, 0.
        weight_temperature (`float`): tau. Above 1 it tempers the likelihood (not the proposal's correction), which
            trades a bias towards the prior for a larger effective sample size. 1.0 is the paper.

    Invalid samples come back as `-inf`. Source: https://huggingface.co/papers/2505.03075, Eq. 6, 7, 19.
    """
    log_weights = generator_logps / weight_temperature
    if log_ratio is not None:
        log_weights = log_weights + log_ratio
    return log_weights.masked_fill(~torch.isfinite(log_weights), -torch.inf)


def log_sampling_ratio(
    token_logps: torch.Tensor,
    sampling_logps: torch.Tensor,
    mode: str = "sequence_mask",
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> torch.Tensor:
    r"""Returns what corrects for an engine that samples not quite the trainer's policy, truncated: log of a ratio.

    $$\log p_s(z_t) - \log p_\text{engine}(z_t)$$

    of each t or summed over the sequence, kept within bounds.

    Args:
        token_logps (`torch.Tensor` of shape `(B, m, T)`): log p_s of each decision or token when it was drawn, nats;
            `-inf` in the padding.
        sampling_logps (`torch.Tensor` of shape `(B, m, T)`): the same according to the engine.
        mode (`str`): `vllm_importance_sampling_mode` of `trl.GRPOConfig`: `token_*` or `sequence_*`; `*_truncate`
            takes the bound for what is beyond it, `*_mask` takes `-inf`: the token or sequence does not count.
        clip_min (`float`, *optional*): lower bound of the ratio.
        clip_max (`float`, *optional*): upper bound of the ratio.

    Returns `(B, m, T)` or, of whole sequences, `(B, m, 1)`. Source: TRL's `vllm_importance_sampling_correction`.
    """
    gap = (token_logps - sampling_logps).masked_fill(~sampling_logps.isfinite(), 0.0)
    level, action = mode.split("_")
    if level == "sequence":
        gap = gap.sum(dim=-1, keepdim=True)
    low = -math.inf if clip_min is None or clip_min <= 0 else math.log(clip_min)
    high = math.inf if clip_max is None else math.log(clip_max)
    if action == "truncate":
        return gap.clamp(low, high)
    return gap.masked_fill((gap < low) | (gap > high), -torch.inf)


def importance_weights(log_weights: torch.Tensor) -> torch.Tensor:
    """Returns the weights normalised over the samples of each query, `(B, m)`; rows sum to 1.

    A row without any valid sample has all weights 0: the query is skipped, and nothing is NaN.

    >>> importance_weights(torch.tensor([[-7.0, -7.0, -torch.inf], [-torch.inf] * 3]))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    empty = torch.isneginf(log_weights).all(dim=-1, keepdim=True)
    return torch.softmax(log_weights.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def effective_sample_size(weights: torch.Tensor) -> torch.Tensor:
    r"""Returns Kish's effective sample size $1 / \sum_i w_i^2$ of each query, `(B,)`, in [1, m]; 0 if skipped.

    Near 1, one sample carries the update; near m, the generator sees no difference and there is no signal.

    >>> effective_sample_size(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]))
    tensor([1., 2., 0.])
    """
    squares = weights.square().sum(dim=-1)
    return torch.where(squares > 0, 1 / squares.clamp(min=torch.finfo(squares.dtype).tiny), 0.0)


def frac_degenerate_weights(weights: torch.Tensor, threshold: float = 1.5) -> torch.Tensor:
    """Returns the share of the queries with a signal whose effective sample size is below `threshold`, a scalar."""
    sizes = effective_sample_size(weights)
    counted = sizes > 0
    return ((sizes < threshold) & counted).sum() / counted.sum().clamp(min=1)


def iw_elbo(log_weights: torch.Tensor) -> torch.Tensor:
    r"""Returns the importance-weighted bound on log p(y|x) of each query, `(B,)`, nats.

    $$\log \tfrac{1}{m} \sum_i \tilde w_i \;\le\; \log \sum_z p_s(z|x,d)\, p_g(y|x,d_z) \text{ in expectation}$$

    Its gradient with respect to the generator is exactly the generator's loss (Eq. 11); with all permutations
    enumerated by a uniform proposal it is the log marginal likelihood itself. `-inf` for a skipped query. An invalid
    sample is one that the proposal lost, so it is not counted in m. Source: Burda et al.,
    https://huggingface.co/papers/1509.00519, Eq. 8.
    """
    count = torch.isfinite(log_weights).sum(dim=-1)
    return torch.logsumexp(log_weights, dim=-1) - count.clamp(min=1).to(log_weights.dtype).log()


def baseline_weights(log_ratio: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    r"""Returns the `mean` baseline, the weights that the samples would have without any answer, `(B, m)`.

    $$b_i = \frac{p_s(z_i)/q(z_i)}{\sum_j p_s(z_j)/q(z_j)} \quad (= 1/m \text{ on-policy})$$

    Since $E_q[(p_s/q) \nabla \log p_s] = 0$, using $w_i - b_i$ leaves the expected gradient alone and lowers its
    variance: the advantage becomes *posterior minus prior*. Exactly so on-policy and when all choices are enumerated.

    Args:
        log_ratio (`torch.Tensor` of shape `(B, m)`): log p_s(z_i) - log q(z_i), nats.
        valid (`torch.Tensor` of shape `(B, m)`, bool): samples that take part.
    """
    return importance_weights(log_ratio.masked_fill(~valid, -torch.inf))
