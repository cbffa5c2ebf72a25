"""A trained role as a model of its own: its adapter merged into the base, for software that knows nothing of PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from .adapters import GENERATOR
from .errors import InvalidInputError, OutputError
from .manifest import check_writable
from .models import choose_dtype, load_model_and_tokenizer, resolve_model
from .pipeline import one_line, run_folder, saved_run
from .prompts import PromptBuilder


def export_role(run: str | Path, role: str, folder: Path, dtype: str | None = None) -> None:
    """Writes a checkpoint with its tokenizer that `AutoModelForCausalLM.from_pretrained` loads; see `docs/sharing.md`.

    The sum is made in float32 and rounded once, to the data type that is written. In bfloat16 a merged weight has 8
    bits for both, so of a small adapter less is left than beside its base; in float32 nothing is lost. The generator
    generates as in [`RAGPipeline`]: greedily, as many tokens, to the end of the turn.

    Args:
        run (`str` or `Path`): a run's directory, or its name on the hub.
        role (`str`): `selector` or `generator`.
        folder (`Path`): where to.
        dtype (`str`, *optional*): of the written weights; default: the base checkpoint's own.

    Raises:
        FileNotFoundError: if `run` is no run.
        InvalidInputError: if it or its base cannot be loaded, or `dtype` is no floating-point type.
        OutputError: if nothing can be written to `folder`, which is known before anything is loaded.
    """
    run = run_folder(run)
    base_name, generator_name, settings = saved_run(run)
    separate = role == GENERATOR and generator_name is not None
    name = resolve_model(generator_name if separate else base_name)
    check_writable(folder)
    try:
        written = choose_dtype(dtype or AutoConfig.from_pretrained(name).dtype or torch.float32)
        base, _ = load_model_and_tokenizer(name, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, run / role, adapter_name=role)
        tokenizer = AutoTokenizer.from_pretrained(run / role if separate else run)
    except (OSError, SafetensorError) as error:
        raise InvalidInputError(
            f"the {role} of {run} on its base {name} cannot be loaded: {one_line(error)}"
        ) from error
    model = adapted.merge_and_unload(safe_merge=True)
    if role == GENERATOR:
        template: Any = settings.chat_template_kwargs
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=settings.max_answer_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=PromptBuilder(tokenizer, chat_template_kwargs=template).end_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    try:
        model.to(written).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"the merged {role} cannot be written to {folder}: {one_line(error)}") from error
