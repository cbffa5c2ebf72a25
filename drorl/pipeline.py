"""The trained system: select passages, answer from them.

[`RAGPipeline`] is two models, the prompts and the policy; the trainer, the evaluation and the user share it.
"""

import dataclasses
import json
import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from httpx import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .adapters import GENERATOR, ROLES, SELECTOR, activate, adapter_parameters, trainable_roles
from .data.rows import RowError
from .errors import InvalidInputError
from .models import load_model_and_tokenizer, portable_name
from .policy import Decisions, Drawing, SelectorPolicy
from .ppo import ValueHead
from .prompts import PromptBuilder, PromptTooLongError, SelectorPrompt
from .query_likelihood import QueryLikelihoods
from .settings import QUERY_LIKELIHOODS, PipelineSettings
from .sharding import gathered

SETTINGS_FILE = "drorl.json"
BACKENDS = ("transformers", "vllm")
LOADED = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]
"""What is downloaded of a run on the hub: nothing that is pickled."""
CHECKPOINTS = "*checkpoint*/*"
Passage = Mapping[str, Any]


@dataclass(frozen=True)
class RankedPassage:
    """A chosen passage; `logp` is the log-probability of choosing it at its place, nats."""

    passage: Passage
    logp: float


@dataclass(frozen=True)
class Answer:
    """A generated answer and the passages it was generated from, best first."""

    text: str
    citations: list[RankedPassage]
    ranking: list[RankedPassage]
    """All passages that the selector read, by how likely each was to be its first choice: that is their `logp`."""


class RAGPipeline:
    """Selects passages with one model and answers from them with another (or the other adapter of the same).

    Args:
        model (`PeftModel`): carries the adapter `selector`, and `generator` unless `generator_model` is given.
        tokenizer (`PreTrainedTokenizerBase`): of `model`.
        settings ([`PipelineSettings`]): prompts and policy.
        generator_model (`PeftModel`, *optional*): a separate generator with its own base.
        generator_tokenizer (`PreTrainedTokenizerBase`, *optional*): defaults to `tokenizer`.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: PipelineSettings,
        generator_model: PeftModel | None = None,
        generator_tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.model = model
        self.generator_model = generator_model
        self.models = [model] if generator_model is None else [model, generator_model]
        self.critic: ValueHead | None = None  # PPO's, which a trainer brings
        self._describe(tokenizer, generator_tokenizer or tokenizer, settings)
        self.prompts = self._builder(_window(model), tokenizer)
        self.generator_prompts = self.prompts
        if generator_model is not None:
            self.generator_prompts = self._builder(_window(generator_model), self.generator_tokenizer)

    def _describe(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generator_tokenizer: PreTrainedTokenizerBase,
        settings: PipelineSettings,
    ) -> None:
        """Sets what does not depend on where the models are."""
        self.tokenizer, self.generator_tokenizer, self.settings = tokenizer, generator_tokenizer, settings
        self.policy = SelectorPolicy(settings.selector_temperature, settings.retrieval_prior_weight)

    def _builder(self, window: int | None, tokenizer: PreTrainedTokenizerBase) -> PromptBuilder:
        s = self.settings
        lengths = [s.max_prompt_length, window and window - s.max_answer_length]
        limit = min((length for length in lengths if length is not None), default=None)
        template: Any = s.chat_template_kwargs  # a string only until the configuration has read it
        return PromptBuilder(tokenizer, s.identifiers, s.num_selected, s.max_passage_tokens, limit, template)

    @classmethod
    def from_pretrained(
        cls,
        run_dir: str | Path,
        dtype: str = "auto",
        device: str | None = None,
        backend: str = "transformers",
        **engine: Any,
    ) -> "RAGPipeline":
        """Loads a pipeline that [`DROTrainer.save_model`] wrote: `selector/`, `generator/`, tokenizer, `drorl.json`.

        Args:
            run_dir (`str` or `Path`): the run's directory, or its name on the hub.
            dtype (`str`): see [`~models.choose_dtype`].
            device (`str`, *optional*): default: a GPU if there is one. vLLM takes the one it was built for.
            backend (`str`): `transformers`, or `vllm`: both adapters on one engine; see [`~engines.pipeline`].
            **engine: `window` and `memory` of the engine, see [`~engines.vllm.LocalEngine`].

        Raises:
            FileNotFoundError: if `run_dir` is not such a directory, and not on the hub.
            InvalidInputError: if it is not whole, or its base model is not there.
            TypeError: if `backend` has no such keyword.
            ValueError: if there is no such `backend`, or it is vLLM, which has no `device` to choose.
        """
        run_dir = run_folder(run_dir)
        base_name, generator_name, settings = saved_run(run_dir)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
        if backend == "vllm":
            if device is not None:
                raise ValueError(
                    f"device={device!r} is for backend='transformers': vLLM takes the one it is built for"
                )
            from .engines.pipeline import EnginePipeline

            return EnginePipeline.load(run_dir, dtype, **engine)
        if engine:
            raise TypeError(f"backend='transformers' takes no {', '.join(engine)}")
        base = _base(base_name, dtype)
        model = PeftModel.from_pretrained(base, run_dir / SELECTOR, adapter_name=SELECTOR)
        tokenizer = AutoTokenizer.from_pretrained(run_dir, padding_side="left")
        generator_model = generator_tokenizer = None
        if generator_name is None:
            model.load_adapter(run_dir / GENERATOR, adapter_name=GENERATOR)
        else:
            base = _base(generator_name, dtype)
            generator_tokenizer = AutoTokenizer.from_pretrained(run_dir / GENERATOR, padding_side="left")
            generator_model = PeftModel.from_pretrained(base, run_dir / GENERATOR, adapter_name=GENERATOR)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        pipeline = cls(model, tokenizer, settings, generator_model, generator_tokenizer)
        for module in pipeline.models:
            module.to(device).eval()
        return pipeline

    def save_pretrained(self, run_dir: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes both adapters, the tokenizer and the settings; the base models are named, not copied."""
        run_dir = Path(run_dir)
        self.model.save_pretrained(run_dir, selected_adapters=list(trainable_roles(self.model)), state_dict=state_dict)
        if self.generator_model is not None:
            self.generator_model.save_pretrained(run_dir, selected_adapters=[GENERATOR])
        self.tokenizer.save_pretrained(run_dir)
        if self.generator_model is not None:
            self.generator_tokenizer.save_pretrained(run_dir / GENERATOR)
        saved = {
            "base_model": self.base_name(SELECTOR),
            "generator_base_model": self.generator_model and self.base_name(GENERATOR),
            "settings": dataclasses.asdict(self.settings),
        }
        (run_dir / SETTINGS_FILE).write_text(json.dumps(saved, indent=2) + "\n")

    def role(self, role: str) -> PeftModel:
        """Returns the model of `selector` or `generator`, its adapter active."""
        model = self.owner(role)
        activate(model, role)
        return model

    def owner(self, role: str) -> PeftModel:
        """Returns the model that carries the adapter of `role`."""
        return self.generator_model if role == GENERATOR and self.generator_model is not None else self.model

    def base_name(self, role: str) -> str:
        """Returns the name of the base of `role`: one on the hub, of the embedded model, or a folder."""
        return portable_name(self.owner(role).get_base_model().name_or_path)

    def parameters(self, role: str) -> list[torch.nn.Parameter]:
        """The adapter's parameters of one role."""
        return list(adapter_parameters(self.owner(role), role).values())

    @contextmanager
    def without_adapters(self) -> Generator[None]:
        """The base models as they are: zero-shot."""
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(model.disable_adapter())
            yield

    @contextmanager
    def gathered(self) -> Generator[None]:
        """Both models are whole in this process; see [`~sharding.gathered`]."""
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(gathered(model))
            yield

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """No gradient and no dropout; both models go back to their modes afterwards."""
        with torch.no_grad(), self.gathered(), ExitStack() as stack:
            for model in self.models:
                stack.callback(model.train, model.training)
                model.eval()
            yield

    def check_length(self, index: int, query: str, candidates: Sequence[Passage]) -> None:
        """Checks that the prompts of row `index` fit into the window when passages are cut.

        Raises:
            RowError: if they do not, though every passage were cut to one token.
        """
        titles = [{"title": c["title"], "text": "."} for c in candidates[: self.settings.num_candidates]]
        limit = self.prompts.max_prompt_tokens
        # A token has at least a byte (each title stands twice), so most rows are known to fit without tokenizing them.
        size = 2 * len(query.encode()) + sum(2 * len(c["title"].encode()) + 32 for c in titles) + 1024
        if limit is None or size < limit:
            return
        try:
            self.prompts.selector(query, titles)
        except PromptTooLongError as error:
            raise RowError(index, "query", str(error)) from error

    def present(self, query: str, candidates: Sequence[Passage], seed: int | str = 0) -> list[Passage]:
        """Returns the first N candidates as the prompt shows them; a shuffle depends on `seed` and the query alone."""
        shown = list(candidates[: self.settings.num_candidates])
        if self.settings.shuffle_candidates:
            random.Random(f"{seed}/{query}").shuffle(shown)
        return shown

    def decisions(self, queries: Sequence[str], shown: Sequence[Sequence[Passage]], keep: bool = True) -> Drawing:
        """Returns the selector's decisions over each query's candidates as shown; see [`~policy.Decisions`]."""
        return self.decide([self.prompts.selector(*pair) for pair in zip(queries, shown, strict=True)], keep)

    def decide(self, prompts: Sequence[SelectorPrompt], keep: bool = True, role: str = SELECTOR) -> Drawing:
        """Returns the decisions of the selector, or of another adapter, after prompts; see [`~policy.Decisions`]."""
        critic = self.critic if role == SELECTOR else None
        if self.settings.identifiers in QUERY_LIKELIHOODS:
            return QueryLikelihoods(self.policy, self.role(role), prompts, critic)
        return Decisions(self.policy, self.role(role), prompts, keep, critic)

    def select(self, query: str, candidates: Sequence[Passage], k: int | None = None) -> list[RankedPassage]:
        """Returns the passages of the most likely permutation, best first, each with its log-probability.

        Args:
            query (`str`): the question.
            candidates (`list` of `{id, title, text, score}`): in the retriever's order.
            k (`int`, *optional*): how many of the K to return.

        Raises:
            ValueError: if there are fewer candidates than K, or `k` exceeds K.
        """
        if k is not None and not 1 <= k <= self.settings.num_selected:
            raise ValueError(f"k must be between 1 and num_selected={self.settings.num_selected}, not {k}")
        return self._chosen(query, candidates)[0][:k]

    @torch.no_grad()
    def _chosen(self, query: str, candidates: Sequence[Passage]) -> tuple[list[RankedPassage], list[RankedPassage]]:
        """Returns the passages of the most likely permutation, and all by how likely they are to come first."""
        shown = self.present(query, candidates)
        decisions = self.decisions([query], [shown])
        [permutation] = decisions.greedy()
        [(logps, _)] = decisions.permutation_logps([[permutation]])
        [[first]] = decisions.logps([[()]])
        chosen = [RankedPassage(shown[i], float(logp)) for i, logp in zip(permutation, logps[0], strict=True)]
        return chosen, [RankedPassage(shown[i], float(first[i])) for i in first.argsort(descending=True, stable=True)]

    def answer(self, query: str, candidates: Sequence[Passage]) -> Answer:
        """Returns the generator's greedy answer from the selected passages, and how all passages were ranked."""
        citations, ranking = self._chosen(query, candidates)
        prompt = self.generator_prompts.generator(query, [c.passage for c in citations])
        return Answer(self.generate([prompt])[0], citations, ranking)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Returns the generator's greedy continuation of each tokenized prompt."""
        model, tokenizer = self.role(GENERATOR), self.generator_tokenizer
        batch = tokenizer.pad({"input_ids": [list(p) for p in prompts]}, padding_side="left", return_tensors="pt")
        output = model.generate(
            **batch.to(model.device),
            max_new_tokens=self.settings.max_answer_length,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self.generator_prompts.end_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]


def one_line(error: Exception) -> str:
    """Returns an error's type and the first line of its text, if it has any."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")


def run_folder(run: str | Path) -> Path:
    """Returns where the files of a run lie: its directory, or the hub's cache.

    Raises:
        FileNotFoundError: if there is no such directory, and no such run on the hub, or it is out of reach.
    """
    if Path(run).exists():
        return Path(run)
    try:
        return Path(snapshot_download(str(run), allow_patterns=LOADED, ignore_patterns=CHECKPOINTS))
    except HFValidationError as error:  # a path
        raise FileNotFoundError(f"{run} is not a drorl run: it has no {SETTINGS_FILE}") from error
    except (HTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{run} is not a drorl run: it has no {SETTINGS_FILE}, and on the hub: {one_line(error)}"
        ) from error


def saved_run(run_dir: Path) -> tuple[str, str | None, PipelineSettings]:
    """Returns what a run's `drorl.json` says: its base, that of its generator if it has one of its own, its settings.

    Raises:
        FileNotFoundError: if `run_dir` is no run.
        InvalidInputError: if the file is damaged, or an adapter is missing.
    """
    file = run_dir / SETTINGS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{run_dir} is not a drorl run: it has no {SETTINGS_FILE}")
    try:
        saved = json.loads(file.read_text())
        found = saved["base_model"], saved["generator_base_model"], PipelineSettings(**saved["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidInputError(f"{file} is damaged, or of another version of drorl: {error}") from error
    for role in ROLES:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (run_dir / role / name).is_file():
                raise InvalidInputError(f"{run_dir} has no {role}/{name}: the run was not finished, or copied in part")
    return found


def _base(name: str, dtype: str) -> PreTrainedModel:
    """The base model of a run.

    Raises:
        InvalidInputError: if it is not there.
    """
    try:
        return load_model_and_tokenizer(name, dtype=dtype)[0]
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(f"the run's base model {name} cannot be loaded: {reason}") from error


def _window(model: PeftModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
