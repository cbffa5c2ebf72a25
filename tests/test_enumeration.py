"""The method is exact where it can be enumerated: N = 5, K = 3, all 60 permutations, float64, the real policy code.

What the package computes over packed prefix trees is compared with a second computation written here, which asks the
model for one token after another and knows nothing of tries, tables or trees. The models are random, but their
adapters are not zero, so that the two roles differ.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from drorl.policy import Decisions, Draw, SelectorPolicy
from drorl.prompts import PromptBuilder, SelectorPrompt
from drorl.weights import baseline_weights

QUERY = "Which city is on the Tiber?"
ANSWERS = ("Rome", "Roma")
TITLES = ("Paris", "Paris Hilton", "Rome", "Rome", "Po")  # one begins another, two are equal
TEXTS = ("On the Seine.", "Not on.", "On it.", "A city.", "No.")
SCORES = [2.0, -1.0, 0.5, 1.0, -0.5]
CANDIDATES = [
    {"title": title, "text": text, "score": score} for title, text, score in zip(TITLES, TEXTS, SCORES, strict=True)
]
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
        key = (self.model.active_adapter, torch.is_grad_enabled(), *ids)
        if key not in self._next:
            logits = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
            self._next[key] = torch.log_softmax(logits[0, -1], dim=-1)
        return self._next[key]

    def decision(self, prompt: SelectorPrompt, prefix: Permutation, num_selected: int) -> dict[int, torch.Tensor]:
        """log p_LM of each remaining candidate after `prefix`, normalised over them one token at a time."""
        step = len(prefix)
        written = [t for s, i in enumerate(prefix) for t in self.choice(prompt.identifiers[i], s, num_selected)]
        choices = {i: self.choice(prompt.identifiers[i], step, num_selected) for i in range(N) if i not in prefix}
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
    selector_logps = decide(model, prompt).permutation_logps([ALL])[0][0].sum(dim=1)
    parameters = adapter_parameters(model, SELECTOR)
    rows = [torch.cat([g.flatten() for g in gradients(v, parameters, True).values()]) for v in selector_logps]
    contexts = [builder.generator(QUERY, [CANDIDATES[i] for i in z]) for z in ALL]
    answers = [builder.answer(answer) for answer in ANSWERS]
    activate(model, GENERATOR)
    with torch.no_grad():
        generator_logps = answer_logps(model, contexts, [answers] * len(contexts))
    return Enumeration(prompt, contexts, answers, selector_logps.detach(), generator_logps, torch.stack(rows))


# ------------------------------------------------------------------------------------------------------- probabilities
@pytest.mark.parametrize("policy", POLICIES, ids=["paper", "temperature and prior"])
@pytest.mark.parametrize("kind", ["number", "letter", "title"])
def test_the_probabilities_of_all_permutations_are_exact(
    kind: str, policy: SelectorPolicy, model: PeftModel, naive: Naive, tokenizer: PreTrainedTokenizerFast
) -> None:
    """They sum to 1, and each is the naive product of one-token decisions of the plain model, for all identifiers.

    Tolerance: 60 terms of 3 decisions in float64 err by some 1e-15; 1e-10 leaves room for other kernels.
    """
    prompt = PromptBuilder(tokenizer, kind, K).selector(QUERY, CANDIDATES)
    activate(model, SELECTOR)
    with torch.no_grad():
        decisions, _ = decide(model, prompt, policy).permutation_logps([ALL])[0]
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
        _, entropies = decide(model, exact.prompt).permutation_logps([ALL])[0]
    expected = -(exact.prior * exact.selector_logps).sum()
    assert (exact.prior * entropies).sum().item() == pytest.approx(expected.item(), abs=1e-10)


def test_a_retrieval_prior_without_scores_is_refused(model: PeftModel, exact: Enumeration) -> None:
    """A prior needs the retriever's scores; it is not silently left out."""
    with pytest.raises(ValueError, match="retrieval_prior_weight needs a `score`"):
        Decisions(POLICY, model, [replace(exact.prompt, scores=[None] * N)]).permutation_logps([ALL])


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
    weights at all. rtol 1e-8 of each tensor's largest entry; measured 6e-15.
    """
    selector, generator = adapter_parameters(model, SELECTOR), adapter_parameters(model, GENERATOR)
    selector_logps = naive.permutation_logps(exact.prompt, POLICY)
    marginal = torch.logsumexp(selector_logps + naive.answer_logps(exact.contexts, exact.answers), dim=0)
    expected = gradients(-marginal, selector | generator, retain_graph=True)

    weights = weigh(uniformly_proposed(exact)).importance_weights
    activate(model, SELECTOR)
    selector_logps = decide(model, exact.prompt).permutation_logps([ALL])[0][0].sum(dim=1)
    actual: Gradients = gradients(weighted_mle_loss(selector_logps[None], weights).loss, selector)
    activate(model, GENERATOR)
    generator_logps = answer_logps(model, exact.contexts, [exact.answers] * len(exact.contexts))
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
    """E[sum_i w_i grad log p_s(z_i)] tends to the posterior-weighted gradient, its bias a quarter at four times m.

    Relative bias, exact: 0.633 at m=4, 0.246 at 16, 0.062 at 64, 0.015 at 256. The package's weights of sampled
    permutations have that expectation within 4 standard errors, each about 0.008 on the same scale.
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
    assert biases[4] > biases[16] > biases[64] > biases[256]
    assert biases[4] == pytest.approx(0.633, abs=0.01)
    assert 3.5 < biases[16] / biases[64] < 4.5
    assert 3.5 < biases[64] / biases[256] < 4.5


def expected_distance(target: torch.Tensor, proposal: torch.Tensor, m: int) -> float:
    r"""The expected sum of |w_z - target_z| of m weighted samples, to first order in 1/sqrt(m) (the delta method).

    Var[w_z] = (1/m) sum_j q_j r_j^2 (1[j = z] - target_z)^2 with r = target/q, and E|X| = sqrt(2/pi) deviations.
    """
    ratios = target.square() / proposal
    deviations = torch.eye(60, dtype=torch.float64) - target[:, None]
    return math.sqrt(2 / math.pi / m) * (deviations.square() @ ratios).sqrt().sum().item()


def decide(model: PeftModel, prompt: SelectorPrompt, policy: SelectorPolicy = POLICY) -> Decisions:
    """The package's decisions for one query."""
    return Decisions(policy, model, [prompt])


def posterior_estimate(exact: Enumeration, decisions: Decisions, draws: Sequence[Draw]) -> torch.Tensor:
    """What the weights of pooled draws put on each permutation, `(60,)`; the package computes p_s and the weights."""
    drawn = [z for draw in draws for z in draw.permutations]
    samples = torch.tensor([[ALL.index(z) for z in drawn]])
    selector_logps = decisions.permutation_logps([drawn])[0][0].sum(dim=1)
    proposal_logps = torch.cat([draw.proposal_logps for draw in draws]).sum(dim=1)
    scores = Scores(exact.generator_logps[samples], selector_logps[None], proposal_logps[None])
    return put_on_permutations(samples, weigh(scores).importance_weights)[0]


def test_off_policy_samples_converge_to_the_same_posterior(model: PeftModel, naive: Naive, exact: Enumeration) -> None:
    """Drawn at proposal_temperature 2 and weighted by p_g p_s/q, permutations approach p(z|x,y) as theory has it.

    The sum of the absolute differences, averaged over 8 estimates, is within 25 % of its expectation, 0.170 at m=1000
    and half of it at 4000 (8 % standard error; measured over 60 estimates: 0.166 and 0.082). Without the factor p_s/q
    it would be 0.35, whatever m. q is exact too: each decision's log q sums to that of the naive computation.
    """
    activate(model, SELECTOR)
    decisions = decide(model, exact.prompt)
    with torch.no_grad():
        proposal = naive.permutation_logps(exact.prompt, POLICY, proposal_temperature=2.0)
    assert proposal.exp().sum().item() == pytest.approx(1, abs=1e-10)
    torch.manual_seed(0)
    for m in (1000, 4000):
        draws = [decisions.sample(m, temperature=2.0)[0] for _ in range(8)]
        drawn = torch.tensor([ALL.index(z) for z in draws[0].permutations])
        torch.testing.assert_close(draws[0].proposal_logps.sum(dim=1), proposal[drawn], rtol=0, atol=1e-10)
        distances = [(posterior_estimate(exact, decisions, [d]) - exact.posterior).abs().sum().item() for d in draws]
        assert sum(distances) / 8 == pytest.approx(expected_distance(exact.posterior, proposal.exp(), m), rel=0.25)


def test_every_first_choice_converges_to_the_same_posterior(model: PeftModel, exact: Enumeration) -> None:
    """Each candidate taken once as the first choice, the rest sampled: q(z_1) = 1/N, and the weights stay exact.

    200 draws of N = 5 are pooled into 1000 weighted samples; averaged over 8 such estimates, the distance to the
    posterior is within 25 % of its expectation, as above.
    """
    activate(model, SELECTOR)
    decisions = decide(model, exact.prompt)
    first_choices = torch.stack([exact.prior[[z[0] == first for z in ALL]].sum() for first in range(N)])
    proposal = exact.prior / first_choices[[z[0] for z in ALL]] / N
    torch.manual_seed(0)
    distances = []
    for _ in range(8):
        draws = [decisions.sample(num_generations=99, every_first_choice=True)[0] for _ in range(200)]
        assert [z[0] for z in draws[0].permutations] == list(range(N))
        assert draws[0].proposal_logps[:, 0].tolist() == pytest.approx([-math.log(N)] * N)
        distances.append((posterior_estimate(exact, decisions, draws) - exact.posterior).abs().sum().item())
    assert sum(distances) / 8 == pytest.approx(expected_distance(exact.posterior, proposal, 1000), rel=0.25)


def test_for_one_choice_the_enumeration_of_first_choices_is_exact(
    model: PeftModel, naive: Naive, tokenizer: PreTrainedTokenizerFast
) -> None:
    """K = 1: the weights of one draw are the posterior, iw_elbo is log p(y|x), and the mean baseline is the prior.

    So the advantages have the gradient of the log marginal likelihood with baseline and without: nothing is sampled.
    rtol 1e-8; but 1e-6 nats for iw_elbo, since the sampler holds log 1/N in float32.
    """
    builder = PromptBuilder(tokenizer, "title", 1)
    prompt = builder.selector(QUERY, CANDIDATES)
    contexts = [builder.generator(QUERY, [c]) for c in CANDIDATES]
    answers = [builder.answer(answer) for answer in ANSWERS]
    parameters = adapter_parameters(model, SELECTOR)
    prior = naive.permutation_logps(prompt, POLICY, num_selected=1)
    joint = prior + naive.answer_logps(contexts, answers)
    expected = gradients(-joint.logsumexp(dim=0), parameters)

    activate(model, SELECTOR)
    [draw] = decide(model, prompt).sample(2, every_first_choice=True)
    selector_logps = decide(model, prompt).permutation_logps([draw.permutations])[0][0].sum(dim=1)
    activate(model, GENERATOR)
    generator_logps = answer_logps(model, contexts, [answers] * len(contexts)).detach()
    scores = Scores(generator_logps[None], selector_logps.detach()[None], draw.proposal_logps.sum(dim=1)[None])
    for baseline in ("none", "mean"):
        weighting = weigh(scores, baseline=baseline)
        torch.testing.assert_close(weighting.importance_weights[0], joint.softmax(dim=0), rtol=1e-8, atol=0)
        assert weighting.metrics["iw_elbo"].item() == pytest.approx(joint.logsumexp(dim=0).item(), abs=1e-6)
        loss = weighted_mle_loss(selector_logps[None], weighting.advantages).loss
        assert_same_gradients(gradients(loss, parameters, retain_graph=True), expected, rtol=1e-8)
    torch.testing.assert_close(baseline_weights(scores.log_ratio, scores.valid)[0], prior.exp(), rtol=1e-8, atol=0)


# ----------------------------------------------------------------------------------------------------------- baselines
def enumerated_samples(exact: Enumeration, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All ways of drawing m permutations, as sorted tuples, and the probability of each on-policy."""
    samples = torch.tensor(list(combinations_with_replacement(range(60), m)))
    counts = put_on_permutations(samples, torch.ones(samples.shape, dtype=torch.float64))
    orders = math.factorial(m) / torch.lgamma(counts + 1).sum(dim=1).exp()
    return samples, orders * exact.prior[samples].prod(dim=1)


def mean_and_variance(
    exact: Enumeration, samples: torch.Tensor, probabilities: torch.Tensor, baseline: str
) -> tuple[torch.Tensor, float]:
    """The selector's gradient `(P,)` averaged over all draws of m samples, and the trace of its covariance."""
    advantages = weigh(on_policy(exact, samples), baseline=baseline).advantages
    coefficients = put_on_permutations(samples, advantages)
    mean = probabilities @ coefficients @ exact.jacobian
    products = exact.jacobian @ exact.jacobian.T
    squares = ((coefficients @ products) * coefficients).sum(dim=1)
    return mean, (probabilities @ squares - mean @ mean).item()


@pytest.mark.parametrize(("m", "kept"), [(2, 0.298), (3, 0.426)])
def test_the_mean_baseline_leaves_the_expectation_and_lowers_the_variance(
    exact: Enumeration, m: int, kept: float
) -> None:
    """Exact, over all ways to draw m: E[sum (w_i - 1/m) g_i] = E[sum w_i g_i]; of the variance 30 % (43 %) remains.

    Variance of the selector's gradient (trace), m=2: 36.0 without, 10.7 with; m=3: 31.2 and 13.3. The two means differ
    by rounding, 1e-12 of their size; the variances are recorded to 1 %.
    """
    samples, probabilities = enumerated_samples(exact, m)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    mean, variance = mean_and_variance(exact, samples, probabilities, "none")
    with_baseline, lower = mean_and_variance(exact, samples, probabilities, "mean")
    torch.testing.assert_close(with_baseline, mean, rtol=0, atol=1e-12 * mean.norm().item())
    assert lower / variance == pytest.approx(kept, rel=0.01)


def test_the_mean_baseline_lowers_the_variance_at_the_papers_m(exact: Enumeration) -> None:
    """m = 8, 20,000 draws: 66 % of the variance remains (21.7, 14.2). Two runs of twice the size differed by 0.002."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.multinomial(exact.prior, 20_000 * 8, True, generator=generator).view(-1, 8)
    probabilities = torch.full((len(samples),), 1 / len(samples), dtype=torch.float64)
    _, variance = mean_and_variance(exact, samples, probabilities, "none")
    _, lower = mean_and_variance(exact, samples, probabilities, "mean")
    assert lower / variance == pytest.approx(0.656, abs=0.02)


@pytest.mark.parametrize("m", [2, 3])
def test_the_leave_one_out_baseline_lengthens_the_expectation_only(exact: Enumeration, m: int) -> None:
    """Weights of one query sum to 1, so the mean of the others knows w_i: the expectation gains a factor m/(m-1).

    The direction stays, and so does the ratio of signal to noise of the mean baseline; 1e-12 is rounding.
    """
    samples, probabilities = enumerated_samples(exact, m)
    mean, _ = mean_and_variance(exact, samples, probabilities, "none")
    _, variance = mean_and_variance(exact, samples, probabilities, "mean")
    longer, higher = mean_and_variance(exact, samples, probabilities, "leave_one_out")
    torch.testing.assert_close(longer, mean * m / (m - 1), rtol=0, atol=1e-12 * mean.norm().item())
    assert higher == pytest.approx(variance * (m / (m - 1)) ** 2, rel=1e-10)


# ------------------------------------------------------------------------------------------------------------- sampler
def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The probability of counts at least as far from their expectation (chi-square); rare cells are pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    cells = [*zip(counts[~rare], expected[~rare], strict=True), (counts[rare].sum(), expected[rare].sum())]
    cells = [(count, expectation) for count, expectation in cells if expectation > 0]
    statistic = sum((count - expectation) ** 2 / expectation for count, expectation in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def test_the_sampler_draws_from_the_policy(model: PeftModel, exact: Enumeration) -> None:
    """6000 draws agree with the enumerated probabilities (chi-square, p > 0.001); those of a wrong sampler do not.

    The wrong one draws at temperature 1.15; against it the test has to reject, or it would see no small mistake.
    """
    activate(model, SELECTOR)
    decisions = decide(model, exact.prompt)
    values = {}
    for temperature in (1.0, 1.15):
        torch.manual_seed(0)
        drawn = decisions.sample(6000, temperature)[0].permutations
        counts = torch.tensor([ALL.index(z) for z in drawn]).bincount(minlength=60).double()
        values[temperature] = p_value(counts, exact.prior)
    assert values[1.0] > 0.001
    assert values[1.15] < 1e-6


def test_a_draw_knows_the_probability_of_its_decisions(model: PeftModel, exact: Enumeration) -> None:
    """On-policy, proposal_logps are log p_s of each decision, `(m, K)`, and p_s/q is 1, to rounding."""
    activate(model, SELECTOR)
    decisions = decide(model, exact.prompt)
    [draw] = decisions.sample(50)
    assert draw.proposal_logps.shape == draw.old_selector_logps.shape == (50, K)
    assert draw.log_ratio.abs().max() < 1e-12
    with torch.no_grad():
        [(logps, _)] = decisions.permutation_logps([draw.permutations])
    torch.testing.assert_close(draw.proposal_logps, logps, rtol=0, atol=1e-12)
    [(trained, _)] = decisions.permutation_logps([draw.permutations])
    assert trained.requires_grad
    trained = trained.detach()
    torch.testing.assert_close(logps, trained, rtol=0, atol=1e-12)


def test_the_greedy_permutation_is_the_best_decision_at_each_step(
    model: PeftModel, naive: Naive, exact: Enumeration
) -> None:
    """Each choice is the likeliest of those left given the ones before, as the naive computation of the model says."""
    activate(model, SELECTOR)
    greedy = decide(model, exact.prompt).greedy()[0]
    expected: Permutation = ()
    for _ in range(K):
        with torch.no_grad():
            lm = naive.decision(exact.prompt, expected, K)
        experts = {i: v.item() / POLICY.temperature + POLICY.retrieval_prior_weight * SCORES[i] for i, v in lm.items()}
        expected = (*expected, max(experts, key=experts.__getitem__))
    assert greedy == expected


def test_decisions_without_gradient_are_not_trained_on(model: PeftModel, exact: Enumeration) -> None:
    """Half of their gradient would be missing, and nobody would notice."""
    activate(model, SELECTOR)
    with torch.no_grad():
        decisions = decide(model, exact.prompt)
    with pytest.raises(ValueError, match="made without gradient"):
        decisions.permutation_logps([[(0, 1, 2)]])


def test_each_decision_is_computed_once_whoever_asks(model: PeftModel, exact: Enumeration) -> None:
    """After a draw of everything, asking for the draw's log-probabilities again runs the model no more."""
    activate(model, SELECTOR)
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    decisions = decide(model, exact.prompt)
    [draw] = decisions.sample(8)
    decisions.greedy()
    passes = len(calls)
    assert 0 < passes <= 2 * K
    with torch.no_grad():
        decisions.permutation_logps([draw.permutations])
    decisions.greedy()
    hook.remove()
    assert len(calls) == passes
