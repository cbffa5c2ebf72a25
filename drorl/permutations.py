r"""Permutations: how an ordered choice of passages is written, read back, and given an exact probability.

A *permutation* z = (z_1..z_K) names K of the N candidates, best first. Inside drorl it is a tuple of 0-based candidate
indices; in text it is 1-based and joined by ` > `, as in the paper: `[3] > [1] > [4]`.

The constrained policy. A language model gives some probability to every string, most of which are no permutation.
drorl normalises at every *decision* (which candidate comes next?) over the identifiers that are still allowed. The
tokens of the allowed identifiers form a trie; only the nodes where the trie branches need the model, every other token
is forced and has probability 1:

    candidates  "Paris"  "Paris Hilton"  "Rome"      after the prompt: {Paris, Rome}            2 branches
                  |           |            |          after "Paris":   {" Hilton", " >"}         2 branches
    p("Rome") = p(Rome | {Paris, Rome})              after "Rome":    forced, nothing to compute

so log p_s(z) is exact, every sample is K distinct candidates, and a decision among N numbers costs about one token.
Sampler and loss read the same `DecisionTable`, so they cannot disagree.

Shapes: N candidates, K chosen, m permutations of one query, D decisions, C branching nodes, R children, V vocabulary.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .settings import IDENTIFIERS, QUERY_LIKELIHOODS

Permutation = tuple[int, ...]
SEPARATOR = " > "


# ------------------------------------------------------------------------------------------------------------ text
def identifier_texts(kind: str, titles: Sequence[str]) -> list[str]:
    """Returns the identifier of each candidate of one query, all distinct.

    Args:
        kind (`str`): `"number"` (the paper's `[3]`), `"letter"` (`[C]`) or `"title"` (the passage's title);
            those of `QUERY_LIKELIHOODS` write no identifier, and titles are what people are shown.
        titles (`list[str]` of length N): titles in the order in which the prompt shows the candidates.

    Equal titles get a suffix, `Paris`, `Paris (2)`; the separator inside a title is replaced, so that a permutation of
    titles can always be read back.

    >>> identifier_texts("title", ["Paris", "Paris", "A > B"])
    ['Paris', 'Paris (2)', 'A - B']
    >>> identifier_texts("letter", ["x"] * 28)[-2:]
    ['[AA]', '[AB]']
    """
    if kind == "number":
        return [f"[{i + 1}]" for i in range(len(titles))]
    if kind == "letter":
        return [f"[{_letters(i)}]" for i in range(len(titles))]
    if kind in ("title", *QUERY_LIKELIHOODS):
        # Some tokenizers normalise to NFC: titles that differ before that would be equal as tokens.
        plain = [unicodedata.normalize("NFC", title).replace(">", "-") for title in titles]
        return _distinct([" ".join(title.split()) or "Untitled" for title in plain])
    raise ValueError(f"identifiers must be one of {', '.join(IDENTIFIERS)}, not {kind!r}")


def _letters(index: int) -> str:
    text = ""
    while index >= 0:
        text = chr(ord("A") + index % 26) + text
        index = index // 26 - 1
    return text


def _distinct(texts: list[str]) -> list[str]:
    taken: set[str] = set()
    result = []
    for text in texts:
        unique, copy = text, 1
        while unique in taken or (copy > 1 and unique in texts):
            copy += 1
            unique = f"{text} ({copy})"
        taken.add(unique)
        result.append(unique)
    return result


def format_permutation(permutation: Sequence[int], identifiers: Sequence[str]) -> str:
    """Returns the text of a permutation.

    >>> format_permutation((2, 0, 3), ["[1]", "[2]", "[3]", "[4]"])
    '[3] > [1] > [4]'
    """
    return SEPARATOR.join(identifiers[i] for i in permutation)


@dataclass(frozen=True)
class ParsedPermutation:
    """A permutation read from free text. `permutation` is `None` when no identifier was recognised at all."""

    permutation: Permutation | None
    valid: bool
    """Whether the text was exactly K distinct identifiers joined by ` > `, so that nothing had to be repaired."""


def parse_permutation(text: str, identifiers: Sequence[str], num_selected: int) -> ParsedPermutation:
    """Reads a permutation from free text, with one declared repair policy.

    The policy (RankGPT's): identifiers are read left to right, the first occurrence of each wins, unknown ones are
    dropped, missing places are filled with the remaining candidates in the order of the prompt. A text in which
    nothing is recognised is not repaired into the prompt's order: it has no permutation, and its sample is dropped.

    >>> parse_permutation("[3] > [1]", ["[1]", "[2]", "[3]"], 2)
    ParsedPermutation(permutation=(2, 0), valid=True)
    >>> parse_permutation("[3], [11], [3]", ["[1]", "[2]", "[3]"], 2)
    ParsedPermutation(permutation=(2, 0), valid=False)
    >>> parse_permutation("I cannot tell.", ["[1]", "[2]", "[3]"], 2)
    ParsedPermutation(permutation=None, valid=False)
    """
    index = {identifier: i for i, identifier in enumerate(identifiers)}
    longest_first = sorted(identifiers, key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(i)}(?!\w)" for i in longest_first)
    found = list(dict.fromkeys(index[match] for match in re.findall(pattern, text)))[:num_selected]
    if not found:
        return ParsedPermutation(None, False)
    rest = [i for i in range(len(identifiers)) if i not in found]
    repaired = tuple(found + rest[: num_selected - len(found)])
    return ParsedPermutation(repaired, text.strip() == format_permutation(repaired, identifiers))


# -------------------------------------------------------------------------------------------------- the constraint
@dataclass(frozen=True)
class DecisionTable:
    """Every decision that a set of permutations passes through, laid out for one gather and one softmax.

    Built by [`Slate.decisions`] and consumed by [`DecisionTable.log_probs`].
    """

    prefixes: list[Permutation]
    """D decisions: decision d chooses the next candidate after `prefixes[d]`."""
    contexts: list[tuple[int, ...]]
    """C token sequences, relative to the prompt, whose next-token logits the decisions need."""
    children: torch.Tensor
    """(C, R) long: the allowed next tokens at each context, padded with -1."""
    path_slots: torch.Tensor
    """(P,) long: d * N + i, the decision and candidate that each step of a path belongs to."""
    path_steps: torch.Tensor
    """(P,) long: c * R + r, the context and child that the step takes."""
    allowed: torch.Tensor
    """(D, N) bool: candidates not yet chosen at each decision."""

    def children_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the allowed next tokens, `(C, R)`, of all at `contexts`, `(C, V)`; differentiable."""
        return logits.gather(1, self.children.clamp(min=0).to(logits.device))

    def log_probs(self, scores: torch.Tensor) -> torch.Tensor:
        r"""Returns log p(z_t = i | z_<t), normalised over the candidates still allowed, `-inf` for the others.

        Args:
            scores (`torch.Tensor` of shape `(C, R)`): logits or log-probabilities of `children`, differentiable;
                whatever stands in the padding.

        Returns `(D, N)`, float32 or wider. A decision with one candidate left is forced: its log-probability is 0.
        """
        # Half precision would lose the differences that the weights are made of.
        scores = scores.double() if scores.dtype == torch.float64 else scores.float()
        children = self.children.to(scores.device)
        allowed = self.allowed.to(scores.device)
        steps = torch.log_softmax(scores.masked_fill(children < 0, -torch.inf), dim=-1).flatten()
        steps = steps[self.path_steps.to(scores.device)]  # (P,)
        flat = steps.new_zeros(allowed.numel()).index_add(0, self.path_slots.to(scores.device), steps)
        return flat.view(allowed.shape).masked_fill(~allowed, -torch.inf)


class Slate:
    """The identifiers of one query as tokens: which continuations are allowed after which choice.

    Args:
        first_ids (`list[list[int]]` of length N): tokens of each identifier at the start of the text, `Paris`.
        later_ids (`list[list[int]]` of length N): the same after a separator, ` Paris`.
        separator_ids (`list[int]`): tokens of ` >`, written between two choices.
        end_ids (`list[int]`): tokens that end the permutation (the end of the selector's turn).
        num_selected (`int`): K.

    The separator or the end is part of every choice, as its terminator: it tells `Paris` from `Paris Hilton`.

    Raises:
        ValueError: if K > N, or if one identifier with its terminator is a prefix of another.
    """

    def __init__(
        self,
        first_ids: Sequence[Sequence[int]],
        later_ids: Sequence[Sequence[int]],
        separator_ids: Sequence[int],
        end_ids: Sequence[int],
        num_selected: int,
    ):
        if num_selected > len(first_ids):
            raise ValueError(f"cannot select {num_selected} passages from {len(first_ids)} candidates")
        self.first_ids = [tuple(ids) for ids in first_ids]
        self.later_ids = [tuple(ids) for ids in later_ids]
        self.separator_ids = tuple(separator_ids)
        self.end_ids = tuple(end_ids)
        self.num_selected = num_selected
        self.num_candidates = len(self.first_ids)
        self._check_prefix_free()

    def choice_ids(self, candidate: int, step: int) -> tuple[int, ...]:
        """Returns the tokens by which a candidate is chosen at a step, its terminator included."""
        identifier = self.later_ids[candidate] if step else self.first_ids[candidate]
        return identifier + (self.end_ids if step == self.num_selected - 1 else self.separator_ids)

    def _check_prefix_free(self) -> None:
        for step in sorted({0, min(1, self.num_selected - 1), self.num_selected - 1}):
            choices = sorted(self.choice_ids(i, step) for i in range(self.num_candidates))
            for first, second in zip(choices, choices[1:], strict=False):
                if second[: len(first)] == first:
                    raise ValueError(f"identifiers are not prefix-free as tokens: {first} begins {second}")

    def token_ids(self, permutation: Sequence[int]) -> tuple[int, ...]:
        """Returns the tokens of a (possibly unfinished) permutation, terminators included."""
        return tuple(token for step, i in enumerate(permutation) for token in self.choice_ids(i, step))

    @property
    def max_length(self) -> int:
        """Upper bound on the tokens of a permutation."""
        lengths = sorted((len(ids) for ids in self.later_ids), reverse=True)
        return sum(lengths[: self.num_selected]) + self.num_selected * max(len(self.separator_ids), len(self.end_ids))

    def decisions(self, prefixes: Iterable[Permutation]) -> DecisionTable:
        """Lays out the decisions that follow each of `prefixes` (permutations of fewer than K candidates)."""
        prefixes = list(dict.fromkeys(prefixes))
        contexts: list[tuple[int, ...]] = []  # distinct, because the choices of a step are prefix-free
        children: list[list[int]] = []
        slots: list[int] = []
        steps: list[tuple[int, int]] = []
        allowed = torch.ones(len(prefixes), self.num_candidates, dtype=torch.bool)
        for d, prefix in enumerate(prefixes):
            allowed[d, list(prefix)] = False
            for context, branches in self._branchings(prefix):
                c = len(contexts)
                contexts.append(context)
                children.append(list(branches))
                for r, candidates in enumerate(branches.values()):
                    slots.extend(d * self.num_candidates + i for i in candidates)
                    steps.extend((c, r) for _ in candidates)
        width = max(map(len, children), default=1)
        padded = [tokens + [-1] * (width - len(tokens)) for tokens in children]
        return DecisionTable(
            prefixes=prefixes,
            contexts=contexts,
            children=torch.tensor(padded, dtype=torch.long).view(len(contexts), width),
            path_slots=torch.tensor(slots, dtype=torch.long),
            path_steps=torch.tensor([c * width + r for c, r in steps], dtype=torch.long),
            allowed=allowed,
        )

    def _branchings(self, prefix: Permutation) -> Iterable[tuple[tuple[int, ...], dict[int, list[int]]]]:
        """Yields (context, {next token: candidates that take it}) for each trie node with more than one child."""
        step = len(prefix)
        start = self.token_ids(prefix)
        pending: list[tuple[tuple[int, ...], list[int]]] = [
            ((), [i for i in range(self.num_candidates) if i not in prefix])
        ]
        while pending:
            path, candidates = pending.pop()
            branches: dict[int, list[int]] = {}
            for i in candidates:
                branches.setdefault(self.choice_ids(i, step)[len(path)], []).append(i)
            if len(branches) > 1:
                yield start + path, branches
            pending.extend(((*path, token), group) for token, group in branches.items() if len(group) > 1)


def prefixes_of(permutations: Iterable[Permutation]) -> list[Permutation]:
    """Returns the distinct unfinished prefixes of complete permutations: the decisions that they pass through.

    >>> prefixes_of([(2, 0), (2, 1)])
    [(), (2,)]
    """
    return list(dict.fromkeys(z[:t] for z in permutations for t in range(len(z))))
