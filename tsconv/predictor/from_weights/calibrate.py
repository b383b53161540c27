"""Margins of neurons, chosen on what the exact model computes on a text.

Leaving neuron i out costs token t the share e_ti (tsconv.predictor.train.objective, where training has the same)

    e_ti = (h_ti |down_i|)^2 / sqrt(E max(E_t, E)),  E_t the energy of the token's output, E the median of E_t

so that a few tokens with massive activations count as many, and are not all that counts. Letting it through costs a
price. For a price, the margin of a neuron is where the sum of both is least; the price of a layer is the highest whose
margins miss no more than the share wanted. Where logits come from two matrices, each gets its margins as if it were
alone, and a neuron is on where both are passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

PRICES = np.geomspace(1e-4, 1e2, 25)  # in mean e of a token and neuron
BLOCK = 256  # neurons whose logits are sorted together


@dataclass(frozen=True)
class Sample:
    """What an FFN computed. logits: float32 [n_matrices, n, n_ff]; e: float32 [n, n_ff]."""

    logits: Floats
    e: Floats


def shares(h: Floats, down: npt.NDArray[np.float64], typical: float) -> Floats:
    """e [n, n_ff] of h [n, n_ff] and |down_i|^2 [n_ff]; typical: the median energy of tokens."""
    energy = np.square(h, dtype=np.float32) * down.astype(np.float32)
    typical = max(typical, 1e-30)
    weight = 1 / np.sqrt(typical * np.maximum(energy.sum(axis=1), typical))
    return energy * weight[:, None]


def energies(h: Floats, down: npt.NDArray[np.float64]) -> Floats:
    """E_t [n] of h [n, n_ff]."""
    return np.square(h) @ down.astype(np.float32)


def margins(samples: Sequence[Sample], missed: float) -> list[Floats]:
    """The margins of each FFN of a layer, float32 [n_matrices, n_ff]: a neuron is on where all its logits are above.

    An FFN without tokens has margins of 0.

    Args:
        samples: of the layer's FFNs.
        missed: the share of the sum of e that may be left out, at most.
    """
    total = float(sum(sample.e.sum(dtype=np.float64) for sample in samples))
    mean = total / max(1, sum(sample.e.size for sample in samples))
    grids = [_grid(sample, mean) for sample in samples]
    left = sum(_missed(sample, grid) for sample, grid in zip(samples, grids, strict=True))
    fits = np.flatnonzero(left <= missed * total)
    best = int(fits[-1]) if len(fits) else 0
    return [grid[best] for grid in grids]


def _grid(sample: Sample, mean: float) -> Floats:
    """Margins for each of PRICES: float32 [n_prices, n_matrices, n_ff]."""
    n_matrices, n, n_ff = sample.logits.shape
    grid = np.zeros((len(PRICES), n_matrices, n_ff), np.float32)
    if n == 0:
        return grid
    for start in range(0, n_ff, BLOCK):
        block = slice(start, start + BLOCK)
        for matrix in range(n_matrices):
            grid[:, matrix, block] = _margins_of(sample.logits[matrix, :, block], sample.e[:, block], mean)
    return grid


def _margins_of(logits: Floats, e: Floats, mean: float) -> Floats:
    """Of some neurons, as one matrix has their logits [n, neurons]: [n_prices, neurons]."""
    n = len(logits)
    order = np.argsort(logits, axis=0)
    ascending = np.take_along_axis(logits, order, axis=0)
    below = np.cumsum(np.take_along_axis(e, order, axis=0), axis=0, dtype=np.float64)
    below = np.concatenate([np.zeros((1, e.shape[1])), below])  # what is missed where the k lowest are left out
    kept = (n - np.arange(n + 1, dtype=np.float64))[:, None]
    # Half way between the last that is left out and the first that is not; at the ends, the last that was seen.
    between = np.empty((n + 1, e.shape[1]), np.float32)
    between[1:n] = (ascending[:-1] + ascending[1:]) / 2
    between[0], between[n] = np.nextafter(ascending[0], np.float32(-np.inf)), ascending[-1]
    out = np.empty((len(PRICES), e.shape[1]), np.float32)
    for i, price in enumerate(PRICES):
        best = np.argmin(below + price * mean * kept, axis=0)
        out[i] = np.take_along_axis(between, best[None], axis=0)[0]
    return out


def _missed(sample: Sample, grid: Floats) -> npt.NDArray[np.float64]:
    """The sum of e that the margins of each price leave out: float64 [n_prices]."""
    left = np.empty(len(grid))
    for i, chosen in enumerate(grid):
        on = (sample.logits > chosen[:, None]).all(axis=0)
        left[i] = np.where(on, np.float32(0), sample.e).sum(dtype=np.float64)
    return left
