"""A contradiction in the settings is refused before anything is loaded, and the message says what to change."""

import dataclasses
from typing import Any

import pytest
import torch
from trl import GRPOConfig

from drorl.config import DROConfig


def make(**settings: Any) -> DROConfig:
    """A configuration of few samples; nothing is written to its directory."""
    defaults: dict[str, Any] = {"num_generations": 2, "per_device_train_batch_size": 4, "report_to": "none"}
    return DROConfig("unused", **(defaults | settings))


# settings -> words of the message: the settings at fault, and where there is one, the way out
REJECTED: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_selected": 21}, ["num_selected", "K=21", "num_candidates", "N=20", "lower K"]),
    ({"num_selected": 0}, ["num_selected", "at least 1"]),
    ({"num_candidates": 0}, ["num_candidates", "at least 1"]),
    ({"num_generations": 0}, ["num_generations", "at least 1"]),
    ({"selector_temperature": 0.0}, ["selector_temperature", "above 0"]),
    ({"proposal_temperature": -1.0}, ["proposal_temperature", "above 0"]),
    ({"weight_temperature": 0.0}, ["weight_temperature", "above 0"]),
    ({"weight_temperature": float("nan")}, ["weight_temperature", "above 0"]),
    ({"temperature": 0.7}, ["temperature=0.7", "set selector_temperature only"]),
    ({"temperature": 0.7, "selector_temperature": 0.8}, ["temperature=0.7", "selector_temperature=0.8"]),
    ({"answer_target": "last"}, ["answer_target", "first, surface, marginal", "'last'"]),
    ({"identifiers": "roman"}, ["identifiers", "number, letter, title", "'roman'"]),
    ({"proposal": "beam"}, ["proposal", "policy, first_choices, retriever", "'beam'"]),
    (
        {"selector_objective": "ppo2"},
        ["selector_objective", "dro, grpo, rloo, reinforce, pointwise, ppo, none", "'ppo2'"],
    ),
    ({"generator_objective": "grpo"}, ["generator_objective", "dro, elbo, sft, none", "'grpo'"]),
    ({"baseline": "median"}, ["baseline", "none, mean, leave_one_out", "'median'"]),
    ({"loss_type": "cispo"}, ["loss_type", "grpo, bnpo, dapo, dr_grpo", "'cispo'"]),
    ({"selector_objective": "none", "generator_objective": "none"}, ["both 'none'", "nothing to train"]),
    ({"num_generations": 1, "baseline": "mean"}, ["num_generations >= 2", "baseline='none'"]),
    ({"num_generations": 1, "baseline": "leave_one_out"}, ["num_generations >= 2", "baseline='none'"]),
    ({"num_generations": 1, "selector_objective": "grpo"}, ["num_generations >= 2", "selector_objective='dro'"]),
    ({"num_generations": 1, "selector_objective": "rloo"}, ["num_generations >= 2", "selector_objective='dro'"]),
    # 3 x 2 samples are two queries of three; TRL would accept them and split a query over two steps.
    (
        {"num_generations": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        ["per_device_train_batch_size (2)", "multiple of num_generations (3)"],
    ),
    ({"proposal": "first_choices", "num_candidates": 6}, ["first_choices", "num_generations (2)", "(6)"]),
    ({"proposal": "retriever"}, ["proposal='retriever'", "num_generations=1"]),
    (
        {"constrained": False, "proposal": "retriever", "num_generations": 1},
        ["constrained=False", "proposal='policy'"],
    ),
    (
        {"constrained": False, "proposal": "first_choices", "num_candidates": 2, "num_selected": 1},
        ["constrained=False", "proposal='policy'"],
    ),
    ({"constrained": False, "proposal_temperature": 2.0}, ["constrained=False", "proposal_temperature=1"]),
    ({"constrained": False, "retrieval_prior_weight": 1.0}, ["retrieval_prior_weight", "constrained=True"]),
    ({"selector_objective": "grpo", "proposal_temperature": 2.0}, ["'grpo'", "proposal='policy'"]),
    ({"beta": 0.04}, ["beta=0.04", "grpo and ppo", "'dro'"]),
    ({"reward": "f1"}, ["reward='f1'", "grpo, rloo, reinforce, ppo"]),
    ({"selector_objective": "ppo", "proposal_temperature": 2.0}, ["'ppo'", "proposal_temperature=1"]),
    ({"selector_objective": "ppo", "constrained": False}, ["'ppo'", "constrained=True"]),
    ({"selector_objective": "ppo", "max_tokens_per_forward": 900}, ["'ppo'", "max_tokens_per_forward"]),
    ({"selector_objective": "pointwise", "num_selected": 1}, ["'pointwise'", "proposal='first_choices'"]),
    ({"importance_sampling_level": "sequence"}, ["importance_sampling_level='sequence' is not supported"]),
    ({"constrained": False, "top_p": 0.95}, ["top_p=0.95 is not supported"]),
    ({"use_vllm": True, "rollout_backend": "transformers"}, ["use_vllm=True", "contradict"]),
    ({"use_vllm": True, "proposal": "retriever", "num_generations": 1}, ["proposal='retriever' samples nothing"]),
    ({"max_sampling_logp_difference": 0.0}, ["max_sampling_logp_difference must be above 0"]),
    ({"use_vllm": True, "generation_kwargs": {"num_beams": 2}}, ["generation_kwargs", "use_vllm=True"]),
    ({"vllm_model_impl": "transformers"}, ["vllm_model_impl='transformers' is not supported"]),
    ({"vllm_enable_sleep_mode": True}, ["vllm_enable_sleep_mode=True is not supported"]),
]


@pytest.mark.parametrize(("settings", "words"), REJECTED, ids=[" ".join(map(str, s)) for s, _ in REJECTED])
def test_a_contradiction_is_refused(settings: dict[str, Any], words: list[str]) -> None:
    """Each contradiction raises one `ValueError` that names the settings and what to change."""
    with pytest.raises(ValueError) as caught:
        make(**settings)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"num_selected": 20},
        {"num_generations": 1},
        {"num_generations": 1, "selector_objective": "none"},
        {"proposal": "retriever", "num_generations": 1, "generator_objective": "sft"},
        {"proposal": "first_choices", "num_candidates": 2, "num_selected": 2},
        {"constrained": False, "selector_temperature": 0.7},
        {"selector_objective": "none"},
        {"generator_objective": "none"},
        {"generator_objective": "elbo"},
        {"selector_objective": "ppo", "beta": 0.04, "num_iterations": 4, "reward": "likelihood"},
        {"selector_objective": "reinforce", "num_generations": 1, "reward": "f1"},
        {"selector_temperature": 0.7, "temperature": 0.7},
        {"retrieval_prior_weight": 0.5, "proposal_temperature": 2.0},
        # TRL would want the evaluation's batch size, 8, to be a multiple of 3, but that is not how drorl evaluates.
        {"num_generations": 3, "per_device_train_batch_size": 3, "eval_strategy": "steps"},
    ],
    ids=str,
)
def test_what_borders_on_a_contradiction_is_accepted(settings: dict[str, Any]) -> None:
    """The checks refuse contradictions and not their neighbours: each setting arrives as it was given."""
    config = make(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_one_sample_per_query_is_allowed() -> None:
    """`num_generations=1`, which TRL refuses, passes, and what TRL derives from it is there all the same."""
    config = make(num_generations=1, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert (config.num_generations, config.generation_batch_size, config.steps_per_generation) == (1, 6, 2)


def test_other_errors_of_trl_are_not_swallowed() -> None:
    """With one sample per query only TRL's complaint about that is dropped."""
    with pytest.raises(ValueError, match="auto_find_batch_size"):
        make(num_generations=1, auto_find_batch_size=True)


def test_temperature_follows_the_selectors() -> None:
    """TRL samples at `temperature`, the policy is scored at `selector_temperature`: they are one number."""
    assert make(selector_temperature=0.6).temperature == 0.6


def test_a_copy_is_a_valid_configuration() -> None:
    """`dataclasses.replace` gives the same settings again: what was derived does not contradict what was set."""
    config = make(selector_temperature=0.6)
    copy = dataclasses.replace(config, generation_batch_size=None, learning_rate=1e-3)
    assert (copy.selector_temperature, copy.temperature, copy.learning_rate) == (0.6, 0.6, 1e-3)


# https://huggingface.co/papers/2505.03075, sections 3 and 4: top 20 of ColBERT, 5 passages, 8 samples, `[3] > [1]`,
# on-policy samples, no baseline, both models trained.
PAPER = {
    "num_candidates": 20,
    "num_selected": 5,
    "num_generations": 8,
    "shuffle_candidates": False,
    "identifiers": "number",
    "selector_temperature": 1.0,
    "retrieval_prior_weight": 0.0,
    "proposal": "policy",
    "proposal_temperature": 1.0,
    "weight_temperature": 1.0,
    "selector_objective": "dro",
    "generator_objective": "dro",
    "baseline": "none",
    "learning_rate": 1e-5,
    "weight_decay": 0.01,
    "beta": 0.0,
    "num_iterations": 1,
}
# Where a default is not the paper's, its documentation says so.
OURS = {"constrained": True, "answer_target": "surface"}


def test_defaults_are_the_papers() -> None:
    """Without any setting a run is the paper's, except for the two departures that are declared."""
    config = DROConfig("unused", report_to="none")
    expected = PAPER | OURS
    assert {name: getattr(config, name) for name in expected} == expected


def test_bf16_is_off_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL turns bf16 on where nothing is said; on a CPU that may be a hundred times slower, so it stays off."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert GRPOConfig("unused", report_to="none", use_cpu=True).bf16 is True
    assert make().bf16 is False
    assert make(bf16=True, use_cpu=True).bf16 is True


def test_at_most_26_settings_of_its_own() -> None:
    """The configuration stays small enough to read: at most 26 fields beside TRL's."""
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    own = [field for field in dataclasses.fields(DROConfig) if field.name not in inherited]
    assert 0 < len(own) <= 26
    assert [field.name for field in own if not field.metadata.get("help")] == []
    undocumented = [field.name for field in own if f"        {field.name} (`" not in (DROConfig.__doc__ or "")]
    assert undocumented == []
