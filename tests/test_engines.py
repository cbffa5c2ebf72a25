"""What an engine is given and asked, without vLLM: a second model stands for it. With vLLM: test_vllm.py."""

import http.server
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import SecondModel
from helpers import randomise_adapters
from peft import LoraConfig, PeftModel
from runs import adapter_state, assert_identical, base_state, config
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from drorl.adapters import GENERATOR, SELECTOR, activate, add_adapters
from drorl.engines.base import EngineDecisions, EngineError
from drorl.engines.delivery import Adapter, base_fingerprint
from drorl.engines.remote import RemoteEngine
from drorl.engines.sampler import EngineSampler, choose_backend
from drorl.errors import InvalidInputError
from drorl.permutations import prefixes_of
from drorl.pipeline import PipelineSettings, RAGPipeline
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
    assert Adapter.saved(tmp_path / SELECTOR, SELECTOR).rank == 2
    parameter = next(iter(p for n, p in model.named_parameters() if ".selector." in n))
    parameter.data.view(-1)[0] = torch.nextafter(parameter.data.view(-1)[0], torch.tensor(9.0))
    assert Adapter.of(model, SELECTOR).version != version


def test_what_is_no_plain_adapter_is_refused(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """Bytes that are no adapter, and adapters that vLLM would apply wrongly."""
    with pytest.raises(InvalidInputError, match="not an adapter"):
        Adapter(SELECTOR, b"something else")
    dora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True)
    with pytest.raises(InvalidInputError, match="use_dora"):
        Adapter.of(add_adapters(tiny_model(), dora), SELECTOR)


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
    """Merging into a base with fewer layers fails, and names what is left over."""
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"2 parts of the adapter.*layers\.1\."):
        dict(Adapter.of(adapted_model(), SELECTOR).merged(tmp_path, torch.float32))


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
    if settings.get("selector_objective") != "none":
        steps = [entry for entry in served.state.log_history if "sampling/logp_difference/mean" in entry]
        assert len(steps) == served.state.max_steps
        assert all(entry["sampling/logp_difference/max"] < 1e-5 for entry in steps)
        assert len(engine.delivered) == served.state.max_steps // settings.get("steps_per_generation", 1)


def test_free_text_comes_from_the_engine(make_trainer: Callable[..., DROTrainer], engine: SecondModel) -> None:
    """Free text at a temperature: the log-probabilities of its tokens are the trainer's."""
    settings = {"constrained": False, "selector_temperature": 1.5, "max_completion_length": 6}
    trainer = with_engine(make_trainer(**settings), engine)
    trainer.train()
    logged = [e["sampling/logp_difference/max"] for e in trainer.state.log_history if "iw_elbo" in e]
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
    trainer.sampler.refuse_stale = lambda rollouts: None
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


def test_a_rollout_of_another_version_is_refused(
    make_trainer: Callable[..., DROTrainer], engine: SecondModel, rows: Callable[..., list[dict[str, Any]]]
) -> None:
    """Rollouts name the adapter that drew them, and are good for it alone."""
    trainer = with_engine(make_trainer(), engine)
    from drorl.rollouts import Question

    [rollout] = trainer.sampler.draw([Question(row, row["candidates"], 0) for row in rows(1, 6)])
    assert rollout.version == engine.delivered[-1]
    randomise_adapters(trainer.model, seed=5)
    with pytest.raises(EngineError, match="drawn by selector-"):
        trainer.sampler.refuse_stale([rollout])


def test_a_lost_engine_leaves_a_checkpoint(
    make_trainer: Callable[..., DROTrainer], engine: SecondModel, tmp_path: Path
) -> None:
    """The run is saved where it is, the error says so, and from there it goes on to the same end."""
    whole = with_engine(make_trainer(output_dir="whole", max_steps=3), engine)
    whole.train()
    trainer = with_engine(make_trainer(max_steps=3), engine)
    deliver = engine.deliver

    def lost(adapter: Adapter) -> str:
        if trainer.state.global_step == 2:
            raise EngineError("the server is gone")
        return deliver(adapter)

    engine.deliver = lost
    with pytest.raises(EngineError, match="the server is gone. The run is saved at step 2"):
        trainer.train()
    engine.deliver = deliver
    again = with_engine(make_trainer(max_steps=3), engine)
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


def test_without_vllm_its_installation_is_named(
    make_trainer: Callable[..., DROTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`use_vllm=True` where it is missing: one error with the command."""
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    model = make_trainer().model
    model.get_base_model().name_or_path = "."
    with pytest.raises(EngineError, match="pip install 'drorl\\[vllm\\]'"):
        make_trainer(model, use_vllm=True)


# ---------------------------------------------------------------------------------------------------------- the server
@pytest.fixture
def base_dir(tiny_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_a_server_that_is_not_there_is_waited_for_and_named(base_dir: str) -> None:
    """Nobody listens: after the timeout the error has the address and the command."""
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9 cannot be reached since .* drorl serve"):
        RemoteEngine("http://127.0.0.1:9", base_dir, timeout=0.1)


@pytest.fixture
def other_server() -> Iterator[str]:
    """A web server that is something else."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_that_is_something_else_is_named(base_dir: str, other_server: str) -> None:
    """A wrong port leads to a web server that knows nothing of this: the error asks for it."""
    with pytest.raises(EngineError, match="is this `drorl serve MODEL`"):
        RemoteEngine(other_server, base_dir, timeout=5)
