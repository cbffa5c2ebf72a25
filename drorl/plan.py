"""Predicts the memory and the time of a training step from a model's configuration alone; no weights are loaded.

The parts are those of [`footprint`]. Which of them are there at once, and what is computed, follows from how the
trainer goes through a step: on policy and in one pass the selector's graph, kept since drawing, outlives the
generator's; with `max_tokens_per_forward` or gradient checkpointing each is gone before the next is built.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .errors import InvalidInputError
from .footprint import (
    GIB,
    ModelShape,
    PlanSettings,
    activation_bytes,
    adapter_size,
    base_bytes,
    kept_bytes,
    logits_bytes,
    working_bytes,
)
from .workload import Pass, Work, work_of

# The process before there is a model. CPU: Python with torch, transformers, peft and TRL, measured. GPU: the context
# and the libraries' workspaces, which `memory/peak_gib` does not see; an assumption.
PROCESS_BYTES = {"cpu": int(0.6 * GIB), "cuda": int(1.0 * GIB)}
# Of a device's memory that a plan may fill: allocators lose some to holes.
USABLE = 0.92
# A step's time over that of its products at full speed: 2.15 on 2 CPU cores (docs/performance.md). On GPUs nobody has
# measured it with a model that fills one; 1 / 2.15 is 46 % of the peak, what well-tuned training reaches.
OVERHEAD = 2.15
ADVISED = ("per_device_train_batch_size", "max_tokens_per_forward", "gradient_checkpointing")
"""The settings that a plan recommends."""


@dataclass(frozen=True)
class Plan:
    """The memory of one device, and the time of a step."""

    selector: ModelShape
    generator: ModelShape
    settings: PlanSettings
    separate: bool = False
    """Whether the generator has a base of its own."""

    @cached_property
    def work(self) -> Work:
        """Of one forward pass: the micro-batch, or as many of its queries as `max_tokens_per_forward` admits.

        Raises:
            InvalidInputError: if one query alone has more tokens.
        """
        limit, queries = self.settings.max_tokens_per_forward, self.settings.num_queries
        if limit is not None:
            size = self._work(1).largest
            if size > limit:
                raise InvalidInputError(
                    f"one query has about {size} distinct tokens, and max_tokens_per_forward is {limit}"
                )
            queries = min(queries, limit // size)
        return self._work(queries)

    def _work(self, queries: int) -> Work:
        s = self.settings
        return work_of(s.sizes, s.lengths, queries, s.one_pass, s.device)

    @cached_property
    def fixed(self) -> dict[str, int]:
        """Bytes that are there throughout."""
        s = self.settings
        bases = [self.selector, self.generator] if self.separate else [self.selector]
        trained = sum(adapter_size(model, s) for model, _ in self._trained)
        adapters = adapter_size(self.selector, s) + adapter_size(self.generator, s)
        return {
            "base weights": sum(base_bytes(model, s) for model in bases),
            "adapters": 4 * adapters,  # PEFT keeps them in float32
            "gradients": 4 * trained,
            "optimizer": 8 * trained,  # AdamW's two moments, float32
            "vLLM": int(s.vllm_gpu_memory_utilization * s.memory) if s.use_vllm else 0,
            "process": PROCESS_BYTES[s.device],
        }

    @property
    def _trained(self) -> Iterator[tuple[ModelShape, Sequence[Pass]]]:
        """The models that have a backward pass, with their forward passes."""
        if self.settings.selector_objective != "none":
            yield self.selector, self.work.selector
        if self.settings.generator_objective != "none":
            yield self.generator, [self.work.generator]

    @cached_property
    def passing(self) -> dict[str, int]:
        """Bytes that come and go: each part at its largest."""
        s, work = self.settings, self.work
        trains = s.selector_objective != "none", s.generator_objective != "none"
        contexts = [work.generator]
        drawn = work if s.max_tokens_per_forward is None else self._work(1)  # then each query is drawn by itself
        return {
            "selector's graph": trains[0] * activation_bytes(self.selector, work.selector, s),
            "generator's graph": trains[1] * activation_bytes(self.generator, contexts, s),
            "logits": max(logits_bytes(self.selector, work.selector, s), logits_bytes(self.generator, contexts, s)),
            "backward": max(working_bytes(self.selector, work.selector), working_bytes(self.generator, contexts)),
            "keys and values": 0 if s.draws_without_cache else kept_bytes(self.selector, drawn.selector, s),
        }

    @property
    def moments(self) -> dict[str, list[str]]:
        """Which of the passing parts are alive at once."""
        both = ["selector's graph"] if self.settings.one_pass else []
        return {
            "drawing": [*both, "keys and values"],
            "generator's backward pass, head": [*both, "generator's graph", "logits"],
            "generator's backward pass, layers": [*both, "generator's graph", "backward"],
            "selector's backward pass, head": ["selector's graph", "logits"],
            "selector's backward pass, layers": ["selector's graph", "backward"],
        }

    @property
    def peak(self) -> tuple[str, int]:
        """When the most is in use, and how much, bytes."""
        totals = {name: sum(self.passing[part] for part in parts) for name, parts in self.moments.items()}
        moment = max(totals, key=totals.__getitem__)
        return moment, sum(self.fixed.values()) + totals[moment]

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the allocator the room that it needs."""
        return self.peak[1] <= USABLE * self.settings.memory

    @cached_property
    def operations(self) -> float:
        """Floating-point operations of one step on one device.

        Two per weight and token forward; two backward for the gradient of the layer's input, in the layers from
        `lora_first_layer` on; an adapter's weights once more for their own gradient; four per pair of attention and
        width forward, eight backward; the head where a position is scored. Later decisions are drawn once without a
        graph. Where the graphs may not coexist, prompts are encoded twice; gradient checkpointing computes each pass
        again.
        """
        s, work = self.settings, self._work(self.settings.num_queries)
        again = 1.0 + s.gradient_checkpointing
        roles = (
            (self.selector, work.selector, s.selector_objective != "none"),
            (self.generator, (work.generator,), s.generator_objective != "none"),
        )
        total = 0.0
        for model, passes, trained in roles:
            for work_of_pass in passes:
                total += self._pass_operations(model, work_of_pass, again if trained else 1.0, trained)
        drawn = () if s.use_vllm else work.selector[1:] if s.one_pass else work.selector
        return total + sum(self._pass_operations(self.selector, of, 1.0, False) for of in drawn)

    def _pass_operations(self, model: ModelShape, work: Pass, forward: float, backward: bool) -> float:
        s = self.settings
        layers, upper = model.num_layers, model.num_layers - s.lora_first_layer
        maps, attention = 2 * work.tokens * model.layer_weights, 4 * work.pairs * model.queries
        adapters = 2 * work.tokens * adapter_size(model, s)
        head = 2 * work.scored * model.vocabulary * model.hidden
        total = forward * (layers * (maps + attention) + adapters) + head
        return total + backward * (upper * (maps + 2 * attention) + 2 * adapters + head)

    def seconds(self, flops: float) -> float:
        """Returns the time of a step.

        Args:
            flops (`float`): operations per second that large matrix products reach.
        """
        return OVERHEAD * self.operations / flops

    def changed(self, **settings: Any) -> "Plan":
        """Returns the plan for other settings."""
        return replace(self, settings=replace(self.settings, **settings))

    def alternatives(self, num_queries: int = 1) -> "list[Plan]":
        """Returns the plan under each way to spend memory on speed, the fastest first.

        Both graphs at once; one after the other; and checkpointed; each with so many queries in a forward pass.
        """
        batch = self.settings.sizes.num_generations * num_queries
        bound = -(-int(1.1 * self._work(num_queries).largest) // 256) * 256  # rows differ in length
        larger = max(batch, self.settings.per_device_train_batch_size)
        whole = {"per_device_train_batch_size": batch, "max_tokens_per_forward": None}
        parts = {"per_device_train_batch_size": larger, "max_tokens_per_forward": bound}
        return [
            self.changed(gradient_checkpointing=False, **whole),
            self.changed(gradient_checkpointing=False, **parts),
            self.changed(gradient_checkpointing=True, **parts),
        ]

    def recommended(self) -> "Plan | None":
        """Returns the fastest way that fits, with as many queries in a forward pass as do, up to 16; `None`: none."""
        by_queries = [self.alternatives(num_queries) for num_queries in (1, 2, 4, 8, 16)]
        for plans in zip(*by_queries, strict=True):
            if fitting := [plan for plan in plans if plan.fits]:
                return fitting[-1]
        return None

    def record(self, flops: float) -> dict[str, Any]:
        """Returns the plan as JSON: bytes, seconds, operations."""
        moment, peak = self.peak
        s, passes = self.settings, self._work(self.settings.num_queries)
        return {
            "settings": {name: getattr(s, name) for name in ADVISED},
            "memory": {**self.fixed, **self.passing},
            "peak": peak,
            "peak_moment": moment,
            "available": s.memory,
            "fits": self.fits,
            "tokens": {"selector": sum(p.tokens for p in passes.selector), "generator": passes.generator.tokens},
            "operations": self.operations,
            "seconds": self.seconds(flops),
            "queries_per_second": s.gpus * s.num_queries / self.seconds(flops),
        }
