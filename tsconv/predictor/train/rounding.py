"""A predictor as it is stored: fc1, and fc2 whose row i is divided by the bias of neuron i, in ggml's types or q3_nl.

A predictor has no biases. It is trained with one for each neuron all the same: where b_i > 0,

    fc2_i . relu(fc1 . x) > b_i    is    (fc2_i / b_i) . relu(fc1 . x) > 1

so that dividing rows and a threshold of 1 say the same. This needs inputs whose length means something: normed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from tsconv.transform import q3_nl
from tsconv.transform.quantize import quantize_rows

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

MIN_BIAS = 0.1
THRESHOLD = 1.0  # of the stored predictor


@dataclass(frozen=True)
class Stored:
    """Plain rows of the two matrices: uint8 [r, bytes of a row] and [n_ff, bytes of a row]."""

    fc1: Bytes
    fc2: Bytes

    @property
    def n_bytes(self) -> int:
        return self.fc1.nbytes + self.fc2.nbytes


@dataclass(frozen=True)
class Types:
    """Of fc1 and of fc2."""

    fc1: GGMLQuantizationType
    fc2: GGMLQuantizationType

    @property
    def rounds(self) -> bool:
        """Whether rounding to them is worth training for."""
        exact = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
        return self.fc1 not in exact or self.fc2 not in exact

    def store(self, fc1: Floats, fc2: Floats, importance: Floats) -> Stored:
        """Rounds both matrices.

        Args:
            importance: float32 [r], the mean of each activation between them.

        Raises:
            BadWeightError: a weight that is not finite, or too large for its type.
        """
        rows = np.ascontiguousarray(fc2)
        second = q3_nl.quantize(rows, importance) if self.fc2 == q3_nl.KIND else quantize_rows(rows, self.fc2)
        return Stored(quantize_rows(np.ascontiguousarray(fc1), self.fc1), second)

    def read(self, stored: Stored) -> tuple[Floats, Floats]:
        """The weights that are stored."""
        return dequantize(stored.fc1, self.fc1), dequantize(stored.fc2, self.fc2)

    def divided(self, stored: Stored, divisor: float) -> Stored:
        """The predictor whose logits are those of `stored` divided by a number above 0."""
        if self.fc2 == q3_nl.KIND:
            return Stored(stored.fc1, q3_nl.scaled(stored.fc2, np.full(len(stored.fc2), 1 / divisor, np.float32)))
        return Stored(stored.fc1, quantize_rows(dequantize(stored.fc2, self.fc2) / np.float32(divisor), self.fc2))


def dequantize(rows: Bytes, kind: GGMLQuantizationType) -> Floats:
    """Plain rows as float32 [n, n_cols]."""
    if kind == q3_nl.KIND:
        return q3_nl.dequantize(rows)
    return np.ascontiguousarray(gguf.dequantize(rows, kind), np.float32)
