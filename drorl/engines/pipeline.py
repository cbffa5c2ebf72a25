"""The trained system on an engine: selector and generator are two adapters of one base, asked by turns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from drorl.adapters import GENERATOR, ROLES, SELECTOR
from drorl.errors import InvalidInputError
from drorl.models import choose_dtype
from drorl.pipeline import RAGPipeline, saved_run
from drorl.prompts import SelectorPrompt
from drorl.settings import QUERY_LIKELIHOODS, PipelineSettings

from .base import Engine, EngineDecisions
from .delivery import Adapter


class EnginePipeline(RAGPipeline):
    """A [`RAGPipeline`] whose models are in vLLM: it selects and answers, and has no weights here to train or score.

    Args:
        engine ([`Engine`]): of the base, with both adapters.
        versions (mapping): version of each role's adapter.
        tokenizer (`PreTrainedTokenizerBase`): of the base.
        settings ([`PipelineSettings`]): prompts and policy.
    """

    def __init__(
        self,
        engine: Engine,
        versions: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
        settings: PipelineSettings,
    ):
        self.engine, self.versions = engine, versions
        self.models = []
        self._describe(tokenizer, tokenizer, settings)
        self.prompts = self.generator_prompts = self._builder(engine.window, tokenizer)

    @classmethod
    def over(cls, engine: Engine, run_dir: Path, versions: Mapping[str, str]) -> Self:
        """Returns the pipeline of a saved run on an engine that has its adapters."""
        _, _, settings = saved_run(run_dir)
        return cls(engine, versions, AutoTokenizer.from_pretrained(run_dir, padding_side="left"), settings)

    @classmethod
    def load(cls, run_dir: Path, dtype: str = "auto", window: int | None = None, memory: float = 0.9) -> Self:
        """Starts an engine in this process for a saved run; see [`RAGPipeline.from_pretrained`]."""
        from .vllm import LocalEngine

        adapters = [Adapter.saved(run_dir / role, role) for role in ROLES]
        rank = max(adapter.rank for adapter in adapters)
        engine = LocalEngine(saved_base(run_dir), choose_dtype(dtype), rank, window, memory, native_lora=True)
        return cls.over(engine, run_dir, {adapter.role: engine.deliver(adapter) for adapter in adapters})

    def decide(self, prompts: Sequence[SelectorPrompt], keep: bool = True, role: str = SELECTOR) -> EngineDecisions:
        """Returns the decisions of the selector, or of another adapter, after rendered prompts."""
        return EngineDecisions(self.policy, self.engine, self.versions[role], prompts)

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Returns the generator's greedy continuation of each tokenized prompt."""
        length, end_id = self.settings.max_answer_length, self.generator_prompts.end_id
        _, texts = self.engine.generate(self.versions[GENERATOR], prompts, length, end_id)
        decoded = self.generator_tokenizer.batch_decode([text.tokens for text in texts], skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def close(self) -> None:
        """Stops the engine."""
        self.engine.close()


def saved_base(run_dir: Path) -> str:
    """Returns the base of a saved run.

    Raises:
        InvalidInputError: if it has two, or a selector that no engine can ask.
    """
    base, generator_base, settings = saved_run(run_dir)
    if settings.identifiers in QUERY_LIKELIHOODS:
        raise InvalidInputError(
            f"{run_dir} was trained with identifiers={settings.identifiers!r}, which asks for the likelihood of "
            'prompts: use backend="transformers"'
        )
    if generator_base is not None:
        raise InvalidInputError(
            f"{run_dir} has a separate generator ({generator_base}), and an engine has one base: use "
            'backend="transformers"'
        )
    return base
