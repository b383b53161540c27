"""Weights to ggml types with ggml's own quantizers, called through ctypes (the GIL is released meanwhile).

The library is the libggml-base of the installed llama-cpp-python: files hold exactly the bytes that llama.cpp's own
quantization would make. Source: ggml/src/ggml.c, ggml_quantize_chunk.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tsconv.errors import BackendError
from tsconv.transform import bits, q3_nl

# Types that ggml_quantize_chunk makes without an importance matrix and that the runtime has kernels for.
TYPES = {
    kind.name.lower().replace("_k", "_K"): kind
    for kind in (
        GGMLQuantizationType.F32,
        GGMLQuantizationType.F16,
        GGMLQuantizationType.BF16,
        GGMLQuantizationType.Q8_0,
        GGMLQuantizationType.Q4_0,
        GGMLQuantizationType.Q4_1,
        GGMLQuantizationType.Q5_0,
        GGMLQuantizationType.Q5_1,
        GGMLQuantizationType.Q4_K,
        GGMLQuantizationType.Q5_K,
        GGMLQuantizationType.Q6_K,
        GGMLQuantizationType.Q3_K,
        GGMLQuantizationType.IQ4_NL,
    )
}

# Weights converted at a time: 1 MiB of float32, so that it stays in the L2 cache between expansion and quantization.
PIECE = 1 << 18

# Scales of all block types are f16 and at most the largest weight; f32 and bf16 hold any finite float32.
F16_MAX = 65504.0
UNBOUNDED = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)

# dtype of raw weights -> (signed view, unsigned view, bit pattern of infinity)
_BITS = {
    np.dtype(np.float32): (np.int32, np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.int16, np.uint16, 0x7C00),
    np.dtype(np.uint16): (np.int16, np.uint16, 0x7F80),  # bf16
}


class BadWeightError(ValueError):
    """A weight that is not a number, infinite, or (`is_finite`) too large for the type; the message says which."""

    def __init__(self, message: str, is_finite: bool) -> None:
        super().__init__(message)
        self.is_finite = is_finite


def type_name(kind: GGMLQuantizationType) -> str:
    """Name as the command line spells it: q4_0, q4_K, f16, q3_nl, bits1."""
    if kind in bits.NAMES:
        return bits.NAMES[kind]
    return q3_nl.NAME if kind == q3_nl.KIND else kind.name.lower().replace("_k", "_K")


def block_size(kind: GGMLQuantizationType) -> int:
    """Weights per block; a row must be a multiple of it."""
    return q3_nl.BLOCK if kind == q3_nl.KIND else GGML_QUANT_SIZES[kind][0]


def row_bytes(kind: GGMLQuantizationType, n: int) -> int:
    """Bytes of a row of `n` weights, a multiple of the block size."""
    if kind == q3_nl.KIND:
        return q3_nl.row_bytes(n)
    block, size = GGML_QUANT_SIZES[kind]
    return n // block * size


@functools.cache
def _ggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    try:
        # The soname, as libllama asks for it: the process then holds one copy of the library, not two.
        library = ctypes.CDLL(str(folder / "libggml-base.so.0"))
    except OSError as error:
        raise BackendError(
            f"ggml's library cannot be loaded ({error})", where=folder, fix="reinstall llama-cpp-python"
        ) from None
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_bf16_to_fp32_row.restype = None
    library.ggml_bf16_to_fp32_row.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return library


def to_float32(raw: np.ndarray, out: np.ndarray) -> None:
    """Expands contiguous raw weights (float32, float16, or bf16 as uint16) into `out`, float32 of the same size.

    bf16 goes through ggml's row function: 10.7 Gweights/s where a numpy shift makes 5.3 (2-core Sapphire-Rapids class).
    """
    if raw.dtype == np.uint16:
        _ggml().ggml_bf16_to_fp32_row(raw.ctypes.data, out.ctypes.data, raw.size)
    else:
        np.copyto(out, raw.reshape(out.shape))


def float32(raw: np.ndarray) -> np.ndarray:
    """Raw weights as a new float32 array of the same shape."""
    out = np.empty(raw.shape, np.float32)
    to_float32(raw, out)
    return out


def largest(raw: np.ndarray) -> float:
    """Largest magnitude in `raw`, or inf when any weight is infinite or NaN.

    IEEE floats of one sign sort like the integers of their bits, so two integer maxima (of the positive and of the
    negative values) find it in one pass each, at about 20 Gweights/s.
    """
    signed, unsigned, infinity = _BITS[raw.dtype]
    sign = 1 << (raw.itemsize * 8 - 1)
    positive, negative = int(raw.view(signed).max()), int(raw.view(unsigned).max())
    bits = max(positive, negative - sign, 0)
    if bits >= infinity:
        return float("inf")
    if raw.dtype == np.uint16:
        return float(np.uint32(bits << 16).view(np.float32))
    return float(np.array(bits, unsigned).view(raw.dtype))


def check_weights(raw: np.ndarray, kind: GGMLQuantizationType) -> None:
    """Refuses raw weights that `kind` cannot hold.

    Raises:
        BadWeightError: NaN or infinity among the weights, or a magnitude that the type's f16 scales cannot hold.
    """
    limit = float(np.finfo(np.float32).max) if kind in UNBOUNDED else F16_MAX
    if raw.size and not largest(raw) <= limit:
        raise _bad_weight(raw, kind, limit)


def quantize_rows(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows of weights as rows of a ggml type (q3_nl: tsconv.transform.q3_nl).

    Args:
        raw: contiguous [rows, n] float32, float16, or bf16 as uint16; n a multiple of the type's block.

    Returns:
        uint8 [rows, row_bytes(kind, n)].

    Raises:
        BadWeightError: as `check_weights`.
    """
    rows, n = raw.shape
    check_weights(raw, kind)
    out = np.empty((rows, row_bytes(kind, n)), np.uint8)
    if kind == GGMLQuantizationType.F32:
        to_float32(raw, out.view(np.float32))
        return out
    step = max(1, PIECE // n)
    piece = np.empty((min(step, rows), n), np.float32)
    for start in range(0, rows, step):
        part = raw[start : start + step]
        to_float32(part, piece[: len(part)])
        _ggml().ggml_quantize_chunk(kind, piece.ctypes.data, out[start:].ctypes.data, 0, len(part), n, None)
    return out


def _bad_weight(raw: np.ndarray, kind: GGMLQuantizationType, limit: float) -> BadWeightError:
    values = float32(raw)
    found = values[~(np.abs(values) <= limit)][0]
    bound = "finite numbers" if kind in UNBOUNDED else f"magnitudes up to {limit:g}, as {type_name(kind)} needs"
    return BadWeightError(f"bad weight: expected {bound}, found {found:g}", bool(np.isfinite(found)))
