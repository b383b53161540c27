"""Transforms against numpy written from the formulas, and quantization against gguf-py's numpy quantizers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from tsconv.transform.layout import columns_as_rows, reciprocal
from tsconv.transform.quantize import TYPES, BadWeightError, float32, largest, quantize_rows, row_bytes, type_name
from tsconv.transform.rope import rope_rows

NUMPY_QUANTIZERS = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]


def random_rows(rows: int, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, n), dtype=np.float32) * rng.choice([1e-6, 0.02, 1, 30], (rows, 1)).astype(
        np.float32
    )


@pytest.mark.parametrize("head_dim", [2, 4, 32, 128])
def test_rope_keeps_every_score(head_dim: int) -> None:
    """q . k with Hugging Face's rotation (halves) equals q' . k' with llama.cpp's (neighbours)."""
    rng = np.random.default_rng(head_dim)
    n_head, n = 3, 5
    wq, wk = (rng.standard_normal((n_head * head_dim, n)) for _ in range(2))
    x, y, at_x, at_y = rng.standard_normal(n), rng.standard_normal(n), 7, 3
    angle = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)

    def halves(head: np.ndarray, position: int) -> np.ndarray:
        a, b = head[: head_dim // 2], head[head_dim // 2 :]
        cos, sin = np.cos(position * angle), np.sin(position * angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin])

    def neighbours(head: np.ndarray, position: int) -> np.ndarray:
        out = np.empty_like(head)
        cos, sin = np.cos(position * angle), np.sin(position * angle)
        out[0::2] = head[0::2] * cos - head[1::2] * sin
        out[1::2] = head[1::2] * cos + head[0::2] * sin
        return out

    def scores(q: np.ndarray, k: np.ndarray, turn) -> list[float]:
        heads = zip(np.split(q @ x, n_head), np.split(k @ y, n_head), strict=True)
        return [turn(a, at_x) @ turn(b, at_y) for a, b in heads]

    expected = scores(wq, wk, halves)
    np.testing.assert_allclose(scores(rope_rows(wq, head_dim), rope_rows(wk, head_dim), neighbours), expected)


def test_rope_row_by_row() -> None:
    rows = np.arange(2 * 6 * 3, dtype=np.uint16).reshape(12, 3)
    out = rope_rows(rows, 6)
    for head in range(2):
        for i in range(3):
            for s in range(2):
                np.testing.assert_array_equal(out[head * 6 + 2 * i + s], rows[head * 6 + i + s * 3])


def test_rope_refuses_partial_heads() -> None:
    with pytest.raises(ValueError, match="whole heads"):
        rope_rows(np.zeros((10, 4), np.float32), 4)


@pytest.mark.parametrize("dims", [(1, 1), (3, 5), (32, 64), (33, 31), (100, 7)])
def test_columns_as_rows(dims: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).integers(0, 1 << 16, dims, dtype=np.uint16)
    start, stop = dims[1] // 3, dims[1]
    out = columns_as_rows(matrix, start, stop)
    assert out.flags.c_contiguous
    assert out.tolist() == [[matrix[i, j] for i in range(dims[0])] for j in range(start, stop)]


def test_reciprocal_guards_zeros() -> None:
    weight = np.array([[2.0, -0.5, 0.0, -0.0, 1e-40]], np.float32)
    np.testing.assert_array_equal(reciprocal(weight), np.array([[0.5, -2.0, 0.0, 0.0, 0.0]], np.float32))


def test_float32_of_every_16_bit_pattern() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(float32(bits).view(np.uint32), bits.astype(np.uint32) << 16)
    halves = bits.view(np.float16)
    np.testing.assert_array_equal(float32(halves), halves.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_largest(dtype: type) -> None:
    rng = np.random.default_rng(0)
    for values in ([0.0, -0.0], [1.5, -3.25], [-1.0, -2.0], [3.0, 0.5], rng.standard_normal(1000).tolist()):
        array = np.array(values, np.float32)
        raw = (array.view(np.uint32) >> 16).astype(np.uint16) if dtype is np.uint16 else array.astype(dtype)
        assert largest(raw) == np.abs(float32(raw)).max()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("kind", [T.F32, T.BF16, T.Q4_0])
def test_not_finite_is_refused(bad: float, dtype: str, kind: T) -> None:
    values = random_rows(3, 64)
    values[2, 63] = bad
    raw = {"F32": values, "F16": values.astype(np.float16), "BF16": (values.view(np.uint32) >> 16).astype(np.uint16)}
    with pytest.raises(BadWeightError, match=r"finite|magnitudes"):
        quantize_rows(raw[dtype], kind)


def test_too_large_for_f16_scales() -> None:
    values = random_rows(1, 32)
    values[0, 5] = -7e4
    with pytest.raises(BadWeightError, match="found -70000"):
        quantize_rows(values, T.F16)
    assert quantize_rows(values, T.BF16).shape == (1, 64)


@pytest.mark.parametrize("name", NUMPY_QUANTIZERS)
@pytest.mark.parametrize("dims", [(1, 32), (7, 96), (64, 4096), (3, 14336)])
def test_bytes_are_those_of_the_numpy_quantizers(name: str, dims: tuple[int, int]) -> None:
    values = random_rows(*dims)
    expected = gguf.quantize(values, TYPES[name]).view(np.uint8).reshape(dims[0], -1)
    np.testing.assert_array_equal(quantize_rows(values, TYPES[name]), expected)


@pytest.mark.parametrize("name", TYPES)
def test_rounding_error_is_that_of_the_type(name: str) -> None:
    """Normalised mean squared error after dequantization by gguf-py, on Gaussian weights."""
    bound = {
        "f32": 0,
        "f16": 1e-7,
        "bf16": 5e-6,
        "q8_0": 5e-5,
        "q6_K": 5e-4,
        "q5_K": 2e-3,
        "q5_1": 2.5e-3,
        "q5_0": 3e-3,
        "q3_K": 4e-2,
    }
    values = np.random.default_rng(0).standard_normal((64, 1024), dtype=np.float32)
    out = gguf.dequantize(quantize_rows(values, TYPES[name]), TYPES[name]).reshape(values.shape)
    error = np.square(out - values).sum() / np.square(values).sum()
    assert error <= bound.get(name, 1e-2)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_16_bit_input_equals_its_float32(name: str, dtype: type) -> None:
    values = np.random.default_rng(0).standard_normal((5, 512), dtype=np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype is np.uint16 else values.astype(dtype)
    np.testing.assert_array_equal(quantize_rows(raw, TYPES[name]), quantize_rows(float32(raw), TYPES[name]))


@pytest.mark.parametrize("name", ["q4_0", "q6_K", "f32"])
def test_pieces_make_no_difference(name: str) -> None:
    """More weights than one piece holds, against rows one by one."""
    values = random_rows(70, 4096)
    whole = quantize_rows(values, TYPES[name])
    np.testing.assert_array_equal(whole, np.concatenate([quantize_rows(row[None], TYPES[name]) for row in values]))


def test_names_and_sizes() -> None:
    assert [type_name(kind) for kind in TYPES.values()] == list(TYPES)
    assert (row_bytes(T.Q4_0, 4096), row_bytes(T.Q6_K, 4096), row_bytes(T.F16, 3)) == (2304, 3360, 6)
