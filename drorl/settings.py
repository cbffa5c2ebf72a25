"""The settings that DRO adds to TRL's, and the help that lists them; imports nothing, so that help is instant."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

ANSWER_TARGETS = ("first", "surface", "marginal")
BASELINES = ("none", "mean", "leave_one_out")
IDENTIFIERS = ("number", "letter", "title")
PROPOSALS = ("policy", "first_choices", "retriever")
SELECTOR_OBJECTIVES = ("dro", "grpo", "rloo", "none")
GENERATOR_OBJECTIVES = ("dro", "sft", "none")


@dataclass
class DROSettings:
    """The fields of [`DROConfig`] that are drorl's own or have the paper's default; documented there."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the selector; paper: 1e-5."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay; paper: 0.01."})
    num_candidates: int = field(default=20, metadata={"help": "N: passages that the selector reads."})
    num_selected: int = field(default=5, metadata={"help": "K: passages that the generator reads."})
    shuffle_candidates: bool = field(default=False, metadata={"help": "Show the candidates in a random order."})
    max_passage_tokens: int | None = field(default=None, metadata={"help": "Cut each passage to so many tokens."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Window of the selector's prompt, tokens."})
    max_answer_length: int = field(default=32, metadata={"help": "Longest generated answer, tokens."})
    answer_target: str = field(
        default="surface", metadata={"help": "Gold answer that is scored.", "choices": ANSWER_TARGETS}
    )
    identifiers: str = field(
        default="number", metadata={"help": "How a permutation names passages.", "choices": IDENTIFIERS}
    )
    constrained: bool = field(default=True, metadata={"help": "Normalise the policy over valid permutations."})
    selector_temperature: float = field(default=1.0, metadata={"help": "Temperature of the selector's policy."})
    retrieval_prior_weight: float = field(default=0.0, metadata={"help": "Weight of the retriever's score."})
    proposal: str = field(default="policy", metadata={"help": "Where permutations come from.", "choices": PROPOSALS})
    proposal_temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampling proposal."})
    weight_temperature: float = field(default=1.0, metadata={"help": "Tempers the likelihood in the weights."})
    selector_objective: str = field(
        default="dro", metadata={"help": "Objective of the selector.", "choices": SELECTOR_OBJECTIVES}
    )
    generator_objective: str = field(
        default="dro", metadata={"help": "Objective of the generator.", "choices": GENERATOR_OBJECTIVES}
    )
    baseline: str = field(default="none", metadata={"help": "Control variate of the weights.", "choices": BASELINES})
    min_importance_weight: float = field(
        default=0.0, metadata={"help": "Permutations of a smaller weight do not train the generator."}
    )
    max_tokens_per_forward: int | None = field(
        default=None, metadata={"help": "Bound on the distinct tokens of a forward pass; default: none."}
    )
    generator_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the generator; default: learning_rate."}
    )


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
        for f in dataclasses.fields(group):
            choices = f.metadata.get("choices")
            known = f" One of {', '.join(choices)}." if choices else ""
            text = f"{f.metadata['help']}{known} (default: {f.default})".replace("%", "%%")
            arguments.add_argument(f"--{f.name}", metavar="VALUE", help=text)
    return parser.format_help()
