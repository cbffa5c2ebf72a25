"""Permutations as text, and the constraint that gives each an exact probability; one character is one token here."""

import math
from collections.abc import Sequence
from itertools import permutations as orders

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drorl.permutations import (
    ParsedPermutation,
    Permutation,
    Slate,
    format_permutation,
    identifier_texts,
    parse_permutation,
    prefixes_of,
)

END = 0
NUMBERS = [f"[{i + 1}]" for i in range(20)]
# No ` > ` is safe from a title that a user may bring: anything printable, and white space of every kind.
TITLES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=6)
COLLIDING_TITLES = st.lists(
    st.sampled_from(["A", "A (2)", "A A", "A > A", " A", "", "A-", "-"]), min_size=1, max_size=6
)


def encode(text: str) -> list[int]:
    """The characters of a text as tokens."""
    return [ord(character) for character in text]


def slate_of(identifiers: Sequence[str], num_selected: int) -> Slate:
    """The slate of identifiers whose tokens are characters."""
    return Slate(
        first_ids=[encode(i) for i in identifiers],
        later_ids=[encode(f" {i}") for i in identifiers],
        separator_ids=encode(" >"),
        end_ids=[END],
        num_selected=num_selected,
    )


def random_logits(contexts: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Next-token logits of a made-up model, `(C, V)`, float64: a function of the context alone."""
    rows = []
    for context in contexts:
        generator = torch.Generator().manual_seed(abs(hash(context)) % 2**31)  # integers hash alike in every process
        rows.append(2 * torch.randn(128, dtype=torch.float64, generator=generator))
    return torch.stack(rows) if rows else torch.empty(0, 128, dtype=torch.float64)


def naive_logp(texts: Sequence[str], choice: int, prefix: str) -> float:
    """Log-probability of one of `texts` after `prefix`, one token at a time over the texts that are still possible."""
    total = 0.0
    for position in range(len(texts[choice])):
        possible = [t for t in texts if t[:position] == texts[choice][:position]]
        allowed = sorted({ord(t[position]) for t in possible})
        logits = random_logits([tuple(encode(prefix + texts[choice][:position]))])[0]
        steps = torch.log_softmax(logits[allowed], dim=0)
        total += float(steps[allowed.index(ord(texts[choice][position]))])
    return total


# ------------------------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize(
    ("kind", "text"),
    [("number", "[3] > [1] > [11]"), ("letter", "[C] > [A] > [K]"), ("title", "T2 > T0 > T10")],
)
def test_a_permutation_reads_as_in_the_paper_and_back(kind: str, text: str) -> None:
    """Candidate i is written as its identifier, joined by ` > `, and reading that text gives the candidates again."""
    identifiers = identifier_texts(kind, [f"T{i}" for i in range(12)])
    assert format_permutation((2, 0, 10), identifiers) == text
    assert parse_permutation(text, identifiers, 3) == ParsedPermutation((2, 0, 10), valid=True)


@given(titles=TITLES | COLLIDING_TITLES, data=st.data())
@pytest.mark.parametrize("kind", ["number", "letter", "title"])
def test_whatever_the_titles_every_permutation_can_be_read_back(kind: str, titles: list[str], data: st.DataObject):
    """Format, then parse, is the identity for any titles: equal, empty, with separators, one inside another."""
    identifiers = identifier_texts(kind, titles)
    assert len(set(identifiers)) == len(titles)
    order = data.draw(st.permutations(range(len(titles))))
    permutation = tuple(order[: data.draw(st.integers(1, len(titles)))])
    text = format_permutation(permutation, identifiers)
    assert parse_permutation(text, identifiers, len(permutation)) == ParsedPermutation(permutation, valid=True)


@given(titles=TITLES | COLLIDING_TITLES)
def test_whatever_the_titles_the_tokens_of_a_choice_tell_it_from_the_others(titles: list[str]) -> None:
    """Titles made distinct are prefix-free once their terminator is part of them, so no slate of titles is refused."""
    slate = slate_of(identifier_texts("title", titles), len(titles))
    assert len({slate.token_ids([i]) for i in range(len(titles))}) == len(titles)


def test_equal_titles_get_a_suffix_that_is_itself_free() -> None:
    """A suffix is never one that another candidate has as its title, and the first of equals keeps its name."""
    texts = identifier_texts("title", ["Paris", "Paris", "Paris (2)", "Paris"])
    assert texts == ["Paris", "Paris (3)", "Paris (2)", "Paris (4)"]


def test_a_title_cannot_hold_the_separator_or_a_line_break() -> None:
    """`>` in a title becomes `-`, white space one blank, nothing `Untitled`: a title stays one choice on one line."""
    assert identifier_texts("title", ["A > B", "x\n y", " "]) == ["A - B", "x y", "Untitled"]


def test_an_unknown_kind_of_identifier_is_named() -> None:
    """A misspelt `identifiers` is refused with the choices there are."""
    with pytest.raises(ValueError, match="number, letter, title.*'digits'"):
        identifier_texts("digits", ["A"])


@pytest.mark.parametrize(
    ("text", "permutation", "valid"),
    [
        ("[3] > [1]", (2, 0), True),
        ("  [3] > [1]\n", (2, 0), True),  # white space around is no repair
        ("[11] > [1]", (10, 0), True),  # [1] is not found inside [11]
        ("[3] [1]", (2, 0), False),  # another separator
        ("[3] > [3] > [1]", (2, 0), False),  # the first occurrence wins
        ("[99] > [3] > [1]", (2, 0), False),  # an unknown identifier is dropped
        ("[3] > [1] > [2]", (2, 0), False),  # more than K
        ("[3]", (2, 0), False),  # filled from the front of the prompt
        ("[1]", (0, 1), False),  # filled, without what is already there
        ("I cannot tell", None, False),
        ("", None, False),
        ("3 > 1", None, False),
        ("[99]", None, False),
    ],
)
def test_free_text_is_repaired_as_declared(text: str, permutation: Permutation | None, valid: bool) -> None:
    """First occurrences in order, unknown ones dropped, gaps filled in prompt order; nothing known, no choice."""
    assert parse_permutation(text, NUMBERS, 2) == ParsedPermutation(permutation, valid)


def test_a_title_inside_a_longer_one_is_not_read_on_its_own() -> None:
    """Of titles that match at the same place the longest is meant, and a title is no part of another word."""
    titles = ["Paris", "Paris Hilton", "Vitamin A", "A"]
    assert parse_permutation("Paris Hilton > Vitamin A", titles, 2) == ParsedPermutation((1, 2), True)
    assert parse_permutation("Parisians", titles, 1) == ParsedPermutation(None, False)


# --------------------------------------------------------------------------------------------------- the constraint
def test_a_permutation_and_its_slate_write_the_same_tokens() -> None:
    """The tokens of a complete permutation are those of its text and the end; the terminators are part of them."""
    identifiers = identifier_texts("title", ["Paris", "Paris Hilton", "Rome"])
    slate = slate_of(identifiers, 2)
    for permutation in orders(range(3), 2):
        assert slate.token_ids(permutation) == (*encode(format_permutation(permutation, identifiers)), END)


@pytest.mark.parametrize(
    "identifiers",
    [NUMBERS, NUMBERS[:5], ["Paris", "Paris Hilton", "Paris (2)", "Rome", "Rom"], ["A", "B"], ["only one"]],
    ids=["20 numbers", "5 numbers", "titles", "two", "one"],
)
def test_every_decision_is_a_distribution_over_the_remaining_candidates(identifiers: list[str]) -> None:
    """Each row sums to 1 over the candidates not yet chosen, is 0 for the others, and is the naive product of tokens.

    The naive product asks the model at every token. Float64, sums of at most some ten terms: 1e-12 is rounding.
    """
    num_selected = min(3, len(identifiers))
    slate = slate_of(identifiers, num_selected)
    prefixes = [z for t in range(num_selected) for z in list(orders(range(len(identifiers)), t))[:25]]
    table = slate.decisions(prefixes)
    probabilities = table.log_probs(table.children_scores(random_logits(table.contexts))).exp()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(prefixes)).double(), rtol=0, atol=1e-12)
    for prefix, row in zip(table.prefixes, probabilities, strict=True):
        step = len(prefix)
        blank, end = (" " if step else ""), (chr(END) if step == num_selected - 1 else " >")
        rest = [i for i in range(len(identifiers)) if i not in prefix]
        texts = [f"{blank}{identifiers[i]}{end}" for i in rest]
        written = "".join(f"{' ' if t else ''}{identifiers[i]} >" for t, i in enumerate(prefix))
        naive = [naive_logp(texts, choice, written) for choice in range(len(rest))]
        naive = torch.tensor(naive, dtype=torch.float64).exp()
        torch.testing.assert_close(row[rest], naive, rtol=1e-12, atol=1e-12)
        assert row[list(prefix)].sum() == 0


def test_a_title_that_begins_another_is_told_apart_by_its_terminator() -> None:
    """p(Paris) = p(P | P, R) p( > | Hilton, >): two branchings, the forced letters between them cost nothing."""
    slate = slate_of(["Paris", "Paris Hilton", "Rome"], 2)
    table = slate.decisions([()])
    assert table.contexts == [(), tuple(encode("Paris "))]
    logits = torch.full((2, 128), 7.0)  # what all other tokens have makes no difference
    logits[0, encode("PR")] = torch.tensor([math.log(3.0), math.log(1.0)])
    logits[1, encode("H>")] = torch.tensor([math.log(1.0), math.log(4.0)])
    expected = torch.tensor([[0.75 * 0.8, 0.75 * 0.2, 0.25]])
    torch.testing.assert_close(table.log_probs(table.children_scores(logits)).exp(), expected)


@pytest.mark.parametrize(("count", "contexts"), [(1, 0), (2, 1), (9, 1), (10, 2), (19, 2), (20, 3)])
def test_a_decision_among_numbers_costs_one_context_per_leading_digit_that_branches(count: int, contexts: int) -> None:
    """Brackets and separators are forced: 9 numbers need one context, `[`; 10 also `[1`; 20 also `[2`."""
    slate = slate_of(NUMBERS[:count], 1)
    assert len(slate.decisions([()]).contexts) == contexts


def test_a_last_remaining_candidate_is_certain_and_free() -> None:
    """With N = K = 1 nothing is computed, the log-probability is 0."""
    table = slate_of(["A"], 1).decisions([()])
    assert table.contexts == []
    assert table.log_probs(table.children_scores(torch.empty(0, 128))).tolist() == [[0.0]]


def test_a_decision_asked_for_twice_is_laid_out_once() -> None:
    """Equal prefixes share a row, and no context is listed twice."""
    slate = slate_of(NUMBERS, 3)
    table = slate.decisions([(), (0,), (), (0,), (0, 10), (10, 0)])
    assert table.prefixes == [(), (0,), (0, 10), (10, 0)]
    assert len(set(table.contexts)) == len(table.contexts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_before_the_softmax(dtype: torch.dtype) -> None:
    """The probabilities are those of the same logits in float32, to its rounding."""
    table = slate_of(NUMBERS, 1).decisions([()])
    logits = random_logits(table.contexts).to(dtype)
    log_probs = table.log_probs(table.children_scores(logits))
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, table.log_probs(table.children_scores(logits.float())), rtol=0, atol=0)


def test_more_passages_than_candidates_cannot_be_selected() -> None:
    """K > N is an error that names both."""
    with pytest.raises(ValueError, match="cannot select 3 passages from 2 candidates"):
        slate_of(["A", "B"], 3)


@pytest.mark.parametrize(
    ("first", "later", "separator", "num_selected"),
    [
        ([[1], [1]], [[3], [4]], [9], 2),  # equal first choices
        ([[1], [2]], [[3], [3]], [9], 3),  # equal later choices
        ([[1], [1, 9, 5]], [[3], [4]], [9], 2),  # the separator inside an identifier
        ([[1], [1, 2]], [[3], [4]], [], 2),  # no terminator
        ([[1, 0], [1, 0]], [[3], [4]], [9], 1),  # the last choice, which is also the first
    ],
)
def test_identifiers_that_cannot_be_told_apart_are_refused(
    first: list[list[int]], later: list[list[int]], separator: list[int], num_selected: int
) -> None:
    """A choice whose tokens begin another's has no probability of its own: an error, not a wrong number."""
    candidates = 3  # a third that is fine
    with pytest.raises(ValueError, match="prefix-free"):
        Slate([*first, [7]][:candidates], [*later, [8]][:candidates], separator, [END], num_selected)


def test_prefixes_of_are_the_decisions_a_sampler_has_to_make() -> None:
    """Each unfinished beginning once, in the order met; a complete permutation is no decision."""
    assert prefixes_of([(2, 0), (2, 1), (2, 0), (1, 2)]) == [(), (2,), (1,)]
