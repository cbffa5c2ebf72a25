"""Worlds whose every permutation is known, the learners in them, and where samples come from; see lab.py."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import logsigmoid

NOISE = 0.1
"""Share of the queries in which it is chance what supports the gold answer."""
Kinds = tuple[str, ...]


# ------------------------------------------------------------------------------------------------------------- worlds
def additive(values: dict[str, float]) -> Callable[[Kinds], float]:
    return lambda kinds: sum(values.get(kind, 0.0) for kind in kinds)


def together(kinds: Kinds) -> float:
    return 4.0 * ("half A" in kinds and "half B" in kinds) + 1.5 * ("decoy" in kinds)


def redundant(kinds: Kinds) -> float:
    return 2.5 * ("copy" in kinds) + 1.5 * ("complement" in kinds)


def misleading(kinds: Kinds) -> float:
    return 3.0 * ("good" in kinds) + 1.0 * ("weak" in kinds) + (2.0 - 5.0 * ("good" in kinds)) * ("mislead" in kinds)


def order(kinds: Kinds) -> float:
    return 2.5 * (kinds[0] == "head") + 3.0 * (kinds[-1] == "tail")


WORLDS: dict[str, tuple[Kinds, int, Callable[[Kinds], float]]] = {  # passages of a query, K, evidence for the answer
    "independent": (("good", "weak", "noise", "noise", "noise", "noise"), 2, additive({"good": 3.0, "weak": 1.5})),
    "together": (("half A", "half B", "decoy", "noise", "noise", "noise"), 2, together),
    "redundant": (("copy", "copy", "complement", "noise", "noise", "noise"), 2, redundant),
    "misleading": (("good", "weak", "mislead", "noise", "noise", "noise"), 2, misleading),
    "order": (("head", "tail", "noise", "noise", "noise"), 3, order),
}


@dataclass(frozen=True)
class World:
    """Every permutation of every query. Shapes: X queries, Z permutations, D decisions of a query, N candidates, K.

    A query's passages stand in an order of their own, so that a place says nothing; the kinds are what the selector
    sees. Decision 0 is the first one, and `paths[z, t]` is the decision that permutation z takes at step t.
    """

    features: torch.Tensor
    """(X, D, N, P): of choosing candidate i at decision d; `listwise` marks those that look at what was chosen."""
    listwise: torch.Tensor
    """(P,) bool."""
    prejudged: int
    """The feature of a useless kind."""
    allowed: torch.Tensor
    """(D, N) bool."""
    paths: torch.Tensor
    """(Z, K)."""
    choices: torch.Tensor
    """(Z, K): the candidate that permutation z chooses at step t."""
    evidence: torch.Tensor
    """(X, Z): for the gold answer, in units that the generator makes nats of."""
    alone: torch.Tensor
    """(X, N): the same of a context of one passage."""
    sharpness: float
    """Nats that the generator makes of a unit of evidence at the start; it doubts by two units."""

    @classmethod
    def build(cls, name: str, num_queries: int = 10, sharpness: float = 1.0) -> "World":
        kinds, k, evidence = WORLDS[name]
        n, names = len(kinds), sorted(set(kinds))
        random = torch.Generator().manual_seed(0)
        permutations = list(itertools.permutations(range(n), k))
        prefixes = [z for t in range(k) for z in itertools.permutations(range(n), t)]
        place = {prefix: d for d, prefix in enumerate(prefixes)}
        size = len(names)
        features = torch.zeros(num_queries, len(prefixes), n, size * (1 + k - 1 + size), dtype=torch.float64)
        truth, alone = [], []
        for x in range(num_queries):
            of = [kinds[i] for i in torch.randperm(n, generator=random).tolist()]
            index = [names.index(kind) for kind in of]
            for d, prefix in enumerate(prefixes):
                for i in range(n):
                    features[x, d, i, index[i]] = 1.0
                    if prefix:
                        features[x, d, i, size * len(prefix) + index[i]] = 1.0
                    for j in prefix:
                        features[x, d, i, size * (k + index[j]) + index[i]] += 1.0
            values = [evidence(tuple(of[i] for i in z)) for z in permutations], [evidence((kind,)) for kind in of]
            for into, row in zip((truth, alone), values, strict=True):
                is_noise = x < NOISE * num_queries
                places = torch.randperm(len(row), generator=random).tolist() if is_noise else range(len(row))
                into.append([row[i] for i in places])
        return cls(
            features=features,
            listwise=torch.arange(features.shape[-1]) >= size,
            prejudged=names.index("noise"),
            allowed=torch.tensor([[i not in prefix for i in range(n)] for prefix in prefixes]),
            paths=torch.tensor([[place[z[:t]] for t in range(k)] for z in permutations]),
            choices=torch.tensor(permutations),
            evidence=torch.tensor(truth, dtype=torch.float64),
            alone=torch.tensor(alone, dtype=torch.float64),
            sharpness=sharpness,
        )

    def of(self, queries: torch.Tensor) -> "World":
        """The same world with some of its queries."""
        picked = {name: getattr(self, name)[queries] for name in ("features", "evidence", "alone")}
        return replace(self, **picked)


@dataclass
class Learners:
    """S learners side by side, each with its own parameters: a step of all of them is one pass."""

    world: World
    selector: torch.Tensor
    """(S, P)."""
    generator: torch.Tensor
    """(S, 1): trust in the evidence, nats of a unit."""
    critic: torch.Tensor
    """(S, P'): values of states, linear in the mean features of what may be chosen; PPO's only."""
    pointwise: bool = False

    @classmethod
    def start(cls, world: World, count: int, pointwise: bool = False, prejudice: float = 0.0) -> "Learners":
        """Learners that know nothing, but may be prejudiced, in nats, in favour of noise."""
        p = world.features.shape[-1]
        selector = torch.zeros(count, p, dtype=torch.float64)
        selector[:, world.prejudged] = prejudice
        generator = torch.full((count, 1), world.sharpness, dtype=torch.float64)
        critic = torch.zeros(count, p + 1, dtype=torch.float64)
        return cls(world, *(t.clone().requires_grad_() for t in (selector, generator, critic)), pointwise)

    def decisions(self) -> torch.Tensor:
        """log p_s of each candidate at each decision, `(S, X, D, N)`."""
        weights = self.selector * ~self.world.listwise if self.pointwise else self.selector
        logits = torch.einsum("xdnp,sp->sxdn", self.world.features, weights)
        return torch.log_softmax(logits.masked_fill(~self.world.allowed, -torch.inf), dim=-1)

    def steps(self, decisions: torch.Tensor) -> torch.Tensor:
        """The log-probabilities that permutations are made of, `(S, X, Z, K)`."""
        return decisions[:, :, self.world.paths, self.world.choices]

    def answer_logps(self, evidence: torch.Tensor) -> torch.Tensor:
        """log p_g(y|x,d_z), `(S, X, Z)`, nats."""
        return logsigmoid(self.generator[..., None] * evidence - 2.0 * self.world.sharpness)

    def values(self) -> torch.Tensor:
        """The critic's value of the state before each decision, `(S, X, D)`."""
        allowed = self.world.allowed.to(torch.float64)
        mean = (self.world.features * allowed[..., None]).sum(dim=2) / allowed.sum(dim=1)[:, None]
        return torch.einsum("xdp,sp->sxd", mean, self.critic[:, :-1]) + self.critic[:, -1:, None]

    def log_marginal(self) -> torch.Tensor:
        """log sum_z p_s(z|x) p_g(y|x,z), mean over queries, `(S,)`, exactly."""
        joint = self.steps(self.decisions()).sum(-1) + self.answer_logps(self.world.evidence)
        return joint.logsumexp(-1).mean(-1)

    @property
    def greedy_rate(self) -> torch.Tensor:
        """p_g of the gold answer from the greedy permutation, mean over queries, `(S,)`."""
        steps = self.decisions().detach()
        # The most likely decisions one after the other, not the most likely permutation: as a pipeline decodes.
        alive = torch.ones(*steps.shape[:2], len(self.world.paths), dtype=torch.bool)
        for t in range(self.world.paths.shape[1]):
            logps = steps[:, :, self.world.paths[:, t], self.world.choices[:, t]].masked_fill(~alive, -torch.inf)
            alive = logps == logps.amax(dim=-1, keepdim=True)
        chosen = alive.to(torch.float64)
        rates = (self.answer_logps(self.world.evidence).exp() * chosen).sum(-1) / chosen.sum(-1)
        return rates.mean(-1).detach()


# ----------------------------------------------------------------------------------------------------------- proposals
@dataclass(frozen=True)
class Samples:
    """What one E-step has drawn, `(S, X, m)` each."""

    permutations: torch.Tensor
    """long: numbers of permutations."""
    log_ratio: torch.Tensor
    """log p_s - log q, nats."""
    cost: float
    """Answers that the generator scored, per query."""


Proposal = Callable[[Learners, int], Samples]


def _multinomial(logps: torch.Tensor, count: int) -> torch.Tensor:
    drawn = torch.multinomial(logps.exp().flatten(0, 1), count, replacement=True)
    return drawn.view(*logps.shape[:2], count)


def on_policy(learners: Learners, m: int) -> Samples:
    drawn = _multinomial(learners.steps(learners.decisions()).sum(-1), m)
    return Samples(drawn, torch.zeros(drawn.shape, dtype=torch.float64), m)


def tempered(temperature: float) -> Proposal:
    """A flatter policy, decision by decision (`proposal_temperature`)."""

    def draw(learners: Learners, m: int) -> Samples:
        decisions = learners.decisions()
        logps = learners.steps(decisions).sum(-1)
        logq = learners.steps(torch.log_softmax(decisions / temperature, dim=-1)).sum(-1)
        drawn = _multinomial(logq, m)
        return Samples(drawn, (logps - logq).gather(-1, drawn), m)

    return draw


def without_replacement(learners: Learners, m: int) -> Samples:
    """m different permutations by Gumbel-top-k, with the inclusion probabilities of Kool et al., arXiv 1903.06059."""
    logps = learners.steps(learners.decisions()).sum(-1)
    gumbel = -torch.log(-torch.log(torch.rand(logps.shape, dtype=torch.float64)))
    perturbed, order = (logps + gumbel).topk(m + 1, dim=-1)
    drawn, threshold = order[..., :m], perturbed[..., m:]
    logps = logps.gather(-1, drawn)
    log_inclusion = torch.log(-torch.expm1(-torch.exp(logps - threshold)))
    return Samples(drawn, logps - log_inclusion, m)


def first_choices(learners: Learners, m: int) -> Samples:
    """Every first choice once, the rest sampled (`proposal="first_choices"`)."""
    steps, world = learners.steps(learners.decisions()), learners.world
    logps, drawn = steps.sum(-1), []
    for i in range(world.features.shape[2]):
        rest = (logps - steps[..., 0]).masked_fill(world.choices[:, 0] != i, -torch.inf)
        drawn.append(_multinomial(rest, 1))
    permutations = torch.cat(drawn, dim=-1)
    return Samples(permutations, steps[..., 0].gather(-1, permutations) + math.log(len(drawn)), len(drawn))


def last_decision(learners: Learners, m: int) -> Samples:
    """All but the last decision sampled, and every last choice tried: m is rounded up to whole sets."""
    steps, world = learners.steps(learners.decisions()), learners.world
    count = world.features.shape[2] - world.paths.shape[1] + 1  # completions of a prefix
    drawn = _multinomial(steps.sum(-1), -(-m // count))
    same = world.paths[:, -1][drawn][..., None] == world.paths[:, -1]  # (S, X, prefixes, Z)
    permutations = same.nonzero()[:, -1].view(*drawn.shape[:2], -1)
    return Samples(permutations, steps[..., -1].gather(-1, permutations) + math.log(count), drawn.shape[-1] * count)


def everything(learners: Learners, m: int) -> Samples:
    """Every permutation once: no sampling, the exact gradient."""
    logps = learners.steps(learners.decisions()).sum(-1)
    permutations = torch.arange(logps.shape[-1]).expand(logps.shape)
    return Samples(permutations, logps + math.log(logps.shape[-1]), logps.shape[-1])


def until_effective(target: float) -> Proposal:
    """Samples are added, m/2 at a time and at most 2m, until the effective sample size reaches `target`."""

    def draw(learners: Learners, m: int) -> Samples:
        drawn = on_policy(learners, 2 * m).permutations
        weights = learners.answer_logps(learners.world.evidence).gather(-1, drawn)
        sizes = (2 * weights.logcumsumexp(-1) - (2 * weights).logcumsumexp(-1)).exp()
        count = torch.full(drawn.shape[:2], 2 * m)
        for stop in reversed(range(m // 2, 2 * m, m // 2)):
            count[sizes[..., stop - 1] >= target] = stop
        used = torch.arange(2 * m) < count[..., None]
        log_ratio = torch.zeros(drawn.shape, dtype=torch.float64).masked_fill(~used, -torch.inf)
        return Samples(drawn, log_ratio, float(count.double().mean()))

    return draw
