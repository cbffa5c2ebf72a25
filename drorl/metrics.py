r"""Answer and retrieval metrics, as KILT defines them, and the switches by which other work departs from them.

Every score is that of one query, in [0, 1]; averaging is the caller's. The best of all gold answers counts:

    metric(prediction, answers) = max over a in answers of metric(prediction, a)

| script                          | punctuation        | yes/no                | gold answers |
|---------------------------------|--------------------|-----------------------|--------------|
| KILT (`"kilt"`, the default)    | deleted            | like any other answer | all          |
| HotpotQA, 2Wiki (`"hotpot"`)    | deleted            | F1 0 on a mismatch    | all          |
| DRO's code (`"dro-official"`)   | becomes a space    | like any other answer | the first    |

References:
    KILT: https://github.com/facebookresearch/KILT/blob/main/kilt/eval_downstream.py
    HotpotQA: https://github.com/hotpotqa/hotpot/blob/master/hotpot_evaluate_v1.py
    DRO: https://huggingface.co/papers/2505.03075
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Punctuation = Literal["delete", "space"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHUNK = re.compile(r"\S+")
_PUNCTUATION_TABLES = {
    "delete": str.maketrans("", "", string.punctuation),
    "space": str.maketrans(string.punctuation, " " * len(string.punctuation)),
}
_YES_NO = frozenset({"yes", "no", "noanswer"})
_OPENING = "\"'“‘«([{<*"
_CLOSING = "\"'”’»)]}>*,.;:!?…"


@dataclass(frozen=True)
class MetricSettings:
    """What a score means where scripts disagree. The default is KILT's meaning.

    Args:
        punct (`str`): `"delete"` makes "U.S." "us", `"space"` makes it "u s".
        hotpot_yesno (`bool`): F1 is 0 when prediction and answer differ and either is yes, no or noanswer.
        first_answer_only (`bool`): only the first gold answer counts.
    """

    punct: Punctuation = "delete"
    hotpot_yesno: bool = False
    first_answer_only: bool = False

    def golds(self, answers: Sequence[str]) -> Sequence[str]:
        """The answers that count."""
        if not answers or isinstance(answers, str):
            raise ValueError(f"A list of at least one gold answer is needed, not {answers!r}.")
        return answers[:1] if self.first_answer_only else answers


KILT = MetricSettings()
PRESETS = {
    "kilt": KILT,
    "hotpot": MetricSettings(hotpot_yesno=True),
    "dro-official": MetricSettings(punct="space", first_answer_only=True),
}


@lru_cache(maxsize=1 << 15)  # the same passages and answers are asked about again and again
def normalize_answer(text: str, punct: Punctuation = "delete") -> str:
    """Lower case, without ASCII punctuation, articles and surplus white space, in this order.

    Example:
        >>> normalize_answer("The  U.S.-led coalition")
        'usled coalition'
        >>> normalize_answer("The  U.S.-led coalition", punct="space")
        'u s led coalition'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION_TABLES[punct])).split())


def exact_match(prediction: str, answers: Sequence[str], settings: MetricSettings = KILT) -> float:
    """1.0 if the normalised prediction equals a normalised gold answer, else 0.0.

    As in KILT, two texts of which normalisation leaves nothing are equal.

    Example:
        >>> exact_match("the Beatles.", ["Fab Four", "Beatles"])
        1.0
    """
    predicted = normalize_answer(prediction, settings.punct)
    return float(any(predicted == normalize_answer(gold, settings.punct) for gold in settings.golds(answers)))


def f1(prediction: str, answers: Sequence[str], settings: MetricSettings = KILT) -> float:
    """Harmonic mean of precision and recall over tokens, of the gold answer that fits best.

    As in KILT (and SQuAD 1.1; SQuAD 2.0 differs), it is 0.0 where no token is shared, so also for two empty texts.

    Example:
        >>> round(f1("George Washington", ["Washington, D.C.", "Washington"]), 3)
        0.667
    """
    predicted = normalize_answer(prediction, settings.punct)
    return max(
        _token_f1(predicted, normalize_answer(gold, settings.punct), settings.hotpot_yesno)
        for gold in settings.golds(answers)
    )


def _token_f1(predicted: str, gold: str, hotpot_yesno: bool) -> float:
    """F1 of two normalised texts."""
    if hotpot_yesno and predicted != gold and not _YES_NO.isdisjoint((predicted, gold)):
        return 0.0
    predicted_tokens, gold_tokens = predicted.split(), gold.split()
    shared = (Counter(predicted_tokens) & Counter(gold_tokens)).total()
    return 2.0 * shared / (len(predicted_tokens) + len(gold_tokens)) if shared else 0.0


def contains_answer(passage_text: str, answers: Sequence[str], settings: MetricSettings = KILT) -> bool:
    """Whether a normalised gold answer occurs in the normalised passage as whole tokens.

    An answer of which normalisation leaves nothing occurs nowhere.

    Example:
        >>> contains_answer("Written by Orwell in 1948.", ["orwell"]), contains_answer("Orwellian", ["orwell"])
        (True, False)
    """
    passage = f" {normalize_answer(passage_text, settings.punct)} "
    golds = (normalize_answer(gold, settings.punct) for gold in settings.golds(answers))
    return any(f" {gold} " in passage for gold in golds if gold)


def surface_form(answers: Sequence[str], texts: Sequence[str]) -> str:
    """The gold answer as the texts write it: the string the generator can be expected to give.

    Of all answers, the one that occurs most often as whole normalised tokens is taken (a tie goes to the one listed
    first), and of its spellings in the texts the most frequent. Where no answer occurs, it is the first one. Nothing
    but the arguments plays a part: not the query, and no knowledge of which text is the right one.

    Args:
        answers (`Sequence[str]`): gold answers.
        texts (`Sequence[str]`): the candidates' texts.

    Example:
        >>> surface_form(["USA", "united states"], ["Born in the United States, he ..."])
        'United States'
    """
    spellings = [Counter[str]() for _ in answers]
    patterns = [normalize_answer(answer).split() for answer in KILT.golds(answers)]
    for text in texts:
        tokens, spans = _tokens_with_spans(text)
        for pattern, found in zip(patterns, spellings, strict=True):
            for start in range(len(tokens) - len(pattern) + 1):
                if pattern and tokens[start : start + len(pattern)] == pattern:
                    found[_trim(text[spans[start][0] : spans[start + len(pattern) - 1][1]])] += 1
    best = max(spellings, key=Counter.total)
    return best.most_common(1)[0][0] if best else answers[0]


def _tokens_with_spans(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The tokens of the normalised text, each with the span of the text between white space that it comes from."""
    tokens, spans = [], []
    for chunk in _CHUNK.finditer(text):
        for token in normalize_answer(chunk[0]).split():
            tokens.append(token)
            spans.append(chunk.span())
    return tokens, spans


def _trim(surface: str) -> str:
    """Without the punctuation of the sentence around it; "U.S." and "Mercury (planet)" keep theirs."""
    surface = surface.lstrip(_OPENING)
    while surface and surface[-1] in _CLOSING:
        last = surface[-1]
        abbreviation = last == "." and "." in surface.rsplit(maxsplit=1)[-1][:-1]
        bracketed = last in ")]}" and "([{"[")]}".index(last)] in surface
        if abbreviation or bracketed:
            break
        surface = surface[:-1]
    return surface
