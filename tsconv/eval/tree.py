"""Sequences of tokens as a tree: what several of them begin with stands in it once."""

from __future__ import annotations

from collections.abc import Sequence

Tokens = Sequence[int]


def shared(a: Tokens, b: Tokens) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


class Tree:
    """Grows by one sequence at a time, which must come in ascending order. Its nodes are tokens, numbered as they come:
    a node's number is larger than those of the tokens before it, and the first sequence's are 0, 1, 2, ...

    A leaf is a sequence of llama.cpp: the way to a leaf is one of the sequences here. The leaves of a node are
    neighbours, [first_leaf, end_leaf).

    Args:
        own_leaves: each sequence has a leaf of its own, so that it can be continued. Else a sequence has none that is
            the beginning of another one, or its equal.

    Attributes:
        token, position, first_leaf, end_leaf: of each node.
        paths: the nodes of each sequence.
        n_leaves: how many there are.
    """

    def __init__(self, own_leaves: bool = False) -> None:
        self.token: list[int] = []
        self.position: list[int] = []
        self.first_leaf: list[int] = []
        self.end_leaf: list[int] = []
        self.paths: list[list[int]] = []
        self.n_leaves = 0
        self._own_leaves = own_leaves
        self._last: Tokens = ()

    def __len__(self) -> int:
        return len(self.token)

    def growth(self, tokens: Tokens) -> tuple[int, int]:
        """Nodes and leaves that the sequence would add."""
        same = shared(self._last, tokens)
        return len(tokens) - same, int(self._branches(same))

    def add(self, tokens: Tokens) -> None:
        """Adds a sequence, not before the last one in ascending order."""
        same = shared(self._last, tokens)
        path = self.paths[-1][:same] if self.paths else []
        if self._branches(same):
            self.n_leaves += 1
            for node in path:
                self.end_leaf[node] = self.n_leaves
        new = range(len(self.token), len(self.token) + len(tokens) - same)
        self.token += tokens[same:]
        self.position += range(same, len(tokens))
        self.first_leaf += [self.n_leaves - 1] * len(new)
        self.end_leaf += [self.n_leaves] * len(new)
        self.paths.append([*path, *new])
        self._last = tokens

    def _branches(self, same: int) -> bool:
        """Whether a sequence needs another leaf than the last one, with which it shares so many tokens."""
        return not self.paths or self._own_leaves or same < len(self._last)
