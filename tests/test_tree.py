"""Prefix trees: distinct prefixes, and blocks of attention in which each token sees its ancestors and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drorl.attention import Layout
from drorl.tree import Block, TokenTree, cut

TOKENS = st.lists(st.integers(1, 4), min_size=1, max_size=5)  # few tokens, so that prefixes are shared by chance
LENGTHS = st.lists(st.integers(1, 120), min_size=1, max_size=8)


@given(st.lists(TOKENS, min_size=1, max_size=6))
def test_a_tree_has_one_node_per_distinct_prefix(sequences: list[list[int]]) -> None:
    """Nodes are the distinct prefixes, each path spells its sequence, a node sees its ancestors and itself only."""
    tree = TokenTree()
    paths = [tree.add(sequence) for sequence in sequences]
    prefixes = {tuple(s[: t + 1]) for s in sequences for t in range(len(s))}
    assert len(tree) == len(prefixes)
    visible = tree.visibility(range(len(tree)), range(len(tree)))
    for sequence, path in zip(sequences, paths, strict=True):
        assert [tree.tokens[node] for node in path] == sequence
        assert [tree.positions[node] for node in path] == list(range(len(sequence)))
        for t, node in enumerate(path):
            assert visible[node].nonzero().flatten().tolist() == path[: t + 1]


def test_a_branch_continues_where_it_is_added() -> None:
    """Adding below a node shares what is there, and positions go on counting."""
    tree = TokenTree()
    prompt = tree.add([5, 6, 7])
    branch = tree.add([8, 9], prompt[1])
    assert [tree.positions[node] for node in branch] == [2, 3]
    assert tree.add([5, 6, 8]) == [*prompt[:2], branch[0]]


def tree_of(lengths: list[int], parents: list[int]) -> TokenTree:
    """A tree of runs of these lengths, each below the end of an earlier one or the root; all tokens are distinct."""
    tree, ends, token = TokenTree(), [-1], 0
    for length, parent in zip(lengths, parents, strict=False):
        ends.append(tree.add(range(token, token + length), ends[parent % len(ends)])[-1])
        token += length
    return tree


@given(lengths=LENGTHS, parents=st.lists(st.integers(0, 8), min_size=8, max_size=8))
def test_the_runs_of_a_tree_are_unbranched_and_complete(lengths: list[int], parents: list[int]) -> None:
    """Segments hold every node once, each below the one before it; no run could be joined to the one above it."""
    tree = tree_of(lengths, parents)
    segments = tree.segments()
    assert sorted(node for segment in segments for node in segment.nodes) == list(range(len(tree)))
    for segment in segments:
        assert [tree.parents[node] for node in segment.nodes] == [segment.parent, *segment.nodes[:-1]]
        siblings = [other for other in segments if other.parent == segment.parent]
        assert segment.parent == -1 or len(siblings) > 1


@pytest.mark.parametrize("window", [None, 1, 7])
@settings(max_examples=30)
@given(
    lengths=LENGTHS,
    parents=st.lists(st.integers(0, 8), min_size=8, max_size=8),
    encoded=st.floats(0, 1),
)
def test_along_blocks_each_token_sees_its_ancestors(
    window: int | None, lengths: list[int], parents: list[int], encoded: float
) -> None:
    """Put together, the blocks' masks are the tree's, within a window where there is one.

    Also for a tree of which the first part was encoded before and stands in the cache in another order.
    """
    tree = tree_of(lengths, parents)
    start = int(encoded * (len(tree) - 1))
    slots = torch.randperm(start, generator=torch.Generator().manual_seed(0)).tolist()
    layout = Layout(tree, slots, torch.device("cpu"), torch.float64)
    assert sorted(layout.order) == list(range(start, len(tree)))
    assert layout.slots[:start] == slots
    node_at = {slot: node for node, slot in enumerate(layout.slots)}
    assert len(node_at) == len(tree)
    queries_of = layout.split_queries(torch.tensor(layout.order)[None, None, :, None])
    keys_of = layout.split_keys(torch.arange(len(tree))[None, None, :, None])
    for mask, queries, slots_seen in zip(layout.masks(window), queries_of, keys_of, strict=True):
        queries = queries.flatten().tolist()
        keys = [node_at[slot] for slot in slots_seen.flatten().tolist()]
        seen = torch.ones(len(queries), len(keys)).tril().bool() if mask is None else mask == 0
        for query, row in zip(queries, seen, strict=True):
            near = [
                node
                for node in tree.path(query)
                if window is None
                or len(tree.path(query)) <= window
                or tree.positions[query] - tree.positions[node] < window
            ]
            assert {key for key, visible in zip(keys, row, strict=True) if visible} == set(near)


def test_long_branches_are_cut_off_and_short_ones_stay_together() -> None:
    """Eight contexts of 300 tokens are a block each; the branches of a long prompt are one block, and the prompt one.

    Cut, the contexts need an eighth of the pairs; cut, the prompt needs no mask.
    """
    contexts = tree_of([100, *[300] * 8], [0, *[1] * 8])
    assert sorted(len(block.nodes) for block in cut(contexts)) == [100, *[300] * 8]
    permutations = tree_of([1000, *[10] * 8], [0, *[1] * 8])
    prompt, branches = cut(permutations)
    assert (len(prompt.nodes), len(branches.nodes), len(branches.path)) == (1000, 80, 1000)
    assert prompt.is_causal(permutations)
    assert not branches.is_causal(permutations)
    small = tree_of([10, *[5] * 4], [0, *[1] * 4])
    assert [len(block.nodes) for block in cut(small)] == [30]


def test_what_is_added_below_different_branches_stays_together() -> None:
    """Eight short continuations of kept branches are one block, which sees the prompt once; long ones are one each."""
    lengths, parents = [1000, *[10] * 8], [0, *[1] * 8]
    short = tree_of([*lengths, *[5] * 8], [*parents, *range(2, 10)])
    [block] = cut(short, 1080)
    assert (len(block.nodes), len(block.path)) == (40, 1080)
    long = tree_of([*lengths, *[300] * 8], [*parents, *range(2, 10)])
    assert [(len(block.nodes), len(block.path)) for block in cut(long, 1080)] == [(300, 1010)] * 8


def test_blocks_are_joined_where_the_pairs_that_this_masks_cost_less() -> None:
    """Ten nodes below a path of 1,000, thirty below that and five more: 10 (5 + 30) + 30 (0 + 10) pairs are masked.

    To save are a call and one copy of each key that both see.
    """
    block, other = Block(list(range(1005, 1015)), list(range(1000))), Block(list(range(1015, 1045)), list(range(1005)))
    assert block.joined(other, call_pairs=649, key_pairs=0) is None
    both = Block(list(range(1005, 1045)), list(range(1005)))
    assert block.joined(other, call_pairs=650, key_pairs=0) == other.joined(block, 650, 0) == both
    assert block.joined(other, call_pairs=0, key_pairs=1) == both


def test_a_twin_stands_for_the_same_prefix() -> None:
    """A twin has its node's token, place and parent, and is not what later sequences are added below."""
    tree = TokenTree()
    nodes = tree.add([5, 6])
    twin = tree.twin(nodes[1])
    assert (tree.tokens[twin], tree.positions[twin], tree.parents[twin]) == (6, 1, nodes[0])
    assert tree.add([5, 6, 7])[:2] == nodes


def test_a_copy_grows_on_its_own() -> None:
    """What is added to a copy is not in the tree that it was made of."""
    tree = TokenTree()
    tree.add([1, 2, 3])
    copy = tree.copy()
    copy.add([1, 2, 4])
    assert (len(tree), len(copy)) == (3, 4)
