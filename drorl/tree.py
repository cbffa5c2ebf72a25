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

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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

    def visibility(self, nodes: Sequence[int], seen: Sequence[int]) -> torch.Tensor:
        """Returns `(len(nodes), len(seen))` bool: row i marks the ancestors of `nodes[i]` and itself.

        Parents come before their children in `nodes`, and all that any of them sees is in `seen`.
        """
        visible = np.zeros((len(nodes), len(seen)), dtype=bool)
        column = {node: c for c, node in enumerate(seen)}
        row: dict[int, int] = {}
        for i, node in enumerate(nodes):
            parent = self.parents[node]
            if parent in row:
                visible[i] = visible[row[parent]]
            else:
                visible[i, [column[above] for above in self.path(parent)]] = True
            visible[i, column[node]] = True
            row[node] = i
        return torch.from_numpy(visible)

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
        children = Counter(parent for parent in self.parents[start:] if parent >= start)
        runs: list[Segment] = []
        run_of: dict[int, Segment] = {}
        for node, parent in enumerate(self.parents[start:], start):
            if children[parent] == 1:
                run_of[node] = run_of[parent]
                run_of[node].nodes.append(node)
            else:
                run_of[node] = Segment([node], parent)
                runs.append(run_of[node])
        return runs


@dataclass(frozen=True)
class Segment:
    """An unbranched run of nodes below `parent`, which belongs to another segment or is the root, -1."""

    nodes: list[int]
    parent: int


@dataclass(frozen=True)
class Block:
    """Nodes that see, of `path` and among themselves, their ancestors."""

    nodes: list[int]
    path: list[int]

    def joined(self, other: "Block", call_pairs: int, key_pairs: int) -> "Block | None":
        """Returns both as one, or `None` if the masked pairs that this adds cost more than another block."""
        shared = len(set(self.path).intersection(other.path))
        masked = len(self.nodes) * (len(other.path) - shared + len(other.nodes))
        masked += len(other.nodes) * (len(self.path) - shared + len(self.nodes))
        if masked > call_pairs + key_pairs * shared:
            return None
        return Block(sorted([*self.nodes, *other.nodes]), sorted({*self.path, *other.path}))

    @property
    def seen(self) -> list[int]:
        """What the block's nodes see, and they themselves."""
        return [*self.path, *self.nodes]

    def is_causal(self, tree: TokenTree) -> bool:
        """Whether it is an unbranched run from the root, so that plain causal attention is its attention."""
        steps = zip(self.nodes, self.nodes[1:], strict=False)
        return not self.path and all(tree.parents[below] == above for above, below in steps)


def cut(tree: TokenTree, start: int = 0, device: str = "cpu") -> list[Block]:
    """Cuts the nodes from `start` on into blocks, such that attention over them is cheap.

    Bottom-up: what hangs below an unbranched run joins it, and siblings join each other, where the masked pairs that
    this adds cost less than another block would; then what hangs below different nodes before `start`.
    """
    call_pairs, key_pairs = BLOCK_COST["cpu" if device == "cpu" else "cuda"]
    below: dict[int, list[list[int]]] = {}  # node -> groups of nodes that hang below it
    blocks: list[Block] = []
    for segment in reversed(tree.segments(start)):  # children before their parents
        path_length = tree.positions[segment.nodes[0]]
        group = segment.nodes
        for hanging in below.pop(group[-1], []):
            # A run from the root alone needs no mask, and causal attention computes half of its pairs.
            causal = len(group) ** 2 // 2 if path_length == 0 and group is segment.nodes else 0
            separate = call_pairs + key_pairs * (path_length + len(segment.nodes))
            if len(group) * len(hanging) + causal <= separate:
                group = group + hanging
            else:
                blocks.append(Block(sorted(hanging), tree.path(segment.nodes[-1])))
        siblings = below.setdefault(segment.parent, [])
        if siblings and 2 * len(siblings[-1]) * len(group) <= call_pairs + key_pairs * path_length:
            siblings[-1] = group + siblings[-1]
        else:
            siblings.append(group)
    topmost: list[Block] = []
    for parent, groups in below.items():
        for group in groups:
            block = Block(sorted(group), tree.path(parent))
            both = topmost[-1].joined(block, call_pairs, key_pairs) if topmost else None
            if both is None:
                topmost.append(block)
            else:
                topmost[-1] = both
    return sorted([*blocks, *topmost], key=lambda block: block.nodes[0])
