"""Sequences as a tree: each is there, and what they begin with is there once."""

from __future__ import annotations

import random

import pytest

from tsconv.eval.tree import Tree, shared


def test_shared() -> None:
    for a, b, n in (("", "", 0), ("a", "", 0), ("ab", "ac", 1), ("ab", "abc", 2), ("ab", "ab", 2), ("b", "a", 0)):
        assert shared(a, b) == shared(b, a) == n


def random_sequences(seed: int) -> list[list[int]]:
    """Short ones of few tokens: equal ones and beginnings of others are among them."""
    generator = random.Random(seed)
    return sorted([generator.randrange(3) for _ in range(generator.randint(1, 6))] for _ in range(30))


@pytest.mark.parametrize("own_leaves", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_random_sequences(seed: int, own_leaves: bool) -> None:
    sequences = random_sequences(seed)
    tree = Tree(own_leaves)
    for sequence in sequences:
        before = len(tree), tree.n_leaves
        growth = tree.growth(sequence)
        tree.add(sequence)
        assert (len(tree), tree.n_leaves) == (before[0] + growth[0], before[1] + growth[1])
    beginnings = {tuple(s[: k + 1]) for s in sequences for k in range(len(s))}
    assert len(tree) == len(beginnings)
    for path, sequence in zip(tree.paths, sequences, strict=True):
        assert [tree.token[node] for node in path] == sequence
        assert [tree.position[node] for node in path] == list(range(len(sequence)))
        assert path == sorted(path)
    assert tree.paths[0] == list(range(len(sequences[0])))
    # A leaf's nodes are one sequence; each sequence is the beginning of one, or, with leaves of their own, a leaf.
    leaves = [
        [node for node in range(len(tree)) if tree.first_leaf[node] <= leaf < tree.end_leaf[node]]
        for leaf in range(tree.n_leaves)
    ]
    if own_leaves:
        assert leaves == tree.paths
    else:
        distinct = [s for s in sequences if not any(o[: len(s)] == s and len(o) > len(s) for o in sequences)]
        assert len(leaves) == len({tuple(s) for s in distinct})
        assert all(any(leaf[: len(path)] == path for leaf in leaves) for path in tree.paths)
