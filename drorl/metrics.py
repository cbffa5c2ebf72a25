r"""Answer metrics, as KILT defines them, and the switches by which other work departs from them.

Every score is that of one query, in [0, 1]; averaging is the caller's. The best of all gold answers counts:

    metric(prediction, answers) = max over a in answers of metric(prediction, a)

| script                        | punctuation     | yes/no                | nothing left of both | gold answers |
|-------------------------------|-----------------|-----------------------|----------------------|--------------|
| KILT (`"kilt"`, the default)  | deleted         | like any other answer | F1 0                 | all          |
| Wizard of Wikipedia (`"wow"`) | deleted         | like any other answer | F1 0                 | all          |
| HotpotQA (`"hotpot"`)         | deleted         | F1 0 on a mismatch    | F1 0                 | all          |
| 2WikiMultihopQA (`"2wiki"`)   | deleted         | F1 0 on a mismatch    | F1 0                 | all          |
| MuSiQue (`"musique"`)         | deleted         | like any other answer | F1 1                 | all          |
| DRO's code (`"dro-official"`) | becomes a space | like any other answer | F1 0                 | the first    |

Wizard of Wikipedia is scored by KILT's script. No script normalises Unicode: "é" and "e" with a combining accent are
different letters, full-width "Ａ" is not "A", and only ASCII punctuation is punctuation.

References:
    KILT: https://github.com/facebookresearch/KILT/blob/main/kilt/eval_downstream.py
    HotpotQA: https://github.com/hotpotqa/hotpot/blob/master/hotpot_evaluate_v1.py
    2WikiMultihopQA: https://github.com/Alab-NII/2wikimultihop/blob/main/2wikimultihop_evaluate_v1.1.py
    MuSiQue: https://github.com/StonyBrookNLP/musique/blob/main/metrics/answer.py
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
        empty_match (`bool`): F1 is 1, not 0, where normalisation leaves nothing of prediction and answer.
        fold_titles (`bool`): supporting facts are the same whatever the case of their titles.
    """

    punct: Punctuation = "delete"
    hotpot_yesno: bool = False
    first_answer_only: bool = False
    empty_match: bool = False
    fold_titles: bool = False

    def golds(self, answers: Sequence[str]) -> Sequence[str]:
        """The answers that count."""
        if not answers or isinstance(answers, str):
            raise ValueError(f"A list of at least one gold answer is needed, not {answers!r}.")
        return answers[:1] if self.first_answer_only else answers


KILT = MetricSettings()
PRESETS = {
    "kilt": KILT,
    "wow": KILT,
    "hotpot": MetricSettings(hotpot_yesno=True),
    "2wiki": MetricSettings(hotpot_yesno=True, fold_titles=True),
    "musique": MetricSettings(empty_match=True),
    "dro-official": MetricSettings(punct="space", first_answer_only=True),
}


@dataclass(frozen=True)
class Overlap:
    """How far what was predicted agrees with what is right; each in [0, 1]."""

    exact_match: float
    f1: float
    precision: float
    recall: float

    @classmethod
    def of(cls, exact_match: float, precision: float, recall: float) -> "Overlap":
        """With the harmonic mean of precision and recall."""
        total = precision + recall
        return cls(exact_match, 2 * precision * recall / total if total else 0.0, precision, recall)


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

    As in KILT (and SQuAD 1.1; SQuAD 2.0 and MuSiQue differ), it is 0.0 where no token is shared, so also for two
    empty texts.

    Example:
        >>> round(f1("George Washington", ["Washington, D.C.", "Washington"]), 3)
        0.667
    """
    return answer_overlap(prediction, answers, settings).f1


def answer_overlap(prediction: str, answers: Sequence[str], settings: MetricSettings = KILT) -> Overlap:
    """Exact match, F1, precision and recall over tokens: the largest of each over all gold answers, as in 2Wiki.

    Example:
        >>> answer_overlap("in New York City", ["New York", "the city of New York"])
        Overlap(exact_match=0.0, f1=0.75, precision=0.75, recall=1.0)
    """
    predicted = normalize_answer(prediction, settings.punct)
    golds = [normalize_answer(gold, settings.punct) for gold in settings.golds(answers)]
    scores = zip(*(_token_overlap(predicted, gold, settings) for gold in golds), strict=True)
    return Overlap(float(predicted in golds), *map(max, scores))


def _token_overlap(predicted: str, gold: str, settings: MetricSettings) -> tuple[float, float, float]:
    """F1, precision and recall of two normalised texts."""
    if settings.hotpot_yesno and predicted != gold and not _YES_NO.isdisjoint((predicted, gold)):
        return 0.0, 0.0, 0.0
    if settings.empty_match and predicted == gold == "":
        return 1.0, 1.0, 1.0
    said, right = predicted.split(), gold.split()
    shared = (Counter(said) & Counter(right)).total()
    return (2 * shared / (len(said) + len(right)), shared / len(said), shared / len(right)) if shared else (0, 0, 0)


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
