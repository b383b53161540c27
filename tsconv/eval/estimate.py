"""Log probabilities, and means with their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """log p of each row: [n, n_vocab]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def log_sums(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """log of the sum of exp of each row: float64 [n]; logits - log_sums are log probabilities."""
    top = logits.max(axis=1)
    return top + np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64))


@dataclass
class Mean:
    """The mean of n values and its standard error, sqrt((E[x^2] - E[x]^2) / (n - 1)), from their sums."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Floats) -> None:
        values = values.astype(np.float64)
        self.n += values.size
        self.total += float(values.sum())
        self.squares += float(np.square(values).sum())

    @property
    def mean(self) -> float:
        return self.total / self.n if self.n else 0.0

    @property
    def error(self) -> float:
        variance = self.squares / self.n - self.mean**2 if self.n > 1 else 0.0
        return math.sqrt(variance / (self.n - 1)) if variance > 0 else 0.0


@dataclass
class Covariance:
    """Of the means of two values, from sums."""

    n: int = 0
    first: float = 0.0
    second: float = 0.0
    products: float = 0.0

    def add(self, first: Floats, second: Floats) -> None:
        first, second = first.astype(np.float64), second.astype(np.float64)
        self.n += first.size
        self.first += float(first.sum())
        self.second += float(second.sum())
        self.products += float((first * second).sum())

    @property
    def value(self) -> float:
        if self.n < 2:
            return 0.0
        return (self.products / self.n - self.first / self.n * (self.second / self.n)) / (self.n - 1)
