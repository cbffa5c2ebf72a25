"""Prefix trees of token sequences, and how attention over a packed tree is cut into dense blocks.

The m permutations of a query share a prompt of 1,000-3,000 tokens and add a few each; contexts that begin alike share
that beginning. Causal attention makes the state of a token depend on its ancestors only, so the distinct prefixes form
a tree (of several queries: a forest), and each of its tokens needs to be encoded once:

    sequences  [P Q a b], [P Q a c], [P Q d]      packed   P Q a b c d
                                                  position 0 1 2 3 3 2
    who sees whom            P 1                  b sees P Q a b        c sees P Q a c        d sees P Q d
                             Q 1 1
                             a 1 1 1
                             b 1 1 1 1
                             c 1 1 1 . 1
                             d 1 1 . . . 1

Everything but attention treats the tokens one by one, so it runs on the packed row as it is. Attention as one dense
product would compute n² pairs of which most are masked: eight contexts of 350 tokens would cost more in attention than
in the rest of the model. So the tree is cut into *blocks*, each a set of tokens and the path above them. Above: one
block `P Q`, plainly causal, and one block `a b c d` that sees `P Q`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# What one more block costs, in query-key pairs of attention, forward and backward: a call of the kernel, and each key
# that is copied for it. On a CPU measured, 2 cores with SmolLM2-135M: 0.3 ms and 1 µs where a pair takes 0.02 µs
# (bfloat16) or 0.05 µs (float32). On a GPU not measured: 50 µs for a launch, forward and backward, where a pair of an
# 8B model takes 1 ns.
BLOCK_COST = {"cpu": (8000, 20), "cuda": (50_000, 20)}


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

    def twin(self, node: int) -> int:
        """Adds a second node for the same prefix and returns it."""
        self.tokens.append(self.tokens[node])
        self.parents.append(self.parents[node])
        self.positions.append(self.positions[node])
        return len(self) - 1

    def visibility(self, start: int = 0) -> torch.Tensor:
        """Returns `(n - start, n)` bool: row i marks the ancestors of node start + i and itself."""
        visible = torch.zeros(len(self) - start, len(self), dtype=torch.bool)
        for row, node in enumerate(range(start, len(self))):
            parent = self.parents[node]
            if parent >= start:
                visible[row] = visible[parent - start]
            else:
                visible[row, self.path(parent)] = True
            visible[row, node] = True
        return visible

    def copy(self) -> "TokenTree":
        """Returns a tree that grows on its own."""
        other = TokenTree()
        other.tokens, other.parents, other.positions = self.tokens[:], self.parents[:], self.positions[:]
        other._child = dict(self._child)
        return other

    def path(self, node: int) -> list[int]:
        """Returns the nodes from the root to `node`, which is included; `[]` for the root, -1."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def segments(self, start: int = 0) -> list["Segment"]:
        """Returns the nodes from `start` on as unbranched runs, parents before their children."""
        runs: list[Segment] = []
        children = [0] * len(self)
        for node in range(start, len(self)):
            if self.parents[node] >= start:
                children[self.parents[node]] += 1
        ending: dict[int, Segment] = {}  # by last node
        for node in range(start, len(self)):
            parent = self.parents[node]
            above = ending.get(parent)
            if above is not None and children[parent] == 1:
                above.nodes.append(node)
                ending[node] = ending.pop(parent)
            else:
                ending[node] = Segment([node], parent)
                runs.append(ending[node])
        return runs


@dataclass(frozen=True)
class Segment:
    """An unbranched run of nodes below `parent`, which belongs to another segment or is the root, -1."""

    nodes: list[int]
    parent: int


@dataclass(frozen=True)
class Block:
    """Nodes that see `path` and, among themselves, their ancestors."""

    nodes: list[int]
    path: list[int]

    def visibility(self, tree: TokenTree) -> torch.Tensor:
        """Returns `(len(nodes), len(path) + len(nodes))` bool: row i marks what node i sees."""
        size = len(self.nodes)
        own = torch.ones(size, size, dtype=torch.bool).tril()
        if not self._is_run(tree):
            own = torch.eye(size, dtype=torch.bool)
            row = {node: i for i, node in enumerate(self.nodes)}
            for i, node in enumerate(self.nodes):
                above = row.get(tree.parents[node])
                if above is not None:
                    own[i] |= own[above]
        return torch.cat([torch.ones(size, len(self.path), dtype=torch.bool), own], dim=1)

    def is_causal(self, tree: TokenTree) -> bool:
        """Whether it is an unbranched run from the root, so that plain causal attention is its attention."""
        return not self.path and self._is_run(tree)

    def _is_run(self, tree: TokenTree) -> bool:
        return all(tree.parents[below] == above for above, below in zip(self.nodes, self.nodes[1:], strict=False))


def cut(tree: TokenTree, start: int = 0, device: str = "cpu") -> list[Block]:
    """Cuts the nodes from `start` on into blocks, such that attention over them is cheap; parents come first.

    Bottom-up: what hangs below an unbranched run joins it, and siblings join each other, where the masked pairs that
    this adds cost less than another block would.
    """
    call_pairs, key_pairs = BLOCK_COST["cpu" if device == "cpu" else "cuda"]
    segments = tree.segments(start)
    below: dict[int, list[list[int]]] = {}  # node -> groups of nodes that hang below it
    blocks: list[Block] = []
    for segment in reversed(segments):  # children before their parents
        path_length = tree.positions[segment.nodes[0]]
        group = segment.nodes
        for hanging in below.pop(group[-1], []):
            # A run from the root alone needs no mask, and causal attention computes half of its pairs.
            causal = len(group) ** 2 // 2 if path_length == 0 and group is segment.nodes else 0
            separate = call_pairs + key_pairs * (path_length + len(segment.nodes) + len(hanging))
            if len(group) * len(hanging) + causal <= separate:
                group = group + hanging
            else:
                blocks.append(Block(sorted(hanging), tree.path(segment.nodes[-1])))
        siblings = below.setdefault(segment.parent, [])
        separate = call_pairs + key_pairs * (path_length + len(group))
        if siblings and 2 * len(siblings[-1]) * len(group) <= separate:
            siblings[-1] = group + siblings[-1]
        else:
            siblings.append(group)
    blocks += [Block(sorted(group), tree.path(parent)) for parent, groups in below.items() for group in groups]
    return sorted(blocks, key=lambda block: block.nodes[0])
