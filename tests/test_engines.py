"""What an engine is given and asked, without vLLM: a second model stands for it. With vLLM: test_vllm.py."""

import importlib.util
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import SecondModel
from helpers import randomise_adapters
from peft import LoraConfig, PeftModel
from runs import adapter_state, assert_identical, base_state, config
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from drorl.adapters import GENERATOR, SELECTOR, activate, add_adapters
from drorl.data.rows import RowError
from drorl.engines import sampler
from drorl.engines.base import Branch, EngineDecisions, EngineError
from drorl.engines.delivery import Adapter, base_fingerprint
from drorl.engines.sampler import EngineSampler, choose_backend
from drorl.engines.vllm import VLLMEngine, import_error, start_error
from drorl.errors import InvalidInputError
from drorl.permutations import prefixes_of
from drorl.pipeline import PipelineSettings, RAGPipeline
from drorl.randomness import RandomState
from drorl.rollouts import Question
from drorl.trainer import DROTrainer
from drorl.weights import log_sampling_ratio


# ------------------------------------------------------------------------------------------------------------ delivery
def test_an_adapter_arrives_as_it_was_sent(adapted_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    """What PEFT loads from the delivered bytes gives the logits of the sent adapter, exactly."""
    model = adapted_model(randomise=True)
    activate(model, GENERATOR)
    Adapter.of(model, GENERATOR).write(tmp_path)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        sent = model(input_ids=tokens).logits
        arrived = PeftModel.from_pretrained(adapted_model().unload(), tmp_path)(input_ids=tokens).logits
    torch.testing.assert_close(arrived, sent, rtol=0, atol=0)


def test_a_version_is_the_adapters_weights(adapted_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    """Equal weights have equal versions, also when saved and read; another last bit, another version."""
    model = adapted_model(randomise=True)
    version = Adapter.of(model, SELECTOR).version
    assert version == Adapter.of(adapted_model(randomise=True), SELECTOR).version
    model.save_pretrained(tmp_path, selected_adapters=[SELECTOR])
    assert Adapter.saved(tmp_path / SELECTOR, SELECTOR).version == version
    model.peft_config[SELECTOR].base_model_name_or_path = "elsewhere"
    assert Adapter.of(model, SELECTOR).version == version
    parameter = next(iter(p for n, p in model.named_parameters() if ".selector." in n))
    parameter.data.view(-1)[0] = torch.nextafter(parameter.data.view(-1)[0], torch.tensor(9.0))
    assert Adapter.of(model, SELECTOR).version != version


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 1}}, "rank_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, r"2 other weights.*lora_embedding"),
    ],
    ids=str,
)
def test_what_is_no_plain_adapter_is_refused(
    settings: dict[str, Any], words: str, tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    """Adapters that vLLM, or a merged copy, would apply wrongly, or whose base is no longer the file's."""
    special = LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings))
    model = add_adapters(tiny_model(), special, (SELECTOR,))
    with pytest.raises(InvalidInputError, match=words):
        Adapter.of(model, SELECTOR)


def test_a_transposed_adapter_is_refused(adapted_model: Callable[..., PeftModel]) -> None:
    """`fan_in_fan_out`, of GPT-2's layers, which the tiny model does not have."""
    model = adapted_model()
    model.peft_config[SELECTOR].fan_in_fan_out = True
    with pytest.raises(InvalidInputError, match="fan_in_fan_out"):
        Adapter.of(model, SELECTOR)


def packed(header: Any) -> bytes:
    """A header of safetensors without anything behind it."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"something else",
        b"",
        packed([]),
        packed({}),
        packed({"__metadata__": {"adapter_config": "7"}}),
        packed({"__metadata__": {"adapter_config": '{"peft_type": "LORA"}'}}),
        packed({"__metadata__": {"adapter_config": '{"peft_type": "LORA", "r": 2, "lora_alpha": 2}'}, "x": 3}),
        packed(
            {
                "__metadata__": {"adapter_config": '{"peft_type": "LORA", "r": 2, "lora_alpha": 2}'},
                "x.lora_A.weight": 3,
            }
        ),
    ],
    ids=range(8),
)
def test_bytes_that_are_no_adapter_are_refused(content: bytes) -> None:
    """What a server may be sent: each ends in the one error that it answers with 400."""
    with pytest.raises(InvalidInputError, match="adapter|weights|r and lora_alpha"):
        Adapter(SELECTOR, content).matrices()


@pytest.mark.parametrize("rslora", [False, True])
def test_the_merged_copy_is_pefts(tiny_model: Callable[..., LlamaForCausalLM], rslora: bool, tmp_path: Path) -> None:
    """The merged weights are those of PEFT's own merge; files and model stay as they were, bit by bit."""
    lora = LoraConfig(r=2, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=rslora)
    tiny_model().save_pretrained(tmp_path)
    model = add_adapters(tiny_model(), lora)
    randomise_adapters(model)
    files, weights = (tmp_path / "model.safetensors").read_bytes(), base_state(model)
    merged = dict(Adapter.of(model, SELECTOR).merged(tmp_path, torch.float32))
    assert_identical(base_state(model), weights)
    assert (tmp_path / "model.safetensors").read_bytes() == files
    expected = model.merge_and_unload(adapter_names=[SELECTOR]).state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    assert sum(not torch.equal(merged[name], weights.get(f"base_model.model.{name}", tensor)) for name in merged) == 14


def test_an_adapter_of_another_base_has_no_place(
    tiny_model: Callable[..., LlamaForCausalLM], adapted_model: Callable[..., PeftModel], tmp_path: Path
) -> None:
    """Merging into a base with fewer or smaller layers fails before it begins, and names what does not fit."""
    adapter = Adapter.of(adapted_model(), SELECTOR)
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"2 parts of the adapter.*layers\.1\."):
        adapter.merged(tmp_path, torch.float32)
    tiny_model(hidden_size=48).save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"q_proj.weight is \[48, 48\] in .*\[\[2, 32\], \[32, 2\]\]"):
        adapter.merged(tmp_path, torch.float32)


class Reloading(VLLMEngine):
    """The part of an engine that needs no vLLM: merged copies, which it may fail to take."""

    fails = False

    def _reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        dict(weights)
        if self.fails:
            raise RuntimeError("half of it is loaded")

    _run = _add = _remove = None


def test_after_a_failed_reload_there_is_no_answer(
    tiny_model: Callable[..., LlamaForCausalLM], adapted_model: Callable[..., PeftModel], tmp_path: Path
) -> None:
    """An adapter of another base leaves the engine as it was; weights that it could not load leave it useless."""
    tiny_model().save_pretrained(tmp_path)
    engine = Reloading(tmp_path, torch.float32, 99, False, 8)
    version = engine.deliver(Adapter.of(adapted_model(), SELECTOR))
    with pytest.raises(InvalidInputError):
        engine.deliver(Adapter.of(adapted_model(hidden_size=48), SELECTOR))
    assert list(engine.loaded) == [version]
    engine.fails = True
    for _ in range(2):
        with pytest.raises(EngineError, match="half of it is loaded.*start it again"):
            engine.deliver(Adapter.of(adapted_model(randomise=True), SELECTOR))
    with pytest.raises(EngineError, match="start it again"):
        engine._asked(version)


def test_a_base_has_one_fingerprint(tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    """It does not depend on data type or files, and changes with one layer."""
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    model.float().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    prints = [base_fingerprint(tmp_path / name) for name in ("bf16", "shards")]
    model.model.layers[1].mlp.up_proj.weight.data += 0.01
    model.save_pretrained(tmp_path / "tuned")
    assert prints[0] == prints[1] != base_fingerprint(tmp_path / "tuned")
    with pytest.raises(InvalidInputError, match="no \\*.safetensors"):
        base_fingerprint(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_in_memory_has_the_files_fingerprint(
    tied: bool, adapted_model: Callable[..., PeftModel], tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """In float32 where the file is bfloat16, under adapters, with tied embeddings; not once a layer has changed."""
    tiny_model(torch.bfloat16, tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = adapted_model(randomise=True, tie_word_embeddings=tied)
    base = model.get_base_model()
    base.load_state_dict({n: p.bfloat16().float() if "lora_" not in n else p for n, p in base.state_dict().items()})
    assert base_fingerprint(tmp_path, model) == base_fingerprint(tmp_path)
    base.model.layers[1].self_attn.q_proj.base_layer.weight.data += 0.01
    assert base_fingerprint(tmp_path, model) != base_fingerprint(tmp_path)


def test_only_the_files_that_transformers_reads_count(
    tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """Beside one file or an index there may be the same weights under other names, as Llama's `consolidated`."""
    for folder, size in (("one", "1GB"), ("many", "20KB")):
        tiny_model().save_pretrained(tmp_path / folder, max_shard_size=size)
        before = base_fingerprint(tmp_path / folder)
        tiny_model(seed=1).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / folder / "consolidated.safetensors")
        assert base_fingerprint(tmp_path / folder) == before


def test_a_base_that_has_changed_in_memory_is_not_sampled_from(
    make_trainer: Callable[..., DROTrainer], base_dir: str
) -> None:
    """Colocated vLLM loads the file: a trainer whose base is no longer that is told so before it starts."""
    model = make_trainer().model
    model.get_base_model().name_or_path = base_dir
    model.get_base_model().model.norm.weight.data += 0.5
    with pytest.raises(EngineError, match="the base in memory is not the one in"):
        make_trainer(model, use_vllm=True)


# ------------------------------------------------------------------------------------------------------------ sampling
@pytest.fixture
def engine(tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path) -> SecondModel:
    return SecondModel(tiny_model(), tmp_path / "engine")


@pytest.mark.parametrize("identifiers", ["number", "title"])
def test_an_engine_makes_the_policys_decisions(
    identifiers: str,
    engine: SecondModel,
    adapted_model: Callable[..., PeftModel],
    tokenizer: PreTrainedTokenizerFast,
    rows: Callable[..., list[dict[str, Any]]],
) -> None:
    """Every decision has the trainer's log-probabilities, with temperature and retrieval prior, to 1e-5 nats."""
    model = adapted_model(randomise=True)
    settings = PipelineSettings(
        5, 3, identifiers=identifiers, selector_temperature=1.7, retrieval_prior_weight=0.4, max_passage_tokens=8
    )
    pipeline = RAGPipeline(model, tokenizer, settings)
    prompts = [pipeline.prompts.selector(row["query"], row["candidates"]) for row in rows(3, 5)]
    version = engine.deliver(Adapter.of(model, SELECTOR))
    ours = pipeline.decide(prompts)
    theirs = EngineDecisions(pipeline.policy, engine, version, prompts)
    assert theirs.greedy() == ours.greedy()
    generators = [[torch.Generator().manual_seed(i) for i in range(3)] for _ in range(2)]
    pairs = zip(*(d.sample(8, generators=g) for d, g in zip((ours, theirs), generators, strict=True)), strict=True)
    for own, drawn in pairs:
        assert drawn.permutations == own.permutations
        torch.testing.assert_close(drawn.old_selector_logps, own.old_selector_logps, rtol=0, atol=1e-5)
    asked = [prefixes_of(draw.permutations) for draw in ours.sample(2)]
    for own, their in zip(ours.logps(asked), theirs.logps(asked), strict=True):
        torch.testing.assert_close(their, own, rtol=0, atol=1e-5)


def test_no_prompt_is_asked_twice_for_one_branch(
    engine: SecondModel,
    adapted_model: Callable[..., PeftModel],
    tokenizer: PreTrainedTokenizerFast,
    rows: Callable[..., list[dict[str, Any]]],
) -> None:
    """One request goes ahead only where several share a prompt that is not cached."""
    pipeline = RAGPipeline(adapted_model(), tokenizer, PipelineSettings(5, 1, identifiers="number"))
    prompts = [pipeline.prompts.selector(row["query"], row["candidates"]) for row in rows(2, 5)]
    version, asked = engine.deliver(Adapter.of(pipeline.model, SELECTOR)), []
    answer = engine.next_token_logps

    def counted(version: str, prompts: Any, branches: Any) -> Any:
        asked.append(len(branches))
        return answer(version, prompts, branches)

    engine.next_token_logps = counted
    branches = [Branch(0, [], [5]), Branch(1, [], [5])]
    for given, expected in ((branches, [2]), ([*branches, Branch(0, [5], [6])], [2, 3])):
        asked.clear()
        EngineDecisions(pipeline.policy, engine, version, prompts)._scores(given)
        assert asked == expected


def with_engine(trainer: DROTrainer, engine: SecondModel) -> DROTrainer:
    """The trainer, its permutations drawn by an engine."""
    trainer.sampler = EngineSampler(trainer.args, trainer.pipeline, trainer.accelerator, engine)
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"selector_objective": "grpo"},
        {"proposal_temperature": 2.0},
        {"steps_per_generation": 2, "max_steps": 4},
        {"steps_per_generation": 2, "max_steps": 4, "selector_objective": "grpo"},
        {"steps_per_generation": 2, "max_steps": 4, "proposal_temperature": 2.0},
        {"selector_objective": "none"},
        {"max_tokens_per_forward": 3000},
        {"vllm_importance_sampling_correction": False},
        {"vllm_importance_sampling_mode": "token_truncate", "selector_objective": "grpo"},
    ],
    ids=str,
)
def test_an_engine_without_error_changes_nothing(
    settings: dict[str, Any], make_trainer: Callable[..., DROTrainer], engine: SecondModel
) -> None:
    """Training with an engine that computes the same gives the adapters of training without.

    To 1e-4 where an update is 1e-2: the engine rounds otherwise, and Adam divides by what may be small.
    """
    plain, served = make_trainer(**settings), with_engine(make_trainer(**settings, output_dir="served"), engine)
    for trainer in (plain, served):
        torch.manual_seed(0)
        trainer.train()
    for role in (SELECTOR, GENERATOR):
        expected, actual = adapter_state(plain.model, role), adapter_state(served.model, role)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-4)
    steps = [entry for entry in served.state.log_history if "sampling/logp_difference/mean" in entry]
    assert len(steps) == served.state.max_steps  # of a frozen selector too
    assert all(entry["sampling/logp_difference/max"] < 1e-5 for entry in steps)
    if settings.get("selector_objective") != "none":
        assert len(engine.delivered) == served.state.max_steps // settings.get("steps_per_generation", 1)
    ratios = [entry.get("sampling/importance_sampling_ratio/mean") for entry in steps]
    corrected = settings.get("vllm_importance_sampling_correction", True)
    assert ratios == (pytest.approx([1.0] * len(steps), abs=1e-4) if corrected else [None] * len(steps))


def test_free_text_comes_from_the_engine(make_trainer: Callable[..., DROTrainer], engine: SecondModel) -> None:
    """Free text at a temperature: the log-probabilities of its tokens are the trainer's."""
    settings = {"constrained": False, "selector_temperature": 1.5, "max_completion_length": 6}
    trainer = with_engine(make_trainer(**settings), engine)
    trainer.train()
    logged = [e["sampling/logp_difference/max"] for e in trainer.state.log_history if "step_time" in e]
    assert len(logged) == 2
    assert max(logged) < 1e-5


def test_the_weights_correct_an_engines_error(make_trainer: Callable[..., DROTrainer], tmp_path: Path) -> None:
    """The ratio in the weights is p_s of the trainer over q of the engine, truncated as TRL's settings say."""
    base = make_trainer().model.unload()
    trainer = make_trainer(
        max_steps=1,
        proposal_temperature=1.5,
        vllm_importance_sampling_mode="sequence_truncate",
        vllm_importance_sampling_clip_max=1.1,
        max_sampling_logp_difference=9.0,
    )
    with_engine(trainer, SecondModel(base, tmp_path / "engine", error=0.3))
    seen: list[Any] = []
    weigh = trainer._weigh

    def recorded(rollouts: list, token_logps: torch.Tensor, *rest: Any) -> Any:
        seen.append((rollouts, token_logps, rest[-1]))
        return weigh(rollouts, token_logps, *rest)

    trainer._weigh = recorded
    trainer.train()
    [(rollouts, logps, correction)] = seen
    engine = torch.stack([r.sampling_logps for r in rollouts])
    proposal = torch.stack([r.proposal_logps for r in rollouts])
    gap = (logps - engine).sum(dim=-1)
    assert gap.abs().max() > math.log(1.1)  # so something is truncated
    expected = gap.clamp(max=math.log(1.1)) + (engine - proposal).sum(dim=-1)
    torch.testing.assert_close(trainer.sampler.log_ratio(rollouts, correction), expected)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_correction_is_trls(mode: str) -> None:
    """Against TRL's definition, written out: a ratio, clamped or set to 0 beyond its bounds."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 3, 5, generator=generator)
    theirs[..., 3:] = -torch.inf
    gap = (ours - theirs)[..., :3]
    ratio = gap.exp() if mode.startswith("token") else gap.sum(-1, keepdim=True).exp()
    beyond = (ratio < 0.5) | (ratio > 2.0)
    expected = ratio.clamp(0.5, 2.0) if mode.endswith("truncate") else ratio.masked_fill(beyond, 0.0)
    actual = log_sampling_ratio(ours, theirs, mode, 0.5, 2.0).exp()
    assert beyond.any()
    torch.testing.assert_close(actual[..., : expected.shape[-1]], expected)
    assert (actual[..., expected.shape[-1] :] == 1).all()


@pytest.mark.parametrize("mode", ["token_mask", "token_truncate", "sequence_mask"])
def test_a_gap_reaches_grpos_loss_as_in_trl(
    mode: str, make_trainer: Callable[..., DROTrainer], tmp_path: Path
) -> None:
    """Advantages of the whole group, and each token's loss times its ratio, which is 0 where it is masked."""
    base = make_trainer().model.unload()
    trainer = make_trainer(
        max_steps=1,
        selector_objective="grpo",
        loss_type="grpo",
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=0.8,
        vllm_importance_sampling_clip_max=1.2,
        max_sampling_logp_difference=9.0,
    )
    with_engine(trainer, SecondModel(base, tmp_path / "engine", error=0.3))
    seen: dict[str, Any] = {}
    weigh, selector_loss = trainer._weigh, trainer._selector_loss

    def weighed(rollouts: list, token_logps: torch.Tensor, generator_logps: torch.Tensor, *rest: Any) -> Any:
        seen.update(
            ours=token_logps, theirs=torch.stack([r.sampling_logps for r in rollouts]), rewards=generator_logps
        )
        return weigh(rollouts, token_logps, generator_logps, *rest)

    def lost(*arguments: Any) -> Any:
        seen["output"] = selector_loss(*arguments)
        return seen["output"]

    trainer._weigh, trainer._selector_loss = weighed, lost
    trainer.train()
    gap, rewards = seen["ours"] - seen["theirs"], seen["rewards"]
    ratio = gap.exp() if mode.startswith("token") else gap.sum(dim=-1, keepdim=True).exp()
    beyond = (ratio < 0.8) | (ratio > 1.2)
    ratio = ratio.clamp(0.8, 1.2) if mode.endswith("truncate") else ratio.masked_fill(beyond, 0.0)
    assert beyond.any() and not beyond.all()
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)
    expected = (-advantages[..., None] * ratio).expand_as(gap).mean()  # on policy, the trainer's own ratio is 1
    assert expected.abs() > 1e-3
    torch.testing.assert_close(seen["output"].loss.detach(), expected)
    logged = next(e for e in trainer.state.log_history if "iw_elbo" in e)
    prefix = "sampling/importance_sampling_ratio"
    found = [logged[f"{prefix}/{name}"] for name in ("min", "mean", "max")]
    assert found == pytest.approx([float(ratio.min()), float(ratio.mean()), float(ratio.max())], abs=1e-5)
    assert logged["sampling/logp_difference/max"] == pytest.approx(float(gap.abs().max()), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- the watch
def test_another_policy_than_the_trainers_stops_the_run(
    make_trainer: Callable[..., DROTrainer], engine: SecondModel
) -> None:
    """With the sync switched off after the first, strong update the run stops, and says what it has seen."""
    trainer = with_engine(make_trainer(max_steps=6, learning_rate=1.0), engine)
    first: list[str] = []

    def stale() -> str:
        first.append(engine.deliver(Adapter.of(trainer.model, SELECTOR)) if not first else first[0])
        return first[0]

    trainer.sampler.sync = stale
    with pytest.raises(EngineError, match="not the policy that is being trained"):
        trainer.train()
    assert trainer.state.global_step >= 1


def test_a_gap_warns_before_it_stops(
    make_trainer: Callable[..., DROTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that is off by a little goes on, with a warning that says by how much."""
    base = make_trainer().model.unload()
    trainer = make_trainer(max_steps=1, max_sampling_logp_difference=1.0)
    with_engine(trainer, SecondModel(base, tmp_path / "engine", error=0.6)).train()
    assert "nats from the trainer's on average" in caplog.text


def test_in_float32_a_small_gap_warns(
    make_trainer: Callable[..., DROTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A fifth of the limit is a bfloat16's; in float32 a hundredth of a nat is a thousand times what rounding does."""
    base = make_trainer().model.unload()
    with_engine(make_trainer(max_steps=1), SecondModel(base, tmp_path / "engine", error=0.03)).train()
    assert "nats from the trainer's on average" in caplog.text


def test_the_largest_gap_is_that_of_all_batches(make_trainer: Callable[..., DROTrainer], tmp_path: Path) -> None:
    """One query of eight is far off: `/max` is its gap, not the mean of the batches' largest."""
    base = make_trainer().model.unload()
    trainer = make_trainer(max_steps=1, max_tokens_per_forward=300, max_sampling_logp_difference=9.0)
    with_engine(trainer, SecondModel(base, tmp_path / "engine"))
    calls: list[int] = []
    watch = trainer.sampler.watch

    def disturbed(rollouts: list, token_logps: torch.Tensor, correction: torch.Tensor) -> None:
        calls.append(len(rollouts))
        watch(rollouts, token_logps + 2.0 * (len(calls) == 1), correction)

    trainer.sampler.watch = disturbed
    trainer.train()
    assert len(calls) > 1
    logged = next(e for e in trainer.state.log_history if "iw_elbo" in e)
    assert logged["sampling/logp_difference/max"] == pytest.approx(2.0, abs=1e-4)
    assert logged["sampling/logp_difference/mean"] == pytest.approx(2.0 * calls[0] / sum(calls), abs=1e-4)


def questions(rows: Callable[..., list[dict[str, Any]]], count: int = 1) -> list[Question]:
    return [Question(row, row["candidates"], 0) for row in rows(count, 6)]


@pytest.mark.parametrize("constrained", [True, False])
def test_a_rollout_of_another_version_is_refused(
    constrained: bool,
    make_trainer: Callable[..., DROTrainer],
    engine: SecondModel,
    rows: Callable[..., list[dict[str, Any]]],
) -> None:
    """A rollout has the version that the engine answered with; one that is stuck with an old adapter is found out."""
    trainer = with_engine(make_trainer(constrained=constrained, max_completion_length=3), engine)
    [rollout] = trainer.sampler.draw(questions(rows))
    assert rollout.version == engine.delivered[-1]
    randomise_adapters(trainer.model, seed=5)
    engine.deliver = lambda adapter: adapter.version  # without taking it
    engine._answered = lambda version: engine.delivered[-1]  # and without looking at what it is asked for
    with pytest.raises(EngineError, match=f"drawn by {rollout.version}, and the trainer is at selector-"):
        trainer.sampler.draw(questions(rows))


def test_what_fails_in_another_process_fails_in_this_one(
    make_trainer: Callable[..., DROTrainer],
    engine: SecondModel,
    rows: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is gathered from the others is raised here; with two real processes: test_processes.py."""
    trainer = with_engine(make_trainer(), engine)
    assert trainer.sampler.draw(questions(rows))
    monkeypatch.setattr(sampler, "gather_object", lambda own: [*own, "the other's server is gone"])
    with pytest.raises(EngineError, match="the other's server is gone"):
        trainer.sampler.draw(questions(rows))


# ---------------------------------------------------------------------------------------------------------- the window
def test_rows_beyond_the_engines_window_are_refused_at_once(
    make_trainer: Callable[..., DROTrainer],
    engine: SecondModel,
    rows: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first step, by the row's number; rows that fit, and prompts that are cut to fit, are not."""
    monkeypatch.setattr(sampler, "start_engine", lambda *_: engine)
    train_rows = rows(8, 6)
    train_rows[5]["candidates"][2]["text"] *= 200
    engine.window = 700
    with pytest.raises(RowError, match=r"row 5, .*the engine's window is 700.*vllm_max_model_length"):
        make_trainer(train_rows=train_rows, use_vllm=True)
    assert make_trainer(train_rows=rows(8, 6), use_vllm=True).sampler.engine is engine
    assert make_trainer(train_rows=train_rows, use_vllm=True, max_prompt_length=700).sampler.engine is engine


def test_a_prompt_that_does_not_fit_later_leaves_a_checkpoint(
    make_trainer: Callable[..., DROTrainer], engine: SecondModel, tmp_path: Path
) -> None:
    """Where the engine refuses a prompt in training, the run is saved as for any other loss of it."""
    trainer = with_engine(make_trainer(max_steps=3), engine)
    deliver = engine.deliver

    def shrinking(adapter: Adapter) -> str:
        engine.window = 2048 if trainer.state.global_step < 1 else 10
        return deliver(adapter)

    engine.deliver = shrinking
    with pytest.raises(EngineError, match="the engine's window is 10.* The run is saved at step 1"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoint-1" / SELECTOR).is_dir()


@pytest.mark.parametrize(("lost_at", "queries"), [(0, 8), (1, 8), (1, 16)])
def test_a_lost_engine_leaves_a_checkpoint(
    lost_at: int,
    queries: int,
    make_trainer: Callable[..., DROTrainer],
    engine: SecondModel,
    rows: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """The run is saved where it is, the error says so, and from there it goes on to the same end.

    Also when the second of a step's two micro-batches is lost: what the first has drawn is drawn again. The third step
    is the first of an epoch, or not.
    """
    settings = {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 1,
        "train_rows": rows(queries, 6),
    }
    whole = with_engine(make_trainer(output_dir="whole", **settings), engine)
    whole.train()
    trainer = with_engine(make_trainer(**settings), engine)
    deliver = engine.deliver
    seen: list[int] = []

    def lost(adapter: Adapter) -> str:
        seen.append(trainer.state.global_step)
        if seen.count(2) > lost_at:
            raise EngineError("the server is gone")
        return deliver(adapter)

    engine.deliver = lost
    with pytest.raises(EngineError, match="the server is gone. The run is saved at step 2"):
        trainer.train()
    engine.deliver = deliver
    again = with_engine(make_trainer(**settings), engine)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in adapter_state(whole.model, SELECTOR).items():
        torch.testing.assert_close(adapter_state(again.model, SELECTOR)[name], value, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- choosing it
@pytest.mark.parametrize(
    ("settings", "installed", "expected"),
    [
        ({}, True, "transformers"),
        ({"constrained": False}, True, "vllm"),
        ({"constrained": False}, False, "transformers"),
        ({"rollout_backend": "vllm"}, False, "vllm"),
        ({"use_vllm": True}, False, "vllm"),
        ({"rollout_backend": "transformers", "constrained": False}, True, "transformers"),
        ({"constrained": False, "generation_kwargs": {"num_beams": 2}}, True, "transformers"),
    ],
)
def test_who_samples(
    settings: dict[str, Any], installed: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` takes what was measured to be faster and is there; what is set is taken."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    backend, reason = choose_backend(config(tmp_path, **settings))
    assert backend == expected
    assert reason


def test_auto_colocates_for_one_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several, `auto` leaves free text to the trainer's own model, unless there is a server."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_backend(config(tmp_path, constrained=False), 2)[0] == "transformers"
    assert choose_backend(config(tmp_path, constrained=False, vllm_mode="server"), 2)[0] == "vllm"


def test_auto_goes_on_where_the_engine_does_not_start(
    make_trainer: Callable[..., DROTrainer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody has asked for is no reason to stop: the log says why it is not there."""

    def failing(*_: Any) -> None:
        raise EngineError("no memory left")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(sampler, "start_engine", failing)
    assert make_trainer(constrained=False).sampler is None
    assert "transformers after all. no memory left" in caplog.text
    with pytest.raises(EngineError, match="no memory left"):
        make_trainer(constrained=False, use_vllm=True)


def test_the_settings_stay_the_users(make_trainer: Callable[..., DROTrainer], tmp_path: Path) -> None:
    """`use_vllm` is hidden from TRL while it is made, and only then, also when that fails."""
    trainer = make_trainer(rollout_backend="auto")
    assert trainer.args.use_vllm is False
    args = config(tmp_path, use_vllm=True)
    with pytest.raises(RowError):
        DROTrainer(model=trainer.model, args=args, train_dataset=[{"query": ""}])
    assert args.use_vllm is True


@pytest.fixture
def base_dir(tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path) -> str:
    """The checkpoint of the base that `make_trainer` trains."""
    tiny_model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_without_vllm_its_installation_is_named(
    make_trainer: Callable[..., DROTrainer], base_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`use_vllm=True` where it is missing: one error with the command."""
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    model = make_trainer().model
    model.get_base_model().name_or_path = base_dir
    shutil.copy(Path(__file__), Path(base_dir) / "tokenizer.json")  # which nobody comes to read
    with pytest.raises(EngineError, match="pip install 'drorl\\[vllm\\]'"):
        make_trainer(model, use_vllm=True)


def test_a_vllm_that_cannot_be_imported_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is installed, and something that it needs is not: the error says what."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    text = str(import_error(ImportError("libcudart.so.13: cannot open shared object file")))
    assert "is installed, but cannot be imported: libcudart.so.13" in text
    assert "pip install" not in text


def test_an_error_that_says_what_to_do_stays_as_it_is() -> None:
    """Only what vLLM raises is explained."""
    own = InvalidInputError("no such model")
    assert start_error(own) is own
    assert "vLLM did not start: out of memory" in str(start_error(RuntimeError("out of memory")))


def test_all_random_numbers_come_back() -> None:
    """vLLM seeds the generators of its process when it starts: Python's, NumPy's and torch's are put back."""

    def numbers() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    state = RandomState()
    first = numbers()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    state.restore()
    assert numbers() == first
