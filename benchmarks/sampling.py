r"""Times ways of sampling permutations: the trainer's own model, and vLLM in several ways.

    .venv-vllm/bin/python benchmarks/sampling.py                      # make install-vllm makes that environment

16 queries of VitalQA, N = 8 lengthened passages (prompts of about 700 tokens), m = 8 permutations each, SmolLM2-135M
with a selector adapter, float32, in one process. Every way starts without cached prompts, since each update of the
adapter makes new ones; the ways alternate, medians of the repetitions are reported. The last line is JSON.

    transformers      prompts are encoded once and asked one decision after the other (`rollout_backend=transformers`)
    vllm              one request per decision behind a cached prompt (`rollout_backend=vllm`)
    vllm tokens       one request per permutation, decoded token by token under a logits processor over the trie
    ... free text     24 tokens without a constraint, of the first 4 queries
    ... whole steps   training steps of 4 queries, drawn by turns by the trainer's own model and by vLLM (--steps)
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from long_rows import long_rows
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from vllm import SamplingParams, TokensPrompt
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from drorl import DROConfig, DROTrainer
from drorl.adapters import ROLES, SELECTOR, activate, add_adapters
from drorl.engines.base import EngineDecisions
from drorl.engines.delivery import Adapter
from drorl.engines.sampler import EngineSampler
from drorl.engines.vllm import LocalEngine
from drorl.models import load_model_and_tokenizer
from drorl.pipeline import PipelineSettings, RAGPipeline
from drorl.prompts import SelectorPrompt

MODEL, NUM_QUERIES, NUM_GENERATIONS, FREE_QUERIES, FREE_TOKENS = "smollm2-135m", 16, 8, 4, 24


class TrieProcessor(AdapterLogitsProcessor):
    """Allows the tokens that continue a permutation; each request brings its identifiers as tokens."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable | None:
        if not (params.extra_args and "choices" in params.extra_args):
            return None
        choices = params.extra_args["choices"]  # of each step: candidate -> tokens, its terminator included

        def allow(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            left, path, step = set(range(len(choices[0]))), list(output_ids), 0
            while True:  # read what is complete
                done = [i for i in left if path[: len(choices[step][i])] == choices[step][i]]
                if not done or step + 1 == len(choices):
                    break
                path, step = path[len(choices[step][done[0]]) :], step + 1
                left.remove(done[0])
            starts = [choices[step][i] for i in left if choices[step][i][: len(path)] == path]
            allowed = sorted({tokens[len(path)] for tokens in starts if len(tokens) > len(path)})
            kept = logits[allowed].clone() if allowed else logits
            logits.fill_(-torch.inf)
            logits[allowed] = kept
            return logits

        return allow


def prepared(k: int, identifiers: str) -> tuple[RAGPipeline, list[SelectorPrompt]]:
    """Returns the system with a selector that is not the base, and the prompts."""
    model, tokenizer = load_model_and_tokenizer(MODEL, "float32")
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = add_adapters(model, lora, ROLES).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.005)
    pipeline = RAGPipeline(model, tokenizer, PipelineSettings(8, k, identifiers=identifiers, max_passage_tokens=80))
    activate(model, SELECTOR)
    rows = long_rows("test", NUM_QUERIES)
    shown = [pipeline.present(row["query"], row["candidates"]) for row in rows]
    return pipeline, [
        pipeline.prompts.selector(*pair) for pair in zip([row["query"] for row in rows], shown, strict=True)
    ]


def ways(pipeline: RAGPipeline, prompts: list[SelectorPrompt], engine: LocalEngine, free: bool) -> dict[str, Callable]:
    """Returns each way of sampling, by name."""
    version = engine.deliver(Adapter.of(pipeline.model, SELECTOR))
    end_id = pipeline.prompts.end_id

    @torch.no_grad()
    def transformers() -> Any:
        return pipeline.decide(prompts).sample(NUM_GENERATIONS)

    def vllm() -> Any:
        return EngineDecisions(pipeline.policy, engine, version, prompts).sample(NUM_GENERATIONS)

    def vllm_tokens() -> Any:
        params = []
        for prompt in prompts:
            slate = prompt.slate
            steps = range(slate.num_selected)
            choices = [[list(slate.choice_ids(i, t)) for i in range(slate.num_candidates)] for t in steps]
            params.append(
                SamplingParams(
                    n=NUM_GENERATIONS,
                    max_tokens=slate.max_length,
                    stop_token_ids=[end_id],
                    ignore_eos=True,
                    detokenize=False,
                    logprobs=0,
                    extra_args={"choices": choices},
                )
            )
        asked = [TokensPrompt(prompt_token_ids=prompt.ids) for prompt in prompts]
        lora = engine.loaded[version]
        outputs = engine.llm.generate(asked, params, use_tqdm=False, lora_request=lora)
        return outputs

    some = [prompt.ids for prompt in prompts[:FREE_QUERIES] for _ in range(NUM_GENERATIONS)]

    @torch.no_grad()
    def transformers_free() -> Any:
        batch = pipeline.tokenizer.pad({"input_ids": some}, padding_side="left", return_tensors="pt")
        return pipeline.model.generate(**batch, max_new_tokens=FREE_TOKENS, min_new_tokens=FREE_TOKENS, do_sample=True)

    def vllm_free() -> Any:
        return engine.generate(version, some, FREE_TOKENS, end_id, 1.0, list(range(len(some))))

    constrained = {"transformers": transformers, "vllm": vllm, "vllm tokens": vllm_tokens}
    return constrained | ({"transformers, free text": transformers_free, "vllm, free text": vllm_free} if free else {})


class ByTurns(TrainerCallback):
    """Lets the trainer's own model and vLLM draw the permutations of every other step, and times the steps."""

    def __init__(self, trainer: DROTrainer, engine: LocalEngine):
        self.trainer = trainer
        self.samplers = {
            "transformers": None,
            "vllm": EngineSampler(trainer.args, trainer.pipeline, trainer.accelerator, engine),
        }
        self.seconds: dict[str, list[float]] = {name: [] for name in self.samplers}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.name = list(self.samplers)[state.global_step % 2]
        self.trainer.sampler = self.samplers[self.name]
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds[self.name].append(time.perf_counter() - self.start)


def whole_steps(pipeline: RAGPipeline, engine: LocalEngine, steps: int, folder: str) -> dict[str, list[float]]:
    """Returns the seconds of whole training steps, drawn by either; the first of each is a warm-up."""
    settings = vars(pipeline.settings) | {"num_generations": NUM_GENERATIONS, "gradient_checkpointing": False}
    args = DROConfig(
        folder,
        **settings,
        per_device_train_batch_size=FREE_QUERIES * NUM_GENERATIONS,
        max_steps=2 * (steps + 1),
        rollout_backend="transformers",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = DROTrainer(pipeline.model, args, long_rows("train", 256), None, pipeline.tokenizer)
    turns = ByTurns(trainer, engine)
    trainer.add_callback(turns)
    trainer.train()
    return {f"{name}, whole steps": seconds[1:] for name, seconds in turns.seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--k", type=int, choices=(1, 5), help="default: both")
    parser.add_argument("--native_lora", action="store_true", help="vLLM's own LoRA instead of a merged copy")
    parser.add_argument("--free", action="store_true", help="free text too")
    parser.add_argument("--steps", type=int, default=0, help="whole training steps of each, too")
    args = parser.parse_args()

    engine = LocalEngine(
        MODEL, torch.float32, 16, 2048, native_lora=args.native_lora, logits_processors=[TrieProcessor]
    )
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "native_lora": args.native_lora}
    table = Table("K, identifiers", "way", "seconds (median)", "all")
    for k, identifiers in ((1, "title"), (5, "number")):
        if args.k not in (None, k):
            continue
        pipeline, prompts = prepared(k, identifiers)
        length = round(statistics.fmean(len(prompt.ids) for prompt in prompts))
        timed = ways(pipeline, prompts, engine, args.free and k == 1)
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for repetition in range(args.repetitions + 1):  # the first is a warm-up
            for name, way in timed.items():
                engine.llm.reset_prefix_cache()
                start = time.perf_counter()
                way()
                if repetition:
                    seconds[name].append(time.perf_counter() - start)
        for parameter in pipeline.parameters(SELECTOR):
            parameter.data.mul_(1.01)  # what the engine has already is not delivered again
        start = time.perf_counter()
        engine.deliver(Adapter.of(pipeline.model, SELECTOR))
        seconds["sync"] = [time.perf_counter() - start]
        if (
            args.steps and k == 1
        ):  # five passages under eight permutations with gradient do not fit into 24 GB beside vLLM
            with tempfile.TemporaryDirectory() as folder:
                seconds |= whole_steps(pipeline, engine, args.steps, folder)
        for name, values in seconds.items():
            median = round(statistics.median(values), 2)
            result[f"K={k} {identifiers}: {name}"] = median
            every = ", ".join(f"{value:.2f}" for value in values)
            table.add_row(f"{k}, {identifiers} ({length} tokens)", name, str(median), every)
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
