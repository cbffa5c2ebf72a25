"""PPO's parts against formulas worked by hand, and PPO itself against a problem whose solution is known."""

from itertools import product

import pytest
import torch

from drorl.losses import clipped_surrogate_loss
from drorl.ppo import (
    ValueHead,
    clipped_value_loss,
    episode_rewards,
    generalized_advantages,
    moments_of,
    ppo_loss,
    whiten,
)

FULL = torch.ones(1, 1, 3, dtype=torch.float64)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor([[values]], dtype=torch.float64)


def test_the_reward_comes_with_the_last_decision_and_every_decision_pays_its_penalty() -> None:
    """Of two decisions where three fit, the second has the reward, and the padding has nothing."""
    mask, penalties = tensor(1, 1, 0), tensor(0.1, 0.2, 0.3)
    rewards = episode_rewards(torch.tensor([[5.0]], dtype=torch.float64), mask, penalties)
    assert rewards[0, 0].tolist() == pytest.approx([-0.1, 4.8, 0.0])


def test_generalized_advantages_are_the_published_sum() -> None:
    """GAE, Eq. 16, by hand: r = (0, 0, 1), V = (.5, .6, .8), gamma = .9, lambda = .5.

    delta = (0 + .9*.6 - .5, 0 + .9*.8 - .6, 1 - .8) = (.04, .12, .2)
    A_3 = .2, A_2 = .12 + .45*.2 = .21, A_1 = .04 + .45*.21 = .1345
    """
    advantages = generalized_advantages(tensor(0, 0, 1), tensor(0.5, 0.6, 0.8), FULL, gamma=0.9, lam=0.5)
    assert advantages[0, 0].tolist() == pytest.approx([0.1345, 0.21, 0.2], abs=1e-12)


def test_the_ends_of_lambda_are_the_return_and_the_temporal_difference() -> None:
    """lambda = 1: what followed minus V; lambda = 0: r + V of the next state - V; padding is 0 and changes nothing."""
    rewards, values, mask = tensor(1, 2, 9), tensor(0.5, 0.25, 7), tensor(1, 1, 0)
    rewards = rewards * mask
    returns = generalized_advantages(rewards, values, mask, lam=1.0)
    assert returns[0, 0].tolist() == pytest.approx([3 - 0.5, 2 - 0.25, 0])
    differences = generalized_advantages(rewards, values, mask, lam=0.0)
    assert differences[0, 0].tolist() == pytest.approx([1 + 0.25 - 0.5, 2 - 0.25, 0])


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_decisions() -> None:
    """Over what the mask covers, and nothing leaks out of the padding."""
    white = whiten(tensor(1, 3, 100), tensor(1, 1, 0))
    assert white[0, 0].tolist() == pytest.approx([-1, 1, 0], abs=1e-6)


def test_a_value_that_has_moved_too_far_gains_nothing() -> None:
    """1/2 max[(V - R)^2, (clip(V) - R)^2]: V_old = 0, R = 1, clip .2.

    V = .1: (.9)^2 both ways. V = .5 would be nearer, but .2 is what counts: (.8)^2, and no gradient. V = -.5: (1.5)^2.
    """
    values = tensor(0.1, 0.5, -0.5).requires_grad_()
    loss = clipped_value_loss(values, torch.zeros_like(values), torch.ones_like(values), FULL)
    assert loss.item() == pytest.approx(0.5 * (0.81 + 0.64 + 2.25) / 3)
    gradient = torch.autograd.grad(loss, values)[0][0, 0]
    assert gradient.tolist() == pytest.approx([-0.9 / 3, 0.0, -1.5 / 3])


def test_with_a_true_critic_the_expected_gradient_is_the_policy_gradient() -> None:
    """Two decisions among two: enumerated, and weighted by p, GAE's advantages give grad E[r] for every lambda.

    The critic says the true V of each state, so that lambda only moves variance. Relative error 1e-12 in float64.
    """
    logits = torch.tensor([[0.3, -0.2], [0.5, 0.1], [-0.4, 0.2]], dtype=torch.float64, requires_grad=True)
    reward = {(0, 0): 1.0, (0, 1): -0.5, (1, 0): 2.0, (1, 1): 0.25}
    logps = torch.log_softmax(logits, dim=-1)
    episodes = list(product((0, 1), repeat=2))
    steps = torch.stack([torch.stack([logps[0, a], logps[1 + a, b]]) for a, b in episodes])[None]  # (1, 4, 2)
    rewards = torch.tensor([[reward[e] for e in episodes]], dtype=torch.float64)
    expected = torch.autograd.grad((steps.sum(-1).exp() * rewards).sum(), logits, retain_graph=True)[0]
    later = [sum(logps[1 + a, b].exp() * reward[a, b] for b in (0, 1)) for a in (0, 1)]
    first = sum(logps[0, a].exp() * later[a] for a in (0, 1))
    values = torch.stack([torch.stack([first, later[a]]) for a, _ in episodes])[None].detach()
    mask = torch.ones_like(values)
    for lam in (0.0, 0.5, 1.0):
        advantages = generalized_advantages(episode_rewards(rewards, mask), values, mask, lam=lam)
        # On policy the ratio is 1, and its gradient that of log p; `dr_grpo` divides by 4 episodes and nothing else.
        weighted = advantages * steps.detach().sum(-1, keepdim=True).exp()
        loss = clipped_surrogate_loss(steps, steps.detach(), mask, weighted, loss_type="dr_grpo").loss
        gradient = torch.autograd.grad(-4 * loss, logits, retain_graph=True)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_ppo_finds_the_solution_of_a_tabular_problem() -> None:
    r"""Five choices with rewards and a KL penalty: the optimum is $p^* \propto p_\text{ref} \exp(r/\beta)$.

    256 episodes of one decision, 4 epochs each, 300 times, the rate annealed; every probability within .03, where the
    reference is up to .4 away (the standard error of a batch is .03, and steps average over many).
    """
    torch.manual_seed(0)
    beta, rewards = 0.5, torch.tensor([0.0, 0.2, 0.4, 0.8, -0.3], dtype=torch.float64)
    reference = torch.log_softmax(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.5], dtype=torch.float64), dim=0)
    optimum = torch.softmax(reference + rewards / beta, dim=0)
    logits = reference.clone().requires_grad_()
    critic = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, critic], lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 300)
    assert (optimum - reference.exp()).abs().max() > 0.2
    for _ in range(300):
        old = torch.log_softmax(logits.detach(), dim=0)
        chosen = torch.multinomial(old.exp(), 256, replacement=True)[None]
        old_steps, mask = old[chosen][..., None], torch.ones(1, 256, 1, dtype=torch.bool)
        old_values = critic.detach().expand(1, 256, 1)
        for _ in range(4):
            steps = torch.log_softmax(logits, dim=0)[chosen][..., None]
            values, reference_steps = critic.expand(1, 256, 1), reference[chosen][..., None]
            loss = ppo_loss(steps, values, old_steps, old_values, rewards[chosen], mask, reference_steps, beta).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(torch.softmax(logits.detach(), dim=0), optimum, rtol=0, atol=0.03)
    best = (optimum * (rewards - beta * (optimum.log() - reference))).sum()
    assert critic.item() == pytest.approx(best.item(), abs=0.05)


def test_the_critic_learns_standardised_rewards() -> None:
    """Mean 0 and variance 1 over all rewards so far, by the closed formula; NaN is not counted and stays NaN."""
    critic, seen = ValueHead(4), []
    for rewards in (torch.tensor([[-7.0, -3.0, torch.nan]]), torch.tensor([[-20.0, -4.0, -6.0]])):
        seen += rewards[rewards.isfinite()].tolist()
        got = critic.standardised(rewards, moments_of(rewards))
        mean, deviation = torch.tensor(seen).mean(), torch.tensor(seen).std(unbiased=False)
        torch.testing.assert_close(got.float(), (rewards - mean) / (deviation + 1e-4), equal_nan=True)
    assert critic.state_dict()["moments"][0] == 5
