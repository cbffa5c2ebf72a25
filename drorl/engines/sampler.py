"""Permutations drawn by an engine for the trainer, and the watch that it is the trainer's own policy which draws.

Processes agree on every failure: one that raised alone would leave the others waiting for it.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers.utils import logging

from drorl.adapters import SELECTOR
from drorl.config import DROConfig
from drorl.data.rows import RowError
from drorl.errors import UserError
from drorl.pipeline import RAGPipeline
from drorl.rollouts import Question, Rollout, draw_rollouts, read_rollout, stack, sum_over_tokens
from drorl.weights import log_sampling_ratio

from .base import Engine, EngineDecisions, EngineError
from .delivery import Adapter, base_fingerprint, base_folder

logger = logging.get_logger(__name__)
T = TypeVar("T")


def choose_backend(config: DROConfig, processes: int = 1) -> tuple[str, str]:
    """Returns `transformers` or `vllm`, and why, for `rollout_backend`; figures in docs/vllm.md."""
    if config.use_vllm:
        return "vllm", "as set"
    if config.rollout_backend != "auto":
        return config.rollout_backend, "as set"
    if config.constrained:
        why = "a decision takes few tokens behind a prompt that the loss encodes anyway, so an engine only adds to it"
        return "transformers", f"{why} (measured on a CPU, not on a GPU)"
    if importlib.util.find_spec("vllm") is None:
        return "transformers", "vLLM, which is faster at free text, is not installed"
    if config.generation_kwargs:
        return "transformers", "generation_kwargs are for its generate()"
    if processes > 1 and config.vllm_mode == "colocate":
        return "transformers", "vllm_mode=colocate was not measured with several processes (use_vllm=True takes it)"
    return "vllm", "free text is decoded token by token, where it is faster (measured on a CPU, not on a GPU)"


def sampler_for(
    config: DROConfig, pipeline: RAGPipeline, accelerator: Accelerator, rows: Sequence[Mapping[str, Any]]
) -> "EngineSampler | None":
    """Returns who draws permutations from the selector; `None`: the trainer's own model.

    Raises:
        EngineError: if vLLM is set, and does not start; chosen by `auto`, it may.
        RowError: if the prompt of one of `rows` does not fit into the engine's window.
    """
    backend, reason = choose_backend(config, accelerator.num_processes)
    logger.info(f"rollout_backend={config.rollout_backend}: {backend}, {reason}")
    if backend == "transformers":
        return None
    try:
        sampler = agreed(lambda: EngineSampler(config, pipeline, accelerator))
    except EngineError as error:
        if config.use_vllm:
            raise
        logger.warning(f"rollout_backend=auto: transformers after all. {error}")
        return None
    sampler.check_rows(rows)
    return sampler


def agreed(work: Callable[[], T]) -> T:
    """Returns what `work` returns, once it has succeeded in every process.

    Raises:
        EngineError: in all of them, if it has failed in one.
    """
    results, failure = [], None
    try:
        results.append(work())
    except UserError as error:
        failure = error
    texts = [text for text in gather_object([None if failure is None else str(failure)]) if text is not None]
    if texts:
        raise EngineError(texts[0]) from failure
    return results[0]


def start_engine(config: DROConfig, pipeline: RAGPipeline, accelerator: Accelerator) -> Engine:
    """Returns the engine that TRL's `vllm_*` settings describe.

    Raises:
        EngineError: if it does not start, cannot be reached, or has another base.
    """
    base, model = pipeline.model.get_base_model().name_or_path, pipeline.model
    if config.vllm_mode == "server":
        from .remote import THIS_PROCESS, RemoteEngine

        url = config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"
        client = broadcast_object_list([THIS_PROCESS])[0]  # one trainer, however many processes it has
        own = base_fingerprint(base_folder(base), model)
        return RemoteEngine(url, own, config.vllm_server_timeout, client, model.dtype, accelerator.is_main_process)
    from .vllm import LocalEngine

    if base_fingerprint(base_folder(base), model) != base_fingerprint(base_folder(base)):
        raise EngineError(
            f"the base in memory is not the one in {base}, which vLLM would load: it has changed since, or is another "
            "revision. Save it (save_pretrained), and load the trainer's from there"
        )
    # As in TRL, of several processes each has an engine of its own, in the process group that is there already.
    backend = "external_launcher" if accelerator.num_processes > 1 else None
    return LocalEngine(
        base,
        model.dtype,
        model.peft_config[SELECTOR].r,
        config.vllm_max_model_length,
        config.vllm_gpu_memory_utilization,
        seed=config.seed + accelerator.process_index,
        distributed_executor_backend=backend,
    )


class EngineSampler:
    """Draws the permutations of a trainer with an engine.

    Args:
        config ([`DROConfig`]): settings of the run.
        pipeline ([`RAGPipeline`]): the models that are being trained.
        accelerator (`Accelerator`): of the trainer.
        engine ([`Engine`], *optional*): default: the one that the settings describe.
    """

    def __init__(
        self, config: DROConfig, pipeline: RAGPipeline, accelerator: Accelerator, engine: Engine | None = None
    ):
        self.config, self.pipeline, self.accelerator = config, pipeline, accelerator
        self.engine = engine or start_engine(config, pipeline, accelerator)
        self._gaps: list[torch.Tensor] = []
        self._ratios: list[torch.Tensor] = []

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Checks that the prompts of rows fit into the engine's window, which may be shorter than the model's.

        Raises:
            RowError: if one does not.
        """
        prompts, free = self.pipeline.prompts, 0 if self.config.constrained else self.config.max_completion_length
        if prompts.max_prompt_tokens is not None and prompts.max_prompt_tokens + free <= self.engine.window:
            return  # passages are cut to that
        for index, row in enumerate(rows):
            shown = self.pipeline.present(row["query"], row["candidates"])
            # A token has at least a byte (a title may stand in the permutation too).
            size = sum(3 * len(c["title"].encode()) + len(c["text"].encode()) + 64 for c in shown)
            if size + 2 * len(row["query"].encode()) + 1024 + free < self.engine.window:
                continue
            prompt = prompts.selector(row["query"], shown)
            try:
                self.engine.check_window([prompt.ids], free or prompt.slate.max_length)
            except UserError as error:
                raise RowError(index, "candidates", str(error)) from error

    def sync(self) -> str:
        """Gives the engine the selector as it is, and returns the version."""
        return self.engine.deliver(Adapter.of(self.pipeline.model, SELECTOR))

    def draw(self, questions: Sequence[Question]) -> list[Rollout]:
        """Draws permutations of each question from the selector as it is.

        Raises:
            EngineError: in all processes, if one has lost its engine, or was answered by another adapter.
        """
        current = agreed(self.sync)  # nobody asks before the adapter is there
        return agreed(lambda: self._drawn(questions, current))

    def _drawn(self, questions: Sequence[Question], current: str) -> list[Rollout]:
        rollouts = self._constrained(questions, current) if self.config.constrained else self._free(questions, current)
        for rollout in rollouts:
            if rollout.version != current:
                raise EngineError(f"a rollout was drawn by {rollout.version}, and the trainer is at {current}")
        return rollouts

    def _constrained(self, questions: Sequence[Question], version: str) -> list[Rollout]:
        decide: Any = partial(EngineDecisions, self.pipeline.policy, self.engine, version)
        rollouts, decisions = draw_rollouts(self.pipeline, self.config, questions, decide)
        answered = decisions.version if isinstance(decisions, EngineDecisions) else None
        answered = answered or version  # nothing was asked where nothing was to be decided
        # What the policy's probabilities are by the trainer's own model is for the trainer to say.
        return [
            replace(r, sampling_logps=r.old_selector_logps, old_selector_logps=None, version=answered)
            for r in rollouts
        ]

    def _free(self, questions: Sequence[Question], version: str) -> list[Rollout]:
        config, prompts, m = self.config, self.pipeline.prompts, self.config.num_generations
        repeated = [prompts.selector(q.row["query"], q.shown).ids for q in questions for _ in range(m)]
        length, end_id = config.max_completion_length, prompts.end_id
        seeds = [q.seed + i for q in questions for i in range(m)]
        temperature = config.selector_temperature
        answered, texts = self.engine.generate(version, repeated, length, end_id, temperature, seeds)
        rollouts = []
        for i, question in enumerate(questions):
            drawn = texts[i * m : (i + 1) * m]
            logps = stack([torch.tensor(text.logps) for text in drawn])
            given = {"sampling_logps": logps, "proposal_logps": logps, "version": answered}
            rollouts.append(read_rollout(self.pipeline, config, question, [t.tokens for t in drawn], **given))
        return rollouts

    def correction(self, rollouts: Sequence[Rollout], token_logps: torch.Tensor) -> torch.Tensor:
        """Returns log p_s/q by which an engine's samples are corrected, `(B, m, T)` or `(B, m, 1)`; TRL's settings.

        Args:
            rollouts (`list` of B [`~drorl.rollouts.Rollout`]): drawn by the engine.
            token_logps (`torch.Tensor` of shape `(B, m, T)`): log p_s when they were drawn, nats, by the trainer.
        """
        config, sampling = self.config, self._sampling(rollouts)
        if not config.vllm_importance_sampling_correction:
            return torch.zeros_like(sampling[..., :1])
        return log_sampling_ratio(
            token_logps[..., : sampling.shape[-1]],
            sampling,
            config.vllm_importance_sampling_mode,
            config.vllm_importance_sampling_clip_min,
            config.vllm_importance_sampling_clip_max,
        )

    def log_ratio(self, rollouts: Sequence[Rollout], correction: torch.Tensor | None) -> torch.Tensor:
        """Returns log p_s/q of permutations when they were drawn, `(B, m)`: of the proposal, and of the engine."""
        proposal = stack([r.proposal_logps for r in rollouts if r.proposal_logps is not None])
        ratio = sum_over_tokens(self._sampling(rollouts)) - sum_over_tokens(proposal).to(self.pipeline.model.device)
        return ratio if correction is None else ratio + correction.sum(dim=-1)

    def watch(self, rollouts: Sequence[Rollout], token_logps: torch.Tensor, correction: torch.Tensor) -> None:
        """Notes how far the engine's log-probabilities are from the trainer's, for [`watched`] to judge.

        Args: see [`correction`], whose value is the third.
        """
        sampling = self._sampling(rollouts)
        where = sampling.isfinite()
        self._gaps.append((token_logps[..., : sampling.shape[-1]] - sampling)[where].abs())
        if self.config.vllm_importance_sampling_correction:
            self._ratios.append(correction.exp()[where[..., : correction.shape[-1]]])

    def watched(self) -> dict[str, float]:
        """Returns all processes' gap to the trainer, nats per decision or token, and the ratio that corrects it.

        Raises:
            EngineError: from `max_sampling_logp_difference` on: another policy samples than the one being trained.
        """
        found = self._over_processes("sampling/logp_difference", self._gaps)
        ratios = self._over_processes("sampling/importance_sampling_ratio", self._ratios)
        found.pop("sampling/logp_difference/min", None)
        if found:
            self._judge(*found.values())
        return found | ratios

    def _over_processes(self, name: str, noted: list[torch.Tensor]) -> dict[str, float]:
        """Returns mean, max and min of all that was noted, and forgets it; nothing if there is nothing."""
        values = torch.cat([*noted, torch.empty(0, device=self.accelerator.device)]).float()
        noted.clear()
        infinity = values.new_full((1,), torch.inf)
        peak, least = torch.cat([values, -infinity]).max(), torch.cat([values, infinity]).min()
        own = torch.stack([values.sum(), values.new_tensor(len(values)), peak, least])
        total, count, peaks, leasts = self.accelerator.gather(own[None]).unbind(dim=1)
        if not count.sum():
            return {}
        mean = float(total.sum() / count.sum())
        return {f"{name}/mean": mean, f"{name}/max": float(peaks.max()), f"{name}/min": float(leasts.min())}

    def _judge(self, mean: float, peak: float) -> None:
        limit = self.config.max_sampling_logp_difference
        if not mean <= limit:  # below it, `health` warns
            raise EngineError(
                f"vLLM's log-probabilities are {mean:.3g} nats from the trainer's on average, at most {peak:.3g}, per "
                f"decision: not the policy that is being trained. max_sampling_logp_difference is {limit}"
            )

    def close(self) -> None:
        """Stops the engine, or gives the server back."""
        self.engine.close()

    def _sampling(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        known = [r.sampling_logps for r in rollouts if r.sampling_logps is not None]
        return stack(known).to(self.pipeline.model.device)
