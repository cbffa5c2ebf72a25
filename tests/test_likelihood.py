"""The packed prefix tree gives what encoding every sequence by itself gives: values and gradients."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import Gradients, assert_same_gradients, gradients, widen_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from drorl.answers import answer_logps, scored_answers
from drorl.likelihood import TokenTree, branch_logits, sequence_logps, tree_logits

Pair = tuple[list[int], list[int]]

TOKENS = st.lists(st.integers(1, 4), min_size=1, max_size=5)  # few tokens, so that prefixes are shared by chance
PAIRS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=6)
FORKED: list[Pair] = [
    ([1, 2, 3], [4, 5]),
    ([1, 2, 3], [4, 6, 7]),  # parts after one token of the completion
    ([1, 2, 3], [4, 5]),  # an equal pair
    ([1, 2, 3], [4]),  # a prefix of another
    ([1, 2], [3, 4, 5]),  # the same tokens, another boundary
    ([1, 2, 8, 9], [4, 5]),  # parts within the prompt
    ([7], [7, 7]),  # shares nothing
]


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


def family(name: str, attention: str, sliding_window: int | None = None) -> PreTrainedModel:
    """A random float64 model of two layers of one of three families; only Mistral looks at the window."""
    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=8, attn_implementation=attention))
        elif name == "mistral":
            model = MistralForCausalLM(
                MistralConfig(**common, sliding_window=sliding_window, attn_implementation=attention)
            )
        else:  # learnt positions, and a head that shares the embeddings
            sizes = {"vocab_size": 64, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
            model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, attn_implementation=attention))
    return widen_norms(model.to(torch.float64).eval())


# ------------------------------------------------------------------------------------------------------------ the tree
@given(st.lists(TOKENS, min_size=1, max_size=6))
def test_a_tree_has_one_node_per_distinct_prefix(sequences: list[list[int]]) -> None:
    """Nodes are the distinct prefixes, each path spells its sequence, a node sees its ancestors and itself only."""
    tree = TokenTree()
    paths = [tree.add(sequence) for sequence in sequences]
    prefixes = {tuple(s[: t + 1]) for s in sequences for t in range(len(s))}
    assert len(tree) == len(prefixes)
    visible = tree.visibility()
    for sequence, path in zip(sequences, paths, strict=True):
        assert [tree.tokens[node] for node in path] == sequence
        assert [tree.positions[node] for node in path] == list(range(len(sequence)))
        for t, node in enumerate(path):
            assert visible[node].nonzero().flatten().tolist() == path[: t + 1]


def test_a_branch_continues_where_it_is_added() -> None:
    """Adding below a node shares what is there, and positions go on counting."""
    tree = TokenTree()
    prompt = tree.add([5, 6, 7])
    branch = tree.add([8, 9], prompt[1])
    assert [tree.positions[node] for node in branch] == [2, 3]
    assert tree.add([5, 6, 8]) == [*prompt[:2], branch[0]]


# ------------------------------------------------------------------------------------------------ values and gradients
@settings(max_examples=40)
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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gpt2"])
def test_the_tree_equals_the_naive_computation_in_other_families(name: str, attention: str) -> None:
    """Qwen3 (norms of queries and keys), Mistral, GPT-2 (learnt positions): values and gradients to 1e-10.

    With `eager` attention to 2e-6: transformers computes its softmax in float32 even in a float64 model.
    """
    tolerance = {"sdpa": 1e-10, "eager": 2e-6}[attention]
    model = family(name, attention)
    tree, naive = sequence_logps(model, FORKED), naive_logps(model, FORKED)
    torch.testing.assert_close(torch.cat(tree), torch.cat(naive), rtol=0, atol=tolerance)
    assert_same_gradients(gradient_of(model, tree), gradient_of(model, naive), rtol=tolerance)


@pytest.mark.parametrize("window", [7, 8, None])
def test_a_sequence_beyond_a_sliding_window_is_refused(window: int | None) -> None:
    """The tree's mask replaces the model's own, which forgets tokens out of the window: an error, no wrong number.

    8 tokens are encoded; those that fit agree with the naive computation, 1e-10 as above.
    """
    model = family("mistral", "sdpa", sliding_window=window)
    pairs: list[Pair] = [([1, 2, 3, 4, 5, 6], [7, 8, 9])]
    if window == 7:
        with pytest.raises(ValueError, match="8 tokens exceeds.*window of 7.*max_prompt_length"):
            sequence_logps(model, pairs)
    else:
        torch.testing.assert_close(sequence_logps(model, pairs), naive_logps(model, pairs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_float32_the_tree_differs_by_rounding_only(
    tiny_model: Callable[..., LlamaForCausalLM], attention: str
) -> None:
    """Values agree to 2e-5 nats of about 10, gradients to 2e-5 of the largest entry: hundreds of roundings of 6e-8."""
    model = tiny_model(torch.float32, attn_implementation=attention)
    tree, naive = sequence_logps(model, FORKED), naive_logps(model, FORKED)
    torch.testing.assert_close(torch.cat(tree), torch.cat(naive), rtol=0, atol=2e-5)
    assert_same_gradients(gradient_of(model, tree), gradient_of(model, naive), rtol=2e-5)


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


def test_branches_are_answered_in_the_order_asked(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """branch_logits gives the logits after prompt + branch, also for the empty branch and for one asked for twice."""
    model = tiny_model(torch.float64)
    prompt, branches = [3, 1, 4, 1, 5], [(9, 2), (), (9,), (6,), (9, 2)]
    actual = branch_logits(model, prompt, branches)
    naive = [model(input_ids=torch.tensor([[*prompt, *branch]])).logits[0, -1] for branch in branches]
    torch.testing.assert_close(actual, torch.stack(naive), rtol=0, atol=1e-10)


def test_nodes_may_be_asked_for_in_any_order(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """The head is evaluated once per distinct node, and the rows come back in the order of the question."""
    model, tree = tiny_model(torch.float64), TokenTree()
    nodes = tree.add([3, 1, 4, 1, 5])
    rows = tree_logits(model, tree, [nodes[4], nodes[0], nodes[4]])
    whole = model(input_ids=torch.tensor([tree.tokens])).logits[0]
    torch.testing.assert_close(rows, whole[[4, 0, 4]], rtol=0, atol=1e-10)


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
    inputs = [[*prompt, *completion[:-1]] for prompt, completion in FORKED]
    distinct = {tuple(ids[: t + 1]) for ids in inputs for t in range(len(ids))}
    assert encoded_tokens(model, lambda: sequence_logps(model, FORKED)) == len(distinct) < sum(map(len, inputs))


def test_equal_prompts_are_encoded_once(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """Eight permutations with the same context cost what one costs, and score the same."""
    model = tiny_model()
    prompt, answers = list(range(5, 45)), [[7, 8, 2], [7, 9, 2]]
    once = encoded_tokens(model, lambda: answer_logps(model, [prompt], answers))
    assert once == 40 + 3  # the answers share their first token, and their ends are not encoded
    assert encoded_tokens(model, lambda: answer_logps(model, [prompt] * 8, answers)) == once
    assert len(set(answer_logps(model, [prompt] * 8, answers).tolist())) == 1


# ------------------------------------------------------------------------------------------------------------- answers
def test_the_likelihood_of_an_answer_is_the_sum_over_its_aliases(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """log sum_y p(y|context), each a *sum* of token log-probabilities; with one alias its own log-likelihood."""
    model = tiny_model(torch.float64)
    prompts, answers = [[3, 1, 4], [1, 5, 9, 2]], [[6, 5, 2], [3, 2], [6, 2]]
    naive = [[naive_logps(model, [(p, a)])[0].sum().item() for a in answers] for p in prompts]
    expected = [math.log(sum(map(math.exp, row))) for row in naive]
    assert answer_logps(model, prompts, answers).tolist() == pytest.approx(expected, abs=1e-10)
    assert answer_logps(model, prompts, answers[:1]).tolist() == pytest.approx([r[0] for r in naive], abs=1e-10)


def test_a_sample_without_a_permutation_has_no_likelihood(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """A prompt that is None scores -inf, at its place; the others are not moved, and gradients stay finite."""
    model = tiny_model(torch.float64)
    prompts, answers = [[3, 1, 4], [1, 5, 9, 2]], [[6, 5, 2]]
    first, second = answer_logps(model, prompts, answers).tolist()
    logps = answer_logps(model, [None, prompts[0], None, prompts[1]], answers)
    assert logps.tolist() == pytest.approx([-math.inf, first, -math.inf, second], abs=1e-10)
    alone = gradients(answer_logps(model, prompts, answers).sum(), dict(model.named_parameters()))
    assert_same_gradients(gradients(logps[[1, 3]].sum(), dict(model.named_parameters())), alone, rtol=1e-10)
    assert answer_logps(model, [None, None], answers).tolist() == [-math.inf, -math.inf]


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
