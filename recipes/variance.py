r"""Variance and direction of each estimator's gradient on fixed rows of real questions.

    python recipes/variance.py --run outputs/nq_demo --num_rows 24        # writes results/variance.{json,md}

With K = 1 a query has N permutations, and every estimator's gradient of the selector is a combination of the N
gradients of log p_s(i): sum_i c_i grad log p_s(i). Those are computed once a row, and of them only their products are
kept, N x N. So an estimate is a vector of N coefficients, 10,000 repetitions cost nothing, and the exact gradient, of
log sum_i p_s(i) p_g(y|i), is the combination with the posterior as coefficients.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from drorl.adapters import SELECTOR
from drorl.data.vitalqa import load_vitalqa
from drorl.evaluation import score_permutations
from drorl.losses import Scores, weigh
from drorl.pipeline import RAGPipeline

ESTIMATORS: dict[str, dict[str, Any]] = {
    "dro": {},
    "dro, w - 1/m": {"baseline": "mean"},
    "dro, proposal temperature 2, baseline": {"baseline": "mean", "temperature": 2.0},
    "dro, proposal temperature 4, baseline": {"baseline": "mean", "temperature": 4.0},
    "dro, every first choice": {"enumerate": True},
    "grpo": {"selector_objective": "grpo"},
    "rloo": {"selector_objective": "rloo"},
    "rloo, likelihood": {"selector_objective": "rloo", "reward": "likelihood"},
    "reinforce": {"selector_objective": "reinforce"},
}


def measured(pipeline: RAGPipeline, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns log p_s(i) and log p_g(y|i) of each candidate, `(N,)`, and the products of the gradients, `(N, N)`."""
    shown = pipeline.present(row["query"], row["candidates"])
    decisions = pipeline.decisions([row["query"]], [shown])
    permutations = [(i,) for i in range(len(shown))]
    [(logps, _)] = decisions.permutation_logps([permutations])
    parameters = pipeline.parameters(SELECTOR)
    rows = [torch.autograd.grad(logp, parameters, retain_graph=True, allow_unused=True) for logp in logps[:, 0]]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row if g is not None]) for row in rows]).double()
    with torch.no_grad():
        [generator_logps] = score_permutations(pipeline, [row], [shown], [permutations], "surface")
    return {
        "selector": logps.detach()[:, 0].double(),
        "generator": generator_logps.double(),
        "products": jacobian @ jacobian.T,
    }


def estimates(of: dict[str, torch.Tensor], estimator: dict[str, Any], m: int, repetitions: int) -> torch.Tensor:
    """Returns the coefficients of an estimator's gradients, `(repetitions, N)`, by the package's own weights."""
    settings = dict(estimator)
    temperature, reward = settings.pop("temperature", 1.0), settings.pop("reward", "log_likelihood")
    logps, n = of["selector"], len(of["selector"])
    logq = torch.log_softmax(logps / temperature, dim=0)
    drawn = torch.multinomial(logq.exp().expand(repetitions, n), m, replacement=True)
    if settings.pop("enumerate", False):
        drawn, logq = (
            torch.arange(n).expand(1, n),
            torch.full((n,), -math.log(n), dtype=torch.float64),
        )
    generator = of["generator"][drawn]
    rewards = generator if reward == "log_likelihood" else generator.exp()
    advantages = weigh(Scores(generator, logps[drawn], logq[drawn], rewards), **settings).advantages
    return torch.zeros(len(drawn), n, dtype=torch.float64).scatter_add_(1, drawn, advantages)


def described(rows: Sequence[dict[str, torch.Tensor]], estimator: dict[str, Any], m: int, repetitions: int) -> dict:
    """Returns how far the mean is from DRO's exact gradient, and the deviation of one estimate, averaged over rows."""
    sums = {"deviation": 0.0, "cosine": 0.0, "cosine of one": 0.0}
    for of in rows:
        products = of["products"]
        exact = torch.softmax(of["selector"] + of["generator"], dim=0)
        # Coefficients that are those of log p_s itself add nothing: sum_i p_s(i) grad log p_s(i) = 0.
        coefficients = estimates(of, estimator, m, repetitions)
        mean = coefficients.mean(dim=0)

        def norm(c: torch.Tensor, products: torch.Tensor = products) -> float:
            return float((c @ products @ c).clamp(min=0).sqrt())

        spread = coefficients - mean
        variance = float(torch.einsum("rn,nk,rk->r", spread, products, spread).mean())
        own = norm(mean)  # a reward in nats and a weight have different units: each by its own length
        cosine = float(mean @ products @ exact) / max(own * norm(exact), 1e-30)
        lengths = torch.einsum("rn,nk,rk->r", coefficients, products, coefficients).clamp(min=1e-30).sqrt()
        sums["cosine"] += cosine / len(rows)
        sums["cosine of one"] += float((coefficients @ products @ exact / lengths).mean()) / norm(exact) / len(rows)
        sums["deviation"] += variance**0.5 / max(own, 1e-30) / len(rows)
    return sums


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run with K = 1, as outputs/nq_demo")
    parser.add_argument("--num_rows", type=int, default=24, help="of the training split")
    parser.add_argument("--num_generations", type=int, default=8, help="m")
    parser.add_argument("--repetitions", type=int, default=10_000)
    parser.add_argument("--output_dir", type=Path, default=Path("results"))
    args = parser.parse_args()
    try:
        pipeline = RAGPipeline.from_pretrained(args.run)
    except FileNotFoundError as error:
        parser.error(str(error))
    if pipeline.settings.num_selected != 1:
        parser.error(f"{args.run} selects {pipeline.settings.num_selected} passages: this enumerates a single choice")
    data = load_vitalqa()["train"].select(range(args.num_rows))
    rows = [measured(pipeline, row) for row in track(data, "rows")]
    torch.manual_seed(0)
    table = {name: described(rows, of, args.num_generations, args.repetitions) for name, of in ESTIMATORS.items()}
    entropy = sum(float(torch.special.entr(of["selector"].exp()).sum()) for of in rows) / len(rows)
    result = {"rows": len(rows), "m": args.num_generations, "entropy": entropy, "estimators": table}
    lines = [f"{len(rows)} rows, m = {args.num_generations}, entropy of the selector {entropy:.2f} nats.", ""]
    columns = ["deviation / length of the mean", "cosine of the mean with DRO's exact gradient", "cosine of one"]
    lines += [f"| estimator | {' | '.join(columns)} |", "|---|---|---|---|"]
    for name, of in table.items():
        lines.append(f"| {name} | {of['deviation']:.2f} | {of['cosine']:.3f} | {of['cosine of one']:.3f} |")
    lines += ["", "GRPO, RLOO and REINFORCE maximise another objective: their cosine is no bias."]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "variance.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.output_dir / "variance.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
