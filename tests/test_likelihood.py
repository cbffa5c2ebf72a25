"""Shared prefixes are encoded once, whichever way, and the numbers are those of encoding each sequence by itself."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers.integrations.flex_attention
from helpers import Gradients, assert_same_gradients, gradients, through, widen_norms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import drorl.attention
import drorl.backends
import drorl.tree
from drorl.adapters import SELECTOR, adapter_parameters
from drorl.answers import answer_logps, scored_answers
from drorl.attention import TREE_ATTENTION, _as_products, uninstall
from drorl.backends import backend_of
from drorl.likelihood import PromptStates, TokenLogps, sequence_logps
from drorl.states import TreeStates, can_keep

Pair = tuple[list[int], list[int]]

TOKENS = st.lists(st.integers(1, 4), min_size=1, max_size=5)  # few tokens, so that prefixes are shared by chance
PAIRS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=6)
LONG = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
FORKED: list[Pair] = [
    ([1, 2, 3], [4, 5]),
    ([1, 2, 3], [4, 6, 7]),  # parts after one token of the completion
    ([1, 2, 3], [4, 5]),  # an equal pair
    ([1, 2, 3], [4]),  # a prefix of another
    ([1, 2], [3, 4, 5]),  # the same tokens, another boundary
    ([1, 2, 8, 9], [4, 5]),  # parts within the prompt
    ([7], [7, 7]),  # shares nothing
    (LONG, [1, 2, 3]),  # longer than the sliding windows below
    (LONG[:8], [4, 4]),  # parts within it
]
BACKENDS = ("blocks", "mask", "cached", "repeated")


def naive_logps(model: nn.Module, pairs: Sequence[Pair], temperature: float = 1.0) -> list[torch.Tensor]:
    """log p(completion_t | all before), one sequence after another, the model making its own mask and positions."""
    result = []
    for prompt, completion in pairs:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0] / temperature
        steps = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        result.append(steps[torch.arange(len(completion)), completion])
    return result


def weighted_sum(logps: Sequence[torch.Tensor]) -> torch.Tensor:
    """A scalar to which each log-probability contributes with a weight of its own."""
    flat = torch.cat(list(logps))
    return (flat * torch.linspace(0.5, 2.0, len(flat), dtype=flat.dtype)).sum()


def gradient_of(model: nn.Module, logps: Sequence[torch.Tensor]) -> Gradients:
    """The gradient of the weighted sum with respect to every parameter of the model."""
    return gradients(weighted_sum(logps), dict(model.named_parameters()))


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
WINDOWED = ["sliding_attention", "full_attention"] * 2
FAMILIES: dict[str, Callable[[str], PreTrainedModel]] = {
    "llama": lambda a: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=a)),
    "llama, tied": lambda a: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, attn_implementation=a)),
    "mistral, window": lambda a: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6, attn_implementation=a)),
    "qwen3": lambda a: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, attn_implementation=a)),
    "gemma3, windows": lambda a: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=5, layer_types=WINDOWED, attn_implementation=a)
    ),
    "smollm3, no rope": lambda a: SmolLM3ForCausalLM(
        SmolLM3Config(
            **SIZES, no_rope_layers=[1, 0, 1, 0], pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation=a
        )
    ),
    "gpt2": lambda a: GPT2LMHeadModel(  # learnt positions, and a head that shares the embeddings
        GPT2Config(
            vocab_size=64,
            n_positions=128,
            n_embd=32,
            n_layer=4,
            n_head=4,
            initializer_range=0.2,
            attn_implementation=a,
        )
    ),
    "gemma2, capped": lambda a: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, sliding_window=5, attn_implementation=a)
    ),
    "mamba": lambda _: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)),
}


def family(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """A random float64 model of a few layers of some family."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[name](attention)
    model = model.to(torch.float64).eval()
    # Those of Gemma and Mamba are of other forms.
    return model if name.startswith(("gemma", "mamba")) else widen_norms(model)


# ------------------------------------------------------------------------------------------------ values and gradients
@pytest.mark.usefixtures("block_cost")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=PAIRS)
def test_the_tree_equals_the_naive_computation_for_any_sequences(
    tiny_model: Callable[..., LlamaForCausalLM], pairs: list[Pair]
) -> None:
    """Values and gradients agree to 1e-10 in float64 for any pairs: equal, nested, with nothing in common."""
    model = tiny_model(torch.float64)
    tree, naive = sequence_logps(model, pairs), naive_logps(model, pairs)
    for actual, expected in zip(tree, naive, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    # A gradient may vanish by symmetry (one token attends to nothing but itself), so there is an absolute tolerance.
    for (name, parameter), actual, expected in zip(
        model.named_parameters(),
        torch.autograd.grad(weighted_sum(tree), list(model.parameters())),
        torch.autograd.grad(weighted_sum(naive), list(model.parameters())),
        strict=True,
    ):
        assert actual.shape == parameter.shape
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.fixture(params=["one block", "many blocks"])
def block_cost(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, which makes one block of trees as small as these; and as if a block cost nothing."""
    if request.param == "many blocks":
        monkeypatch.setattr(drorl.tree, "BLOCK_COST", {"cpu": (-1, 0)})


@pytest.mark.usefixtures("block_cost")
@pytest.mark.parametrize(
    ("name", "attention", "expected"),
    [
        ("llama", "sdpa", ["blocks", "mask", "cached", "repeated"]),
        ("llama", "eager", ["mask", "cached", "repeated"]),
        ("llama, tied", "sdpa", ["blocks", "mask", "cached", "repeated"]),
        ("mistral, window", "sdpa", ["blocks", "cached", "repeated"]),
        ("mistral, window", "eager", ["cached", "repeated"]),
        ("qwen3", "sdpa", ["blocks", "mask", "cached", "repeated"]),
        ("gemma3, windows", "sdpa", ["blocks", "cached", "repeated"]),
        ("smollm3, no rope", "sdpa", ["blocks", "mask", "cached", "repeated"]),
        ("gpt2", "sdpa", ["blocks", "mask", "cached", "repeated"]),
        ("gemma2, capped", "sdpa", ["cached", "repeated"]),
        ("mamba", "eager", ["repeated"]),
    ],
)
def test_every_way_that_a_family_can_go_is_exact(name: str, attention: str, expected: list[str]) -> None:
    """Which ways pass the self-check, that the first is chosen, and that each gives the naive values and gradients.

    1e-10 in float64, and 2e-6 where the norms compute in float32 whatever the model (Gemma); with `eager` attention,
    whose softmax does so too, the model is a float32 one: 2e-5, hundreds of roundings of 6e-8.
    """
    model = family(name, attention)
    tolerance = 2e-6 if name.startswith("gemma") else 1e-10
    if attention == "eager":
        model, tolerance = model.float(), 2e-5
    naive = naive_logps(model, FORKED)
    gradient = gradient_of(model, naive)
    assert backend_of(model) == expected[0]
    uninstall(model)
    for backend in BACKENDS:
        if backend not in expected:
            assert drorl.backends._objection(model, backend)
            continue
        with through(backend, model):
            logps = sequence_logps(model, FORKED)
            torch.testing.assert_close(torch.cat(logps), torch.cat(naive), rtol=0, atol=tolerance)
            assert_same_gradients(gradient_of(model, logps), gradient, rtol=tolerance)


def test_a_family_that_cannot_share_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """A recurrent model repeats its sequences; the log says so, with a reason for each way, the first time only."""
    model = family("mamba", "eager")
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        sequence_logps(model, FORKED)
        sequence_logps(model, FORKED)
    (message,) = [r.getMessage() for r in caplog.records if "shared prefixes" in r.getMessage()]
    for part in ("MambaForCausalLM", "repeated", "blocks: ", "linear_attention", "cached: "):
        assert part in message


def test_an_attention_that_ignores_the_tree_is_found_out(
    tiny_model: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in which the packed tokens all see each other fails the self-check and goes another way, which is right.

    The check does not touch torch's randomness.
    """
    model = tiny_model(torch.float64)
    forward = type(model).forward

    def deaf(self: nn.Module, *args: object, **kwargs: object) -> object:
        mask = kwargs.get("attention_mask")
        if kwargs.pop("tree", None) is not None or (mask is not None and mask.dim() == 4):
            kwargs["attention_mask"] = None
        return forward(self, *args, **kwargs)

    state = torch.get_rng_state()
    monkeypatch.setattr(type(model), "forward", deaf)
    assert backend_of(model) == "cached"
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(sequence_logps(model, FORKED), naive_logps(model, FORKED), rtol=0, atol=1e-10)


def test_the_self_check_leaves_every_module_in_its_mode(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """A layer that is in evaluation mode while the model trains stays there."""
    model = tiny_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    backend_of(model)
    assert [module.training for module in model.modules()] == modes


def test_a_layer_that_does_not_say_how_far_it_sees_is_found_out() -> None:
    """A window that is longer than the self-check, and that a layer keeps to itself, is no tree of blocks."""
    config = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=64, layer_types=WINDOWED)
    honest, silent = Gemma3ForCausalLM(config).eval(), Gemma3ForCausalLM(config).eval()
    silent.model.layers[2].self_attn.sliding_window = None
    assert backend_of(honest) == "blocks"
    assert backend_of(silent) != "blocks"


@pytest.mark.slow
def test_flex_attention_takes_the_tree_as_a_block_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model loaded with `attn_implementation="flex_attention"` gets the tree as a `BlockMask`, values to 1e-5.

    On a CPU it has no backward pass, and it is not compiled here.
    """
    wrapper = transformers.integrations.flex_attention
    monkeypatch.setattr(wrapper, "WrappedFlexAttention", lambda training: lambda: flex_attention)
    with torch.no_grad():
        torch.manual_seed(0)
        model = FAMILIES["llama"]("flex_attention").eval()
        torch.manual_seed(0)
        expected = naive_logps(FAMILIES["llama"]("sdpa").eval(), FORKED)
        assert backend_of(model) == "mask"
        torch.testing.assert_close(sequence_logps(model, FORKED), expected, rtol=0, atol=1e-5)


def test_generation_and_ordinary_passes_are_what_they_were(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """With the tree attention in place, padded batches and generation give the bits that they gave without."""
    model = tiny_model()
    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    logits, texts = model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)
    backend_of(model)
    assert model.config._attn_implementation == TREE_ATTENTION
    assert torch.equal(model(**batch).logits, logits)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), texts)


def test_no_kernel_plans_for_a_shape_while_a_model_attends(
    tiny_model: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's attention is off in passes along a tree and in others, and outside it is as it was."""
    model, seen = tiny_model(), []
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    backend_of(model)

    def watched(*args: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(drorl.attention, "scaled_dot_product_attention", watched)
    sequence_logps(model, FORKED)
    along_the_tree = len(seen)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model(torch.tensor([[5, 6, 7]]))
    assert 0 < along_the_tree < len(seen)
    assert set(seen) == {(False, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    with sdpa_kernel(SDPBackend.MATH):  # what somebody else has turned off stays off
        model(torch.tensor([[5, 6, 7]]))
    assert seen[-1] == (False, False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_float32_the_tree_differs_by_rounding_only(
    tiny_model: Callable[..., LlamaForCausalLM], attention: str
) -> None:
    """Values agree to 2e-5 nats of about 10, gradients to 2e-5 of the largest entry: hundreds of roundings of 6e-8."""
    model = tiny_model(torch.float32, attn_implementation=attention)
    tree, naive = sequence_logps(model, FORKED), naive_logps(model, FORKED)
    torch.testing.assert_close(torch.cat(tree), torch.cat(naive), rtol=0, atol=2e-5)
    assert_same_gradients(gradient_of(model, tree), gradient_of(model, naive), rtol=2e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_as_products_is_attention(masked: bool) -> None:
    """Values and gradients are those of PyTorch's attention, three query heads to a key head, to 1e-12 in float64.

    A CPU takes this path in bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6, 12, 8), (1, 2, 20 if masked else 12, 8), (1, 2, 20 if masked else 12, 8)]
    states = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    mask = None
    if masked:
        visible = torch.ones(12, 20, dtype=torch.bool).tril(8)
        mask = torch.zeros(12, 20, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    actual = _as_products(*states, mask, 0.3)
    expected = scaled_dot_product_attention(*states, mask, is_causal=not masked, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for a, e in zip(*(torch.autograd.grad((o * weights).sum(), states) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


def test_in_bfloat16_the_gradient_is_off_by_rounding_only(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """All gradients together are within 5 % of float32's on the same weights: 8 bits are 0.4 %, some layers deep.

    Repeated sequences in bfloat16 are as far off.
    """
    model = tiny_model(torch.bfloat16)
    wide = tiny_model(torch.bfloat16).float()
    expected = gradient_of(wide, naive_logps(wide, FORKED))
    for logps in (sequence_logps, naive_logps):
        actual = gradient_of(model, [logp.float() for logp in logps(model, FORKED)])
        error = sum((actual[name].float() - g).square().sum() for name, g in expected.items())
        assert (error / sum(g.square().sum() for g in expected.values())).sqrt() < 0.05


def test_in_half_precision_log_probabilities_are_float32(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """bfloat16 logits are widened before the softmax, so that equal log-probabilities are not made by rounding.

    The weights are rounded too, so a value may be off by some tenths of a nat; it has more digits than bfloat16 has.
    """
    model = tiny_model(torch.bfloat16)
    values, reference = torch.cat(sequence_logps(model, FORKED)), torch.cat(naive_logps(model.float(), FORKED))
    assert values.dtype == torch.float32
    assert (values != values.bfloat16().float()).any()
    torch.testing.assert_close(values, reference, rtol=0, atol=0.5)


def test_a_temperature_divides_the_logits(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """At temperature 2 the log-probabilities are those of half the logits."""
    model = tiny_model(torch.float64)
    actual, expected = sequence_logps(model, FORKED, 2.0), naive_logps(model, FORKED, 2.0)
    torch.testing.assert_close(torch.cat(actual), torch.cat(expected), rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------------- growing states
Question = list[tuple[int, tuple[int, ...]]]
PROMPTS = st.lists(TOKENS, min_size=1, max_size=3)
QUESTIONS = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 4), max_size=4).map(tuple)), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


def naive_after(model: nn.Module, prompts: Sequence[list[int]], question: Question) -> torch.Tensor:
    """The next-token logits after each prompt and what follows it."""
    sequences = [[*prompts[i], *tokens] for i, tokens in question]
    return torch.stack([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in sequences])


@pytest.mark.usefixtures("block_cost")
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=PROMPTS, questions=QUESTIONS)
def test_prompts_answer_any_questions_one_after_the_other(
    tiny_model: Callable[..., LlamaForCausalLM], backend: str, prompts: list[list[int]], questions: list[Question]
) -> None:
    """Whatever was asked before, also of another prompt, logits and their gradient are the naive ones, to 1e-10.

    Among the questions are the empty branch, a branch twice, and the beginning or the end of an earlier one.
    """
    model = tiny_model(torch.float64)
    questions = [[(i % len(prompts), tokens) for i, tokens in question] for question in questions]
    with through(backend, model):
        states = PromptStates(model, prompts)
        answers = torch.cat([states.logits_after(question) for question in questions])
    naive = torch.cat([naive_after(model, prompts, question) for question in questions])
    torch.testing.assert_close(answers, naive, rtol=0, atol=1e-10)
    weights = torch.linspace(-1, 1, answers.numel(), dtype=torch.float64).view_as(answers).cos()
    actual, expected = (
        torch.autograd.grad((logits * weights).sum(), list(model.parameters())) for logits in (answers, naive)
    )
    for (name, _), a, e in zip(model.named_parameters(), actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_has_no_gradient_and_leaves_no_trace(tiny_model: Callable[..., LlamaForCausalLM], backend: str) -> None:
    """What is asked of a fork is right, needs no graph, and the states answer afterwards as if it had not been.

    It shares what was encoded before: where states are kept, it encodes the branch and no prompt.
    """
    model = tiny_model(torch.float64)
    prompts, question = [[3, 1, 4, 1, 5]], [(0, (9, 2)), (0, ()), (0, (9,))]
    with through(backend, model):
        states = PromptStates(model, prompts)
        states.logits_after([(0, ())])
        fork = states.fork()
        if states.cache is not None:
            assert len(fork.slots) == len(prompts[0])
            assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in fork.cache.layers)
        with torch.no_grad():
            torch.testing.assert_close(
                fork.logits_after(question[:1]), naive_after(model, prompts, question[:1]), rtol=0, atol=1e-10
            )
            fork.logits_after([(0, (9, 2, 6))])
        assert len(states.tree) == len(prompts[0])
        logits = states.logits_after(question)
        assert logits.requires_grad
        torch.testing.assert_close(logits, naive_after(model, prompts, question), rtol=0, atol=1e-10)


def test_states_that_are_not_kept_answer_in_one_pass(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """`keep=False` encodes nothing before the first question, and prompt and branches together with it."""
    model, question = tiny_model(torch.float64), [(0, (9, 2)), (1, ())]
    backend_of(model)
    prompts = [[3, 1, 4, 1, 5], [3, 1, 7]]
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    states = PromptStates(model, prompts, keep=False)
    assert not passes
    logits = states.logits_after(question)
    assert len(passes) == 1
    hook.remove()
    torch.testing.assert_close(logits, naive_after(model, prompts, question), rtol=0, atol=1e-10)


def test_under_gradient_checkpointing_nothing_is_kept(adapted_model: Callable[..., PeftModel]) -> None:
    """transformers drops the cache there: states are not kept, and one pass has the gradient that it has without.

    1e-10 in float64.
    """
    model = adapted_model(torch.float64, randomise=True).train()
    parameters = adapter_parameters(model, SELECTOR)
    plain = gradients(weighted_sum(sequence_logps(model, FORKED)), parameters)
    assert can_keep(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    assert not can_keep(model)
    assert_same_gradients(gradients(weighted_sum(sequence_logps(model, FORKED)), parameters), plain, rtol=1e-10)
    assert can_keep(model.eval())


def test_nodes_may_be_asked_for_in_any_order(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """The head is evaluated once per distinct node, and the rows come back in the order of the question."""
    model = tiny_model(torch.float64)
    states = TreeStates(model, backend_of(model), keep=True)
    nodes = states.tree.add([3, 1, 4, 1, 5])
    rows = states.logits([nodes[4], nodes[0], nodes[4]])
    whole = model(input_ids=torch.tensor([states.tree.tokens])).logits[0]
    torch.testing.assert_close(rows, whole[[4, 0, 4]], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="encoded before"):
        states.logits([nodes[1]])


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_an_empty_prompt_or_completion_is_refused(
    tiny_model: Callable[..., LlamaForCausalLM], pair: tuple[list[int], list[int]]
) -> None:
    """A token before everything has no prediction, and an empty completion no likelihood: an error, not a number."""
    with pytest.raises(ValueError, match="at least one token each"):
        sequence_logps(tiny_model(), [([1], [2]), pair])


# ------------------------------------------------------------------------------------------------------------ the work
def encoded_tokens(model: nn.Module, compute: Callable[[], object]) -> int:
    """How many tokens the model encodes during a computation."""
    lengths: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].numel()))
    compute()
    hook.remove()
    return sum(lengths)


def test_every_distinct_prefix_is_encoded_once(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """Encoded are the distinct prefixes of the sequences without their last token, which predicts nothing."""
    model = tiny_model()
    backend_of(model)  # its self-check encodes tokens too
    inputs = [[*prompt, *completion[:-1]] for prompt, completion in FORKED]
    distinct = {tuple(ids[: t + 1]) for ids in inputs for t in range(len(ids))}
    assert encoded_tokens(model, lambda: sequence_logps(model, FORKED)) == len(distinct) < sum(map(len, inputs))


def test_equal_prompts_are_encoded_once(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """Eight permutations with the same context cost what one costs, and score the same."""
    model = tiny_model()
    backend_of(model)
    prompt, answers = list(range(5, 45)), [[7, 8, 2], [7, 9, 2]]
    once = encoded_tokens(model, lambda: answer_logps(model, [prompt], [answers]))
    assert once == 40 + 3  # the answers share their first token, and their ends are not encoded
    assert encoded_tokens(model, lambda: answer_logps(model, [prompt] * 8, [answers] * 8)) == once
    assert len(set(answer_logps(model, [prompt] * 8, [answers] * 8).tolist())) == 1


# ------------------------------------------------------------------------------------------------------------- answers
def test_the_likelihood_of_an_answer_is_the_sum_over_its_aliases(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """log sum_y p(y|context), each a *sum* of token log-probabilities; with one alias its own log-likelihood."""
    model = tiny_model(torch.float64)
    prompts, answers = [[3, 1, 4], [1, 5, 9, 2]], [[6, 5, 2], [3, 2], [6, 2]]
    naive = [[naive_logps(model, [(p, a)])[0].sum().item() for a in answers] for p in prompts]
    expected = [math.log(sum(map(math.exp, row))) for row in naive]
    assert answer_logps(model, prompts, [answers] * 2).tolist() == pytest.approx(expected, abs=1e-10)
    assert answer_logps(model, prompts, [answers[:1]] * 2).tolist() == pytest.approx([r[0] for r in naive], abs=1e-10)


def test_a_sample_without_a_permutation_has_no_likelihood(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """A prompt that is None scores -inf, at its place; the others are not moved, and gradients stay finite."""
    model = tiny_model(torch.float64)
    prompts, answers = [[3, 1, 4], [1, 5, 9, 2]], [[6, 5, 2]]
    first, second = answer_logps(model, prompts, [answers] * 2).tolist()
    logps = answer_logps(model, [None, prompts[0], None, prompts[1]], [answers] * 4)
    assert logps.tolist() == pytest.approx([-math.inf, first, -math.inf, second], abs=1e-10)
    alone = gradients(answer_logps(model, prompts, [answers] * 2).sum(), dict(model.named_parameters()))
    assert_same_gradients(gradients(logps[[1, 3]].sum(), dict(model.named_parameters())), alone, rtol=1e-10)
    assert answer_logps(model, [None, None], [answers] * 2).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize(
    ("target", "expected"),
    [("first", ["Wien"]), ("marginal", ["Wien", "Vienna"]), ("surface", ["Vienna"])],
)
def test_which_strings_are_scored(target: str, expected: list[str]) -> None:
    """The first gold answer, all distinct ones, or the one that the shown candidates write; blank ones never."""
    row = {
        "query": "The capital of Austria?",
        "answers": [" ", "Wien", "Vienna", "Wien"],
        "candidates": [{"text": "The city of Vienna is a capital."}, {"text": "Wien, Wien, nur du allein."}],
    }
    assert scored_answers(row, target, num_candidates=1) == expected


@pytest.mark.parametrize("numbers", [1, 22, 10**6], ids=["a row", "two rows", "all rows"])
def test_log_probabilities_in_slices_have_the_gradient_of_log_softmax(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the rows are sliced, of rows that several tokens share, or none; by finite differences too."""
    monkeypatch.setitem(TokenLogps.SLICE, "cpu", numbers)
    logits = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    places, targets = torch.tensor([[0, 3, 3, 3, 6, 1], [1, 2, 2, 5, 10, 0]])
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    logps = TokenLogps.apply(logits, places, targets, 1.7)
    expected = torch.log_softmax(logits / 1.7, dim=-1)[places, targets]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-12)
    actual, reference = (torch.autograd.grad(weights @ values, logits)[0] for values in (logps, expected))
    torch.testing.assert_close(actual, reference, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda rows: TokenLogps.apply(rows, places, targets, 1.7), logits)


def test_log_probabilities_of_bfloat16_are_computed_in_float32() -> None:
    """A probable token's gradient, 1 - p, would vanish if p were subtracted in bfloat16."""
    logits = torch.tensor([[9.0, 0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    place = torch.zeros(1, dtype=torch.long)
    logps = TokenLogps.apply(logits, place, place, 1.0)
    expected = torch.log_softmax(logits.detach().float(), dim=-1)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps[0], expected[0, 0])
    [grad] = torch.autograd.grad(logps.sum(), logits)
    torch.testing.assert_close(grad[0, 0].float(), 1 - expected[0, 0].exp(), rtol=2**-8, atol=0)  # one rounding
