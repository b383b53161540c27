"""What the FFNs of some layers compute on a text, in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tsconv.runtime.layers import LayersContext
from tsconv.runtime.model import SparseLlama

Floats = npt.NDArray[np.float32]

ROOM = 1 << 30  # bytes of activations that are kept at a time


class Recorded:
    """x [n, n_embd] and h [n, n_ff] of each FFN of some layers, as `SparseLlama.recording` tells them."""

    def __init__(self, layers: range, n_ffn: int, n_embd: int, n_ff: int) -> None:
        self._parts: dict[tuple[int, int], list[tuple[Floats, Floats]]] = {
            (layer, e): [(np.empty((0, n_embd), np.float32), np.empty((0, n_ff), np.float32))]
            for layer in layers
            for e in range(n_ffn)
        }

    def __call__(self, layer: int, ffns: npt.NDArray[np.int32], x: Floats, h: Floats) -> None:
        bounds = np.flatnonzero(np.diff(ffns, prepend=-1, append=-1)).tolist()
        for start, stop in itertools.pairwise(bounds):
            self._parts[layer, int(ffns[start])].append((x[start:stop].copy(), h[start:stop].copy()))

    def take(self, layer: int, ffn: int) -> tuple[Floats, Floats]:
        """All of an FFN, which is not kept any longer."""
        x, h = zip(*self._parts.pop((layer, ffn)), strict=True)
        return np.concatenate(x), np.concatenate(h)


def record(model: SparseLlama, chunks: Sequence[Sequence[int]], layers: range, recorded: Recorded) -> None:
    """Runs the model, which is opened with exact sparsity, over chunks of tokens, each from an empty context.

    Raises:
        BackendError: llama.cpp cannot compute.
    """
    with (
        LayersContext(model, max(map(len, chunks))) as context,
        model.recording(layers, recorded, stops=context.one_batch) as check,
    ):
        for chunk in chunks:
            context.compute(chunk)
            check()


def group_of(layer: int, n_layer: int, n_tokens: int, n_used: int, n_embd: int, n_ff: int) -> range:
    """The layers from `layer` on whose activations fit into ROOM, at least one."""
    each = max(1, ROOM // (4 * n_tokens * n_used * (n_embd + n_ff)))
    return range(layer, min(layer + each, n_layer))
