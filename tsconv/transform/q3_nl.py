"""q3_nl: 3 bits per weight for a predictor's fc2, whose every row is read for every token (docs/format.md).

A weight is d * s * level: d is an f16 of the row, s from -7 to 7 of 16 columns, level one of 8 uneven ones. ggml has no
such type, so that a GGUF file holds its rows as bytes (I8). fc2 is multiplied with activations behind a ReLU, which
changes what the best rounding is (native/src/quantize/q3_nl.c): they have a mean, and the errors of a row must cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from tsconv.errors import BackendError
from tsconv.native.library import check_array, load_backend

Floats = npt.NDArray[np.float32]

KIND = GGMLQuantizationType.I8  # how a GGUF file declares it
NAME = "q3_nl"
BLOCK, BLOCK_BYTES, HEADER_BYTES = 32, 13, 2  # weights and bytes of a block; bytes of a row before them
MAX_COLUMNS = 1 << 17  # the runtime sums a row's products in 32 bits
LEVELS = (-15, -9, -5, -2, 1, 4, 8, 13)  # of the codes
MAX_WEIGHT = 7 * 15  # in units of a row's d
UNITS = np.finfo(np.float16)


@dataclass(frozen=True)
class Balance:
    """What rounding fc2 takes from both matrices of a predictor, fc2 . relu(fc1 . p), of rank r.

    Dividing row k of fc1 by scale[k] and multiplying column k of fc2 with it leaves the function as it is, the columns
    of fc2 then being of like size: 16 of them share a scale.

    Attributes:
        scale: float32 [r].
        importance: float32 [r], what the activations behind the divided rows of fc1 are on average, up to a factor.
    """

    scale: Floats
    importance: Floats


def row_bytes(n: int) -> int:
    """Bytes of a row of `n` weights, a multiple of BLOCK."""
    return HEADER_BYTES + n // BLOCK * BLOCK_BYTES


def n_weights(n_bytes: int) -> int:
    """Weights of a row of `n_bytes` bytes."""
    return (n_bytes - HEADER_BYTES) // BLOCK_BYTES * BLOCK


def balance(fc1: Floats, fc2: Floats) -> Balance:
    """The balance of fc1 [r, n_embd] and fc2 [n_ff, r].

    An activation is taken to be as large as its row of fc1 is long: nothing is known of the predictor's input. A scale
    is then sqrt(length of the row / root mean square of the column), 1 where that is 0 or not a number.
    """
    length = np.sqrt(np.einsum("re,re->r", fc1, fc1))
    column = np.sqrt(np.einsum("fr,fr->r", fc2, fc2) / len(fc2))
    with np.errstate(all="ignore"):
        scale = np.sqrt(length / column)
    scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1).astype(np.float32)
    return Balance(scale, np.nan_to_num(length / scale, posinf=0).astype(np.float32))


def quantize(rows: Floats, importance: Floats) -> npt.NDArray[np.uint8]:
    """Rows of fc2, balanced, as rows of q3_nl.

    Args:
        rows: contiguous float32 [n, r], finite; r a multiple of BLOCK.
        importance: float32 [r].

    Returns:
        uint8 [n, row_bytes(r)].
    """
    largest = np.abs(rows).max(axis=1)
    units = np.clip(largest / MAX_WEIGHT, UNITS.smallest_subnormal, UNITS.max) * (largest > 0)
    out = np.empty((len(rows), row_bytes(rows.shape[1])), np.uint8)
    round_rows(rows, importance, units.astype(np.float16), out)
    return out


def round_rows(rows: Floats, importance: Floats, units: npt.NDArray[np.float16], out: npt.NDArray[np.uint8]) -> None:
    """`quantize` with the d of each row given. The GIL is released meanwhile.

    Args:
        units: float16 [n].
        out: uint8 [n, row_bytes(r)], written.

    Raises:
        BackendError: out of memory, or arrays that do not fit each other.
    """
    n, r = rows.shape
    if r % BLOCK:
        raise BackendError("columns of rows for q3_nl", expected=f"a multiple of {BLOCK}", found=r)
    arrays: tuple[npt.NDArray[Any], ...] = (rows, importance, units, out)
    dtypes = (np.float32, np.float32, np.float16, np.uint8)
    shapes = ((n, r), (r,), (n,), (n, row_bytes(r)))
    for array, dtype, shape in zip(arrays, dtypes, shapes, strict=True):
        check_array(array, dtype, shape)
    rounded = load_backend().lib.tsffn_quantize_q3_nl
    if not rounded(rows.ctypes.data, n, r, importance.ctypes.data, units.ctypes.data, out.ctypes.data):
        raise BackendError("no memory to quantize a row")


def dequantize(rows: npt.NDArray[np.uint8]) -> Floats:
    """The weights of plain rows, uint8 [n, row_bytes(r)]: float32 [n, r]."""
    n, r = len(rows), n_weights(rows.shape[1])
    units = np.ascontiguousarray(rows[:, :HEADER_BYTES]).view("<f2").astype(np.float32)
    blocks = rows[:, HEADER_BYTES:].reshape(n, -1, BLOCK_BYTES)
    nibbles = np.stack([blocks[..., 0] & 15, blocks[..., 0] >> 4], axis=-1).astype(np.int8)
    scales = (np.where(nibbles < 8, nibbles, nibbles - 16) * units[:, :, None]).astype(np.float32)
    q = blocks[..., 1:].reshape(n, -1, 3, 4)
    codes = np.empty((n, r // BLOCK, 8, 4), np.uint8)
    codes[:, :, 0:3] = q & 7
    codes[:, :, 3:6] = q >> 3 & 7
    codes[:, :, 6:8] = q[:, :, 0:2] >> 6
    codes[:, :, 6] |= (q[:, :, 2] >> 6 & 1) << 2
    codes[:, :, 7] |= (q[:, :, 2] >> 7) << 2
    levels = np.array(LEVELS, np.float32)[codes].reshape(n, r // BLOCK, 2, BLOCK // 2)
    return (levels * scales[..., None]).reshape(n, r)


def scaled(rows: npt.NDArray[np.uint8], factors: Floats) -> npt.NDArray[np.uint8]:
    """The rows [n, row_bytes(r)] with the weights of row i multiplied by factors[i] >= 0, as well as its f16 unit can
    say so."""
    out = rows.copy()
    units = np.ascontiguousarray(rows[:, :HEADER_BYTES]).view("<f2")[:, 0].astype(np.float32) * factors
    out[:, :HEADER_BYTES] = np.clip(units, 0, UNITS.max).astype("<f2")[:, None].view(np.uint8)
    return out
