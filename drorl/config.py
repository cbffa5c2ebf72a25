"""Settings of a DRO run."""

from dataclasses import dataclass, fields

import torch
from trl import GRPOConfig

from .losses import ADVANTAGES, WEIGHTED
from .metrics import PRESETS, MetricSettings
from .settings import QUERY_LIKELIHOODS, DROSettings

SCALES = ("group", "none")
SELECTOR_OBJECTIVES = (*ADVANTAGES, "ppo", "none")
POLICY_GRADIENTS = (*(name for name in ADVANTAGES if name not in WEIGHTED), "ppo")
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
# Settings of TRL that drorl does not read: another value than this one is refused rather than ignored.
FIXED = {
    "use_bias_correction_kl": True,
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "mask_truncated_completions": False,
    "delta": None,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "repetition_penalty": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "vllm_tensor_parallel_size": 1,
    "vllm_enable_sleep_mode": False,
    "vllm_structured_outputs_regex": None,
    "vllm_model_impl": "vllm",
}


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


@dataclass
class DROConfig(DROSettings, GRPOConfig):
    r"""Configuration of [`DROTrainer`]: `trl.GRPOConfig` and what DRO adds, in the order of the data flow.

    Defaults are the paper's (https://huggingface.co/papers/2505.03075, sections 3 and 4) unless said otherwise.
    `per_device_train_batch_size` counts permutations, as in TRL, and must be a multiple of `num_generations` (m), so
    that the samples of a query stay on one process.

    learning_rate (`float`, *optional*, defaults to `1e-5`) and weight_decay (`float`, *optional*, defaults to `0.01`)
    are the paper's.

    Args: Parameters that control the rows
        num_candidates (`int`, *optional*, defaults to `20`): N, passages read by the selector; longer lists are cut.
        num_selected (`int`, *optional*, defaults to `5`): K, passages read by the generator.
        shuffle_candidates (`bool`, *optional*, defaults to `False`): shows the candidates in a random order, drawn
            anew each time a query is seen, so that position is no shortcut. `False`: the retriever's order (paper).
        max_passage_tokens (`int`, *optional*): cuts each passage to this many tokens.
        max_prompt_length (`int`, *optional*): window of the selector's prompt, tokens; default: the model's, less
            `max_answer_length`. Passages are cut to fit, never the query.
        max_answer_length (`int`, *optional*, defaults to `32`): tokens that the generator may write in evaluation.
        answer_target (`str`, *optional*, defaults to `"surface"`): which y is scored when there are several gold
            answers. `"first"` (the authors' code), `"surface"` (the form that occurs in the candidates), `"marginal"`
            (log of the summed likelihood of all distinct answers).

    Args: Parameters that control the selector's policy
        identifiers (`str`, *optional*, defaults to `"number"`): what the selector writes for a passage: `"number"`
            (paper, `[3] > [1]`), `"letter"`, `"title"`, or no name, but the query itself, after each passage alone:
            `"query"`, and `"expanded_query"`, which grows by the passages that were chosen, see [`query_likelihood`].
        constrained (`bool`, *optional*, defaults to `True`): normalises the policy over valid permutations. `False`:
            free text (paper), repaired as [`~permutations.parse_permutation`] says, with `permutations/valid_rate`.
        selector_temperature (`float`, *optional*, defaults to `1.0`): divides the selector's logits, in sampling and
            in the loss; this is TRL's `temperature`, which follows it.
        retrieval_prior_weight (`float`, *optional*, defaults to `0.0`): adds this times the retriever's score to the
            logit of each candidate (product of experts). 0 is the paper.

    Args: Parameters that control the E-step
        proposal (`str`, *optional*, defaults to `"policy"`): where permutations come from. `"policy"`: sampled
            (paper). `"first_choices"`: one permutation for every first choice, the exact expectation over it
            (`num_generations` = `num_candidates`). `"retriever"`: the retriever's order alone; with
            `num_generations=1` this is the supervised warm-up of both models.
        proposal_temperature (`float`, *optional*, defaults to `1.0`): flattens the policy that is sampled from; the
            weights are corrected by p_s/q, so they stay exact.
        rollout_backend (`str`, *optional*, defaults to `"auto"`): who draws: `"transformers"` (the trainer's own
            model), `"vllm"` (the same as TRL's `use_vllm=True`; TRL's settings `vllm_mode`, `vllm_server_base_url`,
            `vllm_gpu_memory_utilization`, `vllm_importance_sampling_correction`, ... hold), or what was measured to
            be faster, see [`~engines.sampler.choose_backend`].
        max_sampling_logp_difference (`float`, *optional*, defaults to `0.5`): mean gap between vLLM's and the
            trainer's log-probability of a decision (or token), nats, at which the run stops, because another policy
            is being sampled than the one that is trained; a fifth of it warns, 0.01 if the model is in float32.
        weight_temperature (`float`, *optional*, defaults to `1.0`): tempers the answer's likelihood in the weights.

    Args: Parameters that control the M-step
        selector_objective (`str`, *optional*, defaults to `"dro"`): `dro`; `grpo`, `rloo`, `reinforce` and `ppo`,
            which maximise `reward`; `pointwise` (each passage weighed by itself); or `none` (frozen selector).
            `grpo` and `ppo` read TRL's `epsilon`, `epsilon_high`, `num_iterations` (epochs over the same permutations)
            and `beta` (KL to the selector as it was when training began).
        reward (`str`, *optional*, defaults to `"log_likelihood"`): of the gold answer, nats; its `"likelihood"`; or
            `"f1"` of the generator's greedy answer.
        vf_coef (`float`, *optional*, defaults to `0.1`): weight of the critic's loss in `ppo`.
        generator_objective (`str`, *optional*, defaults to `"dro"`): `dro`; `elbo` (the mean of the answer's
            log-likelihood over the permutations: what a policy gradient of both models maximises); `sft` (gold answer
            from the retriever's first K passages); or `none` (frozen generator).
        baseline (`str`, *optional*, defaults to `"none"`): `none` (paper), `mean` (lowers the
            variance, keeps the expectation) or `leave_one_out` (`mean` times m/(m-1), RLOO's rule).
        max_tokens_per_forward (`int`, *optional*): bound on the distinct tokens of one forward pass; the queries of a
            micro-batch are split accordingly. It also keeps the graphs of selector and generator from coexisting, for
            which the selector's prompts are encoded once more, as under gradient checkpointing (TRL's default).
            Default: no bound; with `gradient_checkpointing=False` each prompt is encoded once.
        min_importance_weight (`float`, *optional*, defaults to `0.0`): permutations of a smaller weight do not train
            the generator. Above 0 the answer is scored without a graph first, and with one where the weight is not
            negligible, which is less work when few of the m are. 0 is exact, in one pass.
        generator_learning_rate (`float`, *optional*): default: `learning_rate`, which is the selector's.

    Args: Parameters that control the watch
        on_unhealthy (`str`, *optional*, defaults to `"warn"`): what happens when the log shows that training goes
            wrong, see [`health`]: `"warn"` says once what to do, `"stop"` saves and ends the run with an
            [`~errors.UnhealthyError`], `"ignore"` does not look, nor measures `generator/reads_context`.

    Args: Parameters that control evaluation
        metric_preset (`str`, *optional*, defaults to `"kilt"`): whose exact match and F1, see [`metrics.PRESETS`].
    """

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self.temperature = self.selector_temperature
        if self.num_generations_eval is None:
            self.num_generations_eval = 1  # TRL wants whole groups in its evaluation batches; `evaluate` has none
        if self.bf16 is None and not torch.cuda.is_available():
            self.bf16 = False  # TRL would turn it on; without matrix units for it bf16 is up to 120 times slower
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for
        try:
            super().__post_init__()
        except ValueError as error:
            # A group of one has no group advantage, which is why TRL refuses it; weighted likelihood needs no group.
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
        self._check_combinations()

    @property
    def metrics(self) -> MetricSettings:
        """What `metric_preset` stands for."""
        return PRESETS[self.metric_preset]

    def _check_choices(self) -> None:
        for setting in fields(DROSettings):
            if choices := setting.metadata.get("choices"):
                _choice(setting.name, getattr(self, setting.name), choices)
        _choice("selector_objective", self.selector_objective, SELECTOR_OBJECTIVES)
        _choice("loss_type", self.loss_type, LOSS_TYPES)
        # TRL's "batch" spans all processes; a query's samples never leave theirs here.
        _choice("scale_rewards", {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards), SCALES)

    def _check_numbers(self) -> None:
        for name in ("num_candidates", "num_selected", "num_generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        temperatures = ("selector_temperature", "proposal_temperature", "weight_temperature")
        for name in (*temperatures, "max_sampling_logp_difference"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.min_importance_weight < 1:
            raise ValueError(f"min_importance_weight must be in [0, 1), not {self.min_importance_weight}")
        if self.max_tokens_per_forward is not None and self.max_tokens_per_forward < 1:
            raise ValueError(f"max_tokens_per_forward must be at least 1, not {self.max_tokens_per_forward}")
        if self.num_selected > self.num_candidates:
            raise ValueError(
                f"num_selected (K={self.num_selected}) is larger than num_candidates (N={self.num_candidates}); "
                "lower K or retrieve more passages"
            )
        if self.temperature not in (1.0, self.selector_temperature):
            raise ValueError(
                f"temperature={self.temperature} and selector_temperature={self.selector_temperature} are the same "
                "setting; set selector_temperature only"
            )

    def _check_objective(self) -> None:
        objective = self.selector_objective
        if self.reward != "log_likelihood" and objective not in POLICY_GRADIENTS:
            raise ValueError(f"reward={self.reward!r} is for {', '.join(POLICY_GRADIENTS)}: {objective!r} reads none")
        if self.beta != 0 and objective not in ("grpo", "ppo"):
            raise ValueError(f"beta={self.beta} is a KL penalty of grpo and ppo: leave it at 0 with {objective!r}")
        if objective == "ppo" and not self.constrained:
            raise ValueError(
                "selector_objective='ppo' values the state before each decision: it needs constrained=True"
            )
        if objective == "ppo" and self.max_tokens_per_forward is not None:
            raise ValueError("selector_objective='ppo' whitens over a micro-batch: it takes no max_tokens_per_forward")
        if objective == "pointwise" and self.proposal != "first_choices":
            raise ValueError(
                "selector_objective='pointwise' weighs each candidate by itself: it needs proposal='first_choices'"
            )

    def _check_combinations(self) -> None:
        if self.selector_objective == "none" and self.generator_objective == "none":
            raise ValueError("selector_objective and generator_objective are both 'none': there is nothing to train")
        if self.num_generations == 1 and (self.baseline != "none" or self.selector_objective in ("grpo", "rloo")):
            raise ValueError(
                "a baseline (and the objectives grpo and rloo) compares the samples of a query, so it needs "
                "num_generations >= 2; use baseline='none' with selector_objective='dro' for num_generations=1"
            )
        self._check_objective()
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size ({self.per_device_train_batch_size}) counts permutations and must be a "
                f"multiple of num_generations ({self.num_generations}), so that a query is never split over processes"
            )
        if self.proposal == "first_choices" and self.num_generations != self.num_candidates:
            raise ValueError(
                f"proposal='first_choices' draws one permutation per candidate: set num_generations "
                f"({self.num_generations}) to num_candidates ({self.num_candidates})"
            )
        if self.proposal == "retriever" and self.num_generations != 1:
            raise ValueError("proposal='retriever' has one permutation per query: set num_generations=1")
        on_policy = self.proposal == "policy" and self.proposal_temperature == 1.0
        if self.selector_objective in POLICY_GRADIENTS and not on_policy:
            raise ValueError(
                f"selector_objective={self.selector_objective!r} has no weights to correct for another proposal: it "
                "needs proposal='policy' and proposal_temperature=1"
            )
        if not self.constrained and not on_policy:
            raise ValueError("constrained=False samples free text: it needs proposal='policy', proposal_temperature=1")
        if not self.constrained and self.retrieval_prior_weight:
            raise ValueError("retrieval_prior_weight needs constrained=True: free text has no candidate to weigh")
        without_engine = self.constrained and not self.use_vllm and self.rollout_backend != "vllm"
        if self.identifiers in QUERY_LIKELIHOODS and not without_engine:
            raise ValueError(
                f"identifiers={self.identifiers!r} writes no permutation that an engine or free text could hold: it "
                "needs constrained=True, without vLLM"
            )
        if self.use_vllm and self.rollout_backend == "transformers":
            raise ValueError("use_vllm=True and rollout_backend='transformers' contradict each other")
        if self.rollout_backend == "vllm":
            self.use_vllm = True
        if self.use_vllm and self.proposal == "retriever":
            raise ValueError("proposal='retriever' samples nothing: leave use_vllm at False")
        if self.use_vllm and self.generation_kwargs:
            raise ValueError("generation_kwargs are for transformers' generate(): with use_vllm=True leave them out")
        for name, value in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported by drorl: leave it at {value!r}")
