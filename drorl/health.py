"""Watches what is logged, and says what to do when training goes wrong without an error.

Every rule reads the trainer's log, which a checkpoint keeps, and warns once in a run. The thresholds are such that of
the runs in results/ none that went well is warned of, and those that are known to have stood still are; see
`tests/test_health.py`.

Shapes: B queries, m permutations of each.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .config import DROConfig
from .errors import UnhealthyError
from .losses import WEIGHTED
from .pipeline import RAGPipeline
from .rollouts import Rollout, answer_logps_of

logger = logging.get_logger(__name__)

STEPS = 20
"""For so long a state has to last: a step has few queries, and what they say is noisy."""
ESS_NEAR_ONE = 1.05
"""One sample has 97.6 % of the weight. DRO over all first choices learns well at 1.1 to 1.8 (means of 20 steps)."""
ESS_NEAR_ALL = 0.98
"""Of m. A policy gradient near the end of its training has reached 0.90 (mean of 20 steps)."""
COLLAPSED_ENTROPY = 0.05
"""Of a free choice's, log N!/(N-K)!. With N = 8, K = 1 that is 0.10 nats, of 20 steps; runs that learned had 0.40 and
more, two that stood still 0.02 and 0.03; with N = 9, K = 2 it is 0.21, and the least was 0.36."""
SPIKE_STEPS = 10
"""The median of so many steps is compared: single hard queries cost 70 nats in runs that are well."""
SPIKE_BEFORE = (20, 50)
"""At least and at most so many entries of the log before them are what they are compared with."""
SPIKE_RANGES = 4.0
"""Interquartile ranges of those below their median. Runs that were well have reached 2.8."""
SPIKE_NATS = 1.0
"""And at least this: where all that is left is a small loss, its quartiles lie next to each other."""
VALID_RATE_DROP = 0.5
"""Of its best mean over 20 steps."""
VALID_RATE_WORTH = 0.1
"""What that best has to be: the half of next to nothing is noise."""
PARITY_SHARE = 0.2
"""Of the gap at which a run stops."""
PARITY_FLOAT32 = 0.01
"""Nats: a thousand times the gap that rounding makes between vLLM and the trainer in float32."""
PROBE_SHARE = 80
"""For every so many contexts that the generator scores, one of another query is scored, without gradient.

In training a context is read forward and backward, three times the work, so the probe is 1/240 of the generator's.
"""
PROBE_STEPS = 10
"""Not more often than this: if all m contexts are one, the selector's N passages are what a step reads beside it."""
PROBES = 10
"""So many probes are averaged, each of the queries of a step."""
IGNORES_CONTEXT = 0.1
"""Nats that the passages of a query add to its answer's log-likelihood, compared with those of another."""
_REMEMBERED = 1000  # entries of the log; a rule looks at the latest, so that a long run's log costs no more and more


class Log:
    """The training entries of a trainer's log, the latest last.

    Args:
        log_history (`list[dict]`): `TrainerState.log_history`.
    """

    def __init__(self, log_history: Sequence[Mapping[str, Any]]):
        self.entries = [entry for entry in log_history[-_REMEMBERED:] if "loss" in entry]

    def last(self, name: str, steps: int) -> list[float]:
        """Returns what was logged of the last `steps` steps, or of more in one entry; empty in a younger run."""
        now = self.entries[-1]["step"]
        return self._values(name, (e for e in self.entries if e["step"] > now - steps)) if now >= steps else []

    def before(self, name: str, steps: int) -> list[float]:
        """Returns what was logged before the last `steps` steps."""
        now = self.entries[-1]["step"]
        return self._values(name, (e for e in self.entries if e["step"] <= now - steps))

    @staticmethod
    def _values(name: str, entries: Iterator[Mapping[str, Any]]) -> list[float]:
        return [entry[name] for entry in entries if entry.get(name) is not None]


# ----------------------------------------------------------------------------------------------------------- the rules
def one_sample_carries_all(log: Log, args: DROConfig) -> str | None:
    """ESS near 1: of a query's m samples one has all the weight, in step after step."""
    sizes = log.last("effective_sample_size", STEPS)
    weighted = "dro" in (args.selector_objective, args.generator_objective)
    # Below 1 are means over queries of which some were skipped.
    if not weighted or args.num_generations == 1 or not sizes or not 0.999 <= max(sizes) < ESS_NEAR_ONE:
        return None
    return (
        f"effective_sample_size has not exceeded {max(sizes):.2f} of {args.num_generations} for {STEPS} steps: one "
        "permutation carries each update, the others are wasted. Raise weight_temperature (to 2 or 3), and look with "
        "`drorl inspect` at which answers are scored (answer_target): a long one differs by many nats"
    )


def nothing_to_learn(log: Log, args: DROConfig) -> str | None:
    """ESS = m: all samples of a query weigh the same, so their gradients cancel."""
    sizes, m = log.last("effective_sample_size", STEPS), args.num_generations
    if args.selector_objective == "none" or m == 1 or not sizes or fmean(sizes) < ESS_NEAR_ALL * m:
        return None
    unique = fmean(log.last("permutations/unique_ratio", STEPS) or [1.0])
    same = "the same permutation is drawn again and again" if unique * m < 2 else "their passages are equally good"
    return (
        f"effective_sample_size has been {fmean(sizes):.2f} of {m} over {STEPS} steps: all samples of a query have "
        f"the same weight ({same}), so the selector learns nothing. {_explore(args)}, and check that candidates differ"
    )


def entropy_collapsed(log: Log, args: DROConfig) -> str | None:
    """The selector has made up its mind, and draws nothing else any more that could change it."""
    entropies, free = log.last("selector/entropy", STEPS), math.log(math.perm(args.num_candidates, args.num_selected))
    if args.proposal == "retriever" or not entropies or fmean(entropies) >= COLLAPSED_ENTROPY * free:
        return None
    return (
        f"selector/entropy has been {fmean(entropies):.3f} nats over {STEPS} steps (a free choice of "
        f"{args.num_selected} of {args.num_candidates} has {free:.2f}): the selector draws next to nothing but its "
        f"favourite. Go on from an earlier checkpoint with a lower learning_rate. {_explore(args)}"
    )


def _explore(args: DROConfig) -> str:
    if args.selector_objective in WEIGHTED and args.constrained:
        return "Draw what it would not: proposal=first_choices, or a proposal_temperature above 1"
    penalty = ", or a beta above 0" if args.selector_objective in ("grpo", "ppo") else ""
    return f"Draw from a flatter policy: a higher selector_temperature{penalty}"


def context_ignored(log: Log, args: DROConfig) -> str | None:
    """The answer is as likely after the passages of another query, see [`reads_context`]."""
    steps = PROBES * probe_interval(args)
    gains = log.last("generator/reads_context", steps)
    if not gains or fmean(gains) >= IGNORES_CONTEXT:
        return None
    return (
        f"generator/reads_context has been {fmean(gains):.2f} nats over {steps} steps: the generator finds the gold "
        "answer as likely after another query's passages, so the weights say nothing about passages. Check that the "
        "candidates hold the answers (`drorl inspect`), warm the generator up on them (warmup_queries of the recipe), "
        "or lower generator_learning_rate"
    )


def parity_lost(log: Log, args: DROConfig, dtype: torch.dtype) -> str | None:
    """The engine that draws has another opinion than the trainer; far apart, `EngineSampler` stops the run itself."""
    gaps, limit = log.last("sampling/logp_difference/mean", 1), args.max_sampling_logp_difference
    warn = min(limit, PARITY_FLOAT32 if dtype == torch.float32 else PARITY_SHARE * limit)
    if not gaps or gaps[-1] <= warn:
        return None
    peak = log.last("sampling/logp_difference/max", 1)[-1]
    return (
        f"vLLM's log-probabilities are {gaps[-1]:.3g} nats from the trainer's on average, at most {peak:.3g}, per "
        f"decision; {warn:.3g} is what {dtype} explains. Give both the same dtype and base, and leave "
        f"vllm_importance_sampling_correction on; at {limit} (max_sampling_logp_difference) the run stops"
    )


def valid_rate_dropped(log: Log, args: DROConfig) -> str | None:
    """Free texts that used to be permutations are none any more."""
    now, earlier = log.last("permutations/valid_rate", STEPS), log.before("permutations/valid_rate", STEPS)
    if args.constrained or not now or len(earlier) < len(now):
        return None
    parts = [earlier[end - len(now) : end] for end in range(len(earlier), len(now) - 1, -len(now))]
    best = max(map(fmean, parts))
    if best < VALID_RATE_WORTH or fmean(now) >= VALID_RATE_DROP * best:
        return None
    return (
        f"permutations/valid_rate has fallen from {best:.2f} to {fmean(now):.2f}: what the selector writes is no "
        "permutation any more, and repair decides. Go on from an earlier checkpoint with a lower learning_rate; if "
        "texts are cut, raise max_completion_length; constrained=True makes no malformed permutation"
    )


def loss_spiked(log: Log, args: DROConfig) -> str | None:
    """The answers have become much less likely: -iw_elbo is what all objectives lower, and is in nats for all."""
    now, earlier = log.last("iw_elbo", SPIKE_STEPS), log.before("iw_elbo", SPIKE_STEPS)[-SPIKE_BEFORE[1] :]
    if not now or len(earlier) < SPIKE_BEFORE[0]:
        return None
    low, middle, high = quantiles(earlier, n=4)
    fall = middle - median(now)
    if fall <= max(SPIKE_RANGES * (high - low), SPIKE_NATS):
        return None
    return (
        f"iw_elbo, the answers' log-likelihood, has fallen from {middle:.2f} to {median(now):.2f} nats (medians: "
        f"the last {SPIKE_STEPS} steps against those before): a loss spike. Go on from an earlier checkpoint with a "
        "lower learning_rate (generator_learning_rate) or max_grad_norm"
    )


RULES: dict[str, Callable[[Log, DROConfig], str | None]] = {
    "one_sample_carries_all": one_sample_carries_all,
    "nothing_to_learn": nothing_to_learn,
    "entropy_collapsed": entropy_collapsed,
    "context_ignored": context_ignored,
    "valid_rate_dropped": valid_rate_dropped,
    "loss_spiked": loss_spiked,
}


class HealthCallback(TrainerCallback):
    """Warns once of each rule that finds something, or stops the run: `DROConfig.on_unhealthy`.

    Args:
        args ([`DROConfig`]): settings of the run.
    """

    def __init__(self, args: DROConfig):
        self.args = args
        self.found: dict[str, str] = {}
        """What was found in this run, by the name of the rule."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.found = {}

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict, model: Any, **_: Any
    ) -> None:
        """Asks every rule after a training entry; what it finds is said once, and with `stop` ends the run, saved."""
        if "loss" not in logs:
            return
        log = Log(state.log_history)
        texts = {name: rule(log, self.args) for name, rule in RULES.items()}
        texts["parity_lost"] = parity_lost(log, self.args, model.dtype)
        for name, text in texts.items():
            if text is not None and name not in self.found:
                self.found[name] = text
                if state.is_world_process_zero:
                    logger.warning(f"step {state.global_step}: {text}")
        if self.found and self.args.on_unhealthy == "stop":
            control.should_save = True
            control.should_training_stop = True

    def check(self, state: TrainerState) -> None:
        """Ends a run that was stopped.

        Raises:
            UnhealthyError: if something was found, and that is to stop the run.
        """
        if self.found and self.args.on_unhealthy == "stop":
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            saved = f"; the run is saved in {folder}" if folder.is_dir() else ""
            raise UnhealthyError(f"stopped at step {state.global_step}{saved}. {'. '.join(self.found.values())}")


# ----------------------------------------------------------------------------------------------------------- the probe
def probe_interval(args: DROConfig) -> int:
    """Returns every how many steps the generator is asked whether it reads; see `PROBE_SHARE` and `PROBE_STEPS`."""
    return max(PROBE_STEPS, math.ceil(PROBE_SHARE / args.num_generations))


@torch.no_grad()
def reads_context(
    pipeline: RAGPipeline,
    rollouts: Sequence[Rollout],
    generator_logps: torch.Tensor,
    prior_weights: torch.Tensor,
    rows: Sequence[Mapping[str, Any]],
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Returns by how much a query's passages make its gold answer likelier than another's do, and of how many.

    $$\sum_i b_i \log p_g(y|x,d_{z_i}) - \log p_g(y|x,d')$$

    averaged over the queries, a scalar, nats; b are the weights that the samples would have without any answer, d' the
    first passages of another query in the retriever's order, as many as the permutations have. A query of which one or
    the other is not there does not count; 0 where none counts.

    Args:
        pipeline ([`RAGPipeline`]): both models.
        rollouts (`list` of B [`~rollouts.Rollout`]): with their drawn permutations.
        generator_logps (`torch.Tensor` of shape `(B, m)`): log p_g(y|x,d_z), nats; `-inf` for an invalid sample.
        prior_weights (`torch.Tensor` of shape `(B, m)`): b; 0 for an invalid sample.
        rows (`Sequence`): training rows, from which d' is taken.
        start (`int`): the row from which another query is looked for.
    """
    contexts = [[_of_another(pipeline, rollout, rows, start + i)] for i, rollout in enumerate(rollouts)]
    others = answer_logps_of(pipeline, rollouts, contexts)[:, 0]
    own = (prior_weights * generator_logps.masked_fill(prior_weights == 0, 0.0)).sum(dim=-1)
    where = others.isfinite() & (prior_weights.sum(dim=-1) > 0)
    return (own - others)[where].sum() / where.sum().clamp(min=1), where.sum()


def _of_another(
    pipeline: RAGPipeline, rollout: Rollout, rows: Sequence[Mapping[str, Any]], start: int
) -> list[int] | None:
    """Returns the generator's prompt with a rollout's query and the passages of another; `None`: there is none."""
    query = rollout.question.row["query"]
    another = next((row for i in range(len(rows)) if (row := rows[(start + i) % len(rows)])["query"] != query), None)
    if another is None or not rollout.drawn:
        return None
    return pipeline.generator_prompts.generator(query, another["candidates"][: len(rollout.drawn[0])])
