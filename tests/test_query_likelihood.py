"""The policy that reads each passage alone, against passes of the plain model and Plackett and Luce's formula."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from helpers import assert_same_gradients, gradients
from peft import PeftModel
from runs import GradientRecorder, adapter_state, config
from test_trainer import record_rollouts
from transformers import PreTrainedTokenizerFast

from drorl.adapters import SELECTOR, activate, adapter_parameters
from drorl.engines.pipeline import saved_base
from drorl.errors import InvalidInputError
from drorl.permutations import prefixes_of
from drorl.policy import SelectorPolicy
from drorl.ppo import ValueHead
from drorl.prompts import PromptBuilder, PromptTooLongError, SelectorPrompt
from drorl.query_likelihood import QueryLikelihoods
from drorl.rollouts import batches
from drorl.settings import QUERY_LIKELIHOODS
from drorl.trainer import DROTrainer

POLICY = SelectorPolicy(temperature=2.5, retrieval_prior_weight=0.3)
N, K = 5, 3
ALL = list(permutations(range(N), K))
Make = Callable[..., DROTrainer]


@pytest.fixture
def model(adapted_model: Callable[..., PeftModel]) -> PeftModel:
    """A float64 model whose adapters are not zero, the selector's active."""
    model = adapted_model(torch.float64, randomise=True)
    activate(model, SELECTOR)
    return model


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerFast, rows: Callable[..., list]) -> list[SelectorPrompt]:
    """The prompts of two queries."""
    builder = PromptBuilder(tokenizer, "query", K)
    return [builder.selector(row["query"], row["candidates"]) for row in rows(2, N)]


def by_hand(model: PeftModel, prompt: SelectorPrompt) -> torch.Tensor:
    """log p(x | d_i) of each passage, from one plain pass of each, `(N,)`."""
    totals = []
    for ids, query in prompt.queries:
        logits = model(input_ids=torch.tensor([[*ids, *query]]), use_cache=False).logits[0]
        logps = torch.log_softmax(logits[len(ids) - 1 : -1], dim=-1)
        totals.append(sum(logps[t, token] for t, token in enumerate(query)))
    return torch.stack(totals)


def plackett_luce(strengths: torch.Tensor, z: tuple[int, ...]) -> list[torch.Tensor]:
    """log of s_z1 / sum of all s, of s_z2 / sum of what is left, ..., s = exp(strength)."""
    left, logps = list(range(len(strengths))), []
    for i in z:
        logps.append(strengths[i] - strengths[left].logsumexp(dim=0))
        left.remove(i)
    return logps


def test_each_prompt_holds_one_passage_and_ends_with_the_query(
    prompts: list[SelectorPrompt], rows: Callable[..., list], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The passage and no other stands in the user's turn, the query and the end of the turn are what is scored."""
    row, prompt = rows(2, N)[0], prompts[0]
    for candidate, (ids, query) in zip(row["candidates"], prompt.queries, strict=True):
        text = tokenizer.decode(ids)
        assert [c["text"] in text for c in row["candidates"]] == [c is candidate for c in row["candidates"]]
        assert row["query"] not in text
        assert tokenizer.decode(query) == row["query"] + tokenizer.eos_token


def test_permutations_have_plackett_and_luces_probabilities(model: PeftModel, prompts: list[SelectorPrompt]) -> None:
    """Every decision of all 60 permutations of two queries and its gradient, in float64: 1e-10."""
    decisions = QueryLikelihoods(POLICY, model, prompts)
    actual = torch.stack([logps for logps, _ in decisions.permutation_logps([ALL, ALL])])
    strengths = [by_hand(model, p) / 2.5 + 0.3 * torch.tensor(p.scores, dtype=torch.float64) for p in prompts]
    expected = torch.stack([torch.stack([torch.stack(plackett_luce(s, z)) for z in ALL]) for s in strengths])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert actual.sum(dim=-1).exp().sum(dim=-1).tolist() == pytest.approx([1.0, 1.0])

    weights = torch.linspace(-1, 2, actual.numel(), dtype=torch.float64).view_as(actual)
    parameters = adapter_parameters(model, SELECTOR)
    assert_same_gradients(
        gradients((weights * actual).sum(), parameters), gradients((weights * expected).sum(), parameters), rtol=1e-9
    )
    with torch.no_grad():
        assert decisions.greedy()[0] == tuple(strengths[0].argsort(descending=True)[:K].tolist())


@pytest.fixture
def expanding(tokenizer: PreTrainedTokenizerFast, rows: Callable[..., list]) -> list[SelectorPrompt]:
    """The prompts of two queries that what is chosen becomes a part of."""
    builder = PromptBuilder(tokenizer, "expanded_query", K)
    return [builder.selector(row["query"], row["candidates"]) for row in rows(2, N)]


def expanded_by_hand(
    model: PeftModel, prompt: SelectorPrompt, row: dict, z: tuple[int, ...], tokenizer: PreTrainedTokenizerFast
) -> torch.Tensor:
    """log p_s of each decision of a permutation: all sequences written out as text, scored by plain passes."""
    decisions = []
    for t in range(K):
        query = " ".join([row["query"], *(row["candidates"][i]["text"] for i in z[:t])]) + tokenizer.eos_token
        asked = tokenizer(query, add_special_tokens=False)["input_ids"]
        left = [i for i in range(N) if i not in z[:t]]
        scored = by_hand(model, replace(prompt, queries=[(prompt.queries[i][0], asked) for i in left]))
        strengths = scored / 2.5 + 0.3 * torch.tensor([prompt.scores[i] for i in left], dtype=torch.float64)
        decisions.append(torch.log_softmax(strengths, dim=0)[left.index(z[t])])
    return torch.stack(decisions)


def test_what_is_chosen_becomes_part_of_the_query(
    model: PeftModel, expanding: list[SelectorPrompt], rows: Callable[..., list], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every decision, its gradient, and the sum over all permutations, against passes over the texts: 1e-10."""
    drawn = [[(0, 3, 1), (0, 3, 4), (4, 1, 2)], [(2, 0, 1), (2, 1, 0), (2, 0, 4)]]
    decisions = QueryLikelihoods(POLICY, model, expanding)
    actual = torch.stack([logps for logps, _ in decisions.permutation_logps(drawn)])
    by_query = zip(expanding, rows(2, N), drawn, strict=True)
    expected = torch.stack(
        [torch.stack([expanded_by_hand(model, p, row, z, tokenizer) for z in of]) for p, row, of in by_query]
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    weights = torch.linspace(-1, 2, actual.numel(), dtype=torch.float64).view_as(actual)
    parameters = adapter_parameters(model, SELECTOR)
    assert_same_gradients(
        gradients((weights * actual).sum(), parameters), gradients((weights * expected).sum(), parameters), rtol=1e-9
    )
    with torch.no_grad():
        every = torch.stack(
            [logps for logps, _ in QueryLikelihoods(POLICY, model, expanding).permutation_logps([ALL] * 2)]
        )
    assert every.sum(dim=-1).exp().sum(dim=-1).tolist() == pytest.approx([1.0, 1.0])


def test_with_one_choice_there_is_nothing_to_expand(
    model: PeftModel, prompts: list[SelectorPrompt], expanding: list[SelectorPrompt]
) -> None:
    """The first decision is the same with both identifiers, the second is not."""
    plain, expanded = (QueryLikelihoods(POLICY, model, p).logps([[(), (1,)]] * 2)[0] for p in (prompts, expanding))
    torch.testing.assert_close(plain[0], expanded[0])
    assert not torch.allclose(plain[1], expanded[1])


def test_place_does_not_count(model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Callable) -> None:
    """Candidates in another order have the same probabilities."""
    [row] = rows(1, N)
    builder, order = PromptBuilder(tokenizer, "query", 1), [3, 1, 4, 0, 2]
    shown = [row["candidates"], [row["candidates"][i] for i in order]]
    asked = QueryLikelihoods(POLICY, model, [builder.selector(row["query"], candidates) for candidates in shown])
    straight, shuffled = (rows[0] for rows in asked.logps([[()], [()]]))
    torch.testing.assert_close(shuffled, straight[order])


def test_the_critic_values_what_is_left(model: PeftModel, prompts: list[SelectorPrompt]) -> None:
    """V(x, z_<t) is the mean, over the passages left, of the linear map of the state at the query's last token."""
    head = ValueHead(model.config.hidden_size)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    drawn = [[(0, 3, 1), (4, 1, 2)], [(2, 0, 1), (2, 1, 0)]]
    asked = QueryLikelihoods(POLICY, model, prompts, head)
    logps = asked.permutation_logps(drawn)
    values = asked.values(drawn)
    assert values is not None
    for q, prompt in enumerate(prompts):
        ends = []
        for ids, query in prompt.queries:
            given = torch.tensor([[*ids, *query[:-1]]])
            hidden = model(input_ids=given, output_hidden_states=True, use_cache=False).hidden_states[-1]
            ends.append(head.linear(hidden[0, -1].float())[0])
        for i, z in enumerate(drawn[q]):
            for t in range(K):
                expected = torch.stack([ends[j] for j in range(N) if j not in z[:t]]).mean()
                assert values[q, i, t].item() == pytest.approx(expected.item(), abs=1e-5)
    for (with_critic, _), (without, _) in zip(
        logps, QueryLikelihoods(POLICY, model, prompts).permutation_logps(drawn), strict=True
    ):
        torch.testing.assert_close(with_critic, without)


def test_decisions_made_without_gradient_are_not_trained_on(model: PeftModel, prompts: list[SelectorPrompt]) -> None:
    """They would have no gradient, silently."""
    with torch.no_grad():
        decisions = QueryLikelihoods(POLICY, model, prompts)
    with pytest.raises(ValueError, match="made without gradient"):
        decisions.permutation_logps([ALL, ALL])


@pytest.mark.parametrize("identifiers", QUERY_LIKELIHOODS)
@pytest.mark.parametrize("objective", ["dro", "grpo", "rloo", "reinforce", "ppo"])
def test_every_objective_trains_it(objective: str, identifiers: str, make_trainer: Make) -> None:
    """K = 2 of N = 6: both adapters move, every step."""
    trainer = make_trainer(identifiers=identifiers, selector_objective=objective, selector_temperature=4.0)
    start = adapter_state(trainer.model, SELECTOR)
    trainer.train()
    end = adapter_state(trainer.model, SELECTOR)
    assert all(not torch.equal(end[name], value) for name, value in start.items())


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"max_tokens_per_forward": 600}, {"num_iterations": 2}]
)
def test_a_step_is_the_same_however_memory_is_spent(settings: dict, make_trainer: Make) -> None:
    """Gradient checkpointing, a pass for each query, and drawing before the loss: the first gradient to 1e-4."""
    steps = []
    for changes in ({}, settings):
        trainer = make_trainer(identifiers="query", max_steps=1, output_dir=f"run{len(steps)}", **changes)
        recorder = GradientRecorder(selector=adapter_parameters(trainer.model, SELECTOR))
        trainer.add_callback(recorder)
        trainer.train()
        steps.append(recorder.steps[0]["selector"])
    assert_same_gradients(steps[1], steps[0], rtol=1e-4)


@pytest.mark.parametrize("identifiers", QUERY_LIKELIHOODS)
def test_the_size_of_a_rollout_counts_passages_and_queries(identifiers: str, make_trainer: Make) -> None:
    """The tokens of the larger role, each once: here the selector's. A bound below them is refused."""
    trainer = make_trainer(identifiers=identifiers, max_steps=1)
    rollouts = record_rollouts(trainer)
    trainer.train()
    sizes = []
    for _, rollout in rollouts:
        asked = [pair for z in prefixes_of(rollout.drawn) for pair in rollout.prompt.queries_after(z)]
        paths = [[*ids, *query] for ids, query in asked]
        distinct = {tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}
        assert rollout.size == len(distinct)
        sizes.append(len(distinct))
    assert [len(batch) for batch in batches([r for _, r in rollouts], max(sizes))] == [1] * len(sizes)
    with pytest.raises(InvalidInputError, match="distinct tokens"):
        list(batches([r for _, r in rollouts], min(sizes) - 1))


def test_it_is_saved_with_the_adapters(make_trainer: Make, tmp_path: Path) -> None:
    """Whoever loads them asks the same way."""
    make_trainer(identifiers="query").pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "drorl.json").read_text())["settings"]["identifiers"] == "query"


@pytest.mark.parametrize("settings", [{"use_vllm": True}, {"rollout_backend": "vllm"}, {"constrained": False}])
def test_engines_and_free_text_are_refused(settings: dict, tmp_path: Path) -> None:
    """Neither could hold a permutation that is never written."""
    with pytest.raises(ValueError, match="identifiers='query'"):
        config(tmp_path, identifiers="query", **settings)


def test_an_engine_is_not_started_for_it(make_trainer: Make, tmp_path: Path) -> None:
    """Serving such a run through vLLM is refused in one line, before anything is loaded."""
    make_trainer(identifiers="query").pipeline.save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match='backend="transformers"'):
        saved_base(tmp_path)


def test_a_query_that_does_not_fit_is_refused(tokenizer: PreTrainedTokenizerFast, rows: Callable[..., list]) -> None:
    """Passages are cut to make room for the query behind them, down to nothing and not below."""
    [row] = rows(1, N)
    whole = PromptBuilder(tokenizer, "query", K).selector(row["query"], row["candidates"])
    longest = max(len(ids) + len(query) for ids, query in whole.queries)
    cut = PromptBuilder(tokenizer, "query", K, max_prompt_tokens=longest - 3)
    assert max(len(ids) + len(query) for ids, query in cut.selector(row["query"], row["candidates"]).queries) == (
        longest - 3
    )
    with pytest.raises(PromptTooLongError, match="shorten the query"):
        PromptBuilder(tokenizer, "query", K, max_prompt_tokens=40).selector(row["query"], row["candidates"])


def test_there_is_room_for_what_may_be_chosen(tokenizer: PreTrainedTokenizerFast, rows: Callable[..., list]) -> None:
    """With a window that cuts passages, no expanded query exceeds it."""
    [row] = rows(1, N)
    whole = PromptBuilder(tokenizer, "expanded_query", K).selector(row["query"], row["candidates"])

    def longest(prompt: SelectorPrompt) -> int:
        return max(
            len(ids) + len(query) for z in permutations(range(N), K - 1) for ids, query in prompt.queries_after(z)
        )

    window = longest(whole) - 3
    cut = PromptBuilder(tokenizer, "expanded_query", K, max_prompt_tokens=window)
    assert longest(cut.selector(row["query"], row["candidates"])) <= window
