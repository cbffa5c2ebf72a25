"""The states of a prefix tree under one model, in three ways; see [`likelihood`]."""

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .attention import Layout
from .errors import InvalidInputError
from .ppo import ValueHead
from .sharding import takes_part
from .tree import Segment, TokenTree


def base_of(model: nn.Module) -> PreTrainedModel:
    """Returns the model of transformers inside its wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def checkpoints_gradients(model: nn.Module) -> bool:
    """Whether the model computes its forward pass again in backward, and throws its states away."""
    return base_of(model).is_gradient_checkpointing


class TreeStates:
    """The states of a growing prefix tree under one model.

    Args:
        model (`nn.Module`): a causal language model of transformers, wrapped by PEFT or not; its active adapter counts
        backend (`str`): `blocks`, `mask`, `cached` or `repeated`, see [`~backends.backend_of`].
        keep (`bool`): keeps keys and values, so that the tree can grow, where that can be: not by `repeated`, and not
            under gradient checkpointing. Otherwise each call encodes everything again.
        critic ([`~ppo.ValueHead`], *optional*): its values are a last column of the logits.
    """

    def __init__(self, model: nn.Module, backend: str, keep: bool = False, critic: ValueHead | None = None):
        self.model, self.base, self.critic = model, base_of(model), critic
        self.tree = TokenTree()
        # Rounds are built on keys and values that gradient checkpointing would throw away.
        self.backend = "repeated" if backend == "cached" and not can_keep(model) else backend
        self._room = _longest_exact(self.base)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        keep = keep and self.backend != "repeated" and can_keep(model)
        self.cache = DynamicCache() if keep else None
        self.slots: list[int] = []
        """Where the keys of each encoded node stand in the cache."""
        self.windows: list[int | None] = []
        """What the layers said of their sliding windows (`blocks` only)."""

    def fork(self) -> Self:
        """Returns states that grow on their own, without gradient; keys and values are not copied."""
        other = copy.copy(self)
        other.tree, other.slots = self.tree.copy(), self.slots[:]
        if self.cache is not None:
            other.cache = _cache_of([(layer.keys.detach(), layer.values.detach()) for layer in self.cache.layers])
        return other

    def logits(self, nodes: Sequence[int]) -> torch.Tensor:
        """Returns the next-token logits after each of `nodes`, `(len(nodes), V)`; see [`distinct_logits`]."""
        logits, places = self.distinct_logits(nodes)
        return logits[places]

    def distinct_logits(self, nodes: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Encodes what is new in the tree and returns the next-token logits after some of its nodes.

        The head is evaluated there only (by the packed back ends). `nodes` must be new.

        Returns:
            logits (`torch.Tensor` of shape `(U, V)`): of the U distinct nodes.
            places (`list[int]`): the row of each of `nodes`.

        Raises:
            InvalidInputError: if a sequence is longer than the model's window.
        """
        if (length := max(self.tree.positions) + 1) > self._room:
            raise InvalidInputError(
                f"a sequence has {length} tokens, and {type(self.base).__name__} is exact up to {self._room}: lower "
                "max_prompt_length, or score shorter answers"
            )
        unique = sorted(set(nodes))
        if unique[0] < len(self.slots):
            raise ValueError(f"node {unique[0]} was encoded before: its logits are gone")
        encode = {"cached": self._rounds, "repeated": self._sequences}.get(self.backend, self._packed)
        return encode(unique), _places(unique, nodes)

    def _run(
        self, nodes: torch.Tensor, mask: torch.Tensor | BlockMask, keep: Sequence[int], **inputs: object
    ) -> torch.Tensor:
        """Returns the logits of rows of nodes at the columns `keep`, `(rows, len(keep), V)`; -1 is padding."""
        ids = torch.tensor(self.tree.tokens)[nodes].to(self.device)
        columns = torch.tensor(keep, dtype=torch.long, device=self.device)
        inputs |= {"input_ids": ids, "attention_mask": mask, "logits_to_keep": columns}
        if self.critic is None:
            return self.model(**inputs).logits
        with self.critic.reading(self.base.get_output_embeddings()) as values:
            logits = self.model(**inputs).logits
        return torch.cat([logits, *values], dim=-1)

    # ---------------------------------------------------------------------------------------------------------- packed
    def _packed(self, nodes: list[int]) -> torch.Tensor:
        tree, start = self.tree, len(self.slots)
        if self.backend == "blocks":
            layout = Layout(tree, self.slots, self.device, self.dtype)
            order, slots = layout.order, layout.slots
            # Any mask of four dimensions is handed on as it is, and this one is not looked at.
            mask, extra = torch.empty(1, 1, 1, 1, device=self.device), {"tree": layout}
        else:
            order, slots = list(range(start, len(tree))), list(range(len(tree)))
            mask, extra = self._mask(start), {}
        row = torch.tensor([order])
        positions = torch.tensor(tree.positions)[row].to(self.device)
        states = {"past_key_values": self.cache, "use_cache": self.cache is not None}
        logits = self._run(row, mask, _places(order, nodes), position_ids=positions, **states, **extra)
        if self.cache is not None:
            self.slots = slots
        if self.backend == "blocks":
            self.windows = layout.windows
        return logits[0]

    def _mask(self, start: int) -> torch.Tensor | BlockMask:
        """Returns who sees whom as the model's attention wants it, `(1, 1, new, all)`; old nodes keep their order."""
        nodes = range(len(self.tree))
        visible = self.tree.visibility(nodes[start:], nodes).to(self.device)
        if self.base.config._attn_implementation == "flex_attention":
            return create_block_mask(
                lambda b, h, q, k: visible[q, k], 1, None, *visible.shape, device=self.device, _compile=False
            )
        # The minimum instead of -inf, because a softmax over a row of -inf would be NaN in the kernels that pad rows.
        smallest = torch.finfo(self.dtype).min
        return torch.zeros_like(visible, dtype=self.dtype).masked_fill(~visible, smallest)[None, None]

    # ---------------------------------------------------------------------------------------------------------- cached
    def _rounds(self, nodes: list[int]) -> torch.Tensor:
        """Encodes the unbranched runs of one depth together, padded, each behind the states above it."""
        tree, cache, slots = self.tree, self.cache or DynamicCache(), self.slots[:]
        count = len(slots)
        segments = tree.segments(count)
        slots += [-1] * (len(tree) - count)
        wanted, found, scored = set(nodes), [], []
        depth: dict[int, int] = {}  # by last node
        rounds: list[list[Segment]] = []
        for segment in segments:
            level = depth[segment.nodes[-1]] = depth.get(segment.parent, -1) + 1
            if level == len(rounds):
                rounds.append([])
            rounds[level].append(segment)
        for runs in rounds:
            paths = [torch.tensor([slots[node] for node in tree.path(run.parent)], dtype=torch.long) for run in runs]
            past = pad_sequence(paths, batch_first=True, padding_side="left", padding_value=-1)
            own = [torch.tensor(run.nodes) for run in runs]
            new = pad_sequence(own, batch_first=True, padding_value=-1)
            places = [(row, t) for row, run in enumerate(runs) for t, node in enumerate(run.nodes) if node in wanted]
            keep = sorted({t for _, t in places}) or [0]
            logits, states = self._round(cache, past, new, keep)
            found.append(_picked(logits, places, keep))
            scored += [runs[row].nodes[t] for row, t in places]
            for node in (node for run in runs for node in run.nodes):
                slots[node], count = count, count + 1
            _append(cache, states, new >= 0)
        if self.cache is not None:
            self.cache, self.slots = cache, slots
        return torch.cat(found)[_places(scored, nodes)]

    def _round(
        self, cache: DynamicCache, past: torch.Tensor, new: torch.Tensor, keep: list[int]
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Returns logits `(runs, keep, V)` and the new keys and values of each layer, `(runs, heads, length, d)`."""
        index = past.clamp(min=0).to(self.device)
        gathered = [
            tuple(states[0][:, index].transpose(0, 1) for states in (layer.keys, layer.values))
            for layer in (cache.layers if past.shape[1] else [])
        ]
        behind = _cache_of(gathered)
        mask = torch.cat([past >= 0, new >= 0], dim=1).long().to(self.device)
        positions = torch.tensor(self.tree.positions)[new].to(self.device)
        logits = self._run(new, mask, keep, position_ids=positions, past_key_values=behind, use_cache=True)
        width = past.shape[1]
        return logits, [(layer.keys[:, :, width:], layer.values[:, :, width:]) for layer in behind.layers]

    # -------------------------------------------------------------------------------------------------------- repeated
    def _sequences(self, nodes: list[int]) -> torch.Tensor:
        """Encodes each wanted path that is not the beginning of another as a row of its own."""
        tree = self.tree
        paths = {node: tree.path(node) for node in nodes}
        inner = {node for path in paths.values() for node in path[:-1]}
        leaves = [node for node in nodes if node not in inner]
        rows = [torch.tensor(paths[leaf]) for leaf in leaves]
        new = pad_sequence(rows, batch_first=True, padding_value=-1)
        row_of = {node: row for row, leaf in enumerate(leaves) for node in paths[leaf]}
        keep = sorted({tree.positions[node] for node in nodes})
        logits = self._run(new, (new >= 0).long().to(self.device), keep, use_cache=False)
        return _picked(logits, [(row_of[node], tree.positions[node]) for node in nodes], keep)


def can_keep(model: nn.Module) -> bool:
    """Whether states can be kept with their gradient: gradient checkpointing throws them away.

    Where a model is cut up, all is encoded in one pass: how often a tree grows is not the same in each process.
    """
    return not takes_part(model) and not (checkpoints_gradients(model) and model.training)


def _longest_exact(base: PreTrainedModel) -> float:
    """Returns how many tokens a sequence may have such that its states depend on nothing but itself."""
    config = base.config.get_text_config()
    window = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or float("inf")
    rope = getattr(config, "rope_parameters", None) or {}
    # These take their frequencies from the longest sequence of a pass once it exceeds the original window.
    if rope.get("rope_type") in ("longrope", "dynamic"):
        window = min(window, rope.get("original_max_position_embeddings", window))
    return window


def _picked(logits: torch.Tensor, places: Sequence[tuple[int, int]], columns: Sequence[int]) -> torch.Tensor:
    """Returns the logits at `(row, position)`, `(len(places), V)`, of `(rows, len(columns), V)`."""
    return logits[[row for row, _ in places], _places(columns, [t for _, t in places])]


def _places(items: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Returns where each of `wanted` stands in `items`."""
    place = {item: i for i, item in enumerate(items)}
    return [place[item] for item in wanted]


def _cache_of(states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """Returns a cache that holds these keys and values themselves, where `DynamicCache(...)` would hold copies."""
    cache = DynamicCache()
    for keys, values in states:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _append(cache: DynamicCache, states: Sequence[tuple[torch.Tensor, torch.Tensor]], valid: torch.Tensor) -> None:
    """Appends the states of padded rows to a cache of one row, without their padding."""
    rows, columns = (index.to(states[0][0].device) for index in valid.nonzero(as_tuple=True))
    for layer, pair in enumerate(states):
        cache.update(*(s[rows, :, columns].transpose(0, 1)[None] for s in pair), layer)
