"""The method is exact where it can be enumerated: N = 5, K = 3, all 60 permutations, float64, the real policy code.

What the package computes over packed prefix trees is compared with a second computation written here, which asks the
model for one token after another and knows nothing of tries, tables or trees. The models are random, but their
adapters are not zero, so that the two roles differ.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations

import pytest
import torch
from helpers import Gradients, assert_same_gradients, gradients
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from drorl.adapters import GENERATOR, SELECTOR, activate, adapter_parameters
from drorl.answers import answer_logps
from drorl.losses import Scores, weigh, weighted_mle_loss
from drorl.permutations import Permutation, format_permutation
from drorl.prompts import PromptBuilder, SelectorPrompt
from drorl.rollouts import Decisions, SelectorPolicy
from drorl.weights import baseline_weights, importance_weights, iw_elbo, log_importance_weights

QUERY = "Which city is on the Tiber?"
ANSWERS = ("Rome", "Roma")
TITLES = ("Paris", "Paris Hilton", "Rome", "Rome", "Po")  # one begins another, two are equal
CANDIDATES = [
    {"title": title, "text": text, "score": score}
    for title, text, score in zip(TITLES, ("On the Seine.", "Not on.", "On it.", "A city.", "No."), range(5), strict=True)
]
SCORES = [2.0, -1.0, 0.5, 1.0, -0.5]
N, K = 5, 3
ALL = list(permutations(range(N), K))
POLICIES = [SelectorPolicy(), SelectorPolicy(temperature=2.5, retrieval_prior_weight=0.3)]
POLICY = POLICIES[1]  # not the default one, so that a temperature or a prior forgotten somewhere shows


# ---------------------------------------------------------------------------------------------- the naive computation
class Naive:
    """Asks the plain model for one token at a time; each question is asked once."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model, tokenizer
        self._next: dict[tuple, torch.Tensor] = {}

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def next_token_logps(self, ids: Sequence[int]) -> torch.Tensor:
        """log p(token | ids), `(V,)`, of the active adapter."""
        key = (self.model.active_adapter, *ids)
        if key not in self._next:
            logits = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
            self._next[key] = torch.log_softmax(logits[0, -1], dim=-1)
        return self._next[key]

    def decision(self, prompt: SelectorPrompt, prefix: Permutation, num_selected: int) -> dict[int, torch.Tensor]:
        """log p_LM of each remaining candidate after `prefix`, normalised over them one token at a time."""
        step = len(prefix)
        written = [t for s, i in enumerate(prefix) for t in self.choice(prompt.identifiers[i], s, num_selected)]
        choices = {
            i: self.choice(prompt.identifiers[i], step, num_selected) for i in range(N) if i not in prefix
        }
        result = {}
        for i, tokens in choices.items():
            result[i] = torch.zeros((), dtype=torch.float64)
            for t, token in enumerate(tokens):
                allowed = sorted({other[t] for other in choices.values() if other[:t] == tokens[:t]})
                if len(allowed) > 1:
                    logps = self.next_token_logps([*prompt.ids, *written, *tokens[:t]])[allowed]
                    result[i] = result[i] + (logps - logps.logsumexp(0))[allowed.index(token)]
        return result

    def choice(self, identifier: str, step: int, num_selected: int) -> list[int]:
        """The tokens of a choice and of what ends it."""
        last = step == num_selected - 1
        end = [self.tokenizer.eos_token_id] if last else self.tokens(" >")
        return self.tokens(f" {identifier}" if step else identifier) + end

    def permutation_logps(
        self, prompt: SelectorPrompt, policy: SelectorPolicy, num_selected: int = K, proposal_temperature: float = 1.0
    ) -> torch.Tensor:
        """log p_s(z) of every permutation, in the order of `itertools`."""
        activate(self.model, SELECTOR)
        totals = []
        for z in permutations(range(N), num_selected):
            total = torch.zeros((), dtype=torch.float64)
            for step, chosen in enumerate(z):
                lm = self.decision(prompt, z[:step], num_selected)
                expert = {i: v / policy.temperature + policy.retrieval_prior_weight * SCORES[i] for i, v in lm.items()}
                norm = torch.stack(list(expert.values())).logsumexp(0)
                logps = {i: (v - norm) / proposal_temperature for i, v in expert.items()}
                total = total + logps[chosen] - torch.stack(list(logps.values())).logsumexp(0)
            totals.append(total)
        return torch.stack(totals)

    def answer_logps(self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """log p_g(y|x,d_z) of every context, one sequence after another."""
        activate(self.model, GENERATOR)
        totals = []
        for context in contexts:
            aliases = []
            for answer in answers:
                ids = torch.tensor([[*context, *answer]])
                logps = torch.log_softmax(self.model(input_ids=ids, use_cache=False).logits[0], dim=-1)
                aliases.append(sum(logps[len(context) - 1 + t, token] for t, token in enumerate(answer)))
            totals.append(torch.stack(aliases).exp().sum().log())
        return torch.stack(totals)


# ------------------------------------------------------------------------------------------------------------ fixtures
@pytest.fixture(scope="module")
def model(adapted_model: Callable[..., PeftModel]) -> PeftModel:
    """One base, two adapters that are not zero, float64; the answer's log-likelihoods spread by 1.8 nats."""
    return adapted_model(torch.float64, seed=3, randomise=True, initializer_range=0.3)


@pytest.fixture(scope="module")
def naive(model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> Naive:
    """The second computation; its answers are shared by the tests."""
    return Naive(model, tokenizer)


@pytest.fixture(scope="module")
def builder(tokenizer: PreTrainedTokenizerFast) -> PromptBuilder:
    """Prompts with titles, where the trie has depth."""
    return PromptBuilder(tokenizer, "title", K)


@dataclass
class Enumeration:
    """Everything about all permutations of one query; each tensor has 60 rows in the order of `ALL`."""

    prompt: SelectorPrompt
    contexts: list[list[int]]
    answers: list[list[int]]
    selector_logps: torch.Tensor
    generator_logps: torch.Tensor
    jacobian: torch.Tensor
    """(60, P): gradient of log p_s(z) with respect to the selector's adapter."""

    @property
    def prior(self) -> torch.Tensor:
        """p_s(z)."""
        return self.selector_logps.exp()

    @property
    def posterior(self) -> torch.Tensor:
        """p(z|x,y), by Bayes' rule."""
        joint = (self.selector_logps + self.generator_logps).exp()
        return joint / joint.sum()

    def gradient_norm(self, coefficients: torch.Tensor) -> float:
        """The norm of a gradient that is a combination of those of the permutations."""
        return (coefficients @ self.jacobian).norm().item()


@pytest.fixture(scope="module")
def exact(model: PeftModel, builder: PromptBuilder) -> Enumeration:
    """The enumeration, by the package's own code, which the first tests here compare with the naive one."""
    prompt = builder.selector(QUERY, CANDIDATES)
    activate(model, SELECTOR)
    selector_logps = POLICY.permutation_logps(model, prompt, ALL, SCORES)[0].sum(dim=1)
    parameters = adapter_parameters(model, SELECTOR)
    rows = [torch.cat([g.flatten() for g in gradients(v, parameters, True).values()]) for v in selector_logps]
    contexts = [builder.generator(QUERY, [CANDIDATES[i] for i in z]) for z in ALL]
    answers = [builder.answer(answer) for answer in ANSWERS]
    activate(model, GENERATOR)
    with torch.no_grad():
        generator_logps = answer_logps(model, contexts, answers)
    return Enumeration(prompt, contexts, answers, selector_logps.detach(), generator_logps, torch.stack(rows))


# ------------------------------------------------------------------------------------------------------- probabilities
@pytest.mark.parametrize("policy", POLICIES, ids=["paper", "temperature and prior"])
@pytest.mark.parametrize("kind", ["number", "letter", "title"])
def test_the_probabilities_of_all_permutations_are_exact(
    kind: str, policy: SelectorPolicy, model: PeftModel, naive: Naive, tokenizer: PreTrainedTokenizerFast
) -> None:
    """They sum to 1, and each is the naive product of one-token decisions of the plain model, whatever the identifiers.

    Tolerance: 60 terms of 3 decisions in float64 err by some 1e-15; 1e-10 leaves room for other kernels.
    """
    prompt = PromptBuilder(tokenizer, kind, K).selector(QUERY, CANDIDATES)
    activate(model, SELECTOR)
    with torch.no_grad():
        decisions, _ = policy.permutation_logps(model, prompt, ALL, SCORES)
        assert decisions.shape == (60, K)
        logps = decisions.sum(dim=1)
        assert abs(logps.exp().sum().item() - 1) < 1e-10
        torch.testing.assert_close(logps, naive.permutation_logps(prompt, policy), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["number", "letter", "title"])
def test_the_tokens_of_a_permutation_are_those_of_its_text(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Decoded, the tokens that a permutation is scored by are its text and the end of the turn."""
    prompt = PromptBuilder(tokenizer, kind, K).selector(QUERY, CANDIDATES)
    for z in ALL:
        text = format_permutation(z, prompt.identifiers)
        assert tokenizer.decode(prompt.slate.token_ids(z)) == text + tokenizer.eos_token


def test_the_entropies_along_the_permutations_average_to_the_entropy_of_the_policy(
    model: PeftModel, exact: Enumeration
) -> None:
    """Under p_s, the sum of the decisions' entropies has the mean -sum_z p_s(z) log p_s(z); 1e-10 as above."""
    activate(model, SELECTOR)
    with torch.no_grad():
        _, entropies = POLICY.permutation_logps(model, exact.prompt, ALL, SCORES)
    expected = -(exact.prior * exact.selector_logps).sum()
    assert (exact.prior * entropies).sum().item() == pytest.approx(expected.item(), abs=1e-10)


def test_a_retrieval_prior_without_scores_is_refused(model: PeftModel, exact: Enumeration) -> None:
    """A prior needs the retriever's scores; it is not silently left out."""
    with pytest.raises(ValueError, match="retrieval_prior_weight needs a `score`"):
        POLICY.permutation_logps(model, exact.prompt, ALL, None)


# ----------------------------------------------------------------------------------------------------------- gradients
def uniformly_proposed(exact: Enumeration) -> Scores:
    """All permutations as if drawn once each from the uniform proposal: their weights are the exact posterior."""
    return Scores(
        generator_logps=exact.generator_logps[None],
        selector_logps=exact.selector_logps[None],
        proposal_logps=torch.full((1, 60), -math.log(60), dtype=torch.float64),
    )


def test_the_enumerated_weights_are_the_posterior_and_their_bound_the_marginal_likelihood(exact: Enumeration) -> None:
    """With every permutation enumerated, w = p(z|x,y) and iw_elbo = log sum_z p_s(z) p_g(y|x,d_z), by Bayes' rule."""
    weighting = weigh(uniformly_proposed(exact))
    torch.testing.assert_close(weighting.importance_weights[0], exact.posterior, rtol=1e-10, atol=0)
    marginal = (exact.prior * exact.generator_logps.exp()).sum().log()
    assert weighting.metrics["iw_elbo"].item() == pytest.approx(marginal.item(), abs=1e-10)


def test_with_exact_weights_the_surrogate_has_the_gradient_of_the_log_marginal_likelihood(
    model: PeftModel, naive: Naive, exact: Enumeration
) -> None:
    """d/d(theta) [L_s + L_g] = -d/d(theta) log sum_z p_s(z|x,d) p_g(y|x,d_z), for both adapters (Fisher's identity).

    Left: the package's losses, weights constant. Right: autograd through the naive computation of both models, with no
    weights at all. rtol 1e-8 of each tensor's largest entry; measured 2e-14.
    """
    selector, generator = adapter_parameters(model, SELECTOR), adapter_parameters(model, GENERATOR)
    selector_logps = naive.permutation_logps(exact.prompt, POLICY)
    marginal = torch.logsumexp(selector_logps + naive.answer_logps(exact.contexts, exact.answers), dim=0)
    expected = gradients(-marginal, selector | generator, retain_graph=True)

    weights = weigh(uniformly_proposed(exact)).importance_weights
    activate(model, SELECTOR)
    selector_logps = POLICY.permutation_logps(model, exact.prompt, ALL, SCORES)[0].sum(dim=1)
    actual: Gradients = gradients(weighted_mle_loss(selector_logps[None], weights).loss, selector)
    activate(model, GENERATOR)
    generator_logps = answer_logps(model, exact.contexts, exact.answers)
    actual |= gradients(weighted_mle_loss(generator_logps[None], weights).loss, generator)
    assert_same_gradients(actual, expected, rtol=1e-8)


# ------------------------------------------------------------------------------------------------ sampled permutations
def expected_weights(exact: Enumeration, m: int) -> torch.Tensor:
    r"""E[weight that m on-policy samples put on z], `(60,)`, exactly, by one integral instead of 60^m terms.

    With L = p_g, n_z the count of z and phi(t) = sum_z p_z exp(-t L_z), from 1/S = int exp(-t S) dt,

        E[n_z L_z / sum_j L_{z_j}] = m p_z L_z int_0^inf exp(-t L_z) phi(t)^(m-1) dt.
    """
    log_likelihoods = exact.generator_logps - exact.generator_logps.max()
    likelihoods = log_likelihoods.exp()
    # t = e^u: the trapezoidal rule converges exponentially on an integrand that vanishes at both ends.
    u = torch.linspace(-30, 12 - log_likelihoods.min().item(), 4001, dtype=torch.float64)
    decays = torch.exp(-u.exp()[:, None] * likelihoods)
    phi = decays @ exact.prior
    integrals = (u.exp()[:, None] * decays * phi[:, None] ** (m - 1)).sum(dim=0) * (u[1] - u[0])
    return m * exact.prior * likelihoods * integrals


def on_policy(exact: Enumeration, samples: torch.Tensor) -> Scores:
    """The scores of permutations drawn from the policy itself, given by their number, `(B, m)`."""
    logps = exact.selector_logps[samples]
    return Scores(exact.generator_logps[samples], logps, logps)


def put_on_permutations(samples: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What each query puts on each of the 60 permutations, `(B, 60)`, given its samples and their values `(B, m)`."""
    return torch.zeros(len(samples), 60, dtype=torch.float64).scatter_add_(1, samples, values)


def test_the_bias_of_the_self_normalised_gradient_falls_like_one_over_m(exact: Enumeration) -> None:
    """E[sum_i w_i grad log p_s(z_i)] tends to the posterior-weighted gradient, its bias about a quarter at four times m.

    Relative bias, exact: 0.633 at m=4, 0.246 at 16, 0.062 at 64, 0.015 at 256. The package's weights of sampled
    permutations have that expectation within 4 standard errors, which are 40 times smaller than the bias at m=4.
    """
    generator = torch.Generator().manual_seed(0)
    size = exact.gradient_norm(exact.posterior)
    biases = {}
    for m, repetitions in {4: 40_000, 16: 20_000, 64: 5_000, 256: 2_000}.items():
        expected = expected_weights(exact, m)
        assert expected.sum().item() == pytest.approx(1, abs=1e-9)  # the integral is right
        biases[m] = exact.gradient_norm(expected - exact.posterior) / size
        samples = torch.multinomial(exact.prior, repetitions * m, True, generator=generator).view(-1, m)
        estimates = put_on_permutations(samples, weigh(on_policy(exact, samples)).importance_weights)
        spread = (estimates - estimates.mean(dim=0)) @ exact.jacobian
        standard_error = spread.square().sum(dim=1).mean().sqrt().item() / math.sqrt(repetitions)
        assert exact.gradient_norm(estimates.mean(dim=0) - expected) < 4 * standard_error
    assert standard_error > 0
    assert biases[4] > biases[16] > biases[64] > biases[256]
    assert biases[4] == pytest.approx(0.633, abs=0.01)
    assert 3.5 < biases[16] / biases[64] < 4.5
    assert 3.5 < biases[64] / biases[256] < 4.5
