r"""The DRO trainer: GRPO's loop with another weight and a second learner.

One optimization step is

    E-step  `_generate_and_score_completions`   the selector draws m permutations of each query
    M-step  `_compute_loss`                     the generator scores the gold answer under each, the scores become
                                                weights (losses.weigh -> weights.py), and the weights train the
                                                generator (Eq. 11) from the same pass, then the selector (Eq. 10)

Differences from the paper (https://huggingface.co/papers/2505.03075): both steps alternate per batch, as in TRL,
instead of once per pass over the data, and the weights follow both models as they move; adapters instead of full
models; the policy is constrained to valid permutations unless `constrained=False`.

Shapes: B queries, m permutations of each, K chosen, T decisions (constrained: K) or tokens (free text).
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from .adapters import GENERATOR, ROLES, SELECTOR, load_with_adapters
from .backends import backend_of, refuse_dropout
from .config import DROConfig
from .data.rows import validate_rows
from .engines.sampler import sampler_for
from .errors import InvalidInputError
from .losses import WEIGHTED, LossOutput, Scores, Weighting, clipped_surrogate_loss, weigh, weighted_mle_loss
from .pipeline import PipelineSettings, RAGPipeline
from .ppo import ValueHead, ppo_loss
from .records import Record
from .rollouts import (
    Question,
    Rollout,
    SelectorScores,
    answer_logps_of,
    batches,
    compare_with_reference,
    draw_rollouts,
    read_rollout,
    remember,
    rewards_of,
    score_selector,
    stack,
    stacked,
    stacked_sums,
    sum_over_tokens,
)
from .states import checkpoints_gradients
from .two_roles import TwoRoleTrainer, trl_without, with_whole_models

logger = logging.get_logger(__name__)


def _no_reward(*_: Any, **__: Any) -> list[float]:
    raise NotImplementedError("DROTrainer computes its reward in the M-step; TRL must not ask for it")


class DROTrainer(TwoRoleTrainer):
    r"""Trains a selector and a generator jointly with Direct Retrieval-augmented Optimization.

    $$\mathcal{L} = -\sum_i w_i \log p_s(z_i|x,d) \;-\; \sum_i w_i \log p_g(y|x,d_{z_i}), \qquad
      w_i = \frac{p_g(y|x,d_{z_i})}{\sum_j p_g(y|x,d_{z_j})}$$

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): base of the selector (and of the generator, unless
            `generator_model` is given). A `PeftModel` brings its adapters, named `selector` and `generator`.
        args ([`DROConfig`]): settings.
        train_dataset (`Dataset` or list of rows): rows `query`, `answers`, `candidates` (list of `{id, title, text}`,
            in the retriever's order, with `score` for a retrieval prior).
        eval_dataset (`Dataset`, *optional*): rows of the same form.
        processing_class (`PreTrainedTokenizerBase`, *optional*): tokenizer; default: the one saved beside the model.
        generator_model (`str`, `PreTrainedModel` or `PeftModel`, *optional*): a separate base for the generator.
        generator_processing_class (`PreTrainedTokenizerBase`, *optional*): its tokenizer.
        peft_config (`LoraConfig`, *optional*): default: rank 16, alpha 32, all linear layers.
        callbacks, optimizers: as in `transformers.Trainer`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: DROConfig,
        train_dataset: Dataset | Sequence[Mapping[str, Any]],
        eval_dataset: Dataset | Sequence[Mapping[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        generator_model: str | PreTrainedModel | PeftModel | None = None,
        generator_processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
    ):
        torch.manual_seed(args.seed)  # adapters are initialised at random
        roles = ROLES if generator_model is None else (SELECTOR,)
        model, tokenizer = load_with_adapters(model, roles, peft_config, args.model_init_kwargs)
        generator_tokenizer = None
        if generator_model is not None:
            generator_model, generator_tokenizer = load_with_adapters(
                generator_model, (GENERATOR,), peft_config, args.model_init_kwargs
            )
        with trl_without(args, use_vllm=False, beta=0.0):
            super().__init__(
                model=model,
                reward_funcs=_no_reward,
                args=args,
                train_dataset=self._rows(train_dataset, args),
                eval_dataset=None if eval_dataset is None else self._rows(eval_dataset, args),
                processing_class=processing_class or tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self.beta = args.beta
        if generator_model is not None:
            if generator_processing_class is None and generator_tokenizer is None:
                raise ValueError("generator_model is an object: pass its tokenizer as generator_processing_class")
            generator_model = self._prepared(generator_model)
        self.pipeline = RAGPipeline(
            self.model,
            self.processing_class,
            PipelineSettings.from_config(args),
            generator_model,
            generator_processing_class or generator_tokenizer,
        )
        self._shard()
        if args.selector_objective == "ppo":
            self.pipeline.critic = ValueHead(self.model.config.get_text_config().hidden_size).to(self.model.device)
        self.last_records: list[Record] = []
        self._sums = {}
        with self.pipeline.gathered():
            for module in self.pipeline.models:
                refuse_dropout(module)
                backend_of(module)  # how prefixes are shared is found out, and logged, before the first step
        needed = args.generation_batch_size // args.num_generations
        if len(self.train_dataset) < needed:
            raise InvalidInputError(
                f"one step takes {needed} queries, but train_dataset has {len(self.train_dataset)} rows"
            )
        for index, row in enumerate(self.train_dataset):
            self.pipeline.check_length(index, row["query"], row["candidates"])
        with self.pipeline.gathered():
            self.sampler = sampler_for(args, self.pipeline, self.accelerator, self.train_dataset)

    @staticmethod
    def _rows(rows: Dataset | Sequence[Mapping[str, Any]], args: DROConfig) -> Dataset:
        rows, _ = validate_rows(rows, args.num_selected, require_scores=args.retrieval_prior_weight != 0)
        return rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))

    # --------------------------------------------------------------------------------------------------------- E-step
    @property
    def _on_policy(self) -> bool:
        """Whether the selector has not moved since it drew what it is trained on; TRL's condition."""
        args = self.args
        return args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations) == 0

    @property
    def _one_pass(self) -> bool:
        """Whether the M-step keeps the selector's graph while the generator has its own.

        Then no prompt is encoded twice. Where memory is short (`max_tokens_per_forward`, gradient checkpointing, FSDP)
        each graph is gone before the next one is built, and what comes first is computed without one.
        """
        short = self.args.max_tokens_per_forward is not None or any(map(checkpoints_gradients, self.pipeline.models))
        return not (short or self.is_sharded)

    @torch.no_grad()
    @with_whole_models
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The E-step: draws permutations of each query. `inputs` repeats each row m times, as TRL samples them.

        On policy and in one pass the M-step draws them instead, from the states that it then trains on.
        """
        rows = inputs[:: self.num_generations]
        order = f"{self.args.seed}/{self.state.global_step}"
        shown = [self.pipeline.present(row["query"], row["candidates"], order) for row in rows]
        # TRL samples free text, and nothing else may take from its randomness.
        by_trl = not self.args.constrained and self.sampler is None
        seeds = [0] * len(rows) if by_trl else torch.randint(2**62, (len(rows),)).tolist()
        questions = [Question(*question) for question in zip(rows, shown, seeds, strict=True)]
        rollouts, num_items = None, len(rows) * self.num_generations * self.args.num_selected
        if self.sampler is not None:
            rollouts = self.sampler.draw(questions)
            num_items = sum(r.num_items for r in rollouts)
        elif not self.args.constrained:
            texts = self._generate_texts(questions)
            rollouts = [read_rollout(self.pipeline, self.args, *q) for q in zip(questions, texts, strict=True)]
            num_items = sum(r.num_items for r in rollouts)
        elif not (self._on_policy and self._one_pass):
            apart = self.args.max_tokens_per_forward is not None
            together = [[question] for question in questions] if apart else [questions]
            with self.pipeline.evaluating():  # in training, gradient checkpointing would throw the states away
                rollouts = [r for group in together for r in draw_rollouts(self.pipeline, self.args, group)[0]]
        if rollouts is not None and not self._on_policy:
            groups = list(batches(rollouts, self.args.max_tokens_per_forward))
            if self.sampler is not None or not self.args.constrained:
                groups = [remember(self.pipeline, self.args, group) for group in groups]
            if self.beta:
                groups = [compare_with_reference(self.pipeline, self.args, group) for group in groups]
            rollouts = [r for group in groups for r in group]
        count = torch.tensor(float(num_items), device=self.accelerator.device)
        return {
            "row": torch.arange(len(rows)),  # TRL splits the batch along the first tensor
            "questions": questions,
            "rollouts": rollouts,
            "num_items_in_batch": self.accelerator.gather(count).sum(),
        }

    # --------------------------------------------------------------------------------------------------------- M-step
    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The M-step: weighs the permutations, trains both roles, and returns the last loss for its backward pass."""
        rollouts, scored = inputs["rollouts"], None
        if rollouts is None:
            train_selector = self.args.selector_objective != "none"
            with torch.set_grad_enabled(torch.is_grad_enabled() and train_selector):
                rollouts, decisions = draw_rollouts(self.pipeline, self.args, inputs["questions"])
                if train_selector:
                    scored = score_selector(self.pipeline, self.args, rollouts, decisions)
                del decisions  # and the keys and values that drawing has made
        described = {
            "permutations/unique_ratio": fmean(r.unique_ratio for r in rollouts),
            "permutations/valid_rate": fmean(r.valid_rate for r in rollouts),
            "passages/truncated_ratio": self.pipeline.prompts.truncated_ratio,
        }
        items = torch.tensor(float(sum(r.num_items for r in rollouts)))
        if self.loss_type == "dapo":  # TRL counts the generation batch of all processes, of which this is a part
            items = inputs["num_items_in_batch"] / self.accelerator.num_processes / self.args.steps_per_generation
        loss = torch.zeros((), device=self.accelerator.device)
        counted: list[tuple[LossOutput, int]] = []
        for batch, share in self._in_step(rollouts):
            if loss.requires_grad:
                self.accelerator.backward(loss)
            output = self._batch_loss(batch, scored, share, (share or 1.0) * items.clamp(min=1))
            loss = output.loss + loss.detach()
            counted.append((output, len(batch) if share else 0))
        self._log_means(counted, described)
        return loss

    def _batch_loss(
        self, rollouts: list[Rollout], scored: SelectorScores | None, share: float, num_items: torch.Tensor
    ) -> LossOutput:
        """Trains the generator on a batch of queries, and returns the selector's loss on them.

        The generator's scores give the weights and its loss in one pass. Where memory is short, its backward pass ends
        before the selector's forward pass begins; gradient checkpointing needs that too, since it recomputes with
        whatever adapter is active during backward.

        Args:
            rollouts (`list` of [`Rollout`]): the batch.
            scored ([`SelectorScores`], *optional*): the selector's, where they are known already.
            share (`float`): of the micro-batch's queries that are in this batch.
            num_items (`torch.Tensor`): this batch's share of the decisions or tokens of the micro-batch.
        """
        args = self.args
        train_selector, train_generator = args.selector_objective != "none", args.generator_objective != "none"
        if scored is None and train_selector and self._one_pass:
            scored = score_selector(self.pipeline, self.args, rollouts)
        selector_logps = self._selector_logps_now(rollouts, scored)
        correction = None
        if self.sampler is not None and selector_logps is not None:
            old = self._old_selector_logps(rollouts, selector_logps)
            correction = self.sampler.correction(rollouts, old)
            self.sampler.watch(rollouts, old, correction)
        generator_logps = self._generator_logps(rollouts)
        # A surrogate's loss is corrected itself; there a sample that is masked stays in its group, as in TRL.
        in_weights = correction if args.selector_objective in (*WEIGHTED, "none") else None
        weighting = self._weigh(rollouts, selector_logps, generator_logps.detach(), in_weights)
        weighting = self._watched(rollouts, weighting)
        loss, metrics = torch.zeros((), device=self.args.device), dict(weighting.metrics)
        counts, scale = dict(weighting.counts), 1 / self.current_gradient_accumulation_steps
        if train_generator:
            output = self._generator_loss(rollouts, generator_logps, weighting)
            metrics |= {"generator/loss": output.loss, **output.metrics}
            loss = scale * share * output.loss
            if train_selector and torch.is_grad_enabled():
                self.accelerator.backward(loss)
                loss = loss.detach()
        if train_selector:
            if self.beta and rollouts[0].reference_logps is None:
                rollouts = compare_with_reference(self.pipeline, self.args, rollouts)
            scored = scored or score_selector(self.pipeline, self.args, rollouts)
            output = self._selector_loss(rollouts, scored, weighting, num_items, correction)
            metrics |= {"selector/loss": output.loss, **output.metrics, **scored.metrics}
            counts |= output.counts
            loss = loss + scale * share * output.loss
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()}, counts)

    @property
    def _threshold(self) -> float:
        """`min_importance_weight`; a single permutation has weight 1 and `elbo` no such weights: nothing to spare."""
        weighted = self.num_generations > 1 and self.args.generator_objective == "dro"
        return self.args.min_importance_weight if weighted else 0.0

    def _generator_logps(self, rollouts: list[Rollout]) -> torch.Tensor:
        """Returns log p_g(y|x,d_z), `(B, m)`; `-inf` where there is no permutation.

        With gradient if these scores are also what the generator is trained on, all of them.
        """
        trained = self.args.generator_objective in ("dro", "elbo") and self._threshold == 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return answer_logps_of(self.pipeline, rollouts, [r.contexts for r in rollouts])

    def _generator_loss(
        self, rollouts: list[Rollout], generator_logps: torch.Tensor, weighting: Weighting
    ) -> LossOutput:
        if self.args.generator_objective == "sft":
            logps = answer_logps_of(self.pipeline, rollouts, [[r.supervised_context] for r in rollouts])
            return weighted_mle_loss(logps, logps.isfinite().to(logps.dtype))
        weights = weighting.prior_weights if self.args.generator_objective == "elbo" else weighting.importance_weights
        if (threshold := self._threshold) > 0:  # the scores had no graph: what counts is scored again, with one
            kept = [
                [context if weight >= threshold else None for context, weight in zip(r.contexts, row, strict=False)]
                for r, row in zip(rollouts, weights.tolist(), strict=True)
            ]
            generator_logps = answer_logps_of(self.pipeline, rollouts, kept)
            weights = weights.masked_fill(weights < threshold, 0.0)
        return weighted_mle_loss(generator_logps, weights)

    def _selector_logps_now(self, rollouts: list[Rollout], scored: SelectorScores | None) -> torch.Tensor | None:
        """Returns log p_s under the current selector without gradient, `(B, m, T)`; `None`: nothing depends on it.

        On policy these are the E-step's. Otherwise the selector has moved since, and the weights follow it. An
        engine's are not the trainer's own, and are compared with these though the selector is frozen.
        """
        if scored is not None:
            return scored.token_logps.detach()
        known = [r.old_selector_logps for r in rollouts if r.old_selector_logps is not None]
        if self.sampler is None and (self._on_policy or self.args.selector_objective == "none"):
            return stack(known).to(self.args.device) if len(known) == len(rollouts) else None
        with torch.no_grad():
            return score_selector(self.pipeline, self.args, rollouts).token_logps

    def _old_selector_logps(self, rollouts: list[Rollout], token_logps: torch.Tensor) -> torch.Tensor:
        """Returns log p_s when the permutations were drawn, `(B, m, T)`, given what it is now."""
        if self._on_policy:
            return token_logps.detach()  # the ratio is exactly 1, as in TRL
        known = [r.old_selector_logps for r in rollouts if r.old_selector_logps is not None]
        return stack(known).to(self.args.device)[..., : token_logps.shape[-1]]  # remembered in larger groups

    def _selector_loss(
        self,
        rollouts: list[Rollout],
        scored: SelectorScores,
        weighting: Weighting,
        num_items: torch.Tensor,
        correction: torch.Tensor | None,
    ) -> LossOutput:
        args, logps = self.args, scored.token_logps
        if args.selector_objective in WEIGHTED:
            return weighted_mle_loss(sum_over_tokens(logps), weighting.advantages)
        mask = logps.isfinite()
        old, reference = self._old_selector_logps(rollouts, logps), stacked([r.reference_logps for r in rollouts])
        surrogate: dict[str, Any] = {
            "epsilon_low": self.epsilon_low,
            "epsilon_high": self.epsilon_high,
            "loss_type": self.loss_type,
            "num_items": num_items,
            "max_completion_length": self.max_completion_length,
            "sampling_ratio": None if correction is None else correction.exp(),
            "reference_logps": None if reference is None else reference[..., : logps.shape[-1]],
            "beta": self.beta,
        }
        if scored.values is not None:
            known = stacked([r.old_values for r in rollouts])
            old_values = scored.values.detach() if self._on_policy or known is None else known.to(scored.values)
            rewards = self._standardised(rollouts, weighting.rewards)
            states = logps, scored.values, old, old_values
            return ppo_loss(*states, rewards, mask, vf_coef=args.vf_coef, **surrogate)
        logps, old = logps.masked_fill(~mask, 0.0), old.masked_fill(~mask, 0.0)
        return clipped_surrogate_loss(logps, old, mask, weighting.advantages, **surrogate)

    def _weigh(
        self,
        rollouts: list[Rollout],
        token_logps: torch.Tensor | None,
        generator_logps: torch.Tensor,
        correction: torch.Tensor | None,
    ) -> Weighting:
        args = self.args
        selector_logps = torch.zeros_like(generator_logps) if token_logps is None else sum_over_tokens(token_logps)
        if self.sampler is not None:
            old = token_logps if token_logps is None else self._old_selector_logps(rollouts, token_logps)
            old_logps = selector_logps if old is None else sum_over_tokens(old)
            proposal_logps = old_logps - self.sampler.log_ratio(rollouts, correction)
        else:
            # Drawn from the policy itself, its own probabilities are q, without the rounding of another pass.
            own = self._on_policy and args.proposal == "policy" and args.proposal_temperature == 1.0
            proposal_logps = None if own else stacked_sums([r.proposal_logps for r in rollouts], args.device)
            proposal_logps = selector_logps if proposal_logps is None else proposal_logps
        rewards = rewards_of(self.pipeline, args.reward, rollouts, generator_logps)
        scores = Scores(generator_logps, selector_logps, proposal_logps, rewards)
        # PPO's advantages are those of decisions, and a critic's.
        objective = "dro" if args.selector_objective in ("none", "ppo") else args.selector_objective
        weighting = weigh(scores, objective, args.weight_temperature, args.baseline, args.scale_rewards)
        if skipped := int((~scores.valid.any(dim=-1)).sum()):
            logger.warning(f"{skipped} queries skipped: no sample of theirs has a finite answer likelihood")
        return weighting
