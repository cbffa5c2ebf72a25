"""A tokenizer, tiny random models and made-up rows, built in memory: nothing here reaches for the hub."""

import gc
import os
import tempfile

# Before any import of these libraries, which read them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TRACKIO_DIR", os.path.join(tempfile.gettempdir(), "drorl-tests-trackio"))

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise_adapters, widen_norms
from hypothesis import settings
from peft import LoraConfig, PeftModel
from runs import config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from drorl.adapters import add_adapters
from drorl.prompts import GENERATOR_HEAD, GENERATOR_TAIL, SELECTOR_HEAD, SELECTOR_TAIL
from drorl.trainer import DROTrainer

# Two threads gain nothing on models of this size, and on a busy machine their barriers cost fifty times the work.
torch.set_num_threads(1)
# Every training run ends with a full garbage collection; without this it would go through all that imports have made.
gc.freeze()
# The same examples on every run and no database on disk: a failure on one machine is a failure on all.
settings.register_profile("drorl", derandomize=True, database=None, deadline=None)
settings.load_profile("drorl")

Row = dict[str, Any]

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RIVERS = ["Danube", "Rhine", "Thames", "Volga", "Po", "Elbe", "Seine", "Tiber", "Loire", "Ebro", "Main", "Spree"]
CITIES = ["Vienna", "Basel", "London", "Kazan", "Turin", "Dresden", "Paris", "Rome", "Tours", "Zurich", "Mainz", "Ulm"]


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens: no text is unknown to it, and prompts stay short."""
    frames = [SELECTOR_HEAD, *SELECTOR_TAIL.values(), GENERATOR_HEAD, GENERATOR_TAIL, "user\n", "assistant\n"]
    sentences = [f"The {river} flows through {city}." for river, city in zip(RIVERS, CITIES, strict=True)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(frames + sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of a chat model: ChatML, `<|im_end|>` ends a turn."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def base_tokenizer() -> PreTrainedTokenizerFast:
    """The same without a chat template, as base models have it."""
    return build_tokenizer(chat_template=None)


@pytest.fixture(scope="session")
def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaConfig]:
    """Makes the configuration of a Llama of two layers; keywords override its fields."""

    def make(**overrides: Any) -> LlamaConfig:
        defaults = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            # Ten times the usual one, so that a random model has opinions and a wrong context shows in its logits.
            "initializer_range": 0.2,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
        return LlamaConfig(**(defaults | overrides))

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., LlamaConfig]) -> Callable[..., LlamaForCausalLM]:
    """Makes a random Llama of two layers; keywords override its configuration. Equal seeds, equal weights."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(tiny_config(**overrides)).to(dtype).eval()
        return widen_norms(model) if dtype == torch.float64 else model

    return make


@pytest.fixture(scope="session")
def lora() -> LoraConfig:
    """A LoRA of rank 2 on the attention's queries and values, without dropout."""
    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="session")
def adapted_model(tiny_model: Callable[..., LlamaForCausalLM], lora: LoraConfig) -> Callable[..., PeftModel]:
    """Makes a tiny model with both adapters; `randomise=True` makes them differ from nothing and from each other."""

    def make(
        dtype: torch.dtype = torch.float32, seed: int = 0, randomise: bool = False, **overrides: Any
    ) -> PeftModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = add_adapters(tiny_model(dtype, seed, **overrides), lora).to(dtype).eval()
        if randomise:
            randomise_adapters(model, seed)
        return model

    return make


@pytest.fixture(scope="session")
def rows() -> Callable[..., list[Row]]:
    """Makes rows about rivers: distinct titles, ids and falling scores; one candidate holds the answer."""

    def make(count: int = 4, num_candidates: int = 8) -> list[Row]:
        made = []
        for i in range(count):
            order = [(5 * i + 7 * j) % len(RIVERS) for j in range(num_candidates)]
            gold = order[(3 * i + 1) % num_candidates]
            candidates = [
                {
                    "id": str(river),
                    "title": RIVERS[river],
                    "text": f"The {RIVERS[river]} flows through {CITIES[river]}.",
                    "score": 4.0 - 0.5 * rank,
                }
                for rank, river in enumerate(order)
            ]
            query = f"Which river flows through {CITIES[gold]}?"
            made.append({"query": query, "answers": [RIVERS[gold]], "candidates": candidates})
        return made

    return make


@pytest.fixture
def make_trainer(
    tmp_path: Path,
    adapted_model: Callable[..., PeftModel],
    rows: Callable[..., list[Row]],
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., DROTrainer]:
    """Makes a trainer of a tiny model with adapters that are not zero; other keywords are settings, see `runs`."""

    def make(
        model: PeftModel | None = None,
        train_rows: list[Row] | None = None,
        eval_rows: list[Row] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        generator_model: PeftModel | None = None,
        output_dir: str = "run",
        **settings: Any,
    ) -> DROTrainer:
        return DROTrainer(
            model=model or adapted_model(randomise=True),
            args=config(tmp_path / output_dir, **settings),
            train_dataset=train_rows or rows(8, 6),
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            generator_model=generator_model,
            generator_processing_class=tokenizer,
            callbacks=callbacks,
        )

    return make
