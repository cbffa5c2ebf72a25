"""The worked examples of an experiment; the whole of it is run by test_recipes.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

import drorl.backends
from drorl.adapters import SELECTOR
from drorl.config import DROConfig
from drorl.evaluation import score_permutations
from drorl.experiment import Experiment
from drorl.pipeline import PipelineSettings, RAGPipeline
from drorl.states import base_of
from drorl.trainer import DROTrainer


@pytest.mark.parametrize("backend", ["blocks", "repeated"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_worked_example_shows_the_selectors_probabilities(
    backend: str,
    k: int,
    adapted_model: Callable[..., PeftModel],
    tokenizer: PreTrainedTokenizerFast,
    rows: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """Its probabilities are p_s of each candidate as the first, its weights p_g p_s / q normalised, to rounding.

    Scoring makes the generator's adapter active; what is asked of the selector before and after must not mix.
    """
    model = adapted_model(randomise=True)
    if backend == "repeated":  # nothing is kept, so every question asks the adapter that is active then
        drorl.backends._backends[base_of(model)] = backend
    config = DROConfig(str(tmp_path), num_candidates=4, num_selected=k, num_generations=4)
    pipeline = RAGPipeline(model, tokenizer, PipelineSettings.from_config(config))
    experiment = Experiment(config, Dataset.from_list(rows(2, 4)))
    experiment.evaluate("dro", "DRO", pipeline)
    for row, example in zip(experiment.rows, experiment.examples("dro", pipeline, 2), strict=True):
        drawn = [tuple(z) for z in example["permutations"]]
        pipeline.role(SELECTOR)
        with torch.no_grad():
            decisions = pipeline.decisions([row["query"]], [row["candidates"]])
            first = decisions.logps([[()]])[0][0]
            chosen = decisions.permutation_logps([drawn])[0][0]
        assert example["probabilities"] == pytest.approx(first.exp().tolist(), abs=1e-5)
        [answer_logps] = score_permutations(pipeline, [row], [row["candidates"]], [drawn], config.answer_target)
        # q(z_1) = 1/N, and the later decisions are drawn from p_s itself.
        expected = torch.softmax(answer_logps + chosen[:, 0], dim=0)
        assert example["importance_weights"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_worked_examples_have_a_choice_to_make(
    adapted_model: Callable[..., PeftModel],
    tokenizer: PreTrainedTokenizerFast,
    rows: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """Questions whose answer stands in a candidate, but not in the retriever's first one, come before all others."""
    config = DROConfig(str(tmp_path), num_candidates=4, num_selected=1, num_generations=4)
    pipeline = RAGPipeline(adapted_model(), tokenizer, PipelineSettings.from_config(config))
    without, first, third = rows(3, 4)
    without["answers"] = ["Styx"]
    assert first["answers"][0] in first["candidates"][0]["text"]
    experiment = Experiment(config, Dataset.from_list([without, first, third]))
    experiment.evaluate("dro", "DRO", pipeline)
    shown = [example["answers"] for example in experiment.examples("dro", pipeline, 3)]
    assert shown == [third["answers"], ["Styx"], first["answers"]]


def test_metrics_are_those_that_were_asked_for(
    make_trainer: Callable[..., DROTrainer], rows: Callable[..., list[dict[str, Any]]]
) -> None:
    """A second gold answer counts, or does not, in the trainer's evaluation and in an experiment's, kept or not."""
    [row] = rows(1, 6)
    trainer = make_trainer()
    trainer.evaluate([row])
    asked = Dataset.from_list([{**row, "answers": ["Styx", trainer.last_records[0].prediction]}])
    for preset, expected in (("kilt", 1.0), ("dro-official", 0.0)):
        trainer.args.metric_preset = preset
        assert trainer.evaluate(asked)["eval_exact_match"] == expected
        [record] = Experiment(trainer.args, asked).evaluate("dro", "DRO", trainer.pipeline)
        assert record.exact_match == expected
