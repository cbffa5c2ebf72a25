r"""The laboratory: worlds so small that every permutation can be enumerated, so that the truth is known.

    python recipes/lab.py                      # under 3 minutes on 2 cores; writes results/lab.{json,md,svg}

A world has queries with N <= 6 passages of a few *kinds*, a tiny selector (linear in the kinds of a candidate and of
what was chosen before it) and a tiny generator (how much it trusts evidence). In one query of ten it is chance under
which passages the gold answer is likely, as distant supervision has it. The worlds (worlds.py) differ in how passages
act together:

    independent   each adds evidence of its own: the best set is that of the best passages
    together      two halves that say nothing alone; a decoy that says a little
    redundant     two copies of the best passage, of which the second adds nothing
    misleading    a passage that convinces alone, and contradicts the better one
    order         the generator reads one kind only in the first place, another only in the last (K = 3: a chain)

Everything is measured with the package's own `losses`, `weights` and `ppo`, against enumeration:

    gradients     bias, variance and direction of each estimator at equal samples, 400 repetitions
    convergence   each method from the same start, two queries an update, its learning rate chosen from the same three
    list-wise     DRO's list-wise policy against pointwise weights (REPLUG, Atlas), world by world
    regions       DRO against GRPO and RLOO over m, the selector's prejudice and the spread of the likelihood
    joint         both models, the selector alone, the generator alone

Settings that are not in the package (sampling without replacement, enumerating the last decision, a baseline per
prefix, ...) live here as prototypes; what wins moves into the package.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from worlds import (
    WORLDS,
    Learners,
    Proposal,
    World,
    everything,
    first_choices,
    last_decision,
    on_policy,
    tempered,
    until_effective,
    without_replacement,
)

from drorl.losses import Scores, weigh, weighted_mle_loss
from drorl.ppo import ppo_loss


# ------------------------------------------------------------------------------------------------------------- methods
@dataclass(frozen=True)
class Method:
    """How a selector learns. Where a generator learns, it learns in the same way from all of them."""

    objective: str
    """A key of `losses.ADVANTAGES`, or `ppo`."""
    proposal: Proposal = on_policy
    reward: str = "log_likelihood"
    baseline: str = "none"
    weight_temperature: float = 1.0
    epochs: int = 1
    prefix_baseline: bool = False
    """Prototype: credit for a decision is the weight of the samples that took it over those that share its past."""
    annealed: bool = False
    """Prototype: the proposal is 3 times as flat at first, as the policy itself at the end."""


METHODS: dict[str, Method] = {
    "dro": Method("dro"),
    "dro, w - 1/m": Method("dro", baseline="mean"),
    "dro, leave one out": Method("dro", baseline="leave_one_out"),
    "dro, weight temperature 2": Method("dro", baseline="mean", weight_temperature=2.0),
    "dro, proposal temperature 2": Method("dro", tempered(2.0), baseline="mean"),
    "dro, proposal temperature 4": Method("dro", tempered(4.0), baseline="mean"),
    "dro, annealed proposal": Method("dro", baseline="mean", annealed=True),
    "dro, without replacement": Method("dro", without_replacement, baseline="mean"),
    "dro, first choices": Method("dro", first_choices, baseline="mean"),
    "dro, last decision": Method("dro", last_decision, baseline="mean"),
    "dro, m by ESS": Method("dro", until_effective(2.0), baseline="mean"),
    "dro, credit per decision": Method("dro", prefix_baseline=True),
    "dro, exact": Method("dro", everything, baseline="mean"),
    "grpo": Method("grpo"),
    "grpo, likelihood": Method("grpo", reward="likelihood"),
    "rloo": Method("rloo"),
    "rloo, likelihood": Method("rloo", reward="likelihood"),
    "reinforce": Method("reinforce"),
    "ppo": Method("ppo", epochs=4),
    "pointwise": Method("pointwise"),
}


class Rollouts:
    """One E-step of S learners, and the losses on it: what the trainer does for two language models.

    Args:
        learners ([`Learners`]): as they are when the permutations are drawn.
        method ([`Method`]): how they learn.
        m (`int`): samples of a query.
        progress (`float`): share of the updates made so far.
    """

    @torch.no_grad()
    def __init__(self, learners: Learners, method: Method, m: int, progress: float = 0.0):
        self.method, self.world = method, learners.world
        proposal = tempered(3.0 - 2.0 * progress) if method.annealed else method.proposal
        self.samples = proposal(learners, m)
        self.old_steps = self._steps(learners)
        self.old_values = learners.values()[:, :, self.world.paths].gather(2, self._index)

    @property
    def _index(self) -> torch.Tensor:
        return self.samples.permutations[..., None].expand(*self.samples.permutations.shape, self.world.paths.shape[1])

    def _steps(self, learners: Learners) -> torch.Tensor:
        """log p_s of each decision of the samples, `(S, X, m, K)`."""
        return learners.steps(learners.decisions()).gather(2, self._index)

    def loss(self, learners: Learners) -> torch.Tensor:
        """The losses of all learners, each a mean over its queries, added up."""
        count = len(learners.selector)
        steps = self._steps(learners)
        answer_logps = learners.answer_logps(self.world.evidence).gather(-1, self.samples.permutations)
        logps = steps.detach().sum(-1)
        rewards = answer_logps.detach() if self.method.reward == "log_likelihood" else answer_logps.detach().exp()
        given = answer_logps.detach(), logps, logps - self.samples.log_ratio, rewards
        scores = Scores(*(tensor.flatten(0, 1) for tensor in given))
        objective = "dro" if self.method.objective in ("ppo", "pointwise") else self.method.objective
        weighting = weigh(scores, objective, self.method.weight_temperature, self.method.baseline)
        generator_loss = weighted_mle_loss(answer_logps.flatten(0, 1), weighting.importance_weights).loss
        if self.method.objective == "ppo":
            return count * generator_loss + self._ppo_loss(learners, steps, rewards)
        if self.method.objective == "pointwise":
            selector_loss = self._pointwise_loss(learners)
        elif self.method.prefix_baseline:
            advantages = self._credit(weighting.importance_weights.view(logps.shape))
            selector_loss = -(advantages * steps).sum(dim=(-1, -2)).mean()
        else:
            selector_loss = weighted_mle_loss(steps.sum(-1).flatten(0, 1), weighting.advantages).loss
        return count * (selector_loss + generator_loss)

    def _pointwise_loss(self, learners: Learners) -> torch.Tensor:
        alone = learners.answer_logps(self.world.alone).detach().flatten(0, 1)
        targets = weigh(Scores(alone, alone, alone), "pointwise").advantages
        return weighted_mle_loss(learners.decisions()[:, :, 0].flatten(0, 1), targets).loss

    def _ppo_loss(self, learners: Learners, steps: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        values = learners.values()[:, :, self.world.paths].gather(2, self._index)
        mask, total = torch.ones_like(steps, dtype=torch.bool), torch.zeros(())
        for s in range(len(steps)):  # what PPO whitens is a batch, and a learner has its own
            total = (
                total + ppo_loss(steps[s], values[s], self.old_steps[s], self.old_values[s], rewards[s], mask[s]).loss
            )
        return total

    def _credit(self, weights: torch.Tensor) -> torch.Tensor:
        """Mean weight of the samples that share a decision's past and the decision, minus that of its past alone.

        `(S, X, m, K)`. Without sample i itself in the second mean, as in a leave-one-out baseline; a past that no
        other sample shares is compared with all others.
        """
        paths = self.world.paths[self.samples.permutations]  # (S, X, m, K)
        others = ~torch.eye(weights.shape[-1], dtype=torch.bool)
        columns = []
        for t in range(paths.shape[-1]):
            shares = (paths[..., None, t] == paths[..., None, :, t]) & others
            shares = torch.where(shares.any(-1, keepdim=True), shares, others).to(weights.dtype)
            columns.append(weights - (shares @ weights[..., None])[..., 0] / shares.sum(-1))
        return torch.stack(columns, dim=-1)


class Adam:
    """Adam (https://huggingface.co/papers/1412.6980) with a learning rate for each learner, `(S,)`."""

    def __init__(self, parameters: Sequence[torch.Tensor], rates: torch.Tensor):
        self.parameters, self.rates, self.count = parameters, rates[:, None], 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    def step(self, loss: torch.Tensor) -> None:
        self.count += 1
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for p, g, (mean, square) in zip(self.parameters, gradients, self.moments, strict=True):
            if g is not None:
                mean.lerp_(g, 0.1)
                square.lerp_(g.square(), 0.01)
                size = (square / (1 - 0.99**self.count)).sqrt() + 1e-8
                p.data -= self.rates * mean / (1 - 0.9**self.count) / size


RATES = (0.03, 0.1, 0.3)
"""The learning rates among which each method chooses."""


@dataclass(frozen=True)
class Curves:
    """log p(y|x) of S learners over updates."""

    values: torch.Tensor
    """(updates + 1, S)."""
    cost: float
    """Generator scores of a query and update."""
    learners: Learners


BOTH = ("selector", "generator")


def train(
    world: World,
    method: Method,
    rates: torch.Tensor,
    updates: int,
    m: int,
    prejudice: float = 0.0,
    trained: Sequence[str] = ("selector",),
    batch_size: int = 2,
) -> Curves:
    """Trains one learner for each of `rates`, `(S,)`, on `batch_size` queries an update."""
    torch.manual_seed(0)
    learners = Learners.start(world, len(rates), method.objective == "pointwise", prejudice)
    adam = Adam([learners.critic, *(getattr(learners, name) for name in trained)], rates)
    values, cost = [learners.log_marginal().detach()], 0.0
    order = torch.cat([torch.randperm(len(world.features)) for _ in range(batch_size * updates)])
    for update, queries in enumerate(order.split(batch_size)[:updates]):
        some = replace(learners, world=world.of(queries))
        rollouts = Rollouts(some, method, m, update / updates)
        for _ in range(method.epochs):
            adam.step(rollouts.loss(some))
        values.append(learners.log_marginal().detach())
        cost += rollouts.samples.cost / updates
    return Curves(torch.stack(values), cost, learners)


def optimum(world: World, trained: Sequence[str] = ("selector",)) -> Learners:
    """The highest log p(y|x) that the list-wise policy (and the generator) reach, by ascent on the exact gradient."""
    learners = Learners.start(world, 1)
    adam = Adam([getattr(learners, name) for name in trained], torch.tensor([0.3]))
    for _ in range(400):
        adam.step(-learners.log_marginal().sum())
    return learners


def gradients_of(
    world: World, learners: Learners, method: Method, m: int, repetitions: int
) -> tuple[torch.Tensor, float]:
    """Independent estimates of the selector's gradient (ascent), `(repetitions, P)`, and their cost."""
    many = replace(
        learners,
        **{
            name: getattr(learners, name).detach().expand(repetitions, -1).clone().requires_grad_()
            for name in ("selector", "generator", "critic")
        },
    )
    rollouts = Rollouts(many, method, m)
    [gradient] = torch.autograd.grad(rollouts.loss(many), [many.selector])
    return -gradient, rollouts.samples.cost


def exact_gradient(learners: Learners, reward: str) -> torch.Tensor:
    """Gradient of the objective that an estimator without bias has, `(P,)`; `marginal` is DRO's."""
    joint, logps = learners.steps(learners.decisions()).sum(-1), learners.answer_logps(learners.world.evidence)
    objectives = {
        "marginal": lambda: (joint + logps).logsumexp(-1),
        "log_likelihood": lambda: (joint.exp() * logps).sum(-1),
        "likelihood": lambda: (joint + logps).exp().sum(-1),
    }
    [gradient] = torch.autograd.grad(objectives[reward]().mean(), [learners.selector])
    return gradient[0]


# --------------------------------------------------------------------------------------------------------- experiments
def gradient_table(m: int, repetitions: int) -> dict[str, Any]:
    """Bias, deviation and direction of each estimator in the world `together`, at the start and half-way."""
    world = World.build("together")
    start = Learners.start(world, 1)
    midway = train(world, METHODS["dro, exact"], torch.tensor([0.1]), 12, m, batch_size=10).learners
    table: dict[str, Any] = {}
    for place, learners in (("start", start), ("midway", midway)):
        marginal = exact_gradient(learners, "marginal")
        for name, method in METHODS.items():
            if method.objective in ("ppo", "pointwise") or method.annealed:
                continue  # PPO's is that of its critic, which knows nothing yet; pointwise has another policy
            torch.manual_seed(1)
            estimates, cost = gradients_of(world, learners, method, m, repetitions)
            if method.objective in ("rloo", "reinforce"):
                estimates = estimates / m  # their loss adds m samples up, as DRO's does whose weights add up to 1
            mean = estimates.mean(dim=0)
            variance = float((estimates - mean).square().sum(dim=1).mean())
            own = {"dro": "marginal", "grpo": None}.get(method.objective, method.reward)
            row = {
                "cost": cost,
                "deviation": math.sqrt(variance) / float(mean.norm()),
                "cosine": float(torch.cosine_similarity(mean, marginal, dim=0)),
                "cosine_of_one": float(torch.cosine_similarity(estimates, marginal[None], dim=1).mean()),
            }
            if own is not None and method.weight_temperature == 1.0:
                true = exact_gradient(learners, own)
                # What of the difference is the error of a mean over so many repetitions is taken off.
                square = float((mean - true).square().sum()) - variance / repetitions
                row["bias"] = math.sqrt(max(square, 0.0)) / float(true.norm())
            table.setdefault(name, {})[place] = row
    return table


def convergence(updates: int, seeds: int, m: int) -> dict[str, Any]:
    """What each method reaches in each world, as a share of what the exact optimum adds to the start."""
    rates = torch.tensor(RATES).repeat_interleave(seeds)
    table: dict[str, Any] = {}
    best = {name: optimum(World.build(name)) for name in WORLDS}
    for name, method in METHODS.items():
        curves = {w: train(World.build(w), method, rates, updates, m) for w in WORLDS}
        gains = {w: c.values - c.values[0] for w, c in curves.items()}
        gains = {w: g / (best[w].log_marginal().item() - curves[w].values[0]) for w, g in gains.items()}
        # One learning rate of the three for all worlds, by what it reaches on average with the first half of the
        # seeds; what is reported are the others.
        half = seeds // 2
        final = torch.stack([g[-1].view(len(RATES), seeds)[:, :half].mean(dim=1) for g in gains.values()]).mean(dim=0)
        chosen = int(final.argmax())
        own = slice(chosen * seeds + half, (chosen + 1) * seeds)
        table[name] = {"learning_rate": RATES[chosen], "cost": curves["together"].cost, "worlds": {}}
        for w, gain in gains.items():
            reached = (gain[:, own] >= 0.9 * gain[-1, own]).double()
            table[name]["worlds"][w] = {
                "gain": float(gain[-1, own].mean()),
                "deviation": float(gain[-1, own].std()),
                "greedy": float(curves[w].learners.greedy_rate[own].mean() / best[w].greedy_rate),
                "updates_to_90_percent": int(reached.argmax(dim=0).median()),
                "collapsed": float((gain[-1, own] < 0.5).double().mean()),
                "curve": [round(float(v), 4) for v in gain[:, own].mean(dim=1)],
            }
    return table


REGION_METHODS = (
    "dro, w - 1/m",
    "dro, proposal temperature 4",
    "dro, first choices",
    "dro, without replacement",
    "grpo",
    "rloo",
    "rloo, likelihood",
)


def regions(updates: int, seeds: int) -> dict[str, Any]:
    """How good the greedy choice is after training, as a share of the optimum's, in the world `together`.

    Over m, the selector's prejudice in favour of useless passages, and the generator's sharpness, both in nats. Every
    method's learning rate is chosen anew in each place, with half of the seeds, and the other half is reported.
    """
    rates, table = torch.tensor(RATES).repeat_interleave(seeds), {}
    for sharpness, prejudice, m in itertools.product((0.5, 1.0, 3.0), (0.0, 2.0, 4.0), (2, 8)):
        world = World.build("together", sharpness=sharpness)
        best = float(optimum(world).greedy_rate)
        rows = {}
        for name in REGION_METHODS:
            curves = train(world, METHODS[name], rates, updates, m, prejudice)
            reached = curves.learners.greedy_rate.view(len(RATES), seeds)
            chosen = int(reached[:, : seeds // 2].mean(dim=1).argmax())
            rows[name] = float(reached[chosen, seeds // 2 :].mean()) / best
        table[f"{sharpness:g} / {prejudice:g} / {m}"] = rows
    return table


def joint(updates: int, seeds: int, m: int) -> dict[str, Any]:
    """log p(y|x) with both models trained, or one of them (Fig. 5 of the paper), and of the exact joint optimum."""
    rates, method, table = torch.full((seeds,), 0.1), METHODS["dro, w - 1/m"], {}
    for name in WORLDS:
        world = World.build(name)
        runs = {" + ".join(t): train(world, method, rates, updates, m, trained=t) for t in (BOTH, BOTH[:1], BOTH[1:])}
        table[name] = {"start": float(next(iter(runs.values())).values[0, 0])}
        table[name] |= {of: float(curves.values[-1].mean()) for of, curves in runs.items()}
        table[name]["optimum"] = optimum(world, BOTH).log_marginal().item()
    return table


def listwise(table: dict[str, Any]) -> dict[str, Any]:
    """How good the greedy choice is, as a share of the optimum's: DRO's list-wise policy against pointwise weights."""
    return {
        world: {"dro": table["dro, w - 1/m"]["worlds"][world]["greedy"], "pointwise": row["greedy"]}
        for world, row in table["pointwise"]["worlds"].items()
    }


# -------------------------------------------------------------------------------------------------------------- report
def markdown(result: dict[str, Any]) -> str:
    """Returns the tables for people."""
    lines = [
        "| estimator | scores a query | bias | deviation | cosine of the mean | cosine of one |",
        "|---|---|---|---|---|---|",
    ]
    for name, places in result["gradients"].items():
        row = places["midway"]
        bias = f"{row['bias']:.3f}" if "bias" in row else "-"
        lines.append(
            f"| {name} | {row['cost']:.1f} | {bias} | {row['deviation']:.2f} | {row['cosine']:.3f} | "
            f"{row['cosine_of_one']:.3f} |"
        )
    worlds = list(WORLDS)
    columns = ["scores a query", "rate", *worlds, "mean", "greedy choice", "updates to 90 %", "collapsed"]
    lines += ["", f"| share of the attainable gain in log p(y given x) | {' | '.join(columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in result["convergence"].items():
        of = row["worlds"]
        gains = " | ".join(f"{of[w]['gain']:.3f}" for w in worlds)
        mean = sum(of[w]["gain"] for w in worlds) / len(worlds)
        slow = max(of[w]["updates_to_90_percent"] for w in worlds)
        collapsed = sum(of[w]["collapsed"] for w in worlds) / len(worlds)
        greedy = sum(of[w]["greedy"] for w in worlds) / len(worlds)
        lines.append(
            f"| {name} | {row['cost']:.1f} | {row['learning_rate']:g} | {gains} | {mean:.3f} | {greedy:.3f} "
            f"| {slow} | {collapsed:.2f} |"
        )
    lines += ["", "The gain is in DRO's own objective; `greedy choice`, as a share of the optimum's, is nobody's."]
    lines += ["", "| greedy choice, share of the optimum | list-wise (DRO) | pointwise |", "|---|---|---|"]
    lines += [f"| {w} | {r['dro']:.3f} | {r['pointwise']:.3f} |" for w, r in result["listwise"].items()]
    for title, part in (("sharpness / prejudice / m", "regions"), ("log p(y given x)", "joint")):
        columns = list(next(iter(result[part].values())))
        lines += ["", f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {p} | {' | '.join(f'{v:.3f}' for v in row.values())} |" for p, row in result[part].items()]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws how fast the methods learn, and what a prejudice does to them."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name in ("dro, exact", "dro, without replacement", "dro, w - 1/m", "dro", "grpo", "rloo", "ppo", "pointwise"):
        of = result["convergence"][name]["worlds"].values()
        left.plot([sum(values) / len(of) for values in zip(*(row["curve"] for row in of), strict=True)], label=name)
    left.set(xlabel="updates", ylabel="share of the attainable gain in log p(y|x)", ylim=(0, 1.02))
    places = {
        place: row for place, row in result["regions"].items() if place.startswith("1 /") and place.endswith("8")
    }
    for name in REGION_METHODS:
        prejudices = [float(place.split(" / ")[1]) for place in places]
        right.plot(prejudices, [row[name] for row in places.values()], marker="o", label=name)
    right.set(xlabel="prejudice at the start, nats (m = 8, `together`)", ylabel="greedy choice, share of the optimum")
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("results"))
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=16, help="half of them choose a learning rate")
    parser.add_argument("--num_generations", type=int, default=8, help="m")
    parser.add_argument("--repetitions", type=int, default=400, help="of each gradient")
    args = parser.parse_args()
    start = time.monotonic()
    result: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(args).items()}}
    result["gradients"] = gradient_table(args.num_generations, args.repetitions)
    result["convergence"] = convergence(args.updates, args.seeds, args.num_generations)
    result["listwise"] = listwise(result["convergence"])
    result["regions"] = regions(args.updates, args.seeds)
    result["joint"] = joint(args.updates, args.seeds, args.num_generations)
    result["seconds"] = time.monotonic() - start
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "lab.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (args.output_dir / "lab.md").write_text(text)
    draw(result, args.output_dir / "lab.svg")
    sys.stdout.write(f"{text}\n{result['seconds']:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
