"""Kinds of predictors that are made of an FFN's gate and up, without training. Pure functions of arrays.

    sign    the signs of gate and up against the signs of x: how many of the products are positive (SparseInfer,
            arXiv:2411.12692, which has the gate's)
    quant   gate, or gate and up, in a few bits
    svd     the gate's best approximation of a rank, as two matrices without an activation between them

A neuron's logits are one for each matrix with a row for it; it is on where each is above its margin.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from tsconv.format import forms
from tsconv.transform import bits
from tsconv.transform.quantize import quantize_rows

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """A matrix as the sidecar holds it.

    Attributes:
        rows: uint8 [n_rows, bytes of a row], not in panels.
        kind: the ggml type that the file declares.
        values: float32 [n_rows, n_cols], the weights that `rows` stands for; of bits1 and bits2 in units of the row.
    """

    rows: npt.NDArray[np.uint8]
    kind: GGMLQuantizationType
    values: Floats


@dataclass(frozen=True)
class Predictor:
    """Of an FFN.

    Attributes:
        matrices: by what they are called in the form, such as "gate".
        input_bits: of x, where matrices are of bits1 or bits2.
    """

    form: forms.Form
    matrices: dict[str, Matrix]
    input_bits: int | None = None

    def logits(self, x: Floats) -> Floats:
        """Of inputs x [n, n_embd]: float32 [matrices with rows of neurons, n, n_ff]."""
        if self.input_bits is not None:
            x = bits.input_values(x, self.input_bits)
        for what in self.form.first:
            x = x @ self.matrices[what].values.T
        return np.stack([x @ self.matrices[what].values.T for what in self.form.neurons])


def sign(gate: Floats, up: Floats, input_bits: int = 1) -> Predictor:
    """The signs of gate and up [n_ff, n_embd]. input_bits: 1 takes the signs of x, up to 8 more of it."""
    return Predictor(forms.GATE_UP, {"gate": _bits(gate, 1), "up": _bits(up, 1)}, input_bits)


def quant(gate: Floats, up: Floats, kind: GGMLQuantizationType | str, both: bool, input_bits: int) -> Predictor:
    """gate, or `both` gate and up [n_ff, n_embd], as a ggml type, or "bits1", "bits2"."""
    form = forms.GATE_UP if both else forms.GATE
    given = {"gate": gate, "up": up} if both else {"gate": gate}
    if isinstance(kind, str):
        n_bits = next(n for n, of in bits.KINDS.items() if bits.NAMES[of] == kind)
        return Predictor(form, {what: _bits(rows, n_bits) for what, rows in given.items()}, input_bits)
    return Predictor(form, {what: _quantized(rows, kind) for what, rows in given.items()})


def svd(gate: Floats, rank: int, kind: GGMLQuantizationType) -> Predictor:
    """gate [n_ff, n_embd] = U S V, cut to `rank`: fc1 = S^1/2 V and fc2 = U S^1/2, so that both are of like size."""
    u, s, v = np.linalg.svd(gate, full_matrices=False)
    root = np.sqrt(s[:rank])
    fc1, fc2 = root[:, None] * v[:rank], u[:, :rank] * root
    return Predictor(forms.LINEAR, {"fc1": _quantized(fc1, kind), "fc2": _quantized(fc2, kind)})


def _bits(rows: Floats, n_bits: int) -> Matrix:
    odd = bits.rounded(rows, n_bits)
    return Matrix(bits.pack(odd, n_bits), bits.KINDS[n_bits], odd.astype(np.float32))


def _quantized(rows: Floats, kind: GGMLQuantizationType) -> Matrix:
    stored = quantize_rows(np.ascontiguousarray(rows, np.float32), kind)
    return Matrix(stored, kind, gguf.dequantize(stored, kind).reshape(rows.shape))
