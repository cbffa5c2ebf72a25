"""Log-likelihoods of token sequences, with every shared prefix encoded once.

The m permutations of a query share a prompt of 1,000-3,000 tokens and add a few each; contexts that begin alike share
that beginning. Causal attention makes the state of a token depend on its ancestors only, so the distinct prefixes form
a tree, and one forward pass over the packed tree, in which a token sees its ancestors and itself, gives each of them
the same state as the repeated sequences would:

    sequences  [P Q a b], [P Q a c], [P Q d]      packed   P Q a b c d
                                                  position 0 1 2 3 3 2
    mask (who sees whom)     P 1                  b sees P Q a b        c sees P Q a c        d sees P Q d
                             Q 1 1
                             a 1 1 1
                             b 1 1 1 1
                             c 1 1 1 . 1
                             d 1 1 . . . 1

Exact, not an approximation: tests/test_likelihood.py compares values and gradients with the repeated computation.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


class TokenTree:
    """Prefix tree of token sequences; node n is the n-th distinct prefix, and parents come before their children."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.positions: list[int] = []
        self._child: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, sequence: Sequence[int], parent: int = -1) -> list[int]:
        """Adds a sequence below `parent` (-1: the root) and returns the node of each of its tokens."""
        nodes = []
        for token in sequence:
            node = self._child.get((parent, token))
            if node is None:
                node = len(self.tokens)
                self._child[parent, token] = node
                self.tokens.append(token)
                self.parents.append(parent)
                self.positions.append(self.positions[parent] + 1 if parent >= 0 else 0)
            nodes.append(node)
            parent = node
        return nodes

    def visibility(self) -> torch.Tensor:
        """Returns `(n, n)` bool: row i marks the ancestors of node i and i itself."""
        visible = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                visible[node, : parent + 1] |= visible[parent, : parent + 1]
        return visible


def tree_logits(model: nn.Module, tree: TokenTree, nodes: Sequence[int]) -> torch.Tensor:
    """Returns the next-token logits after each of `nodes`, `(len(nodes), V)`; the head is evaluated only there.

    `model` is any causal language model of transformers whose attention takes a 4-D mask (`sdpa` or `eager`), wrapped
    or not by PEFT or DDP; the active adapter is used.

    Raises:
        ValueError: if a sequence exceeds the model's sliding attention window, which a 4-D mask would switch off.
    """
    _check_window(model, max(tree.positions) + 1)
    device = next(model.parameters()).device
    visible = tree.visibility().to(device)
    # Additive, because every attention implementation reads that; the minimum instead of -inf, because a softmax over
    # a row of -inf would be NaN in the kernels that pad rows.
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, torch.finfo(dtype).min)
    rows, inverse = torch.unique(torch.tensor(nodes, device=device), return_inverse=True)
    output = model(
        input_ids=torch.tensor([tree.tokens], device=device),
        attention_mask=mask[None, None],
        position_ids=torch.tensor([tree.positions], device=device),
        use_cache=False,
        logits_to_keep=rows,
    )
    return output.logits[0][inverse]


def _check_window(model: nn.Module, length: int) -> None:
    config = next(m for m in model.modules() if isinstance(m, PreTrainedModel)).config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation={config._attn_implementation!r} takes no tree mask: use sdpa or eager")
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        raise ValueError(
            f"a sequence of {length} tokens exceeds the model's sliding attention window of {window}: its likelihood "
            f"would be wrong; set max_prompt_length so that prompt and completion fit into {window} tokens"
        )


def branch_logits(model: nn.Module, prompt: Sequence[int], branches: Sequence[Sequence[int]]) -> torch.Tensor:
    """Returns the next-token logits after `prompt + branch` for each branch, `(len(branches), V)`."""
    tree = TokenTree()
    last = tree.add(prompt)[-1]
    return tree_logits(model, tree, [tree.add(branch, last)[-1] if branch else last for branch in branches])


def sequence_logps(
    model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
) -> list[torch.Tensor]:
    r"""Returns log p(completion_t | prompt, completion_<t) of each (prompt, completion) pair, in nats.

    One tensor of shape `(T,)` per pair, T being the length of its completion; float32 or wider, differentiable. Equal
    prefixes of any two pairs are encoded once, so equal pairs cost nothing. `temperature` divides the logits.

    Raises:
        ValueError: if a prompt or a completion is empty.
    """
    tree = TokenTree()
    scored: list[int] = []
    targets: list[int] = []
    for prompt, completion in pairs:
        if not prompt or not completion:
            raise ValueError("a prompt and its completion need at least one token each")
        # The last token predicts nothing that is scored, so it is not encoded.
        scored += tree.add([*prompt, *completion[:-1]])[len(prompt) - 1 :]
        targets += completion
    logits = tree_logits(model, tree, scored)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logps = torch.log_softmax(logits / temperature, dim=-1).gather(
        1, torch.tensor(targets, device=logits.device)[:, None]
    )[:, 0]
    return list(logps.split([len(completion) for _, completion in pairs]))
