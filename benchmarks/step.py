r"""Times one training step of drorl against the same step written with stock TRL, on the same rows and model.

    make bench                                       # or: python benchmarks/step.py --quick

drorl's step: draw m permutations, weigh them, train both adapters, one optimizer step. The TRL step does the same
work as a user of TRL would write it: `trl.GRPOTrainer` with `AnswerLikelihoodReward` trains the selector (sampling by
`generate`, reward, forward and backward of m repeated prompts, optimizer step), and an ordinary supervised step
trains the generator on the m contexts with the weights of their permutations. SmolLM2-135M cannot write permutations
unasked, so the TRL side's reward and supervised step are given those that drorl drew for the row, and its completions
get a permutation's length. One base with two adapters (drorl's default: rank 16, all linear layers) on either side.

The two alternate in one process, on VitalQA's rows with lengthened passages; medians and quartiles of the repetitions.
The *floor* is the time of the matrix products that cannot be avoided, one forward and one backward of each distinct
token, at the speed that large products reach in the same run. Peak memory is that of a process that makes one side's
steps only. The last line is JSON; with `--output docs` it is also written there, beside a plot.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from long_rows import long_rows
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from drorl import AnswerLikelihoodReward, DROConfig, DROTrainer
from drorl.adapters import GENERATOR, ROLES, SELECTOR, activate, adapter_parameters, load_with_adapters
from drorl.answers import answer_logps
from drorl.models import load_model_and_tokenizer, measure_gflops
from drorl.permutations import format_permutation
from drorl.pipeline import PipelineSettings, RAGPipeline
from drorl.policy import Decisions, SelectorPolicy
from drorl.rollouts import Question, Rollout
from drorl.tree import TokenTree

COMMON: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "max_steps": 1,
    "learning_rate": 1e-5,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1000,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
N, K, M = 20, 5, 8
PASSAGE_TOKENS = 48
ROWS = 4  # of a forward and backward pass on the TRL side; eight repeated prompts do not fit into 24 GB
M_SCALE, N_SCALE = (4, 8, 16, 32), (5, 10, 20)


class StepTimer(TrainerCallback):
    """Seconds from the beginning of a step, sampling included, to the end of its optimizer step."""

    def __init__(self) -> None:
        self.start = self.seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start


@dataclass
class Step:
    """One step of drorl: how long it took, and what it drew."""

    seconds: float
    rollout: Rollout
    weights: torch.Tensor


class Bench:
    """One model with two adapters, and either way to make a step with it."""

    def __init__(self) -> None:
        base, self.tokenizer = load_model_and_tokenizer("smollm2-135m", "float32")
        self.model, _ = load_with_adapters(base, ROLES)
        torch.manual_seed(0)
        for role in ROLES:  # an adapter as it is made changes nothing, and half of its gradient is zero
            for name, parameter in adapter_parameters(self.model, role).items():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.01)
        self.rows = long_rows("train", 64)
        settings = PipelineSettings(num_candidates=N, num_selected=K, max_passage_tokens=PASSAGE_TOKENS)
        self.pipeline = RAGPipeline(self.model, self.tokenizer, settings)
        self._scratch = tempfile.TemporaryDirectory()

    def _run(self, trainer: GRPOTrainer) -> float:
        timer = StepTimer()
        trainer.add_callback(timer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return timer.seconds

    def drorl(self, row: dict[str, Any], n: int = N, m: int = M) -> Step:
        """One step of `DROTrainer` on one query."""
        config = DROConfig(
            self._scratch.name,
            num_candidates=n,
            num_selected=K,
            num_generations=m,
            per_device_train_batch_size=m,
            max_passage_tokens=PASSAGE_TOKENS,
            **COMMON,
        )
        trainer = DROTrainer(self.model, config, [row], processing_class=self.tokenizer)
        seen: dict[str, Any] = {}
        batch_loss, weigh = trainer._batch_loss, trainer._weigh
        trainer._batch_loss = lambda rollouts, *args: seen.update(rollout=rollouts[0]) or batch_loss(rollouts, *args)
        trainer._weigh = lambda *args: seen.setdefault("weighting", weigh(*args))
        seconds = self._run(trainer)
        return Step(seconds, seen["rollout"], seen["weighting"].importance_weights[0])

    def trl(self, step: Step) -> float:
        """The same step with `GRPOTrainer` and a supervised step; returns its seconds."""
        rollout, m = step.rollout, len(step.rollout.permutations)
        length = max(len(rollout.prompt.slate.token_ids(z)) for z in rollout.drawn)
        row = {
            "query": rollout.question.row["query"],
            "answers": rollout.question.row["answers"],
            "candidates": list(rollout.question.shown),
            "prompt": self.tokenizer.decode(rollout.prompt.ids, skip_special_tokens=False),
        }
        config = GRPOConfig(
            self._scratch.name,
            num_generations=m,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
            **COMMON | {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": m // ROWS},
        )
        texts = [format_permutation(z, rollout.prompt.identifiers) for z in rollout.drawn]
        likelihood = AnswerLikelihoodReward(self.model, self.tokenizer, "number", K, "surface", PASSAGE_TOKENS)

        def answer_likelihood(completions: Sequence[str], **columns: Any) -> list[float | None]:
            activate(self.model, GENERATOR)
            rewards = likelihood(texts, columns["query"], columns["answers"], columns["candidates"])
            activate(self.model, SELECTOR)
            return rewards

        activate(self.model, SELECTOR)
        trainer = GRPOTrainer(
            model=self.model,
            reward_funcs=answer_likelihood,
            args=config,
            train_dataset=Dataset.from_list([row]),
            processing_class=self.tokenizer,
        )
        return self._run(trainer) + self.supervised(rollout, step.weights)

    def supervised(self, rollout: Rollout, weights: torch.Tensor) -> float:
        """An ordinary supervised step of the generator on a padded batch of (context, answer); returns its seconds."""
        activate(self.model, GENERATOR)
        parameters = list(adapter_parameters(self.model, GENERATOR).values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        start = time.perf_counter()
        pairs = contexts_and_answers(rollout)
        for first in range(0, len(pairs), ROWS):
            logps = padded_logps(self.model, pairs[first : first + ROWS])
            (-(weights[first : first + ROWS] * logps).sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    def undrawn(self, row: dict[str, Any]) -> Step:
        """What a step of drorl would hand to TRL's, without its work: neighbours in the retriever's order."""
        question = Question(row, row["candidates"][:N], 0)
        prompts = self.pipeline.prompts
        prompt = prompts.selector(row["query"], question.shown)
        drawn = [tuple(i + j for j in range(K)) for i in range(M)]
        contexts = [prompts.generator(row["query"], [question.shown[i] for i in z]) for z in drawn]
        answers = [prompts.answer(row["answers"][0])]
        rollout = Rollout(question, prompt, None, list(drawn), None, None, list(contexts), None, answers)
        return Step(0.0, rollout, torch.full((M,), 1 / M))


# -------------------------------------------------------------------------------------------- the repeated computation
def contexts_and_answers(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    return [(context, rollout.answers[0]) for context in rollout.contexts if context is not None]


def padded_logps(model: PeftModel, pairs: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Returns log p(completion | prompt) of each pair, `(m,)`, from one padded batch; the head sees what it scores."""
    sequences = [torch.tensor([*prompt, *completion]) for prompt, completion in pairs]
    ids = pad_sequence(sequences, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True, padding_side="left")
    width = max(len(completion) for _, completion in pairs)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=width + 1
    ).logits[:, :-1]
    logps = torch.log_softmax(logits.float(), dim=-1).gather(2, ids[:, -width:, None])[..., 0]
    scored = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for _, c in pairs])
    return (logps * scored).sum(dim=1)


def repeated_selector_logp(model: PeftModel, rollout: Rollout, z: tuple[int, ...]) -> torch.Tensor:
    """Returns log p_s of one permutation from its own sequence: a second implementation, for temperature 1, no prior.

    The product over the branching tokens along the permutation's own path.
    """
    slate, tokens = rollout.prompt.slate, rollout.prompt.slate.token_ids(z)
    logits = model(input_ids=torch.tensor([[*rollout.prompt.ids, *tokens]]), use_cache=False).logits[0]
    logits = logits[len(rollout.prompt.ids) - 1 :].float()
    logp = logits.new_zeros(())
    for t in range(K):
        for context, branches in slate._branchings(z[:t]):
            if tokens[: len(context)] == context:
                allowed = logits[len(context)][list(branches)]
                logp = logp + torch.log_softmax(allowed, dim=0)[list(branches).index(tokens[len(context)])]
    return logp


def gradient(parameters: Sequence[torch.Tensor], loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters))])


def relative_error(bench: Bench, step: Step) -> float:
    """How far each adapter's gradient is from the repeated computation's, relative to its norm; the larger of both."""
    rollout, weights, errors = step.rollout, step.weights, []
    for role in ROLES:
        model = bench.pipeline.role(role)
        parameters = list(adapter_parameters(model, role).values())
        if role == SELECTOR:
            decisions = bench.pipeline.decide([rollout.prompt])
            shared = decisions.permutation_logps([rollout.drawn])[0][0].sum(dim=1)
            alone = [partial(repeated_selector_logp, model, rollout, z) for z in rollout.drawn]
        else:
            shared = answer_logps(model, rollout.contexts, [rollout.answers] * len(rollout.contexts))
            alone = [partial(padded_logps, model, [pair]) for pair in contexts_and_answers(rollout)]
        exact = gradient(parameters, (weights * shared).sum())
        parts = [gradient(parameters, (w * logp()).sum()) for w, logp in zip(weights, alone, strict=True)]
        repeated = torch.stack(parts).sum(dim=0)
        errors.append(float((exact - repeated).norm() / repeated.norm()))
    return max(errors)


def shared_selector_logps(model: PeftModel, rollout: Rollout) -> torch.Tensor:
    """Returns log p_s of each decision of the permutations drawn, `(m, K)`, from one pass over their tree."""
    return Decisions(SelectorPolicy(), model, [rollout.prompt], keep=False).permutation_logps([rollout.drawn])[0][0]


def selector_speedups(bench: Bench, steps: Sequence[Step]) -> list[float]:
    """Forward and backward of the selector's log-likelihoods alone: m repeated rows over the shared prompt."""
    model = bench.pipeline.role(SELECTOR)
    parameters = list(adapter_parameters(model, SELECTOR).values())

    def timed(*logps: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        for part in logps:
            gradient(parameters, part().sum())
        return time.perf_counter() - start

    ratios = []
    for step in steps:
        rollout = step.rollout
        pairs = [(rollout.prompt.ids, list(rollout.prompt.slate.token_ids(z))) for z in rollout.drawn]
        parts = [pairs[first : first + ROWS] for first in range(0, len(pairs), ROWS)]
        repeated = timed(*(partial(padded_logps, model, part) for part in parts))
        shared = timed(partial(shared_selector_logps, model, rollout))
        ratios.append(repeated / shared)
    return ratios


# ----------------------------------------------------------------------------------------------------------- the floor
def trees(rollout: Rollout) -> tuple[TokenTree, TokenTree, int]:
    """The distinct tokens of both roles, and how many the repeated sequences have."""
    selector, generator, repeated = TokenTree(), TokenTree(), 0
    for z in rollout.drawn:
        tokens = [*rollout.prompt.ids, *rollout.prompt.slate.token_ids(z)]
        selector.add(tokens[:-1])
        repeated += len(tokens) - 1
    for context, answer in contexts_and_answers(rollout):
        generator.add([*context, *answer[:-1]])
        repeated += len(context) + len(answer) - 1
    return selector, generator, repeated


def floor_operations(model: PeftModel, rollout: Rollout) -> float:
    """Operations of one forward and one backward of each distinct token.

    Two per weight of the linear layers and token, forward and again backward, since the base is frozen; the adapters'
    weights once more for their own gradient; the visible pairs of attention, four per pair and width forward and eight
    backward; the head where a token is scored.
    """
    config = model.config
    named = [(name, p.numel()) for name, p in model.named_parameters()]
    adapter = sum(size for name, size in named if f".{SELECTOR}." in name)
    linear = sum(size for name, size in named if "proj" in name and "lora" not in name)
    selector, generator, _ = trees(rollout)
    scored = K * len(rollout.drawn), len(rollout.drawn) * len(rollout.answers[0])
    total = 0.0
    for tree, predictions in zip((selector, generator), scored, strict=True):
        pairs = sum(position + 1 for position in tree.positions)
        total += len(tree) * (4 * linear + 6 * adapter)
        total += 12 * pairs * config.hidden_size * config.num_hidden_layers
        total += 4 * predictions * config.vocab_size * config.hidden_size
    return total


# ------------------------------------------------------------------------------------------------------------- running
def quartiles(values: Sequence[float]) -> list[float]:
    return [round(q, 3) for q in statistics.quantiles(values, n=4, method="inclusive")]


def growth(bench: Bench, settings: Sequence[tuple[int, int]], repetitions: int) -> list[float]:
    """Seconds of drorl's step for each (n, m) over those for the first: medians of the ratios on equal rows."""
    ratios = []
    for repetition, row in enumerate(bench.rows[:repetitions]):
        order = settings[:: -1 if repetition % 2 else 1]  # none is always the first
        seconds = {setting: bench.drorl(row, *setting).seconds for setting in order}
        ratios.append([seconds[setting] / seconds[settings[0]] for setting in settings])
    return [round(statistics.median(column), 2) for column in zip(*ratios, strict=True)]


def peak_rss(side: str, threads: int) -> int:
    """Peak memory in MiB of a process that makes two steps of one side only."""
    command = [sys.executable, __file__, "--side", side, "--threads", str(threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.strip().splitlines()[-1])


def run_side(side: str) -> None:
    bench = Bench()
    for row in bench.rows[:2]:
        if side == "drorl":
            bench.drorl(row)
        else:
            bench.trl(bench.undrawn(row))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def compare(repetitions: int, threads: int) -> dict[str, Any]:
    """Measures everything, and returns what the last line says."""
    memory = {side: peak_rss(side, threads) for side in ("drorl", "trl")}
    bench = Bench()
    bench.trl(bench.drorl(bench.rows[-1]))  # the first step of a process is slower
    steps, seconds, floors = [], [], []
    for row in bench.rows[:repetitions]:
        gflops = measure_gflops(torch.float32)
        steps.append(bench.drorl(row))
        seconds.append(bench.trl(steps[-1]))
        floors.append(floor_operations(bench.model, steps[-1].rollout) / gflops / 1e9)
        times = f"drorl {steps[-1].seconds:.2f} s, TRL {seconds[-1]:.2f} s, floor {floors[-1]:.2f} s"
        print(f"{times} at {gflops:.0f} GFLOP/s", file=sys.stderr)
    measured = {
        "speedup_vs_trl": [trl / step.seconds for trl, step in zip(seconds, steps, strict=True)],
        "speedup_selector": selector_speedups(bench, steps),
        "floor_ratio": [step.seconds / floor for step, floor in zip(steps, floors, strict=True)],
        "drorl_seconds": [step.seconds for step in steps],
        "trl_seconds": seconds,
    }
    sizes = [trees(step.rollout) for step in steps]
    return {
        **{name: round(statistics.median(values), 2) for name, values in measured.items()},
        "grad_rel_err": relative_error(bench, steps[0]),
        "peak_rss_ratio": round(memory["drorl"] / memory["trl"], 3),
        "m_scaling": dict(zip(map(str, M_SCALE), growth(bench, [(N, m) for m in M_SCALE], repetitions), strict=True)),
        "n_scaling": dict(zip(map(str, N_SCALE), growth(bench, [(n, M) for n in N_SCALE], repetitions), strict=True)),
        "tokens_distinct": statistics.median(len(selector) + len(generator) for selector, generator, _ in sizes),
        "tokens_repeated": statistics.median(repeated for _, _, repeated in sizes),
        "prompt_tokens": statistics.median(len(step.rollout.prompt.ids) for step in steps),
        "quartiles": {name: quartiles(values) for name, values in measured.items()},
        "peak_rss_mib": memory,
        "threads": threads,
        "repetitions": repetitions,
    }


KINDS = {  # of operators, by a part of their name; the first that fits
    "attention": ("scaled_dot_product",),
    "matrix products": ("::mm", "::bmm", "::addmm"),
    "copies and casts": ("copy_", "::cat", "index", "gather", "scatter", "fill_", "zero_"),
    "element by element": (
        "::mul",
        "::add",
        "::silu",
        "::pow",
        "::div",
        "::neg",
        "::sum",
        "::mean",
        "::sub",
        "softmax",
    ),
}


def profile(bench: Bench) -> dict[str, float]:
    """Where the time of one step of drorl goes: the share of each kind of operator."""
    bench.drorl(bench.rows[-1])
    with torch.profiler.profile() as profiler:
        bench.drorl(bench.rows[0])
    shares: dict[str, float] = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in profiler.key_averages():
        fits = (kind for kind, parts in KINDS.items() if any(part in event.key for part in parts))
        shares[next(fits, "everything else")] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: round(share / total, 3) for kind, share in shares.items()}


def plot(result: dict[str, Any], folder: Path) -> None:
    """Draws every figure, and how the step's time grows with m and N."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.json").write_text(json.dumps(result, indent=2) + "\n")
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    (times, tokens, memory), (by_m, by_n, speedups) = figure.subplots(2, 3)
    seconds = {"floor": result["drorl_seconds"] / result["floor_ratio"]}
    seconds |= {"drorl": result["drorl_seconds"], "TRL": result["trl_seconds"]}
    counts = {"drorl": result["tokens_distinct"], "TRL": result["tokens_repeated"]}
    gibs = {"drorl": result["peak_rss_mib"]["drorl"] / 1024, "TRL": result["peak_rss_mib"]["trl"] / 1024}
    ratios = {"whole step": result["speedup_vs_trl"], "selector alone": result["speedup_selector"]}
    bars = (
        (times, seconds, "%.1f s", f"one step, N = {N}, K = {K}, m = {M}"),
        (tokens, counts, "%.0f", "tokens encoded, both roles"),
        (memory, gibs, "%.1f GiB", "peak memory of the process"),
        (speedups, ratios, "%.1f", "times faster than TRL"),
    )
    for axes, values, form, title in bars:
        colours = ["#bbbbbb" if name in ("TRL", "floor") else "#2a6f97" for name in values]
        axes.bar_label(axes.barh(list(values), list(values.values()), color=colours), fmt=form, padding=3)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.35)
    for axes, key, label in ((by_m, "m_scaling", "permutations m"), (by_n, "n_scaling", "candidates N")):
        points = {int(x): y for x, y in result[key].items()}
        first = min(points)
        axes.plot(list(points), list(points.values()), marker="o", color="#2a6f97")
        axes.plot(list(points), [x / first for x in points], linestyle=":", color="#999999")
        axes.set_xlabel(label)
        axes.set_title(f"time over that at {first}; dotted: proportional", fontsize=10)
        axes.set_xticks(list(points))
        axes.set_ylim(bottom=0)
    figure.savefig(folder / "step.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 repetitions instead of 9")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--side", choices=["drorl", "trl"], help="two steps of one side; prints its peak memory, MiB")
    parser.add_argument(
        "--profile", action="store_true", help="where the time of one step of drorl goes, nothing else"
    )
    parser.add_argument("--output", type=Path, default=None, help="folder for step.svg and step.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        run_side(args.side)
        return
    if args.profile:
        print(json.dumps(profile(Bench())))
        return
    result = compare(3 if args.quick else 9, args.threads)
    if args.output:
        plot(result, args.output)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
