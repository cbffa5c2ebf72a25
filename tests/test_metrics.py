"""Metrics against values worked out by hand from the KILT and HotpotQA scripts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drorl.metrics import (
    PRESETS,
    contains_answer,
    exact_match,
    f1,
    normalize_answer,
    surface_form,
)

OFFICIAL, HOTPOT = PRESETS["dro-official"], PRESETS["hotpot"]


@pytest.mark.parametrize(
    ("text", "deleted", "spaced"),
    [
        ("The  Quick\tBrown Fox!", "quick brown fox", "quick brown fox"),
        ("U.S.", "us", "u s"),
        ("Jean-Paul's", "jeanpauls", "jean paul s"),
        ("a-ha", "aha", "ha"),  # articles go after punctuation: only as a space does it leave the article "a"
        ("Theatre", "theatre", "theatre"),
        ("Röntgen – “X”", "röntgen – “x”", "röntgen – “x”"),  # only ASCII punctuation, as in KILT
        ("東京 タワー", "東京 タワー", "東京 タワー"),
        ("the", "", ""),
        ("?!", "", ""),
    ],
)
def test_normalisation_is_that_of_the_scripts(text: str, deleted: str, spaced: str) -> None:
    """Lower case, punctuation, articles, white space, in KILT's order; only punctuation differs between scripts."""
    assert normalize_answer(text) == deleted
    assert normalize_answer(text, punct="space") == spaced


@given(st.text(), st.sampled_from(["delete", "space"]))
def test_normalised_text_has_no_surplus_space_and_no_punctuation(text: str, punct: str) -> None:
    """Tokens of normalised text are separated by one space, and no ASCII punctuation is left, for any Unicode text."""
    normalised = normalize_answer(text, punct)
    assert normalised == " ".join(normalised.split())
    assert not set(normalised) & set(".,;:!?'\"()-_")


def test_the_best_gold_answer_counts() -> None:
    """EM and F1 are the maximum over all gold answers; with `first_answer_only` the others might as well not be."""
    answers = ["Fab Four", "The Beatles"]
    assert (exact_match("beatles", answers), f1("beatles", answers)) == (1.0, 1.0)
    assert (exact_match("beatles", answers, OFFICIAL), f1("beatles", answers, OFFICIAL)) == (0.0, 0.0)


def test_f1_is_the_harmonic_mean_over_tokens_with_their_counts() -> None:
    """Two of three predicted tokens match two of four gold ones: P = 2/3, R = 1/2, F1 = 4/7. A repeat counts once."""
    assert f1("new york new", ["york is new city"]) == pytest.approx(4 / 7)


@pytest.mark.parametrize("nothing", ["", "   ", "the", "...", "A."])
def test_texts_of_which_nothing_is_left(nothing: str) -> None:
    """As in KILT's script, two empty normalised texts match exactly and have F1 0, for they share no token."""
    assert (exact_match(nothing, ["!"]), f1(nothing, ["!"])) == (1.0, 0.0)
    assert (exact_match(nothing, ["Paris"]), f1(nothing, ["Paris"])) == (0.0, 0.0)


def test_yes_no_switch() -> None:
    """A yes or no that differs from the gold answer has F1 0 under Hotpot's rule and partial credit under KILT's."""
    assert (f1("no way", ["no"], HOTPOT), f1("no", ["no way"], HOTPOT)) == (0.0, 0.0)
    assert f1("no way", ["no"]) == f1("no", ["no way"]) == pytest.approx(2 / 3)
    assert f1("No.", ["no"], HOTPOT) == 1.0


def test_punctuation_switch_changes_scores() -> None:
    """ "U.S." equals "US" when punctuation is deleted and not when it becomes a space."""
    assert exact_match("US", ["U.S."]) == 1.0
    assert exact_match("US", ["U.S."], OFFICIAL) == 0.0


def test_an_answer_occurs_only_as_whole_tokens() -> None:
    """Part of a word is no occurrence, case and punctuation do not matter, nor does the place in the passage."""
    assert contains_answer("... written by George Orwell.", ["george orwell"])
    assert contains_answer("Orwell", ["Orwell"])
    assert not contains_answer("An Orwellian nightmare", ["Orwell"])
    assert not contains_answer("George met Orwell", ["George Orwell"])


def test_an_answer_of_only_punctuation_occurs_nowhere() -> None:
    """An empty normalised answer is in no passage, not in every one."""
    assert not contains_answer("What? Never!", ["!", "the", ""])


def test_missing_answers_are_refused() -> None:
    """No answers, or a string for a list of them, is an error, not a score."""
    for answers in ([], "Paris"):
        with pytest.raises(ValueError, match="gold answer"):
            exact_match("Paris", answers)


@pytest.mark.parametrize(
    ("answers", "texts", "expected"),
    [
        (["USA", "united states"], ["The United States (U.S.) is"], "United States"),
        (["us"], ["In the U.S., and only there"], "U.S."),
        (["mercury planet"], ["see Mercury (planet)."], "Mercury (planet)"),
        (["paris"], ["(Paris), “Paris”! PARIS"], "Paris"),  # the most frequent spelling
        (["B", "A C"], ["a c, b", "B"], "b"),  # one alias occurs twice; of its spellings the first
        (["x y", "y"], ["x y"], "x y"),  # a tie goes to the alias listed first
        (["Orwell"], ["Orwellian"], "Orwell"),  # occurs nowhere: the first answer as it is
        (["!", "Röntgen"], ["! Wilhelm röntgen's or Röntgen"], "Röntgen"),
        (["only"], [], "only"),
    ],
)
def test_surface_form(answers: list[str], texts: list[str], expected: str) -> None:
    """The alias with most occurrences, as the texts spell it, without the punctuation around it."""
    assert surface_form(answers, texts) == expected


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4), st.lists(st.text(max_size=40), max_size=3))
def test_surface_form_is_an_answer_or_scores_as_one(answers: list[str], texts: list[str]) -> None:
    """For any Unicode text, what is returned is the first answer or matches one of the answers exactly."""
    form = surface_form(answers, texts)
    assert form == answers[0] or exact_match(form, answers) == 1.0
