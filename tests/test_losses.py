"""The losses against formulas written out in plain Python, and queries that have nothing to teach."""

import math
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from drorl.losses import ADVANTAGES, Scores, clipped_surrogate_loss, weigh, weighted_mle_loss

INF = math.inf
LOGPS = [[-3.0, -1.0, -7.0, -2.0], [-20.0, -22.0, -20.0, -24.0]]


def scores(generator_logps: list[list[float]], log_ratio: list[list[float]] | None = None) -> Scores:
    """Scores with the given log p_s - log q, on-policy by default, float64."""
    logps = torch.tensor(generator_logps, dtype=torch.float64)
    selector_logps = torch.full_like(logps, -2.5)
    ratio = 0.0 if log_ratio is None else torch.tensor(log_ratio, dtype=torch.float64)
    return Scores(logps, selector_logps, selector_logps - ratio)


def test_scores_tell_which_samples_take_part() -> None:
    """A sample is valid when its likelihood and the ratio p_s/q are finite; the ratio is a difference of logs."""
    made = scores([[-1.0, -INF, math.nan, -1.0]], [[0.5, 0.0, 0.0, math.nan]])
    assert made.valid.tolist() == [[True, False, False, False]]
    assert made.log_ratio[0, 0].item() == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------------- advantages
def test_without_a_baseline_the_advantages_of_dro_are_the_weights() -> None:
    """The paper's setting: advantage = importance weight = softmax of the log-likelihoods."""
    weighting = weigh(scores(LOGPS))
    expected = torch.tensor(LOGPS, dtype=torch.float64).softmax(dim=1)
    torch.testing.assert_close(weighting.importance_weights, expected)
    torch.testing.assert_close(weighting.advantages, expected)


def test_the_mean_baseline_subtracts_what_the_samples_would_weigh_without_an_answer() -> None:
    """On-policy w_i - 1/m, off-policy w_i minus the normalised p_s/q; an invalid sample has advantage 0."""
    weighting = weigh(scores([[-1.0, -2.0, -INF]]), baseline="mean")
    weights = weighting.importance_weights[0].tolist()
    assert weighting.advantages[0].tolist() == pytest.approx([weights[0] - 0.5, weights[1] - 0.5, 0.0])
    ratio = [math.log(0.6), math.log(0.2), math.log(0.2)]
    weighting = weigh(scores([[-1.0, -2.0, -3.0]], [ratio]), baseline="mean")
    weights = weighting.importance_weights[0].tolist()
    assert weighting.advantages[0].tolist() == pytest.approx([weights[0] - 0.6, weights[1] - 0.2, weights[2] - 0.2])


def test_the_leave_one_out_baseline_is_the_mean_weight_of_the_others() -> None:
    """w_i - (1 - w_i)/(m - 1), which is the mean baseline's advantage times m/(m - 1); m counts valid samples."""
    for row in (LOGPS[0], [*LOGPS[0], math.nan]):
        advantages = weigh(scores([row]), baseline="leave_one_out").advantages[0, :4]
        weights = weigh(scores([row])).importance_weights[0, :4].tolist()
        expected = [w - mean(weights[:i] + weights[i + 1 :]) for i, w in enumerate(weights)]
        assert advantages.tolist() == pytest.approx(expected, abs=1e-12)
        mean_baseline = weigh(scores([row]), baseline="mean").advantages[0, :4]
        torch.testing.assert_close(advantages, mean_baseline * 4 / 3)


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_grpo_advantages_are_standardised_log_likelihoods(scale_rewards: str) -> None:
    """(r - mean of the group) / (std + 1e-4), the std unbiased and of the group, of the batch, or 1."""
    advantages = weigh(scores(LOGPS), "grpo", scale_rewards=scale_rewards).advantages
    for rewards, row in zip(LOGPS, advantages.tolist(), strict=True):
        scale = {"group": stdev(rewards) + 1e-4, "none": 1.0}
        assert row == pytest.approx([(r - mean(rewards)) / scale[scale_rewards] for r in rewards], rel=1e-10)


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_grpo_leaves_invalid_samples_out_of_its_statistics(scale_rewards: str) -> None:
    """An invalid sample has advantage 0 and the others have what they would have without it."""
    rows = [[-3.0, math.nan, -1.0, -7.0, -INF], [-20.0, -22.0, -20.0, -24.0, -21.0]]
    advantages = weigh(scores(rows), "grpo", scale_rewards=scale_rewards).advantages
    assert advantages[0, [1, 4]].tolist() == [0, 0]
    rewards = [-3.0, -1.0, -7.0]
    scale = {"group": stdev(rewards) + 1e-4, "none": 1.0}[scale_rewards]
    assert advantages[0, [0, 2, 3]].tolist() == pytest.approx([(r - mean(rewards)) / scale for r in rewards])


def test_rloo_advantages_compare_with_the_mean_of_the_others() -> None:
    """r_i minus the mean reward of the other valid samples; an invalid one has 0."""
    advantages = weigh(scores([[-3.0, math.nan, -1.0, -7.0]]), "rloo").advantages[0]
    assert advantages.tolist() == pytest.approx([-3.0 + 4.0, 0.0, -1.0 + 5.0, -7.0 + 2.0])


def test_reinforce_has_no_baseline() -> None:
    """The advantage is the reward, 0 for an invalid sample."""
    assert weigh(scores([[-3.0, math.nan, -1.0]]), "reinforce").advantages[0].tolist() == [-3.0, 0.0, -1.0]


def test_a_policy_gradient_maximises_the_reward_and_dro_the_likelihood() -> None:
    """With rewards of their own the estimators read them where a sample is valid; DRO's weights stay what they are."""
    plain, own = scores([[-3.0, -INF, -1.0, -7.0]]), torch.tensor([[1.0, 9.0, 0.0, 0.5]], dtype=torch.float64)
    rewarded = replace(plain, rewards=own)
    assert weigh(rewarded, "reinforce").advantages[0].tolist() == [1.0, 0.0, 0.0, 0.5]
    assert weigh(rewarded, "rloo").advantages[0].tolist() == pytest.approx([0.75, 0.0, -0.75, 0.0])
    assert weigh(rewarded, "grpo", scale_rewards="none").advantages[0].tolist() == pytest.approx([0.5, 0, -0.5, 0])
    torch.testing.assert_close(weigh(rewarded).advantages, weigh(plain).advantages, rtol=0, atol=0)


def test_pointwise_weights_ignore_the_selector() -> None:
    """softmax of the log-likelihoods, tempered, where DRO's weights have p_s/q too: REPLUG, Eq. 5."""
    made = scores([[-1.0, -2.0, -4.0]], [[3.0, 0.0, -1.0]])
    tempered = weigh(made, "pointwise", weight_temperature=2.0).advantages
    torch.testing.assert_close(tempered, torch.softmax(made.generator_logps / 2, dim=1))
    assert not torch.allclose(tempered, weigh(made, weight_temperature=2.0).advantages, atol=0.1)


@pytest.mark.parametrize("objective", ["dro", "grpo", "rloo"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_one_valid_sample_has_nothing_to_be_compared_with(objective: str, baseline: str) -> None:
    """With one valid sample every baseline is that sample itself: advantage 0, and no division by zero."""
    weighting = weigh(scores([[-3.0], [-5.0]]), objective, baseline=baseline, scale_rewards="group")
    assert weighting.advantages.tolist() == [[0.0], [0.0]]
    weighting = weigh(scores([[-3.0, -INF]]), objective, baseline=baseline, scale_rewards="group")
    assert weighting.advantages.tolist() == [[0.0, 0.0]]


# --------------------------------------------------------------------------------------------------------- diagnostics
def test_the_diagnostics_are_means_over_the_queries_that_could_be_scored() -> None:
    """A query without valid samples is counted in frac_skipped_queries and enters no other mean."""
    metrics = weigh(scores([[math.log(0.1), math.log(0.3)], [-INF, math.nan], [-4.0, -4.0]])).metrics
    expected = {
        "effective_sample_size": (1 / (0.25**2 + 0.75**2) + 2) / 2,
        "importance_weights/max": (0.75 + 0.5) / 2,
        "frac_degenerate_weights": 0.0,
        "iw_elbo": (math.log(0.2) - 4.0) / 2,
        "generator/logps": (math.log(0.1) + math.log(0.3) - 8.0) / 4,
        "reward": (math.log(0.1) + math.log(0.3) - 8.0) / 4,
        "frac_skipped_queries": 1 / 3,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-6)


def test_the_logged_bound_does_not_depend_on_the_weight_temperature() -> None:
    """iw_elbo bounds log p(y|x) at temperature 1 only, so that is the one logged; the weights are tempered."""
    plain, tempered = weigh(scores(LOGPS)), weigh(scores(LOGPS), weight_temperature=5.0)
    assert tempered.metrics["iw_elbo"] == plain.metrics["iw_elbo"]
    assert tempered.metrics["effective_sample_size"] > plain.metrics["effective_sample_size"]


@pytest.mark.parametrize("objective", list(ADVANTAGES))
@pytest.mark.parametrize("baseline", ["none", "mean", "leave_one_out"])
def test_a_batch_without_any_valid_sample_teaches_nothing(objective: str, baseline: str) -> None:
    """All -inf or NaN: weights, advantages, losses and gradients are 0, every metric finite, all queries skipped."""
    weighting = weigh(scores([[-INF, -INF], [math.nan, -INF]]), objective, baseline=baseline)
    assert weighting.importance_weights.tolist() == weighting.advantages.tolist() == [[0, 0], [0, 0]]
    assert weighting.metrics["frac_skipped_queries"] == 1
    assert all(math.isfinite(value) for value in weighting.metrics.values())
    logps = torch.tensor([[-INF, -1.0], [math.nan, -2.0]], dtype=torch.float64, requires_grad=True)
    for weights in (weighting.importance_weights, weighting.advantages):
        loss = weighted_mle_loss(logps, weights).loss
        assert loss.item() == 0
        assert torch.autograd.grad(loss, logps)[0].tolist() == [[0, 0], [0, 0]]


# ------------------------------------------------------------------------------------------------- weighted likelihood
def test_the_weighted_likelihood_is_summed_over_samples_and_averaged_over_queries() -> None:
    """-(1/B) sum_b sum_i w_bi log p_bi, written out; its gradient is -w/B."""
    logps = torch.tensor([[-1.0, -3.0], [-2.0, -5.0]], requires_grad=True)
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    loss = weighted_mle_loss(logps, weights).loss
    assert loss.item() == pytest.approx((0.25 * 1 + 0.75 * 3 + 1.0 * 2) / 2)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], -weights / 2)


def test_a_sample_of_weight_zero_adds_nothing_even_if_it_is_impossible() -> None:
    """0 * -inf is NaN in floating point; here it is 0, in the loss and in the gradient, also upstream of a log."""
    probabilities = torch.tensor([[0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    logps = torch.where(probabilities > 0, probabilities.clamp(min=1e-300).log(), -INF)
    loss = weighted_mle_loss(logps, torch.tensor([[1.0, 0.0]]).double()).loss
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(loss, probabilities)[0].tolist() == [[-2.0, 0.0]]


def test_weights_are_constants() -> None:
    """No gradient flows through the weights: the M-step holds them fixed."""
    logps = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    weights = logps.softmax(dim=1)
    gradient = torch.autograd.grad(weighted_mle_loss(logps, weights).loss, logps)[0]
    torch.testing.assert_close(gradient, -weights.detach())


def test_one_sample_per_query_is_supervised_fine_tuning() -> None:
    """m = 1: the weight is 1 whatever the likelihood, so the loss is the mean negative log-likelihood."""
    logps = torch.tensor([[-1.0], [-30.0]], dtype=torch.float64)
    weights = weigh(scores([[-1.0], [-30.0]])).importance_weights
    assert weights.tolist() == [[1.0], [1.0]]
    assert weighted_mle_loss(logps, weights).loss.item() == pytest.approx(15.5)


# --------------------------------------------------------------------------------------------------- clipped surrogate
def clipped_surrogate_by_loops(
    logps: Any, old: Any, mask: Any, advantages: Any, low: float, high: float, loss_type: str, length: int
) -> tuple[float, float]:
    """GRPO's loss and clipped share, one token at a time."""
    sequences, terms, clipped = [], [], 0
    for b in range(len(logps)):
        for i in range(len(logps[b])):
            sequence = []
            for t in range(len(logps[b][i])):
                if mask[b][i][t]:
                    ratio, advantage = math.exp(logps[b][i][t] - old[b][i][t]), advantages[b][i]
                    sequence.append(-min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage))
                    clipped += (ratio < 1 - low and advantage < 0) or (ratio > 1 + high and advantage > 0)
            terms += sequence
            sequences.append(sequence)
    value = {
        "grpo": sum(sum(s) / max(len(s), 1) for s in sequences) / len(sequences),
        "bnpo": sum(terms) / len(terms),
        "dapo": sum(terms) / len(terms),
        "dr_grpo": sum(terms) / (len(sequences) * length),
    }
    return value[loss_type], clipped / len(terms)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("seed", range(3))
def test_the_clipped_surrogate_is_what_loops_give(loss_type: str, seed: int) -> None:
    """Each reduction, the clipping on either side and the clipped share agree with one token at a time; 1e-12."""
    generator = torch.Generator().manual_seed(seed)
    logps, old = 0.3 * torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64) - 2
    advantages = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([[5, 2, 1], [3, 0, 4]])  # a sequence without any token among them
    mask = torch.arange(5) < lengths[..., None]
    output = clipped_surrogate_loss(logps, old, mask, advantages, 0.2, 0.3, loss_type, max_completion_length=7)
    expected, share = clipped_surrogate_by_loops(
        logps.tolist(), old.tolist(), mask.tolist(), advantages.tolist(), 0.2, 0.3, loss_type, 7
    )
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)
    assert 0 < share < 1  # clipped and unclipped tokens both occur
    assert output.metrics["clip_ratio/region_mean"].item() == pytest.approx(share)


def test_the_clipped_surrogate_stops_at_the_trust_regions_edge() -> None:
    """A token beyond the range has no gradient when the advantage pushes it further, and keeps it when it pulls back.

    Ratios 2 and 1/2 with advantages 1 and -1: gradient -(ratio * advantage) where it counts, else 0.
    """
    logps = torch.tensor([2.0, 2.0, 0.5, 0.5]).log().view(1, 4, 1).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss = clipped_surrogate_loss(logps, torch.zeros(1, 4, 1), torch.ones(1, 4, 1), advantages, num_items=1.0).loss
    gradient = torch.autograd.grad(loss, logps)[0].flatten()
    torch.testing.assert_close(gradient, torch.tensor([0.0, 2.0, -0.5, 0.0]))


def test_on_policy_the_clipped_surrogate_has_the_gradient_of_the_weighted_likelihood() -> None:
    """At ratio 1 each token's gradient is -A; summed over tokens this is REINFORCE, DRO's selector loss."""
    logps = torch.tensor([[[-1.0, -2.0], [-0.5, -3.0]]], requires_grad=True)
    advantages = torch.tensor([[0.7, -0.3]])
    surrogate = clipped_surrogate_loss(logps, logps.detach(), torch.ones(1, 2, 2), advantages, num_items=1.0).loss
    likelihood = weighted_mle_loss(logps.sum(dim=-1), advantages).loss
    torch.testing.assert_close(torch.autograd.grad(surrogate, logps), torch.autograd.grad(likelihood, logps))


def test_num_items_is_what_dapo_divides_by() -> None:
    """Accumulated over two calls with the window's number of tokens, `dapo` equals one call over both."""
    generator = torch.Generator().manual_seed(0)
    logps, old = 0.1 * torch.randn(2, 4, 2, 3, generator=generator)
    mask, advantages = torch.rand(4, 2, 3, generator=generator) < 0.7, torch.randn(4, 2, generator=generator)
    whole = clipped_surrogate_loss(logps, old, mask, advantages).loss
    halves = [
        clipped_surrogate_loss(logps[part], old[part], mask[part], advantages[part], num_items=mask.sum()).loss
        for part in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(halves), whole)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_a_call_without_any_token_teaches_nothing(loss_type: str) -> None:
    """When no sample could be read, the mask is empty: loss, gradient and clipped share are 0, not 0/0."""
    logps = torch.full((1, 2, 3), -1.0, requires_grad=True)
    output = clipped_surrogate_loss(
        logps, logps.detach(), torch.zeros(1, 2, 3), torch.ones(1, 2), loss_type=loss_type, max_completion_length=3
    )
    assert output.loss.item() == output.metrics["clip_ratio/region_mean"].item() == 0
    assert torch.autograd.grad(output.loss, logps)[0].abs().sum() == 0


def test_an_unknown_loss_type_is_named() -> None:
    """A misspelt `loss_type` is refused with the choices there are."""
    with pytest.raises(ValueError, match="grpo, bnpo, dapo, dr_grpo, not 'gspo'"):
        clipped_surrogate_loss(*torch.zeros(3, 1, 1, 1), torch.zeros(1, 1), loss_type="gspo")
