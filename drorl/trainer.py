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

import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging
from trl import GRPOTrainer

from .adapters import (
    GENERATOR,
    ROLES,
    SELECTOR,
    load_with_adapters,
)
from .answers import answer_logps
from .checkpoints import AtomicCheckpoints
from .config import DROConfig
from .data.rows import validate_rows
from .errors import InvalidInputError
from .evaluation import Record, aggregate, evaluate_rows
from .losses import LossOutput, Scores, Weighting, clipped_surrogate_loss, weigh, weighted_mle_loss
from .pipeline import Passage, PipelineSettings, RAGPipeline
from .rollouts import Rollout, draw_rollout, read_rollout, stack, sum_over_tokens, text_logps, without_nan

# Every private name of TRL and transformers that is overridden or used here; tests/test_trl_contract.py checks each
# against the installed version, so that an upgrade fails with one clear message.
OVERRIDDEN_TRL_HOOKS = {
    "_generate_and_score_completions": ("inputs",),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "_compute_loss": ("model", "inputs"),
    "_get_train_sampler": ("dataset",),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    "_clip_grad_norm": ("model",),
    "_save": ("output_dir", "state_dict"),
    "create_optimizer": ("model",),
    "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
}
USED_TRL_HOOKS = {"_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "num_generations")}


SUPPORTED_ENGINES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
logger = logging.get_logger(__name__)


def _no_reward(*_: Any, **__: Any) -> list[float]:
    raise NotImplementedError("DROTrainer computes its reward in the M-step; TRL must not ask for it")


class DROTrainer(AtomicCheckpoints, GRPOTrainer):
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

    _tag_names = ["trl", "dro", "drorl"]
    _name = "DRO"
    _paper = {
        "title": "Direct Retrieval-augmented Optimization: Synergizing Knowledge Selection and Language Models",
        "id": "2505.03075",
        "citation": textwrap.dedent("""\
            @article{shi2025direct,
                title        = {{Direct Retrieval-augmented Optimization: Synergizing Knowledge Selection and
                                 Language Models}},
                author       = {Zhengliang Shi and Lingyong Yan and Weiwei Sun and Yue Feng and Pengjie Ren and
                                Xinyu Ma and Shuaiqiang Wang and Dawei Yin and Maarten de Rijke and Zhaochun Ren},
                year         = 2025,
                eprint       = {arXiv:2505.03075},
            }"""),
    }

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
        if self.accelerator.distributed_type not in SUPPORTED_ENGINES:
            raise ValueError(f"{self.accelerator.distributed_type} is not supported: drorl averages gradients itself")
        if generator_model is not None:
            if generator_processing_class is None and generator_tokenizer is None:
                raise ValueError("generator_model is an object: pass its tokenizer as generator_processing_class")
            if args.gradient_checkpointing:  # the Trainer does this for `model` only
                generator_model.enable_input_require_grads()
                generator_model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            generator_model = self.accelerator.unwrap_model(self.accelerator.prepare_model(generator_model))
        self.pipeline = RAGPipeline(
            self.model,
            self.processing_class,
            PipelineSettings.from_config(args),
            generator_model,
            generator_processing_class or generator_tokenizer,
        )
        self.last_records: list[Record] = []
        needed = args.generation_batch_size // args.num_generations
        if len(self.train_dataset) < needed:
            raise InvalidInputError(
                f"one step takes {needed} queries, but train_dataset has {len(self.train_dataset)} rows"
            )
        for index, row in enumerate(self.train_dataset):
            self.pipeline.check_length(index, row["query"], row["candidates"])

    @staticmethod
    def _rows(rows: Dataset | Sequence[Mapping[str, Any]], args: DROConfig) -> Dataset:
        rows, _ = validate_rows(rows, args.num_selected, require_scores=args.retrieval_prior_weight != 0)
        return rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))

    # --------------------------------------------------------------------------------------------------------- E-step
    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The E-step: draws permutations of each query. `inputs` repeats each row m times, as TRL samples them."""
        rows = inputs[:: self.num_generations]
        seed = f"{self.args.seed}/{self.state.global_step}"
        shown = [self.pipeline.present(row["query"], row["candidates"], seed) for row in rows]
        if self.args.constrained:
            rollouts = [draw_rollout(self.pipeline, self.args, *pair) for pair in zip(rows, shown, strict=True)]
        else:
            texts = self._generate_texts(rows, shown)
            rollouts = [read_rollout(self.pipeline, self.args, *t) for t in zip(rows, shown, texts, strict=True)]
        self._log_rollouts(rollouts)
        num_items = torch.stack([r.old_selector_logps.isfinite().sum() for r in rollouts]).sum().float()
        return {
            "row": torch.arange(len(rows)),  # TRL splits the batch along the first tensor
            "rollouts": rollouts,
            "num_items_in_batch": self.accelerator.gather(num_items.to(self.accelerator.device)).sum(),
        }

    def _generate_texts(self, rows: list[dict[str, Any]], shown: list[list[Passage]]) -> list[list[list[int]]]:
        """Samples m texts of each query with TRL's own generation, as tokens."""
        self.pipeline.role(SELECTOR)
        m, prompts = self.num_generations, self.pipeline.prompts
        repeated = [prompts.selector(r["query"], s).ids for r, s in zip(rows, shown, strict=True) for _ in range(m)]
        texts, _ = self._generate_single_turn(repeated, None, {}, m)
        return [texts[i : i + m] for i in range(0, len(texts), m)]

    def _log_rollouts(self, rollouts: list[Rollout]) -> None:
        metrics = {
            "permutations/unique_ratio": [r.unique_ratio for r in rollouts],
            "permutations/valid_rate": [r.valid_rate for r in rollouts],
            "passages/truncated_ratio": [self.pipeline.prompts.truncated_ratio],
        }
        self._log_means({name: torch.tensor(values).mean() for name, values in metrics.items()})

    # --------------------------------------------------------------------------------------------------------- M-step
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One forward and backward pass of each role; the last of an accumulation averages gradients over processes.

        DDP cannot do that: it expects one forward and one backward pass, here are two of each. So the bare models run.
        """
        if self.pipeline.generator_model is not None:
            self.pipeline.generator_model.train()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for p in chain.from_iterable(self._trained_parameters().values()):
                p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The M-step: weighs the permutations, trains the generator, and returns the selector's loss.

        The generator's scores give the weights and its loss in one pass. Its backward pass ends before the selector's
        forward pass begins: their graphs never coexist, and gradient checkpointing, which recomputes with whatever
        adapter is active during backward, recomputes each role under its own.
        """
        args, rollouts = self.args, inputs["rollouts"]
        train_selector, train_generator = args.selector_objective != "none", args.generator_objective != "none"
        selector_logps = self._selector_logps_now(rollouts)
        with torch.set_grad_enabled(torch.is_grad_enabled() and args.generator_objective == "dro"):
            generator_logps = self._generator_logps(rollouts)
        weighting = self._weigh(rollouts, selector_logps, generator_logps.detach())
        metrics = dict(weighting.metrics)
        loss = torch.zeros((), device=self.accelerator.device)
        if train_generator:
            output = self._generator_loss(rollouts, generator_logps, weighting)
            metrics |= {"generator/loss": output.loss, **output.metrics}
            loss = output.loss / self.current_gradient_accumulation_steps + self._touch(GENERATOR)
            if train_selector and torch.is_grad_enabled():
                self.accelerator.backward(loss)
                loss = loss.detach()
        if train_selector:
            output = self._selector_loss(rollouts, weighting, inputs["num_items_in_batch"])
            metrics |= {"selector/loss": output.loss, **output.metrics}
            loss = loss + output.loss / self.current_gradient_accumulation_steps
        self._log_means(metrics)
        return loss

    def _generator_logps(self, rollouts: list[Rollout]) -> torch.Tensor:
        """Returns log p_g(y|x,d_z), `(B, m)`; `-inf` where there is no permutation."""
        generator = self.pipeline.role(GENERATOR)
        scored = [answer_logps(generator, r.contexts, r.answers) for r in rollouts]
        return stack([without_nan(logps) for logps in scored], self.args.device)

    def _generator_loss(
        self, rollouts: list[Rollout], generator_logps: torch.Tensor, weighting: Weighting
    ) -> LossOutput:
        if self.args.generator_objective == "dro":
            return weighted_mle_loss(generator_logps, weighting.importance_weights)
        generator = self.pipeline.role(GENERATOR)
        scored = [answer_logps(generator, [r.supervised_context], r.answers) for r in rollouts]
        logps = stack([without_nan(logps) for logps in scored], self.args.device)
        return weighted_mle_loss(logps, logps.isfinite().to(logps.dtype))

    @property
    def _on_policy(self) -> bool:
        """Whether the selector has not moved since it drew what it is trained on; TRL's condition."""
        args = self.args
        return args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations) == 0

    def _selector_logps_now(self, rollouts: list[Rollout]) -> torch.Tensor:
        """Returns log p_s(z|x,d) under the current selector without gradient, `(B, m)`.

        On-policy these are the E-step's. Otherwise the selector has moved since, and the weights follow it.
        """
        if self._on_policy or self.args.selector_objective == "none":
            return sum_over_tokens(stack([r.old_selector_logps for r in rollouts], self.args.device))
        with torch.no_grad():
            return sum_over_tokens(self._selector_logps(rollouts)[0])

    def _selector_logps(self, rollouts: list[Rollout]) -> tuple[torch.Tensor, dict]:
        """Returns log p_s of each decision or token, `(B, m, T)`, `-inf` in the padding, and metrics."""
        model = self.pipeline.role(SELECTOR)
        if not self.args.constrained:
            logps = [text_logps(model, r.prompt, r.completion_ids or [], self.temperature) for r in rollouts]
            return stack(logps, self.args.device), {}
        policy = self.pipeline.policy
        scored = [policy.permutation_logps(model, r.prompt, r.drawn, r.scores) for r in rollouts]
        entropy = torch.stack([entropies.mean() for _, entropies in scored]).mean()
        return stack([logps for logps, _ in scored], self.args.device), {"selector/entropy": entropy}

    def _selector_loss(self, rollouts: list[Rollout], weighting: Weighting, num_items: torch.Tensor) -> LossOutput:
        token_logps, metrics = self._selector_logps(rollouts)
        if self.args.selector_objective == "dro":
            output = weighted_mle_loss(sum_over_tokens(token_logps), weighting.advantages)
        else:
            output = self._surrogate(token_logps, rollouts, weighting, num_items)
        return LossOutput(output.loss, metrics | output.metrics)

    def _surrogate(
        self, token_logps: torch.Tensor, rollouts: list[Rollout], weighting: Weighting, num_items: torch.Tensor
    ) -> LossOutput:
        mask = token_logps.isfinite()
        old = token_logps.detach()  # on-policy the ratio is exactly 1, as in TRL
        if not self._on_policy:
            old = stack([r.old_selector_logps for r in rollouts], self.args.device)
        return clipped_surrogate_loss(
            token_logps.masked_fill(~mask, 0.0),
            old.masked_fill(~mask, 0.0),
            mask,
            weighting.advantages,
            self.epsilon_low,
            self.epsilon_high,
            self.loss_type,
            # TRL counts the tokens of the generation batch; this call is one of its `steps_per_generation` parts.
            num_items.clamp(min=1) / self.accelerator.num_processes / self.args.steps_per_generation,
            self.max_completion_length,
        )

    def _weigh(
        self, rollouts: list[Rollout], selector_logps: torch.Tensor, generator_logps: torch.Tensor
    ) -> Weighting:
        args = self.args
        proposal_logps = sum_over_tokens(stack([r.proposal_logps for r in rollouts], self.args.device))
        scores = Scores(generator_logps, selector_logps, proposal_logps)
        objective = "dro" if args.selector_objective == "none" else args.selector_objective
        weighting = weigh(scores, objective, args.weight_temperature, args.baseline, args.scale_rewards)
        if skipped := int((~scores.valid.any(dim=-1)).sum()):
            logger.warning(f"{skipped} queries skipped: no sample of theirs has a finite answer likelihood")
        return weighting

    def _touch(self, role: str) -> torch.Tensor:
        """A zero that depends on the role's adapter: a loss keeps its graph though no sample is valid."""
        return torch.stack([0.0 * p.sum() for p in self._trained_parameters()[role]]).sum()

    def _log_means(self, metrics: dict[str, torch.Tensor]) -> None:
        """Logs each scalar's mean over processes."""
        mode = "train" if self.model.training else "eval"
        values = torch.stack([v.detach().float().to(self.accelerator.device) for v in metrics.values()])
        for name, value in zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True):
            self._metrics[mode][name].append(value)

    # ------------------------------------------------------------------------------------------------------ evaluation
    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Returns exact match, F1, recall@k and the bound `iw_elbo` of the whole system, decoded greedily.

        The records of the questions stay in `last_records`, in the order of the rows.
        """
        rows = self.eval_dataset if eval_dataset is None else self._rows(eval_dataset, self.args)
        if rows is None:
            raise ValueError("evaluate() needs an eval_dataset")
        mode = "train" if self.model.training else "eval"
        self.model.eval()  # `log` names the metrics after the mode
        self.last_records = evaluate_rows(
            self.pipeline, rows, answer_target=self.args.answer_target, num_samples=self.args.num_generations
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in aggregate(self.last_records).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(mode == "train")
        return metrics

    # ------------------------------------------------------------------------------------------ optimizer, checkpoints
    def _trained_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters of each role that is trained."""
        objectives = {SELECTOR: self.args.selector_objective, GENERATOR: self.args.generator_objective}
        return {role: self.pipeline.parameters(role) for role, objective in objectives.items() if objective != "none"}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the optimizer with one parameter group per trained role, each with its own learning rate."""
        if self.optimizer is None:
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rates = {SELECTOR: self.args.learning_rate, GENERATOR: self.args.generator_learning_rate}
            groups = [
                {
                    "params": parameters,
                    "lr": self.args.learning_rate if rates[role] is None else rates[role],
                    "weight_decay": self.args.weight_decay,
                }
                for role, parameters in self._trained_parameters().items()
            ]
            self.optimizer = optimizer_cls(groups, **kwargs)
        # The Trainer zeroes the gradients of `self.model` only; a separate generator is not part of it.
        self.optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clips each role by itself, so that one's large gradient does not shrink the other's."""
        self.accelerator.unscale_gradients()
        roles = self._trained_parameters().values()
        norms = [nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm) for parameters in roles]
        return torch.stack(norms).norm()
