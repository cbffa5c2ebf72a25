"""The settings that DRO adds to TRL's, and the help that lists them; imports nothing large: help is instant."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from .metrics import PRESETS

QUERY_LIKELIHOODS = ("query", "expanded_query")
"""Identifiers that are not written: a passage is scored by how likely it makes the query."""
IDENTIFIERS = ("number", "letter", "title", *QUERY_LIKELIHOODS)
REWARDS = ("log_likelihood", "likelihood", "f1")


def _setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, **({"choices": choices} if choices else {})})


@dataclass
class PipelineSettings:
    """What a trained pair of adapters needs besides its weights; documented in [`DROConfig`]."""

    num_candidates: int = _setting(20, "N: passages that the selector reads.")
    num_selected: int = _setting(5, "K: passages that the generator reads.")
    shuffle_candidates: bool = _setting(False, "Show the candidates in a random order.")
    identifiers: str = _setting("number", "What the selector writes for a passage; query: the query.", IDENTIFIERS)
    selector_temperature: float = _setting(1.0, "Temperature of the selector's policy.")
    retrieval_prior_weight: float = _setting(0.0, "Weight of the retriever's score.")
    max_passage_tokens: int | None = _setting(None, "Cut each passage to so many tokens.")
    max_prompt_length: int | None = _setting(None, "Window of the selector's prompt, tokens.")
    max_answer_length: int = _setting(32, "Longest generated answer, tokens.")
    chat_template_kwargs: dict | str | None = _setting(None, "Keyword arguments of the chat template.")

    @classmethod
    def from_config(cls, config: "PipelineSettings") -> "PipelineSettings":
        """Returns the settings that `config` (a [`DROConfig`]) shares with the pipeline."""
        return PipelineSettings(**{f.name: getattr(config, f.name) for f in fields(PipelineSettings)})


@dataclass
class DROSettings(PipelineSettings):
    """The fields of [`DROConfig`] that are drorl's own or have the paper's default; documented there."""

    learning_rate: float = _setting(1e-5, "Learning rate of the selector; paper: 1e-5.")
    weight_decay: float = _setting(0.01, "Weight decay; paper: 0.01.")
    answer_target: str = _setting("surface", "Gold answer that is scored.", ("first", "surface", "marginal"))
    constrained: bool = _setting(True, "Normalise the policy over valid permutations.")
    proposal: str = _setting("policy", "Where permutations come from.", ("policy", "first_choices", "retriever"))
    proposal_temperature: float = _setting(1.0, "Temperature of the sampling proposal.")
    rollout_backend: str = _setting("auto", "Who samples permutations.", ("auto", "transformers", "vllm"))
    max_sampling_logp_difference: float = _setting(0.5, "Gap between vLLM and trainer that stops the run, nats.")
    weight_temperature: float = _setting(1.0, "Tempers the likelihood in the weights.")
    selector_objective: str = _setting(
        "dro", "dro, grpo, rloo, reinforce, pointwise, ppo, or none: a frozen selector."
    )
    reward: str = _setting("log_likelihood", "What grpo, rloo, reinforce and ppo maximise, of the answer.", REWARDS)
    vf_coef: float = _setting(0.1, "Weight of the critic's loss (ppo).")
    generator_objective: str = _setting("dro", "Objective of the generator.", ("dro", "elbo", "sft", "none"))
    baseline: str = _setting("none", "Control variate of the weights.", ("none", "mean", "leave_one_out"))
    min_importance_weight: float = _setting(0.0, "Permutations of a smaller weight do not train the generator.")
    max_tokens_per_forward: int | None = _setting(None, "Bound on the distinct tokens of a forward pass.")
    generator_learning_rate: float | None = _setting(None, "Learning rate of the generator; default: learning_rate.")
    on_unhealthy: str = _setting("warn", "What a sign of ill health does to a run.", ("warn", "stop", "ignore"))
    metric_preset: str = _setting("kilt", "Whose exact match and F1 an evaluation reports.", tuple(PRESETS))


def help_text(description: str, *settings: Any) -> str:
    """Returns the help of a recipe: the fields of its dataclasses, and where the rest is found."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --config FILE [--setting VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every setting of trl.GRPOConfig and transformers.TrainingArguments works too: --help_all lists them.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these; the command line wins.")
    for group in settings:
        arguments = parser.add_argument_group(group.__name__)
        for f in fields(group):
            choices = f.metadata.get("choices")
            known = f" One of {', '.join(choices)}." if choices else ""
            text = f"{f.metadata['help']}{known} (default: {f.default})".replace("%", "%%")
            arguments.add_argument(f"--{f.name}", metavar="VALUE", help=text)
    return parser.format_help()
