"""Attention over a packed prefix tree, block by block, for any model that calls transformers' attention interface.

[`install`] puts `tree_attention` in front of a model's attention. A forward pass that is given a [`Layout`] as the
keyword `tree` attends along the tree; every other pass goes to the attention that the model had before.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .tree import Block, TokenTree, cut

TREE_ATTENTION = "drorl_tree"
# What a model may hand to its attention besides queries, keys and values, and `tree_attention` knows how to treat.
_KNOWN = {"dropout", "scaling", "sliding_window", "position_ids", "use_cache", "cache_position", "is_causal"}

MAX_PAIRS_AS_PRODUCTS = 1 << 19  # beyond, what has to be kept for the backward pass no longer fits into the caches


class Layout:
    """The order in which the new nodes of a tree are packed, and their attention as dense products.

    Args:
        tree ([`TokenTree`]): the tree.
        slots (`list[int]`): where the keys of the first nodes of the tree stand in the cache; the others are new.
        device (`torch.device`), dtype (`torch.dtype`): of the model.
    """

    def __init__(self, tree: TokenTree, slots: Sequence[int], device: torch.device, dtype: torch.dtype):
        self._tree, self._device, self._dtype = tree, device, dtype
        self.blocks = cut(tree, len(slots), device.type)
        self.order = [node for block in self.blocks for node in block.nodes]
        self.slots = [*slots, *[0] * len(self.order)]
        """Where the keys of each node stand once the new ones are appended to the cache."""
        for slot, node in enumerate(self.order, start=len(slots)):
            self.slots[node] = slot
        self.windows: list[int | None] = []
        """The sliding window of each layer that has attended along this layout."""
        self._masks: dict[int | None, list[torch.Tensor | None]] = {}
        self.num_queries = [len(block.nodes) for block in self.blocks]
        self.num_keys = [len(block.seen) for block in self.blocks]
        keys = [self.slots[node] for block in self.blocks for node in block.seen]
        self._keys = None if keys == list(range(len(self.slots))) else torch.tensor(keys, device=device)

    def split_queries(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns what each block asks with, of `(1, heads, n, d)`."""
        return states.split(self.num_queries, dim=2)

    def split_keys(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns what each block sees, of keys or values `(1, heads, slots, d)`.

        One selection for all blocks together: in backward, each of its own would fill a gradient of the whole row.
        """
        if self._keys is not None:
            states = states.index_select(2, self._keys)
        return states.split(self.num_keys, dim=2)

    def masks(self, window: int | None) -> list[torch.Tensor | None]:
        """Returns the additive mask `(queries, keys)` of each block; `None`: plain causal attention is the same."""
        if window not in self._masks:
            self._masks[window] = [self._mask(block, window) for block in self.blocks]
        return self._masks[window]

    def _mask(self, block: Block, window: int | None) -> torch.Tensor | None:
        visible = None if block.is_causal(self._tree) else self._tree.visibility(block.nodes, block.seen)
        positions = torch.tensor(self._tree.positions)
        # Every path begins at the root, position 0: the last query reaches as far back as its own position.
        if window is not None and positions[block.nodes].max() >= window:
            distances = positions[block.nodes][:, None] - positions[block.seen]
            visible = (distances >= 0 if visible is None else visible) & (distances < window)
        if visible is None:
            return None
        return torch.zeros(visible.shape, dtype=self._dtype).masked_fill(~visible, -torch.inf).to(self._device)


@contextmanager
def _without_plans() -> Generator[None]:
    """Leaves out cuDNN's attention, which plans for each new shape anew: here each pass has shapes of its own.

    On an H200 a step of SmolLM2-135M took 1.5 s with new shapes and 0.4 s with those of a run before; an answer of 16
    tokens has 16 shapes.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@_without_plans()
def tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tree: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: queries `(1, heads, n, d)` -> `(1, n, heads, d)`.

    Raises:
        NotImplementedError: if the model wants something of its attention that is not known here.
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if unknown := {name for name, argument in kwargs.items() if argument is not None} - _KNOWN:
        raise NotImplementedError(f"the model's attention takes {', '.join(sorted(unknown))}")
    window = kwargs.get("sliding_window")
    tree.windows.append(window)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    parts = zip(
        tree.split_queries(query), tree.split_keys(key), tree.split_keys(value), tree.masks(window), strict=True
    )
    outputs = [_attend(*part, scale).transpose(1, 2) for part in parts]
    return torch.cat(outputs, dim=1), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Returns softmax(scale q k^T + mask) v, `(1, heads, n, d)`; causal where there is no mask."""
    pairs = query.shape[2] * key.shape[2]
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and pairs <= MAX_PAIRS_AS_PRODUCTS:
        return _as_products(query, key, value, mask, scale)
    groups = query.shape[1] // key.shape[1]
    if mask is not None and query.device.type != "cpu":  # PyTorch's fast kernels there take groups or a mask, not both
        key, value, groups = repeat_kv(key, groups), repeat_kv(value, groups), 1
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
    )


def _as_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention as two matrix products, with what one key head serves in one of them.

    PyTorch's fused attention on a CPU does not use the matrix units in its backward pass: in bfloat16, 540 tokens of 9
    heads take it 1.8 + 12.2 ms, forward and backward, and this 2.8 + 3.1 ms. In float32 it is level.
    """
    (batch, heads, count, size), length = query.shape, key.shape[2]
    if mask is None:
        mask = torch.full((count, length), -torch.inf, dtype=query.dtype).triu(1)
    grouped = (batch, key.shape[1], -1)
    scores = ((query * scale).reshape(*grouped, size) @ key.mT).view(batch, heads, count, length)
    probabilities = torch.softmax(scores + mask, dim=-1)
    return (probabilities.view(*grouped, length) @ value).view(batch, heads, count, size)


def install(model: PreTrainedModel) -> None:
    """Puts [`tree_attention`] in front of the model's attention, which has to be `sdpa`.

    Raises:
        NotImplementedError: if it is another.
    """
    current = model.config._attn_implementation
    if current not in ("sdpa", TREE_ATTENTION):
        raise NotImplementedError(f"its attention is {current!r}, not 'sdpa'")
    AttentionInterface.register(TREE_ATTENTION, tree_attention)
    AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
    model.set_attn_implementation(TREE_ATTENTION)


def uninstall(model: PreTrainedModel) -> None:
    """Takes it away again."""
    if model.config._attn_implementation == TREE_ATTENTION:
        model.set_attn_implementation("sdpa")
