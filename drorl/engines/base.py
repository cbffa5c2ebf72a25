"""What drorl asks of an engine, and permutations drawn from its answers.

An engine answers one question: how likely is each allowed token next? The policy of [`drorl.policy`] makes its
decisions from that, as it does from a model's own logits: same constraint, same temperature, same retrieval prior. So
the engine samples p_s itself, no permutation can be malformed, and a decision costs one prefilled request of a few
tokens behind a cached prompt. What else was tried, and its figures: docs/vllm.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from drorl.errors import InvalidInputError, UserError
from drorl.policy import Drawing, Prefixes, SelectorPolicy
from drorl.prompts import SelectorPrompt

from .delivery import Adapter


class EngineError(UserError):
    """The engine cannot be started or reached, or does not have what is asked for."""


class StaleAdapterError(EngineError):
    """The engine has other weights than the ones that are asked for."""


@dataclass(frozen=True)
class Branch:
    """What may follow one of several prompts."""

    prompt: int
    """Which prompt."""
    context: Sequence[int]
    """Tokens after it."""
    allowed: Sequence[int]
    """R tokens that may come next."""


@dataclass(frozen=True)
class Completion:
    """A generated text."""

    tokens: list[int]
    logps: list[float]
    """log p of each token at the temperature it was drawn with (at 1, if greedy), nats."""


class Engine(ABC):
    """A vLLM engine with the adapters of one base.

    Every question names the version of the adapter that has to answer it, and every answer the one that did; see
    [`delivery`].
    """

    window: int
    """Longest prompt with what follows it, tokens."""

    @abstractmethod
    def deliver(self, adapter: Adapter) -> str:
        """Gives the engine a role's adapter in place of the role's last one, and returns its version."""

    @abstractmethod
    def next_token_logps(
        self, version: str, prompts: Sequence[Sequence[int]], branches: Sequence[Branch]
    ) -> tuple[str, list[list[float]]]:
        """Returns who answers, and log p(token | prompt, context) of the allowed tokens of each branch, nats.

        They are normalised over the vocabulary.

        Raises:
            StaleAdapterError: if the engine does not have `version`.
        """

    @abstractmethod
    def generate(
        self,
        version: str,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_id: int,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> tuple[str, list[Completion]]:
        """Returns who answers, and one text per prompt; temperature 0 is greedy.

        Args:
            version (`str`): of the adapter.
            prompts (`list` of token sequences): one text is generated after each.
            max_tokens (`int`): longest text.
            end_id (`int`): token that ends a text, and belongs to it.
            temperature (`float`): divides the logits.
            seeds (`list[int]`, *optional*): each text's randomness.

        Raises:
            StaleAdapterError: if the engine does not have `version`.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives back what the engine holds."""

    def check_window(self, prompts: Sequence[Sequence[int]], reserve: int = 1) -> None:
        """Checks that prompts fit, with `reserve` tokens behind them.

        Raises:
            InvalidInputError: if one does not.
        """
        longest = max(map(len, prompts), default=0) + reserve
        if longest > self.window:
            raise InvalidInputError(
                f"a prompt takes {longest} tokens, but the engine's window is {self.window}: raise "
                "vllm_max_model_length (or the server's --max-model-len), or lower max_prompt_length"
            )


class EngineDecisions(Drawing):
    """The policy's decisions under an engine's adapter, to draw from.

    Args:
        policy ([`~drorl.policy.SelectorPolicy`]): settings of the policy.
        engine ([`Engine`]): answers with the selector.
        version (`str`): of the selector's adapter.
        prompts (`list` of B [`~drorl.prompts.SelectorPrompt`]): prompts and slates.

    Raises:
        InvalidInputError: if a prompt does not fit into the engine's window.
    """

    def __init__(self, policy: SelectorPolicy, engine: Engine, version: str, prompts: Sequence[SelectorPrompt]):
        super().__init__(policy, prompts)
        self._engine, self._asked = engine, version
        self.version: str | None = None
        """Of the adapter that has answered; `None`: nothing was asked."""
        for prompt in prompts:
            engine.check_window([prompt.ids], prompt.slate.max_length)

    def _ask(self, prefixes: Sequence[Prefixes]) -> list[torch.Tensor]:
        tables = self.tables(prefixes)
        branches = [
            Branch(query, context, [token for token in children if token >= 0])
            for query, table in enumerate(tables)
            for context, children in zip(table.contexts, table.children.tolist(), strict=True)
        ]
        scores = iter(self._scores(branches))
        rows = []
        for table, prompt in zip(tables, self.prompts, strict=True):
            asked = [torch.tensor(next(scores)) for _ in table.contexts]
            padded = pad_sequence(asked, batch_first=True) if asked else torch.empty(table.children.shape)
            rows.append(self.policy.logps(table.log_probs(padded), prompt.scores))
        return rows

    def _scores(self, branches: Sequence[Branch]) -> list[list[float]]:
        if not branches:
            return []
        # Requests that arrive together do not share what they begin with: one of each prompt goes first.
        first = {branch.prompt: branch for branch in reversed(branches)}
        if self.version is None and len(first) < len(branches):
            self._answers(list(first.values()))
        return self._answers(branches)

    def _answers(self, branches: Sequence[Branch]) -> list[list[float]]:
        version, logps = self._engine.next_token_logps(self._asked, [prompt.ids for prompt in self.prompts], branches)
        if self.version not in (None, version):
            raise StaleAdapterError(f"the engine's adapter has changed under the questions: {self.version}, {version}")
        self.version = version
        return logps
