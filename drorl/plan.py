"""Predicts the memory and the time of a training step from a model's configuration alone; no weights are loaded.

Every formula counts something that exists: tokens and attention blocks come from [`workload`], what autograd keeps for
them from the operators of a decoder layer (RMS norms, rotated queries and keys, a gated MLP), which
`torch.autograd.graph.saved_tensors_hooks` lists one by one (tests/test_plan.py compares), parameters from the model on
the meta device.

Shapes: n tokens of a pass, h hidden width, q and kv widths of queries and of keys, f width of the MLP, r rank of the
adapters, V vocabulary.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .attention import MAX_PAIRS_AS_PRODUCTS
from .errors import InvalidInputError
from .models import SMOLLM2_ALIAS, build_smollm2
from .settings import QUERY_LIKELIHOODS
from .workload import Lengths, Pass, Sizes, Work, work_of

GIB = 2**30
# The process before there is a model. CPU: Python with torch, transformers, peft and TRL, measured. GPU: the context
# and the libraries' workspaces, which `memory/peak_gib` does not see; an assumption.
PROCESS_BYTES = {"cpu": int(0.75 * GIB), "cuda": int(1.0 * GIB)}
# Of a device's memory that a plan may fill: allocators lose some to holes.
USABLE = 0.92
# A step's time over that of its products at full speed: 2.15 on 2 CPU cores (docs/performance.md). On GPUs nobody has
# measured it with a model that fills one; 1 / 2.15 is 46 % of the peak, what well-tuned training reaches.
OVERHEAD = 2.15
# float32 rows over scored positions that live at once in backward: log_softmax's output, its gradient, that of the
# logits and that of the rows that were picked from them.
_LOGIT_ROWS = 4
_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ADVISED = ("per_device_train_batch_size", "max_tokens_per_forward", "gradient_checkpointing")
"""The settings that a plan recommends."""
# Linear layers that read the same tensor.
_READERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class ModelShape:
    """The widths of a decoder."""

    num_parameters: int
    num_layers: int
    num_heads: int
    vocabulary: int
    linears: Mapping[str, tuple[int, int]]
    """(in, out) of the linear maps of one layer."""
    norm_widths: int
    """Of all norms of one layer together."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        """Reads the shapes off the model on the meta device, where tensors have no storage.

        Raises:
            InvalidInputError: if its layers are no decoder layers with a gated MLP.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        layer = re.compile(r"\.layers\.0\..*?(\w+)\.weight$")
        found = {m[1]: p.shape for name, p in model.named_parameters() if (m := layer.search(name))}
        linears = {name: (shape[1], shape[0]) for name, shape in found.items() if len(shape) == 2}
        if linears.keys() != _LINEARS:
            raise InvalidInputError(
                f"{type(model).__name__} has layers of {', '.join(sorted(linears)) or 'another form'}: plan knows "
                f"decoders whose layers are {', '.join(sorted(_LINEARS))}, such as Llama, Mistral and Qwen"
            )
        heads = {"q_norm": text.num_attention_heads, "k_norm": text.num_key_value_heads}
        norms = sum(shape.numel() * heads.get(name, 1) for name, shape in found.items() if "norm" in name)
        parameters = sum(p.numel() for p in model.parameters())
        layers = text.num_hidden_layers
        return cls(parameters, layers, text.num_attention_heads, text.vocab_size, linears, norms)

    @classmethod
    def named(cls, name: str) -> Self:
        """Reads the configuration of a model: its name, its folder, or a `config.json`.

        Raises:
            InvalidInputError: if there is none.
        """
        try:
            return cls.of(AutoConfig.from_pretrained(build_smollm2() if name == SMOLLM2_ALIAS else name))
        except (OSError, ValueError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(
                f"{name} names no configuration of a model: {str(error).splitlines()[0]}"
            ) from error

    @property
    def hidden(self) -> int:
        """h"""
        return self.linears["q_proj"][0]

    @property
    def queries(self) -> int:
        """q: heads times their width."""
        return self.linears["q_proj"][1]

    @property
    def keys(self) -> int:
        """kv: the same of keys; of values too."""
        return self.linears["k_proj"][1]

    @property
    def mlp(self) -> int:
        """f"""
        return self.linears["down_proj"][0]

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's linear maps."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())


@dataclass(frozen=True)
class PlanSettings:
    """What a plan is made for; names and meanings of [`DROConfig`], TRL and the recipe."""

    sizes: Sizes = Sizes()
    lengths: Lengths = Lengths()
    per_device_train_batch_size: int = 8
    max_tokens_per_forward: int | None = None
    gradient_checkpointing: bool = False
    selector_objective: str = "dro"
    generator_objective: str = "dro"
    dtype: torch.dtype = torch.bfloat16
    bf16: bool = False
    """Autocast, as the Trainer's setting of this name."""
    lora_r: int = 16
    lora_target_modules: Sequence[str] = tuple(sorted(_LINEARS))
    lora_first_layer: int = 0
    use_vllm: bool = False
    """In this process: `vllm_mode=colocate`."""
    vllm_gpu_memory_utilization: float = 0.3
    device: str = "cuda"
    memory: int = 80 * GIB
    """Bytes of one device."""
    gpus: int = 1

    @property
    def one_pass(self) -> bool:
        """Whether the graphs of both roles coexist; see `DROTrainer._one_pass`."""
        return self.max_tokens_per_forward is None and not self.gradient_checkpointing

    @property
    def draws_without_cache(self) -> bool:
        """Whether no prompt's keys and values are asked again and again."""
        return self.use_vllm or self.sizes.proposal == "retriever" or self.sizes.identifiers in QUERY_LIKELIHOODS

    @property
    def num_queries(self) -> int:
        """Of one micro-batch on one device."""
        return self.per_device_train_batch_size // self.sizes.num_generations

    @property
    def width(self) -> int:
        """Bytes of an activation that is no norm's."""
        return 2 if self.bf16 else self.dtype.itemsize


# ---------------------------------------------------------------------------------------------------- what stays
def base_bytes(model: ModelShape, settings: PlanSettings) -> int:
    """Returns the frozen weights: parameters times the bytes of `dtype`."""
    return model.num_parameters * settings.dtype.itemsize


def adapter_size(model: ModelShape, settings: PlanSettings) -> int:
    """Returns the parameters of one adapter: r (in + out) for each adapted linear map."""
    widths = sum(sum(model.linears[name]) for name in settings.lora_target_modules)
    return settings.lora_r * widths * (model.num_layers - settings.lora_first_layer)


# ---------------------------------------------------------------------------------------------------- activations
def layer_bytes(model: ModelShape, work: Pass, settings: PlanSettings) -> int:
    """Returns what autograd keeps of one decoder layer for one pass.

    Per token, with e bytes of an activation (4 in float32, 2 in bfloat16 or under autocast):

        norms       x in float32, and its inverse root mean square     4 (h + 1) each
        adapters    A's input: in float32 what the base reads too, one tensor for all maps that read the same; in
                    another type each adapted map casts its own, to its own float32 or to autocast's bfloat16
                    A's output, r wide
        attention   see [`attention_bytes`]
        MLP         gate, silu(gate), up                                3 f e

    The first adapted layer keeps somewhat less, since its input needs no gradient; that is not counted. A frozen map
    keeps its weight alone, so what `down_proj` and `o_proj` read is kept by their adapters only; rotating
    and adding keep nothing that is the layer's own.
    """
    targets = set(settings.lora_target_modules)
    casts = settings.dtype != torch.float32 or settings.bf16
    copy = 2 if settings.bf16 else 4
    per_token = 4 * model.norm_widths + 8
    for readers in _READERS:
        adapted = [name for name in readers if name in targets]
        copies = len(adapted) if casts else min(len(adapted), 1)
        per_token += copies * copy * model.linears[readers[0]][0] + len(adapted) * copy * settings.lora_r
    per_token += 3 * model.mlp * settings.width
    return work.tokens * per_token + attention_bytes(model, work, settings)


def attention_bytes(model: ModelShape, work: Pass, settings: PlanSettings) -> int:
    """Returns what attention keeps of one layer.

    A fused product keeps queries, keys, values, its output, and a float32 per head and query: 2 n q + 2 seen kv. Keys
    and values are gathered for each block, so they count as often as blocks see them; on a GPU those behind a mask are
    repeated for the query heads. A small bfloat16 block on a CPU is two plain products, which keep scaled queries,
    keys, values and the probabilities, heads x queries x keys.
    """
    total = 0
    for block in work.blocks:
        products = (
            settings.device == "cpu" and settings.width == 2 and block.queries * block.keys <= MAX_PAIRS_AS_PRODUCTS
        )
        keys = model.queries if settings.device != "cpu" and not block.causal else model.keys
        total += 2 * block.keys * keys * settings.width
        if products:
            total += block.queries * (model.queries + model.num_heads * block.keys) * settings.width
        else:
            total += block.queries * (2 * model.queries * settings.width + 4 * model.num_heads)
    return total


def mask_bytes(passes: Sequence[Pass], settings: PlanSettings) -> int:
    """Returns the additive masks, one for all layers: queries x keys of each block that is not plainly causal."""
    blocks = (block for work in passes for block in work.blocks if not block.causal)
    return settings.dtype.itemsize * sum(block.queries * block.keys for block in blocks)


def activation_bytes(model: ModelShape, passes: Sequence[Pass], settings: PlanSettings) -> int:
    """Returns the graph of one role: the layers from `lora_first_layer` on, the last norm, masks.

    With gradient checkpointing: the input of every layer, n h, and one layer's graph while that is computed again.
    """
    last_norm = sum(work.tokens for work in passes) * 4 * model.hidden
    layers = [layer_bytes(model, work, settings) for work in passes]
    if settings.gradient_checkpointing:
        inputs = sum(work.tokens for work in passes) * model.hidden * settings.dtype.itemsize
        return model.num_layers * inputs + sum(layers) + last_norm + mask_bytes(passes, settings)
    return (model.num_layers - settings.lora_first_layer) * sum(layers) + last_norm + mask_bytes(passes, settings)


def logits_bytes(model: ModelShape, passes: Sequence[Pass]) -> int:
    """Returns the float32 rows of V that live at once in a backward pass: four for each scored position."""
    return 4 * _LOGIT_ROWS * model.vocabulary * max(work.scored for work in passes)


def working_bytes(model: ModelShape, passes: Sequence[Pass]) -> int:
    """Returns what a layer's backward pass needs beside the graph: float32 gradients of the MLP's three products."""
    return 4 * 3 * model.mlp * max(work.tokens for work in passes)


def kept_bytes(model: ModelShape, passes: Sequence[Pass], settings: PlanSettings) -> int:
    """Returns the keys and values that drawing asks, 2 n kv of each layer, twice: a cache grows by being copied."""
    return 2 * 2 * sum(work.tokens for work in passes) * model.keys * settings.width * model.num_layers


# ---------------------------------------------------------------------------------------------------- the whole
@dataclass(frozen=True)
class Plan:
    """The memory of one device, and the time of a step."""

    selector: ModelShape
    generator: ModelShape
    settings: PlanSettings
    separate: bool = False
    """Whether the generator has a base of its own."""

    @cached_property
    def work(self) -> Work:
        """Of one forward pass: the micro-batch, or as many of its queries as `max_tokens_per_forward` admits.

        Raises:
            InvalidInputError: if one query alone has more tokens.
        """
        limit, queries = self.settings.max_tokens_per_forward, self.settings.num_queries
        if limit is not None:
            size = self._work(1).largest
            if size > limit:
                raise InvalidInputError(
                    f"one query has about {size} distinct tokens, and max_tokens_per_forward is {limit}"
                )
            queries = min(queries, limit // size)
        return self._work(queries)

    def _work(self, queries: int) -> Work:
        s = self.settings
        return work_of(s.sizes, s.lengths, queries, s.one_pass, s.device)

    @cached_property
    def fixed(self) -> dict[str, int]:
        """Bytes that are there throughout."""
        s = self.settings
        bases = [self.selector, self.generator] if self.separate else [self.selector]
        trained = sum(adapter_size(model, s) for model, _ in self._trained)
        adapters = adapter_size(self.selector, s) + adapter_size(self.generator, s)
        return {
            "base weights": sum(base_bytes(model, s) for model in bases),
            "adapters": 4 * adapters,  # PEFT keeps them in float32
            "gradients": 4 * trained,
            "optimizer": 8 * trained,  # AdamW's two moments, float32
            "vLLM": int(s.vllm_gpu_memory_utilization * s.memory) if s.use_vllm else 0,
            "process": PROCESS_BYTES[s.device],
        }

    @property
    def _trained(self) -> Iterator[tuple[ModelShape, Sequence[Pass]]]:
        """The models that have a backward pass, with their forward passes."""
        if self.settings.selector_objective != "none":
            yield self.selector, self.work.selector
        if self.settings.generator_objective != "none":
            yield self.generator, [self.work.generator]

    @cached_property
    def passing(self) -> dict[str, int]:
        """Bytes that come and go: each part at its largest."""
        s, work = self.settings, self.work
        trains = s.selector_objective != "none", s.generator_objective != "none"
        contexts = [work.generator]
        drawn = work if s.max_tokens_per_forward is None else self._work(1)  # then each query is drawn by itself
        return {
            "selector's graph": trains[0] * activation_bytes(self.selector, work.selector, s),
            "generator's graph": trains[1] * activation_bytes(self.generator, contexts, s),
            "logits": max(logits_bytes(self.selector, work.selector), logits_bytes(self.generator, contexts)),
            "backward": max(working_bytes(self.selector, work.selector), working_bytes(self.generator, contexts)),
            "keys and values": 0 if s.draws_without_cache else kept_bytes(self.selector, drawn.selector, s),
        }

    @property
    def moments(self) -> dict[str, list[str]]:
        """Which of the passing parts are alive at once."""
        both = ["selector's graph"] if self.settings.one_pass else []
        return {
            "drawing": [*both, "keys and values"],
            "generator's backward pass": [*both, "generator's graph", "logits"],
            "inside it": [*both, "generator's graph", "backward"],
            "selector's backward pass": ["selector's graph", "logits"],
            "inside that": ["selector's graph", "backward"],
        }

    @property
    def peak(self) -> tuple[str, int]:
        """When the most is in use, and how much, bytes."""
        totals = {name: sum(self.passing[part] for part in parts) for name, parts in self.moments.items()}
        moment = max(totals, key=totals.__getitem__)
        return moment, sum(self.fixed.values()) + totals[moment]

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the allocator the room that it needs."""
        return self.peak[1] <= USABLE * self.settings.memory

    @cached_property
    def operations(self) -> float:
        """Floating-point operations of one step on one device.

        Two per weight and token forward; two backward for the gradient of the layer's input, in the layers from
        `lora_first_layer` on; an adapter's weights once more for their own gradient; four per pair of attention and
        width forward, eight backward; the head where a position is scored. Later decisions are drawn once without a
        graph. Where the graphs may not coexist, prompts are encoded twice; gradient checkpointing computes each pass
        again.
        """
        s, work = self.settings, self._work(self.settings.num_queries)
        again = 1.0 + s.gradient_checkpointing
        roles = (
            (self.selector, work.selector, s.selector_objective != "none"),
            (self.generator, (work.generator,), s.generator_objective != "none"),
        )
        total = 0.0
        for model, passes, trained in roles:
            for work_of_pass in passes:
                total += self._pass_operations(model, work_of_pass, again if trained else 1.0, trained)
        drawn = () if s.use_vllm else work.selector[1:] if s.one_pass else work.selector
        return total + sum(self._pass_operations(self.selector, of, 1.0, False) for of in drawn)

    def _pass_operations(self, model: ModelShape, work: Pass, forward: float, backward: bool) -> float:
        s = self.settings
        layers, upper = model.num_layers, model.num_layers - s.lora_first_layer
        maps, attention = 2 * work.tokens * model.layer_weights, 4 * work.pairs * model.queries
        adapters = 2 * work.tokens * adapter_size(model, s)
        head = 2 * work.scored * model.vocabulary * model.hidden
        total = forward * (layers * (maps + attention) + adapters) + head
        return total + backward * (upper * (maps + 2 * attention) + 2 * adapters + head)

    def seconds(self, flops: float) -> float:
        """Returns the time of a step.

        Args:
            flops (`float`): operations per second that large matrix products reach.
        """
        return OVERHEAD * self.operations / flops

    def changed(self, **settings: Any) -> "Plan":
        """Returns the plan for other settings."""
        return replace(self, settings=replace(self.settings, **settings))

    def alternatives(self, num_queries: int = 1) -> "list[Plan]":
        """Returns the plan under each way to spend memory on speed, the fastest first.

        Both graphs at once; one after the other; and checkpointed; each with so many queries in a forward pass.
        """
        batch = self.settings.sizes.num_generations * num_queries
        bound = -(-int(1.1 * self._work(num_queries).largest) // 256) * 256  # rows differ in length
        larger = max(batch, self.settings.per_device_train_batch_size)
        whole = {"per_device_train_batch_size": batch, "max_tokens_per_forward": None}
        parts = {"per_device_train_batch_size": larger, "max_tokens_per_forward": bound}
        return [
            self.changed(gradient_checkpointing=False, **whole),
            self.changed(gradient_checkpointing=False, **parts),
            self.changed(gradient_checkpointing=True, **parts),
        ]

    def recommended(self) -> "Plan | None":
        """Returns the fastest way that fits, with as many queries in a forward pass as do, up to 16; `None`: none."""
        by_queries = [self.alternatives(num_queries) for num_queries in (1, 2, 4, 8, 16)]
        for plans in zip(*by_queries, strict=True):
            if fitting := [plan for plan in plans if plan.fits]:
                return fitting[-1]
        return None

    def record(self, flops: float) -> dict[str, Any]:
        """Returns the plan as JSON: bytes, seconds, operations."""
        moment, peak = self.peak
        s, passes = self.settings, self._work(self.settings.num_queries)
        return {
            "settings": {name: getattr(s, name) for name in ADVISED},
            "memory": {**self.fixed, **self.passing},
            "peak": peak,
            "peak_moment": moment,
            "available": s.memory,
            "fits": self.fits,
            "tokens": {"selector": sum(p.tokens for p in passes.selector), "generator": passes.generator.tokens},
            "operations": self.operations,
            "seconds": self.seconds(flops),
            "queries_per_second": s.gpus * s.num_queries / self.seconds(flops),
        }
