"""Prompts: the only place where text for a model is rendered and tokenized.

Training, sampling, evaluation and serving all call [`PromptBuilder`], so they cannot differ. Five rules:

- Text from outside (queries, passages, titles, answers) yields ordinary tokens, never a control token, also where it
  contains `<|im_end|>`, or `<tool_call>`, which tokenizers do not call special.
- A passage is one line, so that no text can write a line of the prompt: what begins with `[2]` is the prompt's own.
- The selector reads the query before *and* after the passages (a causal model cannot judge a passage by a question it
  has not read yet); the generator reads it first, so that contexts share a long prefix.
- What prompts have in common stands at their beginning, where it is encoded once.
- A prompt that is too long loses passage text, never the query, and the loss is counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import InvalidInputError
from .permutations import Permutation, Slate, identifier_texts
from .settings import QUERY_LIKELIHOODS

Passage = Mapping[str, Any]

SELECTOR_HEAD = "Question: {query}\n\nPassages:\n"
SELECTOR_TAIL = {
    "number": "\nQuestion: {query}\nRank the {k} passages that help most to answer it, best first: [3] > [1] > ...",
    "letter": "\nQuestion: {query}\nRank the {k} passages that help most to answer it, best first: [C] > [A] > ...",
    "title": "\nQuestion: {query}\nWrite the titles of the {k} passages that help most to answer it, best first.",
}
QUERY_HEAD = "Write a question that the passage answers.\nPassage: "
GENERATOR_HEAD = "Answer the question with the help of the passages. Write only the answer.\nQuestion: {query}\n\n"
GENERATOR_TAIL = "Answer:"

_CONTENT = "\ue000"  # private use: stands for the message while the chat template is rendered around it


class PromptTooLongError(InvalidInputError):
    """A query does not fit into the context window even with every passage cut to nothing."""


@dataclass(frozen=True)
class SelectorPrompt:
    """The selector's prompt for one query, and the constraint on what may follow it."""

    ids: list[int]
    """Of the passages together; empty where each is scored by itself."""
    identifiers: list[str]
    """Identifier of each candidate, in the order of the prompt."""
    slate: Slate
    scores: Sequence[float | None] = ()
    """N: the retriever's scores, `None` where a candidate has none."""
    queries: Sequence[tuple[list[int], list[int]]] = ()
    """N, of `QUERY_LIKELIHOODS` only: a passage by itself, and the query as it would be written after it."""
    expansions: Sequence[list[int]] = ()
    """N, with `identifiers="expanded_query"` only: a passage as it would follow the query once it is chosen."""

    def queries_after(self, prefix: Permutation) -> list[tuple[list[int], list[int]]]:
        """Returns `queries` of the passages that are left after `prefix`, expanded by those that it has chosen."""
        added = [token for i in prefix for token in self.expansions[i]] if self.expansions else []
        left = (pair for i, pair in enumerate(self.queries) if i not in prefix)
        return [(passage, [*query[:-1], *added, query[-1]]) for passage, query in left]


@dataclass
class PromptBuilder:
    """Renders and tokenizes the prompts of both roles.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with its chat template; a base model without one gets plain text.
        identifiers (`str`): one of `IDENTIFIERS`, see [`~permutations.identifier_texts`].
        num_selected (`int`): K.
        max_passage_tokens (`int`, *optional*): each passage is cut to this many tokens.
        max_prompt_tokens (`int`, *optional*): what the generator's prompt, and the selector's with its permutation,
            may take of the context window.
        chat_template_kwargs (mapping, *optional*): for the chat template, as TRL's setting of that name.
    """

    tokenizer: PreTrainedTokenizerBase
    identifiers: str = "number"
    num_selected: int = 5
    max_passage_tokens: int | None = None
    max_prompt_tokens: int | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    num_passages: int = field(default=0, init=False)
    num_truncated_passages: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token, so an answer could never end")
        self._control = _control_tokens(self.tokenizer)
        self._before, self._after = self._frame()
        self.end_id = self._end_of_turn()

    @property
    def truncated_ratio(self) -> float:
        """Share of the passages rendered so far that were cut."""
        return self.num_truncated_passages / max(self.num_passages, 1)

    def _frame(self) -> tuple[list[int], list[int]]:
        """Returns the chat template's tokens before and after a user message, special tokens included."""
        if self.tokenizer.chat_template is None:
            bos = self.tokenizer.bos_token_id
            return ([] if bos is None else [bos]), self._encode("\n")
        before, after = self._rendered([{"role": "user", "content": _CONTENT}], add_generation_prompt=True)
        return self._encode(before, split_special=False), self._encode(after, split_special=False)

    def _end_of_turn(self) -> int:
        """Returns the token that ends the model's turn, which is not always the tokenizer's end of sequence."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer.eos_token_id
        turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": _CONTENT}]
        ids = self._encode(self._rendered(turns)[1].strip(), split_special=False)
        return ids[0] if ids and ids[0] in self.tokenizer.all_special_ids else self.tokenizer.eos_token_id

    def _rendered(self, turns: list[dict[str, str]], **options: Any) -> list[str]:
        """Returns what the chat template writes before and after the content."""
        options |= self.chat_template_kwargs or {}
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **options).split(_CONTENT)

    def _encode(self, text: str, split_special: bool = True) -> list[int]:
        """Returns the tokens of a text; unless it is the chat template's, none of them is a control token."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split_special)["input_ids"]
        if not split_special or self._control.keys().isdisjoint(ids):
            return ids
        return [token for i in ids for token in self._spelled(i)]

    def _spelled(self, token: int) -> list[int]:
        """Returns a control token as the text that it is, its characters one by one; others as they are."""
        if token not in self._control:
            return [token]
        characters = [self.tokenizer(c, add_special_tokens=False)["input_ids"] for c in self._control[token]]
        return [i for ids in characters for i in ids if i not in self._control]

    def selector(self, query: str, candidates: Sequence[Passage]) -> SelectorPrompt:
        """Returns the selector's prompt over N candidates, shown in the given order.

        Raises:
            PromptTooLongError: if the query and the identifiers alone exceed `max_prompt_tokens`.
            ValueError: if there are fewer than K candidates.
        """
        titles, texts = _lines(candidates)
        scores = [c.get("score") for c in candidates]
        identifiers = identifier_texts(self.identifiers, titles)
        headers = [
            identifier if self.identifiers == "title" else f"{identifier} {title}"
            for identifier, title in zip(identifiers, titles, strict=True)
        ]
        slate = Slate(
            first_ids=[self._encode(i) for i in identifiers],
            later_ids=[self._encode(f" {i}") for i in identifiers],
            separator_ids=self._encode(" >"),
            end_ids=[self.end_id],
            num_selected=self.num_selected,
        )
        if self.identifiers in QUERY_LIKELIHOODS:
            asked, expansions = self.answer(query), []
            if self.identifiers == "expanded_query":
                expansions = [self._encode(f" {text}")[: self.max_passage_tokens] for text in texts]
            reserve = len(asked) + sum(sorted(map(len, expansions), reverse=True)[: self.num_selected - 1])
            pairs = zip(titles, texts, strict=True)
            alone = [self._prompt(query, QUERY_HEAD, [h], [t], "", reserve) for h, t in pairs]
            return SelectorPrompt([], identifiers, slate, scores, [(prompt, asked) for prompt in alone], expansions)
        ids = self._prompt(query, SELECTOR_HEAD, headers, texts, SELECTOR_TAIL[self.identifiers], slate.max_length)
        return SelectorPrompt(ids, identifiers, slate, scores)

    def generator(self, query: str, passages: Sequence[Passage]) -> list[int]:
        """Returns the generator's prompt: the query, then the chosen passages in the order of the permutation."""
        titles, texts = _lines(passages)
        return self._prompt(query, GENERATOR_HEAD, titles, texts, GENERATOR_TAIL)

    def answer(self, answer: str) -> list[int]:
        """Returns the tokens of a turn that is scored: its own and the one that ends it, no others."""
        return [*self._encode(answer), self.end_id]

    def _prompt(
        self, query: str, head: str, headers: Sequence[str], texts: Sequence[str], tail: str, reserve: int = 0
    ) -> list[int]:
        """Returns the prompt, cut so that `reserve` tokens can follow it within `max_prompt_tokens`."""
        first, last = (self._encode(part.format(query=query, k=self.num_selected)) for part in (head, tail))
        fixed = [self._before, first, last, self._after]
        head_ids = [self._encode(f"{header}:") for header in headers]
        newline = self._encode("\n")
        room = None
        if self.max_prompt_tokens is not None:
            room = self.max_prompt_tokens - reserve - sum(map(len, fixed))
            room -= sum(len(h) + len(newline) for h in head_ids)
            if room < len(texts):
                raise PromptTooLongError(
                    f"the prompt without any passage text leaves {room} of {self.max_prompt_tokens} tokens for "
                    f"{len(texts)} passages (query: {query[:80]!r}); shorten the query, lower num_candidates, or use "
                    "a model with a longer window"
                )
        bodies = self._fit([self._encode(f" {text}") for text in texts], room)
        passages = [token for h, body in zip(head_ids, bodies, strict=True) for token in (*h, *body, *newline)]
        return [*fixed[0], *fixed[1], *passages, *fixed[2], *fixed[3]]

    def _fit(self, bodies: list[list[int]], room: int | None) -> list[list[int]]:
        """Cuts the longest passages first, to one common length, until all fit."""
        limit = self.max_passage_tokens or max(map(len, bodies), default=0)
        if room is not None:
            lengths = sorted(min(len(body), limit) for body in bodies)
            for i, length in enumerate(lengths):
                share = room // (len(lengths) - i)
                if length > share:
                    limit = share
                    break
                room -= length
        self.num_passages += len(bodies)
        self.num_truncated_passages += sum(len(body) > limit for body in bodies)
        return [body[:limit] for body in bodies]


def _lines(passages: Sequence[Passage]) -> tuple[list[str], list[str]]:
    """Returns the titles and the texts, each as one line."""
    return [_line(p["title"]) for p in passages], [_line(p["text"]) for p in passages]


def _line(text: str) -> str:
    return " ".join(text.splitlines())


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Returns id -> text of the tokens that mean something to a model beyond their text.

    Those that are special, and those that were added and look like it: Qwen's `<tool_call>` and `<think>` are not
    called special. Added words, or runs of spaces, are text. A token for what is unknown is no control token.
    """
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    marked = {i for i, text in added.items() if text[0] + text[-1] in ("<>", "[]", "{}") and len(text) > 2}
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    control = (marked | set(tokenizer.all_special_ids)) - unknown
    return {i: added.get(i) or str(tokenizer.convert_ids_to_tokens(i)) for i in control}
