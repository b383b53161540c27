"""Weights of a generated checkpoint that are never all there: each tensor is made when its rows are read.

So a model of 100 GB of bf16 weights is converted with the disk that its GGUF files need.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from math import prod

import numpy as np

from tsconv.bench.synthetic import Shape, Weights, tensor_shapes

KEPT = 4  # tensors that were made last; gate, up and down of an FFN are read at the same time


@dataclass(frozen=True)
class _Maker:
    """Makes tensors, one at a time, and keeps the last ones."""

    weights: Weights
    kept: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tensor(self, name: str, dims: tuple[int, ...]) -> np.ndarray:
        """bf16 bits [rows, dims[-1]]."""
        with self.lock:
            if name not in self.kept:
                while len(self.kept) >= KEPT:
                    self.kept.popitem(last=False)
                values, done = np.empty(prod(dims), np.uint16), 0
                for piece in self.weights(name, dims):
                    values[done : done + piece.size] = piece.reshape(-1)
                    done += piece.size
                self.kept[name] = values.reshape(-1, dims[-1])
            self.kept.move_to_end(name)
            return self.kept[name]


@dataclass(frozen=True)
class MadeTensor:
    """A tsconv.checkpoint.safetensors_reader.SourceTensor."""

    name: str
    shape: tuple[int, ...]
    maker: _Maker
    dtype: str = "BF16"

    @property
    def where(self) -> str:
        return f"generated weights: {self.name}"

    @property
    def nbytes(self) -> int:
        return 2 * prod(self.shape)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self.maker.tensor(self.name, self.shape)[start:stop].copy()


def made_tensors(shape: Shape, weights: Weights) -> dict[str, MadeTensor]:
    """All tensors of a checkpoint of `shape`, by name.

    Args:
        weights: makes a tensor, the same one each time.
    """
    maker = _Maker(weights)
    return {name: MadeTensor(name, dims, maker) for name, dims in tensor_shapes(shape).items()}
