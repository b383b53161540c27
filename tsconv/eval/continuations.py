"""Log likelihoods of continuations, and greedy continuations, of many texts at once.

Texts are computed together as sequences of one context. What several begin with (the examples before a question, the
question before its answers) is computed once: a cell of llama.cpp's unified KV cache may belong to several sequences.
The last sequence of a batch stays in the cache as sequence 0, and the next batch begins with what it has in common with
it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as library

from tsconv.eval.context import SequencesContext
from tsconv.eval.estimate import log_sums
from tsconv.eval.tree import Tokens, Tree, shared
from tsconv.format.kv_cache import padded
from tsconv.runtime.model import SparseLlama

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ (llama-cparams.h)
ROWS = 256  # of logits that are looked at together


@dataclass(frozen=True)
class Continuation:
    """`tokens`: all but the last one of a text. `targets`: the last tokens of the text, which are to be predicted."""

    tokens: Tokens
    targets: Tokens


@dataclass(frozen=True)
class Scored:
    """`log_likelihood` of all targets together; whether each of them is the likeliest token."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue greedily by at most `most`, until `ends` says of the new tokens that they are enough."""

    tokens: Tokens
    most: int
    ends: Callable[[list[int]], bool]


class Continuations:
    """Computes with a context of its own, which `close` frees.

    Args:
        n_ctx: the longest sequence in tokens.
        n_batch: tokens computed together.
        n_seq: sequences computed together.

    Attributes:
        n_tokens: computed since the beginning; those that were shared count once.
        seconds: that took.

    Raises:
        BackendError: no memory for the context.
    """

    def __init__(self, model: SparseLlama, *, n_ctx: int, n_batch: int, n_seq: int) -> None:
        self._model = model
        self._room = padded(max(n_ctx, n_batch, n_seq + 1))
        self._n_batch = min(n_batch, self._room)
        self._n_seq = n_seq
        self._kept: Tokens = ()  # what sequence 0 has
        self._numbers = np.arange(n_seq + 1, dtype=np.int32)
        self.n_tokens, self.seconds = 0, 0.0
        with model.alone():
            self._context = SequencesContext(
                model,
                n_ctx=self._room,
                n_seq=n_seq + 1,
                n_batch=max(self._n_batch, n_seq + 1),  # when texts are generated it has a token of each sequence
                shared=True,
                what=f"{self._room} tokens",
                fix="lower -c or -b",
            )

    def close(self) -> None:
        self._context.close()

    # ---- log likelihoods

    def score(self, wanted: Sequence[Continuation]) -> Iterator[tuple[int, Scored]]:
        """The number and the likelihood of each continuation, in an order that shares most.

        Raises:
            BackendError: llama.cpp cannot compute.
        """
        order = sorted(range(len(wanted)), key=lambda i: list(wanted[i].tokens))
        for tree, numbers in self._trees(order, lambda i: wanted[i].tokens, lambda i: 0, own_leaves=False):
            targets = [(path, wanted[i].targets) for path, i in zip(tree.paths, numbers, strict=True)]
            yield from zip(numbers, self._score(tree, targets), strict=True)

    def _score(self, tree: Tree, wanted: Sequence[tuple[list[int], Tokens]]) -> list[Scored]:
        """Of each path and its targets."""
        nodes = np.concatenate([path[len(path) - len(targets) :] for path, targets in wanted]).astype(np.int64)
        targets = np.concatenate([targets for _, targets in wanted]).astype(np.int64)
        log_p, greedy = np.zeros(len(nodes)), np.zeros(len(nodes), bool)
        by_node = np.argsort(nodes, kind="stable")
        for computed, logits in self._computed(tree, np.unique(nodes)):
            sums, top = log_sums(logits), logits.argmax(axis=1)
            first, end = np.searchsorted(nodes, (computed[0], computed[-1] + 1), sorter=by_node)
            mine = by_node[first:end]
            row = np.searchsorted(computed, nodes[mine])
            log_p[mine] = logits[row, targets[mine]] - sums[row]
            greedy[mine] = top[row] == targets[mine]
        ends = np.cumsum([len(targets) for _, targets in wanted])
        return [
            Scored(float(log_p[end - len(t) : end].sum()), bool(greedy[end - len(t) : end].all()))
            for end, (_, t) in zip(ends, wanted, strict=True)
        ]

    # ---- continuing

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[int]]]:
        """The number and the new tokens of each prompt: greedy, several at once.

        Raises:
            BackendError: llama.cpp cannot compute.
        """
        order = sorted(range(len(prompts)), key=lambda i: list(prompts[i].tokens))
        most = [prompt.most for prompt in prompts]
        for tree, numbers in self._trees(order, lambda i: prompts[i].tokens, most.__getitem__, own_leaves=True):
            yield from zip(numbers, self._generate(tree, [prompts[i] for i in numbers]), strict=True)

    def _generate(self, tree: Tree, prompts: Sequence[Prompt]) -> list[list[int]]:
        last = np.array([path[-1] for path in tree.paths])
        new: list[list[int]] = [[] for _ in prompts]
        for computed, logits in self._computed(tree, np.unique(last)):
            for i in np.flatnonzero(np.isin(last, computed)).tolist():
                new[i].append(int(logits[np.searchsorted(computed, last[i])].argmax()))
        going = list(range(len(prompts)))
        while True:
            going = [i for i in going if len(new[i]) < prompts[i].most and not prompts[i].ends(new[i])]
            if not going:
                return new
            self._step([(i + 1, len(prompts[i].tokens) + len(new[i]) - 1, new[i][-1]) for i in going])
            for i, row in zip(going, self._context.logits(0, len(going)), strict=True):
                new[i].append(int(row.argmax()))

    def _step(self, tokens: Iterable[tuple[int, int, int]]) -> None:
        """Computes a token of each (sequence, position, token)."""
        with self._model.alone():
            batch, n = self._context.batch, 0
            for sequence, position, token in tokens:
                batch.token[n], batch.pos[n], batch.logits[n] = token, position, True
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                n += 1
            self._decode(n)

    # ---- batches

    def _trees(
        self, order: Iterable[int], tokens_of: Callable[[int], Tokens], more: Callable[[int], int], own_leaves: bool
    ) -> Iterator[tuple[Tree, list[int]]]:
        """Sequences in trees that fit: each, and the numbers of its sequences. `more`: cells beside those of its tokens
        that a sequence needs."""
        numbers: list[int] = []
        tree, used = Tree(own_leaves), 0
        for i in order:
            n_nodes, n_leaves = tree.growth(tokens_of(i))
            if numbers and (used + n_nodes + more(i) > self._room or tree.n_leaves + n_leaves > self._n_seq):
                yield tree, numbers
                tree, numbers, used = Tree(own_leaves), [], 0
                n_nodes = len(tokens_of(i))
            tree.add(tokens_of(i))
            numbers.append(i)
            used += n_nodes + more(i)
        if numbers:
            yield tree, numbers

    def _computed(
        self, tree: Tree, wanted: npt.NDArray[np.int64]
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """Computes a tree from its beginning; leaf l becomes sequence l + 1.

        Args:
            wanted: nodes whose logits are needed, ascending.

        Yields:
            some of these nodes, and their logits [n, n_vocab], which the next ones overwrite.
        """
        with self._model.alone():
            start = self._begin(tree, int(wanted[0]))
            flags = np.zeros(len(tree), bool)
            flags[wanted] = True
            for at in range(start, len(tree), self._n_batch):
                end = min(at + self._n_batch, len(tree))
                self._fill(tree, at, end, flags)
                self._decode(end - at)
                outputs = at + np.flatnonzero(flags[at:end])
                for k in range(0, len(outputs), ROWS):
                    some = outputs[k : k + ROWS]
                    yield some, self._context.logits(int(some[0]) - at, len(some))
            self._keep(tree)

    def _begin(self, tree: Tree, first_wanted: int) -> int:
        """Leaves in the cache what the first sequence has in common with the one that was kept, for all that begin with
        it. Returns the number of these nodes."""
        memory = self._context.memory
        for sequence in range(1, self._n_seq + 1):
            library.llama_memory_seq_rm(memory, sequence, -1, -1)
        first = [tree.token[node] for node in tree.paths[0]]
        kept = min(shared(self._kept, first), first_wanted)
        library.llama_memory_seq_rm(memory, 0, kept, -1)
        for leaf in range(tree.n_leaves):
            n = sum(leaf < end for end in tree.end_leaf[:kept])
            if n:
                library.llama_memory_seq_cp(memory, 0, leaf + 1, 0, n)
        library.llama_memory_seq_rm(memory, 0, -1, -1)
        self._kept = ()
        return kept

    def _keep(self, tree: Tree) -> None:
        """Makes the last sequence of a tree sequence 0."""
        library.llama_memory_seq_cp(self._context.memory, tree.n_leaves, 0, -1, -1)
        self._kept = [tree.token[node] for node in tree.paths[-1]]

    def _fill(self, tree: Tree, start: int, end: int, wanted: npt.NDArray[np.bool_]) -> None:
        """The nodes [start, end) into the batch."""
        batch, numbers = self._context.batch, self._numbers.ctypes.data
        for at, (node, output) in enumerate(zip(range(start, end), wanted[start:end].tolist(), strict=True)):
            first, n = tree.first_leaf[node] + 1, tree.end_leaf[node] - tree.first_leaf[node]
            batch.token[at], batch.pos[at], batch.logits[at] = tree.token[node], tree.position[node], output
            batch.n_seq_id[at] = n
            ctypes.memmove(batch.seq_id[at], numbers + 4 * first, 4 * n)

    def _decode(self, n: int) -> None:
        """Computes the n tokens in the batch."""
        started = time.perf_counter()
        self._context.batch.n_tokens = n
        self._context.decode()
        self.seconds += time.perf_counter() - started
        self.n_tokens += n
