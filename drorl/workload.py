"""What one training step encodes, counted before there is a row: tokens, blocks of attention, scored positions.

Sequences of the given lengths, of made-up tokens, go through the code that lays out real ones ([`tree`],
[`permutations`]), so that what prefixes share is counted, not estimated. Permutations are drawn uniformly: a selector
that has learned draws equal ones more often, and encodes less.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, count
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .permutations import Permutation, Slate, prefixes_of
from .settings import QUERY_LIKELIHOODS
from .tree import TokenTree, cut

if TYPE_CHECKING:
    from .prompts import PromptBuilder

_TITLE = 4  # tokens of a title, as an identifier


@dataclass(frozen=True)
class Lengths:
    """Tokens of the parts of a row, on average."""

    passage: int = 140
    """A passage with its title, as the generator reads it."""
    marker: int = 4
    """What the selector's prompt adds to it: `[3] `."""
    query: int = 14
    """The query and the end of its turn, as `identifiers="query"` scores it."""
    answer: int = 6
    """The answer and the end of its turn."""
    selector: int = 100
    """The selector's prompt without passages: instructions, chat template, the query twice."""
    generator: int = 60
    """The generator's prompt without passages."""
    tail: int = 8
    """What of that stands after the passages, where contexts no longer share it."""
    alone: int = 6
    """What of the selector's prompt stands after a passage that it reads alone."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], prompts: "PromptBuilder", num_candidates: int) -> "Lengths":
        """Returns the means over rows, rendered as the trainer renders them."""
        found = [_lengths_of(row, prompts, row["candidates"][:num_candidates]) for row in rows]
        return cls(**{name: round(fmean(of[name] for of in found)) for name in found[0]})


def _lengths_of(row: Mapping[str, Any], prompts: "PromptBuilder", candidates: Sequence[Any]) -> dict[str, float]:
    query = row["query"]
    bare, n = prompts.generator(query, []), len(candidates)
    alone = [prompts.generator(query, [c]) for c in candidates]
    passage = fmean(map(len, alone)) - len(bare)
    prompt = prompts.selector(query, candidates)
    marker = len(prompt.slate.first_ids[0]) + 1 if prompts.identifiers in ("number", "letter") else 0
    asked = [ids for ids, _ in prompt.queries]
    selector = fmean(map(len, asked)) - passage if asked else len(prompt.ids) - n * (passage + marker)
    return {
        "passage": passage,
        "marker": marker,
        "query": len(prompts.answer(query)),
        "answer": len(prompts.answer(row["answers"][0])),
        "selector": selector,
        "generator": len(bare),
        "tail": _same_at_the_end(bare, alone[0]),
        "alone": _same_at_the_end(asked[0], asked[-1]) if asked else 0,
    }


def _same_at_the_end(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(reversed(first), reversed(second), strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


@dataclass(frozen=True)
class Sizes:
    """The settings of [`DROConfig`] that decide how much a step encodes."""

    num_candidates: int = 20
    num_selected: int = 5
    num_generations: int = 8
    identifiers: str = "number"
    proposal: str = "policy"


@dataclass(frozen=True)
class Block:
    """A dense product of attention: so many queries, and the keys they see; plainly causal, or behind a mask."""

    queries: int
    keys: int
    causal: bool

    @property
    def pairs(self) -> int:
        """Products of a query and a key that are computed."""
        return self.queries * (self.queries + 1) // 2 if self.causal else self.queries * self.keys


@dataclass(frozen=True)
class Pass:
    """One forward pass."""

    blocks: tuple[Block, ...]
    scored: int
    """Positions whose logits are asked for."""

    @classmethod
    def over(cls, tree: TokenTree, scored: int, start: int = 0, device: str = "cpu") -> "Pass":
        """Returns the pass that encodes the nodes from `start` on."""
        blocks = cut(tree, start, device)
        return cls(tuple(Block(len(b.nodes), len(b.seen), b.is_causal(tree)) for b in blocks), scored)

    @property
    def tokens(self) -> int:
        """Tokens that are encoded."""
        return sum(block.queries for block in self.blocks)

    @property
    def pairs(self) -> int:
        """Of all blocks."""
        return sum(block.pairs for block in self.blocks)


@dataclass(frozen=True)
class Work:
    """What a number of queries needs of both models in one micro-batch."""

    selector: tuple[Pass, ...]
    """With kept states: the prompts with the first decision, and what the later ones add. Otherwise one pass."""
    generator: Pass

    @property
    def largest(self) -> int:
        """Distinct tokens of the larger role, which `max_tokens_per_forward` bounds."""
        return max(sum(p.tokens for p in self.selector), self.generator.tokens)


@cache
def work_of(sizes: Sizes, lengths: Lengths, num_queries: int = 1, keep: bool = True, device: str = "cpu") -> Work:
    """Returns what a step encodes.

    Args:
        sizes ([`Sizes`]): N, K, m.
        lengths ([`Lengths`]): of the row's parts.
        num_queries (`int`): in one forward pass.
        keep (`bool`): the prompts' states are kept from drawing to training.
        device (`str`): `cpu` or `cuda`, which differ in what a block costs.
    """
    queries = [_Query(sizes, lengths, number) for number in range(num_queries)]
    generator = TokenTree()
    for sequence in chain.from_iterable(query.contexts() for query in queries):
        generator.add(sequence)
    scored = sum(len(query.drawn) for query in queries) * lengths.answer
    asked = _read_alone if sizes.identifiers in QUERY_LIKELIHOODS else _read_together
    return Work(tuple(asked(queries, keep, device)), Pass.over(generator, scored, device=device))


def _read_together(queries: "Sequence[_Query]", keep: bool, device: str) -> Iterator[Pass]:
    """The passes of [`~policy.Decisions`]."""
    tree, start, scored = TokenTree(), 0, 0
    ends = [tree.add(query.prompt)[-1] for query in queries]
    for first in (True, False):
        for query, end in zip(queries, ends, strict=True):
            prefixes = [z for z in prefixes_of(query.drawn) if (not z) == first]
            contexts = query.slate.decisions(prefixes).contexts
            for context in contexts:
                tree.add(context, end)
            scored += len(contexts)
        if scored and (keep or not first) and len(tree) > start:
            yield Pass.over(tree, scored, start, device)
            start, scored = len(tree), 0


def _read_alone(queries: "Sequence[_Query]", keep: bool, device: str) -> Iterator[Pass]:
    """The passes of [`~query_likelihood.QueryLikelihoods`]."""
    expanded = queries[0].sizes.identifiers == "expanded_query"
    for first in (True, False) if expanded else (True,):
        tree, scored = TokenTree(), 0
        for query in queries:
            for z in (z for z in prefixes_of(query.drawn) if (not z) == first):
                for passage, asked in query.asked_after(z):
                    tree.add([*passage, *asked[:-1]])
                    scored += len(asked)
        if len(tree):
            yield Pass.over(tree, scored, device=device)


class _Query:
    """A query of made-up tokens: equal ones where texts are equal."""

    def __init__(self, sizes: Sizes, lengths: Lengths, number: int):
        self.sizes, self.lengths = sizes, lengths
        self._fresh = count(1_000_000 * (number + 1))
        n = sizes.num_candidates
        self._passages = [self._text(lengths.passage) for _ in range(n)]
        self._query, self._answer = self._text(lengths.query), self._text(lengths.answer)
        self.drawn = _permutations(sizes)
        names = [self._text(_TITLE) if sizes.identifiers == "title" else [0, *_digits(i), 1] for i in range(n)]
        self.slate = Slate(names, names, [2], [3], sizes.num_selected)
        markers = self._text(lengths.marker * n)
        self.prompt = [*self._text(lengths.selector), *chain.from_iterable(self._passages), *markers]

    def _text(self, length: int) -> list[int]:
        return [next(self._fresh) for _ in range(length)]

    def contexts(self) -> Iterator[list[int]]:
        """The generator's sequences; instructions are the same for all queries, the tail never shares a parent."""
        length = self.lengths
        shared = list(range(10, 10 + max(length.generator - length.tail - length.query, 0)))
        for z in self.drawn:
            read = chain.from_iterable(self._passages[i] for i in z)
            yield [*shared, *self._query, *read, *range(500, 500 + length.tail), *self._answer[:-1]]

    def asked_after(self, prefix: Permutation) -> Iterator[tuple[list[int], list[int]]]:
        """Each passage that is left, alone, and the query after it, expanded by what was chosen."""
        length = self.lengths
        head, tail = list(range(10, 10 + length.selector - length.alone)), list(range(500, 500 + length.alone))
        chosen = list(chain.from_iterable(self._passages[i] for i in prefix))
        expanded = chosen if self.sizes.identifiers == "expanded_query" else []
        for i, passage in enumerate(self._passages):
            if i not in prefix:
                yield [*head, *passage, *tail], [*self._query[:-1], *expanded, self._query[-1]]


def _digits(number: int) -> list[int]:
    return [100 + int(digit) for digit in str(number + 1)]


def _permutations(sizes: Sizes) -> list[Permutation]:
    """m uniform permutations, always the same; `first_choices`: each candidate once as the first."""
    generator, places = random.Random(0), range(sizes.num_candidates)
    if sizes.proposal == "retriever":
        return [tuple(range(sizes.num_selected))]
    drawn = [tuple(generator.sample(places, sizes.num_selected)) for _ in range(sizes.num_generations)]
    if sizes.proposal != "first_choices":
        return drawn
    later = [generator.sample([i for i in places if i != first], sizes.num_selected - 1) for first in places]
    return [(first, *rest) for first, rest in zip(places, later, strict=True)]
