"""What the Trainer does for one model, done for two roles: gradients, optimizer, clipping, evaluation, logs."""

import resource
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import TrainOutput
from trl import GRPOConfig
from trl.trainer.utils import disable_dropout_in_model

from .adapters import GENERATOR, SELECTOR
from .checkpoints import AtomicCheckpoints
from .engines.base import EngineError
from .engines.sampler import EngineSampler
from .errors import InvalidInputError
from .evaluation import evaluate_rows
from .health import HealthCallback, probe_interval, reads_context
from .inspection import Weighed, weighed
from .losses import LossOutput, Weighting
from .pipeline import RAGPipeline
from .ppo import moments_of
from .records import Record, aggregate
from .rollouts import Question, Rollout, batches
from .sharding import most, shard, wants_sharding
from .zero import HandedOver, check_zero

Method = TypeVar("Method", bound=Callable[..., Any])


def peak_memory() -> float:
    """Returns the most memory that was in use so far, GiB: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


@contextmanager
def trl_without(config: GRPOConfig, **settings: Any) -> Generator[None]:
    """TRL's trainer is built as if it had these settings: what it would do for them, drorl does in another way.

    Its vLLM engine would merge the adapter into the base and take it out again, its reference is a copy of an adapter
    `default`.
    """
    wanted = {name: getattr(config, name) for name in settings}
    vars(config).update(settings)
    try:
        yield
    finally:
        vars(config).update(wanted)


def with_whole_models(method: Method) -> Method:
    """Makes a method of a trainer one in which each process may make as many passes as it likes; no gradient."""

    @wraps(method)
    def run(self: "TwoRoleTrainer", *args: Any, **kwargs: Any) -> Any:
        with self.pipeline.gathered():
            return method(self, *args, **kwargs)

    return cast(Method, run)


class TwoRoleTrainer(AtomicCheckpoints):
    """A trainer of the selector and the generator in `pipeline`, each with its own loss and learning rate."""

    pipeline: RAGPipeline
    sampler: EngineSampler | None
    is_sharded = False
    last_records: list[Record]
    _sums: dict[str, torch.Tensor]
    """Of each metric, since the step began: its sum, and what it was counted on."""
    _drawn: tuple[int, dict[int, tuple[Rollout, Weighting, int]]] = (0, {})
    """The step, and its rollouts so far, each once, with the weighting that it has a place in."""

    def create_accelerator_and_postprocess(self) -> None:
        """As in `transformers.Trainer`, under the engines that drorl runs under.

        Raises:
            InvalidInputError: under another.
        """
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = wants_sharding(self.accelerator)
        if self.is_deepspeed_enabled:
            check_zero(self.accelerator, self.args)

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.health = HealthCallback(self.args)
        if self.args.on_unhealthy != "ignore":
            self.add_callback(self.health)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in `transformers.Trainer`.

        Raises:
            UnhealthyError: with `on_unhealthy="stop"`, if the run was stopped; it is saved.
        """
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self.health.check(self.state)
        return output

    def _prepared(self, generator_model: PeftModel) -> PeftModel:
        """Does for a separate generator what TRL and the Trainer do for `model` only.

        Raises:
            InvalidInputError: under DeepSpeed, which has one model.
        """
        if self.is_deepspeed_enabled:
            raise InvalidInputError(
                "drorl does not run under DeepSpeed with a separate generator_model: use recipes/accelerate/ddp.yaml"
            )
        if self.args.disable_dropout:
            disable_dropout_in_model(generator_model)
        if self.args.gradient_checkpointing:
            generator_model.enable_input_require_grads()
            generator_model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        if self.is_fsdp_enabled:
            return generator_model
        return self.accelerator.unwrap_model(self.accelerator.prepare_model(generator_model))

    def _shard(self) -> None:
        """Cuts the bases up where FSDP is asked for. Adapters are as under DDP then, and so is all the rest."""
        if self.is_fsdp_enabled:
            for model in self.pipeline.models:
                shard(model, self.accelerator)
            self.is_sharded, self.is_fsdp_enabled = True, False

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        """As in `transformers.Trainer`; a model that is cut up is ready, and accelerate would want the optimizer's."""
        if self.is_deepspeed_enabled:
            return self._prepare_zero(max_steps, train_dataloader, resume_from_checkpoint)
        if not self.is_sharded:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._created_lr_scheduler:  # by an earlier call
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.optimizer = self.accelerator.prepare_optimizer(self.create_optimizer())
        self.create_scheduler(num_training_steps=max_steps)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        handler = self.callback_handler
        handler.optimizer, handler.lr_scheduler = self.optimizer, self.lr_scheduler
        handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    def _prepare_zero(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        """As in `transformers.Trainer`; DeepSpeed's engine is for checkpoints and steps, and the bare model runs.

        Raises:
            InvalidInputError: the second time, since an engine cannot be made of what has one.
        """
        if isinstance(self.optimizer, HandedOver):
            raise InvalidInputError("under DeepSpeed a trainer trains once: make another one")
        self.pipeline.role(SELECTOR)  # both adapters have a gradient then, and DeepSpeed leaves out what has none
        if resume_from_checkpoint is not None:  # the Trainer would leave it to DeepSpeed, which knows no reference
            self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        trained = [*chain.from_iterable(self._parameter_groups().values())]
        self.optimizer = HandedOver(self.optimizer, self.deepspeed, trained)
        self.accelerator.deepspeed_engine_wrapped = self.callback_handler.optimizer = self.optimizer
        return prepared

    def _in_step(self, rollouts: list[Rollout]) -> list[tuple[list[Rollout], float]]:
        """Returns batches of rollouts, and each one's share of the queries.

        A process with fewer of them than others has its last one again, for nothing, where all pass together.
        """
        groups = list(batches(rollouts, self.args.max_tokens_per_forward))
        again = max(most(len(groups), model) for model in self.pipeline.models) - len(groups)
        return [(group, len(group) / len(rollouts)) for group in groups] + again * [(groups[-1], 0.0)]

    def _trained_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters of each role that is trained."""
        objectives = {SELECTOR: self.args.selector_objective, GENERATOR: self.args.generator_objective}
        return {role: self.pipeline.parameters(role) for role, objective in objectives.items() if objective != "none"}

    def _parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns what is stepped and clipped as one: each trained role, and PPO's critic."""
        critic = self.pipeline.critic
        return self._trained_parameters() | ({} if critic is None else {"critic": list(critic.parameters())})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the optimizer with one parameter group per trained role, each with its own learning rate."""
        if self.optimizer is None:
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decay = self.args.weight_decay
            groups = {n: {"params": p, "weight_decay": decay} for n, p in self._parameter_groups().items()}
            if GENERATOR in groups and self.args.generator_learning_rate is not None:
                groups[GENERATOR]["lr"] = self.args.generator_learning_rate
            self.optimizer = optimizer_cls(list(groups.values()), **kwargs)
        # The Trainer zeroes the gradients of `self.model` only; a separate generator is not part of it.
        if not isinstance(self.optimizer, AcceleratedOptimizer):  # as it is when training goes on: it has the hook
            self.optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clips each role, and the critic, by itself, so that one's large gradient does not shrink another's."""
        self.accelerator.unscale_gradients()
        groups = self._parameter_groups().values()
        norms = [nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm) for parameters in groups]
        return torch.stack(norms).norm()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One forward and backward pass of each role; the last of an accumulation averages gradients over processes.

        DDP cannot do that: it expects one forward and one backward pass, here are two of each. So the bare models run.
        """
        if self.pipeline.generator_model is not None:
            self.pipeline.generator_model.train()
        with self.saving_on(EngineError):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for p in chain.from_iterable(self._parameter_groups().values()):
                p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
        return loss

    def _generate_texts(self, questions: list[Question]) -> list[list[list[int]]]:
        """Samples m texts of each query with TRL's own generation, as tokens."""
        self.pipeline.role(SELECTOR)
        m, prompts = self.num_generations, self.pipeline.prompts
        repeated = [prompts.selector(q.row["query"], q.shown).ids for q in questions for _ in range(m)]
        texts, _ = self._generate_single_turn(repeated, None, {}, m)
        return [texts[i : i + m] for i in range(0, len(texts), m)]

    def _standardised(self, rollouts: list[Rollout], rewards: torch.Tensor) -> torch.Tensor:
        """Returns PPO's rewards as its critic learns them, `(B, m)`; each rollout is counted once."""
        assert self.pipeline.critic is not None
        new = torch.tensor(["counted" not in rollout.seen for rollout in rollouts])
        for rollout in rollouts:
            rollout.seen["counted"] = torch.ones(())
        counted = self.accelerator.reduce(moments_of(rewards[new.to(rewards.device)]), "sum")
        return self.pipeline.critic.standardised(rewards, counted)

    def _watched(self, rollouts: list[Rollout], weighting: Weighting) -> Weighting:
        """Keeps what was drawn, and adds to its metrics, now and then, whether the generator reads its passages."""
        step, drawn = self._drawn
        batch = {id(rollout): (rollout, weighting, index) for index, rollout in enumerate(rollouts)}
        self._drawn = self.state.global_step, (drawn if step == self.state.global_step else {}) | batch
        due = (self.state.global_step + 1) % probe_interval(self.args) == 0
        # Where the base is sharded every process has to make the same passes, and a probe may find none to make.
        if self.args.on_unhealthy == "ignore" or self.is_sharded or not due:
            return weighting
        asked = self.train_dataset, self.state.global_step
        logps, prior = weighting.scores.generator_logps, weighting.prior_weights
        gain, count = reads_context(self.pipeline, rollouts, logps, prior, *asked)
        # Also where nothing counts: processes add their metrics up, so each has to have the same.
        metrics = weighting.metrics | {"generator/reads_context": gain}
        return replace(weighting, metrics=metrics, counts=weighting.counts | {"generator/reads_context": count})

    @property
    def samples(self) -> list[Weighed]:
        """What this process has drawn in its last step, and what it was worth: one entry a query."""
        return [
            weighed(rollout.question.row, rollout.question.shown, rollout.permutations, weighting, index)
            for rollout, weighting, index in self._drawn[1].values()
        ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL; with `log_completions` its table is of the permutations that were drawn in the step."""
        self.log_completions = self.args.log_completions and "loss" in logs  # not of an evaluation
        if self.log_completions:
            self._tell_samples()
        super().log(logs, start_time)

    def _tell_samples(self) -> None:
        """Hands the samples of all processes to TRL, which prints them and keeps them in a file and in trackers."""
        # TRL makes it before the first step, and an earlier run's directory may have been set aside since.
        (Path(self.args.output_dir) / "completions").mkdir(parents=True, exist_ok=True)
        samples = gather_object(self.samples)
        # In place of TRL's, which hold as many as it generates at a time, of whichever steps.
        self._logs["prompt"] = [sample.query for sample in samples for _ in sample.texts]
        self._logs["completion"] = [text for sample in samples for text in sample.texts]
        self._logs["advantages"] = [value for sample in samples for value in sample.advantages.tolist()]
        self._logs["rewards"] = {
            name: [value for sample in samples for value in getattr(sample, name).tolist()]
            for name in ("selector_logps", "generator_logps", "importance_weights")
        }

    def _log_means(self, outputs: Sequence[tuple[LossOutput, int]], described: Mapping[str, float]) -> None:
        """Logs each metric's mean over all that it was counted on in a step: in every batch, accumulated or not, of
        every process. Where nothing was counted there is no mean, and nothing is logged.

        Args:
            outputs (`list` of pairs): the metrics of a batch, and how many queries it has.
            described (mapping): metrics of a micro-batch, of which each counts the same.
        """
        mode, device = "train" if self.model.training else "eval", self.accelerator.device
        means: list[tuple[str, torch.Tensor, torch.Tensor | int]]
        means = [(name, torch.tensor(value), 1) for name, value in described.items()]
        for output, queries in outputs:
            counts = output.counts if queries else {}
            means += [(name, value, counts.get(name, queries)) for name, value in output.metrics.items()]
        for name, value, count in means:
            pair = torch.stack([value.float() * count, torch.ones_like(value, dtype=torch.float32) * count])
            self._sums[name] = self._sums.get(name, 0) + pair.to(device)
        if not self.accelerator.sync_gradients:
            return
        totals = self.accelerator.reduce(torch.stack(list(self._sums.values())), "sum").tolist()
        logged = {name: total / count for name, (total, count) in zip(self._sums, totals, strict=True) if count}
        self._sums.clear()
        watched = {} if self.sampler is None else self.sampler.watched()
        peak = self.accelerator.gather(torch.tensor([peak_memory()], device=device)).max()
        for name, value in {**logged, **watched, "memory/peak_gib": float(peak)}.items():
            self._metrics[mode][name].append(value)

    def close(self) -> None:
        """Stops the engine that samples, or gives its server back; this happens with the end of the trainer too."""
        if self.sampler is not None:
            self.sampler.close()

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
        scored = self.args.answer_target, self.args.num_generations
        self.last_records = evaluate_rows(self.pipeline, rows, *scored, metrics=self.args.metrics)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in aggregate(self.last_records).items()}
        with self.pipeline.evaluating():  # `log` names the metrics after the mode
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
