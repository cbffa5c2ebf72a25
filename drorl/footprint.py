"""What one device holds during a step, part by part, from a model's shapes alone; no weights are loaded.

Tokens and blocks of attention come from [`workload`], what autograd keeps of them from the operators of a decoder
layer (RMS norms, rotated queries and keys, a gated MLP), which `torch.autograd.graph.saved_tensors_hooks` lists one by
one (tests/test_plan.py compares), parameters from the model on the meta device. [`plan`] puts the parts together.

Shapes: n tokens of a pass, h hidden width, q and kv widths of queries and of keys, f width of the MLP, r rank of the
adapters, V vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .attention import MAX_PAIRS_AS_PRODUCTS
from .errors import InvalidInputError
from .models import SMOLLM2_ALIAS, build_smollm2
from .settings import IDENTIFIERS, QUERY_LIKELIHOODS
from .workload import Lengths, Pass, Sizes

GIB = 2**30
PROPOSALS = ("policy", "first_choices", "retriever")
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
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
        if linears.keys() != LINEARS:
            raise InvalidInputError(
                f"{type(model).__name__} has layers of {', '.join(sorted(linears)) or 'another form'}: plan knows "
                f"decoders whose layers are {', '.join(sorted(LINEARS))}, such as Llama, Mistral and Qwen"
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
    """What a plan is made for; names and meanings of [`DROConfig`], TRL and the recipe.

    What is not planned: free text (`constrained=False`), PPO's critic, a KL penalty's reference, supervised contexts
    (`sft`), `min_importance_weight`, and models that share prefixes in another way than by blocks.

    Raises:
        InvalidInputError: if settings contradict each other, or are of that kind.
    """

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
    lora_target_modules: Sequence[str] = tuple(sorted(LINEARS))
    lora_first_layer: int = 0
    use_vllm: bool = False
    """In this process: `vllm_mode=colocate`."""
    vllm_gpu_memory_utilization: float = 0.3
    device: str = "cuda"
    memory: int = 80 * GIB
    """Bytes of one device."""
    gpus: int = 1

    def __post_init__(self) -> None:
        sizes, m, targets = self.sizes, self.sizes.num_generations, set(self.lora_target_modules)
        first, retriever = (sizes.proposal == name for name in ("first_choices", "retriever"))
        checks = (
            (sizes.identifiers in IDENTIFIERS, f"identifiers: one of {', '.join(IDENTIFIERS)}"),
            (sizes.num_selected <= sizes.num_candidates, "num_selected: at most num_candidates"),
            (sizes.proposal in PROPOSALS, f"proposal: one of {', '.join(PROPOSALS)}"),
            (not first or m == sizes.num_candidates, "proposal='first_choices': num_generations = num_candidates"),
            (not retriever or m == 1, "proposal='retriever': num_generations = 1"),
            (self.per_device_train_batch_size % m == 0, "per_device_train_batch_size: a multiple of num_generations"),
            (self.generator_objective in ("dro", "elbo", "none"), "generator_objective: dro, elbo or none"),
            (bool(targets) and targets <= LINEARS, f"lora_target_modules: of {', '.join(sorted(LINEARS))}"),
        )
        if wrong := [needed for holds, needed in checks if not holds]:
            raise InvalidInputError("; ".join(wrong))

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


def logits_bytes(model: ModelShape, passes: Sequence[Pass], settings: PlanSettings) -> int:
    """Returns the rows of V that live at once in a backward pass: the logits and their gradient.

    The head's product is in the base's data type; slices in float32 are small ([`~likelihood.TokenLogps`]).
    """
    return 2 * settings.width * model.vocabulary * max(work.scored for work in passes)


def working_bytes(model: ModelShape, passes: Sequence[Pass]) -> int:
    """Returns what a layer's backward pass needs beside the graph: float32 gradients of the MLP's three products."""
    return 4 * 3 * model.mlp * max(work.tokens for work in passes)


def kept_bytes(model: ModelShape, passes: Sequence[Pass], settings: PlanSettings) -> int:
    """Returns the keys and values that drawing asks, 2 n kv of each layer, twice: a cache grows by being copied."""
    return 2 * 2 * sum(work.tokens for work in passes) * model.keys * settings.width * model.num_layers
