"""What `drorl plan` predicts, against what autograd keeps, what a trainer encodes, and what a process takes."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CITIES
from peft import LoraConfig
from test_work import encoded_tokens
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from drorl.adapters import add_adapters
from drorl.backends import backend_of
from drorl.cli import app
from drorl.errors import InvalidInputError
from drorl.footprint import GIB, ModelShape, PlanSettings, activation_bytes, adapter_size
from drorl.likelihood import PromptStates
from drorl.plan import Plan
from drorl.trainer import DROTrainer
from drorl.tree import TokenTree
from drorl.workload import Lengths, Pass, Sizes, work_of

REPOSITORY = Path(__file__).parent.parent
LLAMA = str(REPOSITORY / "docs" / "llama-3-8b.json")
ALL = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
RANK, LAYERS = 3, 10
FIRST_CHOICES = {"proposal": "first_choices", "num_generations": 6, "per_device_train_batch_size": 12}
run = CliRunner().invoke


@pytest.fixture(scope="module")
def llama() -> ModelShape:
    """Llama-3-8B, from its configuration."""
    return ModelShape.named(LLAMA)


def tiny(kind: str, num_key_value_heads: int = 2) -> nn.Module:
    """A random decoder whose widths all differ."""
    widths: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 168,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": 20,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**widths)) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(**widths))


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps, bytes: each storage once, a model's parameters not."""

    def __init__(self, model: nn.Module):
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._kept: list[torch.Tensor] = []  # alive, so that no address is used twice
        self._sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            self._kept.append(tensor)
            if storage.data_ptr() not in known:
                self._sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(self._sizes.values())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"dtype": torch.float32}),
        ("llama", {"dtype": torch.float32, "lora_target_modules": ("q_proj", "v_proj")}),
        ("llama", {"dtype": torch.float32, "lora_target_modules": ("down_proj", "q_proj"), "lora_first_layer": 3}),
        ("llama", {"dtype": torch.bfloat16}),
        ("llama", {"dtype": torch.bfloat16, "lora_target_modules": ("gate_proj", "k_proj", "q_proj")}),
        ("llama", {"dtype": torch.bfloat16, "bf16": True}),
        ("qwen3", {"dtype": torch.float32}),
        ("qwen3", {"dtype": torch.bfloat16}),
    ],
)
def test_a_graph_is_what_autograd_keeps(kind: str, settings: dict[str, Any]) -> None:
    """Of a prompt and its branches, to 2 %: the first adapted layer keeps a little less than the others."""
    planned = PlanSettings(**{"lora_r": RANK, "lora_target_modules": ALL, "device": "cpu"} | settings)
    first, layers = planned.lora_first_layer, range(LAYERS)
    lora = LoraConfig(
        r=RANK,
        target_modules=list(planned.lora_target_modules),
        layers_to_transform=list(layers[first:]),
        task_type="CAUSAL_LM",
    )
    base = tiny(kind).to(planned.dtype)
    shape, model = ModelShape.of(base.config), add_adapters(base, lora).train()
    assert backend_of(model) == "blocks"
    branches = [(0, list(range(20 + 3 * i, 60 + 2 * i))) for i in range(3)]
    prompt = [i % 97 for i in range(230)]
    kept = Kept(model)
    with kept, torch.autocast("cpu", torch.bfloat16, enabled=planned.bf16):
        states = PromptStates(model, [prompt])
        states.logits_after(branches)
    tree = TokenTree()
    end = tree.add(prompt)[-1]
    for _, tokens in branches:
        tree.add(tokens, end)
    predicted = activation_bytes(shape, [Pass.over(tree, len(branches))], planned)
    assert predicted == pytest.approx(kept.total, rel=0.02)


def test_parameters_are_the_published_ones(llama: ModelShape) -> None:
    """Llama-3-8B has 8,030,261,248 parameters, and an adapter of rank 16 on all linear maps 41,943,040."""
    assert llama.num_parameters == 8_030_261_248
    assert adapter_size(llama, PlanSettings()) == 41_943_040


def test_another_architecture_is_refused() -> None:
    """The formulas are those of a gated MLP: GPT-2 has none."""
    with pytest.raises(InvalidInputError, match="GPT2LMHeadModel has layers of another form: plan knows"):
        ModelShape.of(GPT2Config(n_layer=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"identifiers": "number"},
        {"identifiers": "title"},
        {"identifiers": "query", "num_selected": 1},
        {"identifiers": "expanded_query"},
    ],
)
def test_a_step_encodes_what_was_planned(make_trainer: Callable[..., DROTrainer], rows: Any, settings: dict) -> None:
    """The tokens of the passes of a real step, to 7 %: rows differ in length, and an expansion has no title.

    With every first choice there is little left of what is drawn to chance.
    """
    given = rows(8, 6)
    for row in given:
        for i, candidate in enumerate(row["candidates"]):
            candidate["text"] = " ".join(f"{(7 * i + j) % 90}{CITIES[(i * j) % 12]}" for j in range(12))
    trainer = make_trainer(train_rows=given, max_steps=1, **FIRST_CHOICES, **settings)
    args, prompts = trainer.args, trainer.pipeline.prompts
    passes = encoded_tokens(trainer.model)
    trainer.train()
    lengths = Lengths.of(given, prompts, args.num_candidates)
    sizes = Sizes(args.num_candidates, args.num_selected, args.num_generations, args.identifiers, args.proposal)
    work = work_of(sizes, lengths, num_queries=args.per_device_train_batch_size // args.num_generations)
    drawn = sum(p.tokens for p in work.selector[1:])  # once without a graph, once with one
    predicted = sum(p.tokens for p in work.selector) + drawn + work.generator.tokens
    assert predicted == pytest.approx(sum(passes), rel=0.07)


def test_memory_is_spent_on_speed(llama: ModelShape) -> None:
    """Each way needs less memory and more time than the one before it; the fastest that fits is recommended."""
    plan = Plan(llama, llama, PlanSettings(bf16=True))
    ways = plan.alternatives()
    peaks, operations = [way.peak[1] for way in ways], [way.operations for way in ways]
    assert peaks == sorted(peaks, reverse=True) and operations == sorted(operations)
    assert len({*peaks}) == len({*operations}) == 3
    for way in ways:
        found = plan.changed(memory=int(way.peak[1] / 0.92) + GIB // 4).recommended()
        assert found is not None and found.fits
        assert found.settings.gradient_checkpointing == way.settings.gradient_checkpointing
        assert (found.settings.max_tokens_per_forward is None) == (way.settings.max_tokens_per_forward is None)
    assert plan.changed(memory=8 * GIB).recommended() is None


def test_a_micro_batch_is_as_large_as_fits(llama: ModelShape) -> None:
    """Twice the queries of the recommended pass do not fit."""
    found = Plan(llama, llama, PlanSettings(bf16=True, memory=141 * GIB)).recommended()
    assert found is not None and found.fits
    larger = found.changed(per_device_train_batch_size=2 * found.settings.per_device_train_batch_size)
    assert not larger.fits


def test_roles_that_are_frozen_need_no_graph(llama: ModelShape) -> None:
    """Without a generator to train there is one adapter's optimizer, and one graph."""
    plan = Plan(llama, llama, PlanSettings())
    frozen = plan.changed(generator_objective="none")
    assert frozen.passing["generator's graph"] == 0 < plan.passing["generator's graph"]
    assert 2 * frozen.fixed["optimizer"] == plan.fixed["optimizer"]
    assert frozen.operations < plan.operations


def test_a_bound_below_one_query_is_refused(llama: ModelShape) -> None:
    """As the trainer refuses it."""
    plan = Plan(llama, llama, PlanSettings(max_tokens_per_forward=1000))
    with pytest.raises(InvalidInputError, match="one query has about .* max_tokens_per_forward is 1000"):
        plan.peak  # noqa: B018


def test_the_command_says_the_same(llama: ModelShape) -> None:
    """Names as in DROConfig; JSON has the parts, whose sum at the peak is the peak."""
    given = ["--num_candidates", "10", "--num-selected", "3", "--num_generations", "4", "--gpu_memory", "141"]
    result = run(app, ["plan", "--model", LLAMA, "--tflops", "400", "--use_vllm", *given, "--json"])
    assert result.exit_code == 0, result.output
    [line] = result.stdout.splitlines()
    said = json.loads(line)
    settings = PlanSettings(Sizes(10, 3, 4), per_device_train_batch_size=4, bf16=True, use_vllm=True, memory=141 * GIB)
    plan = Plan(llama, llama, replace(settings, lora_target_modules=ALL))
    assert said["peak"] == plan.peak[1]
    alive = {*plan.fixed, *plan.moments[said["peak_moment"]]}
    assert sum(size for part, size in said["memory"].items() if part in alive) == said["peak"]
    assert said["memory"]["vLLM"] == int(0.3 * 141 * GIB)
    assert said["seconds"] == pytest.approx(2.15 * said["operations"] / 400e12)
    assert said["recommended"]["fits"]


def test_the_table_says_that_nobody_measured_it() -> None:
    """Of a GPU it is a prediction; what does not fit is marked."""
    result = run(app, ["plan", "--model", LLAMA, "--tflops", "312", "--gpu_memory", "24"])
    assert result.exit_code == 0, result.output
    assert "does NOT fit" in result.stdout and "nobody has measured" in result.stdout


def test_what_plan_cannot_know_is_asked_for() -> None:
    """The speed of a GPU that is not here, and a model that does not exist, each in one line."""
    with pytest.raises(InvalidInputError, match="--tflops"):
        run(app, ["plan", "--model", LLAMA], catch_exceptions=False)
    with pytest.raises(InvalidInputError, match="no/such names no configuration of a model") as error:
        run(app, ["plan", "--model", "no/such", "--tflops", "1"], catch_exceptions=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "needed"),
    [
        ({"sizes": Sizes(identifiers="colour")}, "identifiers: one of number"),
        ({"sizes": Sizes(4, 5)}, "num_selected: at most num_candidates"),
        ({"sizes": Sizes(proposal="none")}, "proposal: one of policy"),
        ({"sizes": Sizes(proposal="first_choices")}, "num_generations = num_candidates"),
        ({"sizes": Sizes(proposal="retriever")}, "num_generations = 1"),
        ({"per_device_train_batch_size": 12}, "a multiple of num_generations"),
        ({"generator_objective": "sft"}, "generator_objective: dro, elbo or none"),
        ({"lora_target_modules": ["qkv"]}, "lora_target_modules: of down_proj"),
    ],
)
def test_what_a_trainer_would_refuse_is_refused(wrong: dict[str, Any], needed: str) -> None:
    """And what the formulas do not cover; every other setting is in order."""
    with pytest.raises(InvalidInputError, match=f"^[^;]*{needed}[^;]*$"):
        PlanSettings(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["demo", "paper", "narrow", "wide", "checkpointed"])
def test_peaks_of_real_steps_are_as_planned(case: str) -> None:
    """Within 15 %: what two steps add to a process, and the process as a whole."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "memory.py"), "--case", case]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    for what in ("step", "process"):
        assert found[what]["predicted"] == pytest.approx(found[what]["measured"], rel=0.15), (what, found)
