"""Rollouts that are still to be trained on, as plain values: a checkpoint may lie between two uses of the same ones.

With `steps_per_generation` above `gradient_accumulation_steps`, or `num_iterations` above 1, one E-step serves several
updates, and TRL keeps its rollouts in a buffer. What is drawn goes into the checkpoint; prompts and contexts follow
from it, and are rendered again.
"""

import json
from collections.abc import Mapping
from typing import Any

from .config import DROConfig
from .pipeline import RAGPipeline
from .rollouts import Question, Rollout, rollout_of

DRAWN = (
    "permutations",
    "completion_ids",
    "proposal_logps",
    "old_selector_logps",
    "old_values",
    "reference_logps",
    "valid_rate",
    "sampling_logps",
    "version",
    "seen",
)
"""What of a rollout does not follow from its question."""

Batch = Mapping[str, Any]
"""What the E-step returns, or a part of it."""


def packed(batch: Batch) -> dict[str, Any]:
    """Returns a batch of questions and rollouts as values that `torch.load(weights_only=True)` reads."""
    questions = [json.loads(json.dumps(vars(q), default=str)) for q in batch["questions"]]
    rollouts = batch["rollouts"]
    if rollouts is not None:
        rollouts = [{name: getattr(rollout, name) for name in DRAWN} for rollout in rollouts]
    return {**batch, "questions": questions, "rollouts": rollouts}


def unpacked(pipeline: RAGPipeline, config: DROConfig, batch: Batch) -> dict[str, Any]:
    """Returns the batch that was [`packed`]."""
    questions, rollouts = [Question(**q) for q in batch["questions"]], batch["rollouts"]
    if rollouts is not None:
        pairs = zip(questions, rollouts, strict=True)
        rollouts = [_unpacked(pipeline, config, question, drawn) for question, drawn in pairs]
    return {**batch, "questions": questions, "rollouts": rollouts}


def _unpacked(pipeline: RAGPipeline, config: DROConfig, question: Question, drawn: Mapping[str, Any]) -> Rollout:
    prompt = pipeline.prompts.selector(question.row["query"], question.shown)
    return rollout_of(pipeline, config, question, prompt, **drawn)
