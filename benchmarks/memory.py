r"""Compares the memory that `drorl plan` predicts with what training steps take, on a CPU.

    python benchmarks/memory.py                    # every case, a line of JSON each
    python benchmarks/memory.py --case demo --heap default

A case is a model, settings and rows; the plan knows the model's configuration and the mean lengths of the rows,
nothing of what is drawn. `step` is what two steps add to the process at their peak (VmHWM, put back before them),
`process` all of it. Peaks are read where the kernel keeps them: Linux only.

The plan counts tensors. glibc keeps much of what was freed in holes of its heap, where it does not fit what comes
next: with `--heap default` that is part of what is measured, with `returned` every larger tensor has pages of its own,
which go back to the system when it is freed.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from long_rows import long_rows
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PrinterCallback

from drorl import DROConfig, DROTrainer
from drorl.adapters import add_adapters
from drorl.data.vitalqa import load_vitalqa
from drorl.footprint import GIB, ModelShape, PlanSettings
from drorl.models import build_smollm2, load_model_and_tokenizer, measure_gflops
from drorl.plan import Plan
from drorl.workload import Lengths, Sizes

DEMO = Path(__file__).parents[1] / "recipes" / "configs" / "nq_demo.yaml"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
HEAPS = {
    "default": {},
    "returned": {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"},  # otherwise they grow
}
STEPS = 2  # in the second one the optimizer's moments are there from the beginning


@dataclass(frozen=True)
class Case:
    """What is planned and measured."""

    settings: dict[str, Any]
    model: dict[str, Any] | None = None
    """Of a random Llama; default: the embedded model."""
    dtype: str = "float32"
    lora: dict[str, Any] = field(default_factory=dict)
    long: bool = True
    """Passages of 100 words, or the data set's own."""


def _demo() -> Case:
    given = yaml.safe_load(DEMO.read_text())
    names = ("num_candidates", "num_selected", "identifiers", "max_passage_tokens", "selector_temperature")
    names += ("retrieval_prior_weight", "proposal", "num_generations", "per_device_train_batch_size")
    lora = {
        "target_modules": given["lora_target_modules"],
        "layers_to_transform": list(range(given["lora_first_layer"], 30)),
    }
    return Case({name: given[name] for name in names}, dtype=given["dtype"], lora=lora, long=False)


def _sizes(n: int, k: int, m: int, tokens: int, **settings: Any) -> dict[str, Any]:
    sizes = {"num_candidates": n, "num_selected": k, "num_generations": m, "max_passage_tokens": tokens}
    return {**sizes, "per_device_train_batch_size": m, **settings}


CASES = {
    "demo": _demo(),
    "paper": Case(_sizes(20, 5, 8, 48, proposal_temperature=100.0)),  # uniform, as a plan draws
    "narrow": Case(
        _sizes(10, 3, 4, 96, per_device_train_batch_size=8),
        {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 12, "heads": (8, 2)},
    ),
    "wide": Case(
        _sizes(8, 2, 6, 120, max_tokens_per_forward=3500),
        {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 5, "heads": (10, 10)},
        lora={"target_modules": ["q_proj", "v_proj"], "r": 8},
    ),
    "checkpointed": Case(
        _sizes(16, 2, 4, 96, gradient_checkpointing=True, per_device_train_batch_size=8),
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 16, "heads": (6, 3)},
    ),
}


def load(case: Case) -> tuple[PreTrainedModel, Any]:
    """Returns the base and the embedded model's tokenizer."""
    if case.model is None:
        return load_model_and_tokenizer("smollm2-135m", case.dtype)
    tokenizer = AutoTokenizer.from_pretrained(build_smollm2(), padding_side="left")
    widths = dict(case.model)
    heads, key_heads = widths.pop("heads")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        **widths,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config), tokenizer


def plan_of(case: Case, model: PreTrainedModel, lengths: Lengths) -> Plan:
    """Returns the plan of a case: of its configuration and the lengths of its rows."""
    given, lora = case.settings, case.lora
    sizes = {name: given[name] for name in Sizes.__dataclass_fields__ if name in given}
    names = ("per_device_train_batch_size", "max_tokens_per_forward", "gradient_checkpointing")
    layers = lora.get("layers_to_transform", [0])
    settings = PlanSettings(
        sizes=Sizes(**sizes),
        lengths=lengths,
        dtype=model.dtype,
        lora_r=lora.get("r", 16),
        lora_first_layer=layers[0],
        device="cpu",
        memory=int(20 * GIB),
        **{name: given[name] for name in names if name in given},
    )
    if "target_modules" in lora:
        settings = PlanSettings(**{**vars(settings), "lora_target_modules": lora["target_modules"]})
    shape = ModelShape.of(model.config)
    return Plan(shape, shape, settings)


def memory(name: str) -> int:
    """Returns a line of the kernel's account of this process, bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def measure(case: Case) -> dict[str, Any]:
    """Trains two steps; returns what they took and what was predicted, GiB and seconds."""
    base, tokenizer = load(case)
    batch = case.settings["per_device_train_batch_size"] // case.settings["num_generations"]
    count = STEPS * batch
    rows = long_rows("train", count) if case.long else list(load_vitalqa()["train"].select(range(count)))
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | case.lora
    model = add_adapters(base, LoraConfig(**lora))
    with tempfile.TemporaryDirectory() as scratch:
        args = DROConfig(
            scratch,
            **{"gradient_checkpointing": False, **case.settings},
            max_steps=STEPS,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = DROTrainer(model, args, rows, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        lengths = Lengths.of(rows, trainer.pipeline.prompts, args.num_candidates)
        plan = plan_of(case, base, lengths)
        gc.collect()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS again
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / STEPS
    peak, stays = memory("VmHWM"), ("base weights", "adapters", "process")
    predicted = plan.peak[1] - sum(plan.fixed[part] for part in stays)
    return {
        "step": {"measured": (peak - before) / GIB, "predicted": predicted / GIB},
        "process": {"measured": peak / GIB, "predicted": plan.peak[1] / GIB},
        "before": {"measured": before / GIB, "predicted": sum(plan.fixed[part] for part in stays) / GIB},
        "seconds": {"measured": seconds, "predicted": plan.seconds(1e9 * measure_gflops(base.dtype))},
        "moment": plan.peak[0],
        "parts": {part: size / GIB for part, size in (plan.fixed | plan.passing).items()},
        "lengths": vars(lengths),
    }


def run(case: str, heap: str) -> dict[str, Any]:
    """Measures a case in a process of its own."""
    command = [sys.executable, __file__, "--case", case, "--here"]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | HEAPS[heap]
    ).stdout
    return {"case": case, "heap": heap, **json.loads(output.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=[*CASES], action="append", help="default: all")
    parser.add_argument("--heap", choices=[*HEAPS], default="returned")
    parser.add_argument("--here", action="store_true", help="in this process, with its heap")
    args = parser.parse_args()
    for case in args.case or CASES:
        print(json.dumps(measure(CASES[case]) if args.here else run(case, args.heap)), flush=True)


if __name__ == "__main__":
    main()
