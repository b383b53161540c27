"""bits1 and bits2: weights of 1 and 2 bits for predictors without a first matrix (docs/format.md). Pure functions.

A weight is +-1 (bits1), or +-1, +-3 (bits2), in units of its row: w = sum_k 2^k (1 - 2 b_k) with the bits b_k. Only
where a row's logit lies among its own logits counts, so that the units are not kept. ggml has no such types: a GGUF
file holds them as I16 and I32, 16 weights to an element.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

Floats = npt.NDArray[np.float32]

KINDS = {1: GGMLQuantizationType.I16, 2: GGMLQuantizationType.I32}  # bits -> how a GGUF file declares them
NAMES = {kind: f"bits{n}" for n, kind in KINDS.items()}
BLOCK = 32  # columns whose bits are one word each
PER_ELEMENT = 16  # weights of an element of KINDS
MAX_INPUT_BITS = 8

# The units that are tried for a row of bits2, in root mean squares of its weights. That of a normal distribution with
# the least error is 0.4978 (levels of +-0.4528 and +-1.510 rounded to +-1 and +-3).
UNITS = np.linspace(0.25, 0.75, 21, dtype=np.float32)


def pack(odd: npt.NDArray[np.int64], n_bits: int) -> npt.NDArray[np.uint8]:
    """Odd integers as bits.

    Args:
        odd: [rows, n] from -(2^n_bits - 1) to 2^n_bits - 1; n a multiple of BLOCK.

    Returns:
        uint8 [rows, n / 8 * n_bits]: for each block of columns n_bits words of 32 bits.
    """
    rows, n = odd.shape
    places = (odd + (1 << n_bits) - 1) >> 1  # from 0 on; a bit of it is 0 where the sign is negative
    bits = np.stack([~(places >> k) & 1 for k in range(n_bits)], axis=-1).astype(np.uint8)
    words = np.packbits(bits.reshape(rows, n // BLOCK, BLOCK, n_bits).swapaxes(2, 3), axis=-1, bitorder="little")
    return words.reshape(rows, n // 8 * n_bits)


def rounded(rows: Floats, n_bits: int) -> npt.NDArray[np.int64]:
    """The odd integers that stand for rows of weights.

    Args:
        rows: float32 [n_rows, n].
        n_bits: 1: signs, of which 0 has the positive one. 2: with the unit of UNITS that leaves a row the least error.
    """
    if n_bits == 1:
        return np.where(rows < 0, -1, 1)
    best = np.empty(rows.shape, np.int64)
    least = np.full(len(rows), np.inf, np.float32)
    size = np.sqrt(np.einsum("ij,ij->i", rows, rows) / rows.shape[1])
    for unit in UNITS:
        units = np.maximum(unit * size, np.finfo(np.float32).tiny)[:, None]
        odd = np.clip(2 * np.floor(rows / (2 * units)) + 1, -3, 3)
        error = np.square(rows - odd * units).sum(axis=1)
        better = error < least
        best[better], least[better] = odd[better], error[better]
    return best


def quantize(rows: Floats, n_bits: int) -> npt.NDArray[np.uint8]:
    """Rows of weights as `pack` has them: float32 [n_rows, n] -> uint8 [n_rows, n / 8 * n_bits]."""
    return pack(rounded(rows, n_bits), n_bits)


def input_values(x: Floats, n_bits: int) -> Floats:
    """What the runtime makes of activations [..., n] that are multiplied with bits1 and bits2, as it rounds (format.md,
    "bits1 and bits2"): float32 of the same shape."""
    most = np.float32((1 << n_bits) - 1)
    if n_bits == 1:
        return np.where(x >= 0, np.float32(1), np.float32(-1))
    largest = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        scale = np.where(largest > 0, np.float32(0.5) * most / largest, np.float32(0))
    places = np.rint(x * scale + np.float32(0.5) * most)
    return (2 * places - most) * (largest / most)
