"""The command that predicts memory and time: plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidInputError
from .app import app

if TYPE_CHECKING:
    import torch

    from ..workload import Lengths, Sizes

_ROWS = 32  # whose lengths are averaged
_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


# Settings are written as in DROConfig, --num_candidates, or as in the other commands, --num-candidates.
@app.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
def plan(
    model: Annotated[str, typer.Option(help="A name, a folder or a config.json; no weights are loaded.")],
    generator_model: Annotated[str | None, typer.Option(help="A separate base of the generator.")] = None,
    gpus: Annotated[int, typer.Option(help="Devices; 0: the CPU of this machine.", min=0)] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Of one device, GiB.", min=0.1)] = 80.0,
    tflops: Annotated[
        float | None, typer.Option(help="Of large matrix products, TFLOP/s; default: measured here, if it is a CPU.")
    ] = None,
    num_candidates: Annotated[int, typer.Option(help="N.", min=1)] = 20,
    num_selected: Annotated[int, typer.Option(help="K.", min=1)] = 5,
    num_generations: Annotated[int, typer.Option(help="m.", min=1)] = 8,
    identifiers: Annotated[str, typer.Option(help="As in DROConfig.")] = "number",
    proposal: Annotated[str, typer.Option(help="As in DROConfig.")] = "policy",
    selector_objective: Annotated[str, typer.Option(help="As in DROConfig.")] = "dro",
    generator_objective: Annotated[str, typer.Option(help="As in DROConfig.")] = "dro",
    per_device_train_batch_size: Annotated[int | None, typer.Option(help="Permutations; default: one query.")] = None,
    max_tokens_per_forward: Annotated[int | None, typer.Option(help="As in DROConfig.", min=1)] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="TRL's own default is on.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the base; auto: bfloat16 on a GPU, measured on a CPU.")] = "auto",
    bf16: Annotated[bool | None, typer.Option(help="Autocast; default: on a GPU, as TRL.")] = None,
    lora_r: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 16,
    lora_target_modules: Annotated[str, typer.Option(help="Adapted maps.")] = _TARGETS,
    lora_first_layer: Annotated[int, typer.Option(help="No adapters below.", min=0)] = 0,
    use_vllm: Annotated[bool, typer.Option(help="vLLM draws, beside the trainer (vllm_mode=colocate).")] = False,
    vllm_gpu_memory_utilization: Annotated[float, typer.Option(help="vLLM's share of a device.")] = 0.3,
    rows: Annotated[Path | None, typer.Option(help="Takes the lengths from rows; the model has a tokenizer.")] = None,
    passage_tokens: Annotated[int, typer.Option(help="A passage with its title; without --rows.", min=1)] = 140,
    query_tokens: Annotated[int, typer.Option(help="A query.", min=1)] = 14,
    answer_tokens: Annotated[int, typer.Option(help="A gold answer.", min=1)] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON; bytes, seconds.")] = False,
) -> None:
    """Predict the memory and the time of a step, by part, and settings that fit. Reads the model's config only."""
    import json

    from rich.console import Console

    from ..footprint import GIB, ModelShape, PlanSettings
    from ..plan import Plan
    from ..terminal import plan_view
    from ..workload import Lengths, Sizes

    device = "cuda" if gpus else "cpu"
    data_type, flops = _speed(dtype, device, tflops)
    sizes = Sizes(num_candidates, num_selected, num_generations, identifiers, proposal)
    lengths = Lengths(passage=passage_tokens, query=query_tokens, answer=answer_tokens)
    settings = PlanSettings(
        sizes=sizes,
        lengths=lengths if rows is None else _lengths(model, rows, sizes),
        per_device_train_batch_size=per_device_train_batch_size or num_generations,
        max_tokens_per_forward=max_tokens_per_forward,
        gradient_checkpointing=gradient_checkpointing,
        selector_objective=selector_objective,
        generator_objective=generator_objective,
        dtype=data_type,
        bf16=bool(gpus) if bf16 is None else bf16,
        lora_r=lora_r,
        lora_target_modules=lora_target_modules.split(","),
        lora_first_layer=lora_first_layer,
        use_vllm=use_vllm,
        vllm_gpu_memory_utilization=vllm_gpu_memory_utilization,
        device=device,
        memory=int(gpu_memory * GIB),
        gpus=max(gpus, 1),
    )
    selector = ModelShape.named(model)
    generator = selector if generator_model is None else ModelShape.named(generator_model)
    made = Plan(selector, generator, settings, separate=generator_model is not None)
    advice = made.recommended()
    if as_json:
        record = made.record(flops) | {"flops": flops, "recommended": advice and advice.record(flops)}
        record["alternatives"] = [plan.record(flops) for plan in made.alternatives(settings.num_queries)]
        typer.echo(json.dumps(record))
    else:
        Console().print(plan_view(made, advice, flops))


def _speed(dtype: str, device: str, tflops: float | None) -> "tuple[torch.dtype, float]":
    """Returns the data type of the base, and the operations per second of large matrix products.

    Raises:
        InvalidInputError: if the speed of a GPU is not given: it may not be here.
    """
    import torch

    from ..models import choose_dtype, measure_gflops

    chosen = torch.bfloat16 if dtype == "auto" and device == "cuda" else choose_dtype(dtype)
    if tflops is not None:
        return chosen, 1e12 * tflops
    if device == "cuda":
        raise InvalidInputError(
            "how fast are the GPUs? --tflops is the speed of large matrix products, such as 312 for an A100 and 989 "
            "for an H100 or H200 in bfloat16; --gpus 0 plans for the CPU of this machine, which is measured"
        )
    return chosen, 1e9 * measure_gflops(chosen)


def _lengths(model: str, rows: Path, sizes: "Sizes") -> "Lengths":
    """Returns the mean lengths of the first rows of a file."""
    from itertools import islice

    from transformers import AutoTokenizer

    from ..data.reading import Reading
    from ..models import resolve_model
    from ..prompts import PromptBuilder
    from ..workload import Lengths

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model), padding_side="left")
    found = list(islice(Reading(rows, num_selected=sizes.num_selected, need_answers=True), _ROWS))
    if not found:
        raise InvalidInputError(f"{rows} has no rows")
    return Lengths.of(found, PromptBuilder(tokenizer, sizes.identifiers, sizes.num_selected), sizes.num_candidates)
