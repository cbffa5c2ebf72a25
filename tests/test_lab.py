"""The laboratory's claims, small: what is exact is exact, and the figures of a fixed seed stay where they are."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from lab import METHODS, RATES, exact_gradient, gradients_of, optimum, train
from variance import ESTIMATORS, estimates
from worlds import WORLDS, Learners, World, everything, first_choices, last_decision, tempered, without_replacement


def random_learners(world: World, count: int = 1) -> Learners:
    """Learners with opinions."""
    learners = Learners.start(world, count)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        learners.selector.data += 1.2 * torch.randn(1, learners.selector.shape[1], dtype=torch.float64)
    return learners


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_holds_every_permutation_once(name: str) -> None:
    """All N!/(N-K)! choices, probabilities that sum to 1, and a noisy query among ten."""
    world = World.build(name)
    kinds, k, _ = WORLDS[name]
    assert world.choices.tolist() == [list(z) for z in itertools.permutations(range(len(kinds)), k)]
    learners = random_learners(world)
    logps = learners.steps(learners.decisions()).sum(-1)
    torch.testing.assert_close(logps.exp().sum(-1), torch.ones_like(logps[..., 0]), rtol=0, atol=1e-12)
    best = world.evidence.max(dim=1).values
    assert (best == best[0]).all()  # noise moves evidence about and makes none


@pytest.mark.parametrize("name", WORLDS)
def test_enumerated_the_estimator_is_the_gradient_of_the_log_marginal_likelihood(name: str) -> None:
    """Fisher's identity through the package's losses, with a generator whose likelihoods differ: 1e-10."""
    learners = random_learners(World.build(name, sharpness=2.0))
    estimate, _ = gradients_of(learners.world, learners, METHODS["dro, exact"], 8, 1)
    torch.testing.assert_close(estimate[0], exact_gradient(learners, "marginal"), rtol=1e-10, atol=1e-12)


PROPOSALS = {
    "tempered": tempered(2.0),
    "without replacement": without_replacement,
    "first choices": first_choices,
    "last decision": last_decision,
    "everything": everything,
}


@pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS)
def test_the_weights_of_every_proposal_make_up_for_it(proposal) -> None:
    """E_q[(p/q) 1[z]] = p(z): a proposal's samples, weighted, count every permutation as often as the policy would.

    20,000 repetitions; the largest of the standard errors is about .003 for a probability of .1.
    """
    learners = random_learners(World.build("together", num_queries=10))
    learners = replace(learners, world=learners.world.of(torch.tensor([4])))
    many = replace(learners, selector=learners.selector.detach().expand(20_000, -1))
    torch.manual_seed(0)
    with torch.no_grad():
        samples = proposal(many, 8)
        p = learners.steps(learners.decisions()).sum(-1).exp()[0, 0]
    share = 1.0 if proposal is without_replacement else 1.0 / samples.permutations.shape[-1]
    counts = torch.zeros(20_000, len(p), dtype=torch.float64)
    counts.scatter_add_(1, samples.permutations[:, 0], share * samples.log_ratio[:, 0].exp())
    torch.testing.assert_close(counts.mean(dim=0), p, rtol=0, atol=0.015)
    assert p.max() > 0.1


def test_bias_and_variance_at_equal_samples() -> None:
    """Half-way in `together`, m = 8: a baseline halves the deviation, and without replacement hardly any is left.

    Fixed figures of 2,000 repetitions: deviation over the gradient's norm .77, .45, .16; the mean's cosine with the
    exact gradient is above .99 for all of them, so the bias (some 8 %) is one of length.
    """
    world = World.build("together")
    midway = train(world, METHODS["dro, exact"], torch.tensor([0.1]), 12, 8, batch_size=10).learners
    marginal = exact_gradient(midway, "marginal")
    deviations = {}
    for name in ("dro", "dro, w - 1/m", "dro, without replacement"):
        torch.manual_seed(1)
        estimates, _ = gradients_of(world, midway, METHODS[name], 8, 2000)
        mean = estimates.mean(dim=0)
        deviations[name] = float((estimates - mean).square().sum(dim=1).mean().sqrt() / mean.norm())
        assert torch.cosine_similarity(mean, marginal, dim=0) > 0.99
    expected = {"dro": 0.77, "dro, w - 1/m": 0.45, "dro, without replacement": 0.16}
    assert deviations == pytest.approx(expected, abs=0.04)


def test_dro_comes_within_two_percent_of_the_optimum() -> None:
    """60 updates of two queries, m = 8, `w - 1/m`: 98 % of what the exact optimum adds, on average over the worlds."""
    gains = []
    for name in WORLDS:
        world = World.build(name)
        curves = train(world, METHODS["dro, w - 1/m"], torch.full((8,), RATES[1]), 60, 8)
        start = float(curves.values[0, 0])
        gains.append((float(curves.values[-1].mean()) - start) / (optimum(world).log_marginal().item() - start))
    assert sum(gains) / len(gains) > 0.98


def test_listwise_beats_pointwise_exactly_where_passages_interact() -> None:
    """The greedy choice as a share of the optimum's: level where each adds its own, a fifth better elsewhere."""
    for name in WORLDS:
        world = World.build(name)
        best = float(optimum(world).greedy_rate)
        rates = torch.full((4,), RATES[1])
        shares = {
            method: float(train(world, METHODS[method], rates, 60, 8).learners.greedy_rate.mean()) / best
            for method in ("dro, w - 1/m", "pointwise")
        }
        lead = shares["dro, w - 1/m"] - shares["pointwise"]
        assert shares["dro, w - 1/m"] > 0.95
        assert abs(lead) < 0.02 if name == "independent" else lead > 0.2


def test_a_flat_proposal_frees_a_prejudiced_selector() -> None:
    """Two nats in favour of noise: on policy neither DRO nor GRPO gets away, from a flatter proposal DRO does."""
    world = World.build("together", sharpness=3.0)
    best, reached = float(optimum(world).greedy_rate), {}
    for name in ("dro, w - 1/m", "grpo", "dro, proposal temperature 4"):
        curves = train(world, METHODS[name], torch.full((8,), RATES[2]), 60, 8, prejudice=2.0)
        reached[name] = float(curves.learners.greedy_rate.mean()) / best
    assert reached["dro, proposal temperature 4"] > 0.9
    assert max(reached["dro, w - 1/m"], reached["grpo"]) < 0.8


def test_the_cost_of_an_estimator_is_what_it_asks_the_generator() -> None:
    """Answers scored of a query: m, N first choices, whole sets of last choices, all 30."""
    world, start = World.build("together"), None
    costs = {}
    for name in ("dro", "dro, first choices", "dro, last decision", "dro, exact"):
        start = Learners.start(world, 1)
        _, costs[name] = gradients_of(world, start, METHODS[name], 8, 2)
    assert costs == {"dro": 8, "dro, first choices": 6, "dro, last decision": 10, "dro, exact": math.perm(6, 2)}


def test_estimates_on_a_row_are_combinations_whose_mean_is_known() -> None:
    """recipes/variance.py: RLOO's average to p_i (r_i - sum_j p_j r_j), those of every first choice are the posterior.

    100,000 repetitions, five standard errors of some .005.
    """
    logps = torch.log_softmax(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), dim=0)
    of = {"selector": logps, "generator": torch.tensor([-1.0, -0.5, -3.0], dtype=torch.float64)}
    torch.manual_seed(0)
    rloo = estimates(of, ESTIMATORS["rloo"], 4, 100_000).mean(dim=0) / 4
    p, r = logps.exp(), of["generator"]
    torch.testing.assert_close(rloo, p * (r - (p * r).sum()), rtol=0, atol=0.005)
    exact = estimates(of, ESTIMATORS["dro, every first choice"], 4, 1)[0]
    torch.testing.assert_close(exact, torch.softmax(logps + r, dim=0))
    flat = estimates(of, {"temperature": 4.0}, 4, 100_000)
    assert (flat.sum(dim=1) - 1).abs().max() < 1e-9
