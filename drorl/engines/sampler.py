"""Permutations drawn by an engine for the trainer, and the watch that it is the trainer's own policy which draws."""

import importlib.util
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from drorl.adapters import SELECTOR
from drorl.config import DROConfig
from drorl.pipeline import RAGPipeline
from drorl.rollouts import Question, Rollout, draw_rollouts, read_rollout, stack, sum_over_tokens
from drorl.weights import log_sampling_ratio

from .base import Engine, EngineDecisions, EngineError
from .delivery import Adapter

logger = logging.get_logger(__name__)
_WARN = 0.2  # of the gap at which a run stops


def choose_backend(config: DROConfig) -> tuple[str, str]:
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
    return "vllm", "free text is decoded token by token, where it is faster (measured on a CPU, not on a GPU)"


def start_engine(config: DROConfig, pipeline: RAGPipeline, accelerator: Accelerator) -> Engine:
    """Returns the engine that TRL's `vllm_*` settings describe.

    Raises:
        EngineError: if it does not start, cannot be reached, or has another base.
    """
    base, model = pipeline.model.get_base_model().name_or_path, pipeline.model
    if config.vllm_mode == "server":
        from .remote import RemoteEngine

        url = config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"
        client = broadcast_object_list([uuid.uuid4().hex[:12]])[0]  # one trainer, however many processes it has
        return RemoteEngine(url, base, config.vllm_server_timeout, client)
    from .vllm import LocalEngine

    if accelerator.num_processes > 1:
        raise EngineError("vllm_mode=colocate samples for one process; with several use vllm_mode=server")
    return LocalEngine(
        base,
        model.dtype,
        model.peft_config[SELECTOR].r,
        config.vllm_max_model_length,
        config.vllm_gpu_memory_utilization,
        seed=config.seed + accelerator.process_index,
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

    def sync(self) -> str:
        """Gives the engine the selector as it is, and returns the version."""
        adapter = Adapter.of(self.pipeline.model, SELECTOR)
        if self.config.vllm_mode == "colocate" or self.accelerator.is_main_process:
            self.engine.deliver(adapter)
        self.accelerator.wait_for_everyone()
        return adapter.version

    def draw(self, questions: Sequence[Question]) -> list[Rollout]:
        """Draws permutations of each question from the selector as it is.

        Raises:
            EngineError: if the engine is lost, or has drawn with another adapter.
        """
        version = self.sync()
        rollouts = self._constrained(questions, version) if self.config.constrained else self._free(questions, version)
        self.refuse_stale(rollouts)
        return rollouts

    def refuse_stale(self, rollouts: Sequence[Rollout]) -> None:
        """Checks that rollouts were drawn with the selector as it is.

        Raises:
            EngineError: if one was not.
        """
        current = Adapter.of(self.pipeline.model, SELECTOR).version
        for rollout in rollouts:
            if rollout.version != current:
                raise EngineError(f"a rollout was drawn by {rollout.version}, and the trainer is at {current}")

    def _constrained(self, questions: Sequence[Question], version: str) -> list[Rollout]:
        decide = partial(EngineDecisions, self.pipeline.policy, self.engine, version)
        rollouts, _ = draw_rollouts(self.pipeline, self.config, questions, decide)
        # What the policy's probabilities are by the trainer's own model is for the trainer to say.
        return [
            replace(r, sampling_logps=r.old_selector_logps, old_selector_logps=None, version=version) for r in rollouts
        ]

    def _free(self, questions: Sequence[Question], version: str) -> list[Rollout]:
        config, prompts, m = self.config, self.pipeline.prompts, self.config.num_generations
        repeated = [prompts.selector(q.row["query"], q.shown).ids for q in questions for _ in range(m)]
        length, end_id = config.max_completion_length, prompts.end_id
        seeds = [q.seed + i for q in questions for i in range(m)]
        texts = self.engine.generate(version, repeated, length, end_id, config.selector_temperature, seeds)
        rollouts = []
        for i, question in enumerate(questions):
            drawn = texts[i * m : (i + 1) * m]
            logps = stack([torch.tensor(text.logps) for text in drawn])
            given = {"sampling_logps": logps, "proposal_logps": logps, "version": version}
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

    def watch(self, rollouts: Sequence[Rollout], token_logps: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns how far the engine's log-probabilities are from the trainer's, nats per decision or token.

        Raises:
            EngineError: from `max_sampling_logp_difference` on: another policy samples than the one being trained.
        """
        sampling, limit = self._sampling(rollouts), self.config.max_sampling_logp_difference
        where = sampling.isfinite()
        gaps = (token_logps[..., : sampling.shape[-1]] - sampling)[where].abs()
        if not len(gaps):
            return {}
        mean, peak = gaps.mean(), gaps.max()
        if not mean <= _WARN * limit:
            text = (
                f"vLLM's log-probabilities are {float(mean):.3g} nats from the trainer's on average, at most "
                f"{float(peak):.3g}, per decision"
            )
            if not mean <= limit:
                raise EngineError(
                    f"{text}: not the policy that is being trained. max_sampling_logp_difference is {limit}"
                )
            logger.warning(text)
        return {"sampling/logp_difference/mean": mean, "sampling/logp_difference/max": peak}

    def _sampling(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        known = [r.sampling_logps for r in rollouts if r.sampling_logps is not None]
        return stack(known).to(self.pipeline.model.device)
