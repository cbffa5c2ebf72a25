"""Importance weights: what they sum to, what they do not depend on, and what becomes of invalid samples."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drorl.weights import (
    baseline_weights,
    effective_sample_size,
    frac_degenerate_weights,
    importance_weights,
    iw_elbo,
    log_importance_weights,
)

INF = math.inf
# Answer log-likelihoods as they occur: from one certain token to a hundred unlikely ones, some without a value.
FINITE = st.floats(-300, 0)
BAD = st.sampled_from([-INF, math.nan])
LOGPS = st.lists(FINITE | BAD, min_size=1, max_size=8)


def double(*rows: list[float]) -> torch.Tensor:
    """A float64 tensor, `(B, m)`."""
    return torch.tensor(rows, dtype=torch.float64)


@given(st.lists(FINITE, min_size=1, max_size=8), st.floats(-1000, 1000))
def test_weights_are_the_softmax_of_the_log_likelihoods(logps: list[float], shift: float) -> None:
    """They are p_i / sum_j p_j, sum to 1, and shifting all log-likelihoods of a query changes nothing.

    Plain Python relative to the largest; the shift costs 1000 * 2^-53 = 1e-13 nats of rounding, hence 1e-10.
    """
    weights = importance_weights(log_importance_weights(double(logps)))[0]
    ratios = [math.exp(value - max(logps)) for value in logps]
    assert weights.tolist() == pytest.approx([r / math.fsum(ratios) for r in ratios], rel=1e-10, abs=1e-300)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    shifted = importance_weights(log_importance_weights(double(logps) + shift))[0]
    assert shifted.tolist() == pytest.approx(weights.tolist(), rel=1e-10, abs=1e-300)


def test_weights_survive_likelihoods_that_float32_cannot_hold() -> None:
    """exp(-1000) is 0 in any float, but only differences count: -1000 and -1000 - ln 3 weigh 3 to 1."""
    weights = importance_weights(log_importance_weights(torch.tensor([[-1000.0, -1000.0 - math.log(3)]])))
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]), rtol=1e-4, atol=0)  # 1000 has a step of 6e-5


@pytest.mark.parametrize("m", [1, 2, 8])
def test_a_uniform_likelihood_gives_uniform_weights(m: int) -> None:
    """An answer that is equally likely under all permutations is no signal: weights 1/m, effective sample size m."""
    weights = importance_weights(log_importance_weights(torch.full((1, m), -7.0)))
    torch.testing.assert_close(weights, torch.full((1, m), 1 / m))
    torch.testing.assert_close(effective_sample_size(weights), torch.tensor([float(m)]))


@pytest.mark.parametrize("bad", [-INF, math.nan, INF])
def test_an_invalid_sample_is_dropped_before_the_softmax(bad: float) -> None:
    """A likelihood that is not finite has weight 0, and the others have what they would have without it."""
    with_bad = importance_weights(log_importance_weights(double([-3.0, bad, -5.0])))
    without = importance_weights(log_importance_weights(double([-3.0, -5.0])))
    assert with_bad[0, 1] == 0
    torch.testing.assert_close(with_bad[:, [0, 2]], without, rtol=0, atol=0)


def test_an_impossible_permutation_is_dropped_too() -> None:
    """A ratio p_s/q without a value (-inf - -inf, or q = 0) makes a sample invalid, whatever its likelihood."""
    log_ratio = double([0.0, math.nan, INF, -INF])
    weights = importance_weights(log_importance_weights(double([-3.0, -1.0, -1.0, -1.0]), log_ratio))
    assert weights.tolist() == [[1, 0, 0, 0]]


@given(st.lists(LOGPS, min_size=2, max_size=4).filter(lambda rows: len({len(r) for r in rows}) == 1))
def test_every_row_sums_to_one_or_is_skipped(rows: list[list[float]]) -> None:
    """With a valid sample a row sums to 1, without one it is all 0 and its bound is -inf; nothing is ever NaN."""
    log_weights = log_importance_weights(double(*rows))
    weights, sizes, bounds = (
        importance_weights(log_weights),
        effective_sample_size(importance_weights(log_weights)),
        iw_elbo(log_weights),
    )
    assert not torch.cat([weights.flatten(), sizes, bounds]).isnan().any()
    for row, weight, bound in zip(rows, weights, bounds, strict=True):
        if any(map(math.isfinite, row)):
            assert weight.sum().item() == pytest.approx(1, abs=1e-12)
            assert math.isfinite(bound)
        else:
            assert weight.tolist() == [0] * len(row)
            assert bound == -INF


def test_a_repeated_permutation_keeps_its_weight_as_often_as_it_was_drawn() -> None:
    """Two draws of one permutation weigh, together, twice what one does: duplicates are evidence."""
    twice = importance_weights(double([math.log(0.2), math.log(0.2), math.log(0.6)]))
    torch.testing.assert_close(twice, double([0.2, 0.2, 0.6]))


def test_the_off_policy_ratio_multiplies_the_likelihood() -> None:
    """w_i is proportional to p_g p_s / q: a sample the proposal overstates by 2 loses half its weight."""
    logps, ratio = double([math.log(0.3), math.log(0.3)]), double([math.log(0.5), 0.0])
    torch.testing.assert_close(importance_weights(log_importance_weights(logps, ratio)), double([1 / 3, 2 / 3]))


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, [0.8, 0.2]), (2.0, [2 / 3, 1 / 3]), (1e-3, [1.0, 0.0]), (1e9, [0.5, 0.5])]
)
def test_a_weight_temperature_tempers_the_likelihood(temperature: float, expected: list[float]) -> None:
    """w_i is proportional to p_g^(1/tau): 1 is the paper, small ones take the best sample, large ones the mean."""
    weights = importance_weights(log_importance_weights(double([math.log(0.8), math.log(0.2)]), None, temperature))
    torch.testing.assert_close(weights, double(expected), rtol=0, atol=1e-8)


def test_a_weight_temperature_leaves_the_proposals_correction_alone() -> None:
    """In the limit of a large tau the likelihood is gone and p_s/q is left: the samples then stand for the prior."""
    log_ratio = double([math.log(0.9), math.log(0.1)])
    weights = importance_weights(log_importance_weights(double([-50.0, -1.0]), log_ratio, 1e9))
    torch.testing.assert_close(weights, double([0.9, 0.1]), rtol=0, atol=1e-6)  # 50/1e9 of likelihood is left


@given(st.lists(FINITE | BAD, min_size=1, max_size=8).filter(lambda row: any(map(math.isfinite, row))))
def test_the_effective_sample_size_lies_between_one_and_the_valid_samples(logps: list[float]) -> None:
    """1/sum w^2, in [1, number of valid samples], to rounding."""
    weights = importance_weights(log_importance_weights(double(logps)))
    size = effective_sample_size(weights).item()
    assert size == pytest.approx(1 / math.fsum(w * w for w in weights[0].tolist()), rel=1e-12)
    assert 1 - 1e-9 <= size <= sum(map(math.isfinite, logps)) + 1e-9


def test_degenerate_weights_are_counted_among_queries_with_a_signal() -> None:
    """ESS 1, 1.22, 2 and a skipped query: two of three are below 1.5; without any signal the share is 0."""
    weights = double([1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 0.0])
    assert frac_degenerate_weights(weights).item() == pytest.approx(2 / 3)
    assert frac_degenerate_weights(torch.zeros(2, 3)).item() == 0


def test_the_bound_is_the_log_of_the_mean_weight_of_the_valid_samples() -> None:
    """log (1/m) sum_i w~_i; an invalid sample is not counted in m, and a query without samples has -inf."""
    bounds = iw_elbo(double([math.log(0.2), math.log(0.6), -INF], [-INF] * 3, [-800.0] * 3))
    assert bounds.tolist() == pytest.approx([math.log(0.4), -INF, -800.0])


def test_the_gradient_of_the_bound_is_the_weights() -> None:
    """d iw_elbo / d log p_g(y|x,d_z_i) = w_i, so the generator's loss (Eq. 11) ascends the bound; to 1e-12."""
    logps = double([-3.0, -1.0, -7.0], [-2.0, -2.0, -900.0]).requires_grad_()
    log_ratio = double([0.1, -0.4, 2.0], [0.0, 0.0, 1.0])
    log_weights = log_importance_weights(logps, log_ratio)
    (gradient,) = torch.autograd.grad(iw_elbo(log_weights).sum(), logps)
    torch.testing.assert_close(gradient, importance_weights(log_weights).detach(), rtol=0, atol=1e-12)


def test_the_baseline_is_the_weights_without_an_answer() -> None:
    """On-policy 1/m among the valid samples, else the normalised p_s/q; an invalid sample has none."""
    valid = torch.tensor([[True, True, False]])
    assert baseline_weights(double([0.0, 0.0, 0.0]), valid).tolist() == [[0.5, 0.5, 0.0]]
    off_policy = baseline_weights(double([math.log(3.0), 0.0, math.nan]), valid)
    torch.testing.assert_close(off_policy, double([0.75, 0.25, 0.0]))
