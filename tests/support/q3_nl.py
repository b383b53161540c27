"""The type q3_nl, read with loops from the tables of docs/format.md, and rounded by the formulas in float64."""

from __future__ import annotations

import math

import numpy as np
from gguf import GGMLQuantizationType

KIND = GGMLQuantizationType.I8
LEVELS = np.array([-15, -9, -5, -2, 1, 4, 8, 13])
# Where bits 0 and 1 of the code of weight 4 g + k lie, and bit 2: (which of q[3], first bit), (which, bit).
PLACES = [
    ((0, 0), (0, 2)),
    ((1, 0), (1, 2)),
    ((2, 0), (2, 2)),
    ((0, 3), (0, 5)),
    ((1, 3), (1, 5)),
    ((2, 3), (2, 5)),
    ((0, 6), (2, 6)),
    ((1, 6), (2, 7)),
]


def row_bytes(n: int) -> int:
    return 2 + 13 * n // 32


def nibble(byte: int, high: bool) -> int:
    value = byte >> 4 if high else byte & 15
    return value if value < 8 else value - 16


def weights(row: np.ndarray) -> np.ndarray:
    """float64 [n] of the bytes of one plain row."""
    data = row.tobytes()
    d = float(np.frombuffer(data[:2], "<f2")[0])
    out = []
    for start in range(2, len(data), 13):
        scales, q = data[start], [data[start + 1 + 4 * i : start + 5 + 4 * i] for i in range(3)]
        for g, ((low, first), (high, bit)) in enumerate(PLACES):
            for k in range(4):
                code = (q[low][k] >> first & 3) | (q[high][k] >> bit & 1) << 2
                out.append(d * nibble(scales, g >= 4) * int(LEVELS[code]))
    return np.array(out)


def matrix(rows: np.ndarray) -> np.ndarray:
    """float64 [n_rows, n] of plain rows, uint8 [n_rows, row_bytes]."""
    return np.stack([weights(row) for row in rows])


def plain_rows(stored: bytes, n_rows: int) -> np.ndarray:
    """Plain rows of a matrix in panels: uint8 [n_rows, row_bytes]."""
    n_bytes = len(stored) // n_rows
    rows = np.frombuffer(stored, np.uint8).reshape(n_rows, n_bytes).copy()
    for row in range(n_rows // 16 * 16):
        panel, i = stored[row // 16 * 16 * n_bytes :][: 16 * n_bytes], row % 16
        parts = [panel[2 * i : 2 * i + 2]]
        for block in range(32, 16 * n_bytes, 208):
            parts.append(panel[block + i : block + i + 1])
            parts += [panel[block + 16 + 64 * g + 4 * i :][:4] for g in range(3)]
        rows[row] = np.frombuffer(b"".join(parts), np.uint8)
    return rows


def scale(fc1: np.ndarray, fc2: np.ndarray) -> np.ndarray:
    """What rows of fc1 [r, n_embd] are divided by, and columns of fc2 [n_ff, r] multiplied with."""
    return np.sqrt(np.sqrt((fc1.astype(float) ** 2).sum(1)) / np.sqrt((fc2.astype(float) ** 2).mean(0)))


def expected_square(error: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """E (error . h)^2 for each row, of independent h = relu(normal) with these means: E h^2 = pi (E h)^2."""
    return (error @ mean) ** 2 + (math.pi - 1) * (error**2 @ mean**2)


def nearest(value: float) -> int:
    return int(LEVELS[np.abs(LEVELS - value).argmin()])


def rounded(row: np.ndarray, mean: np.ndarray, pass_on: bool = True) -> np.ndarray:
    """A row [n] rounded as native/src/quantize/q3_nl.c says, scales first; or to nearest."""
    n, c = len(row), math.pi - 1
    d = float(np.float16(np.abs(row).max() / 105))
    w, scales, q = row / d, np.empty(n), np.zeros(n)
    for start in range(0, n, 16):
        group, m2 = w[start : start + 16], mean[start : start + 16] ** 2
        candidates = [s for s in range(-7, 8) if s != 0]
        costs = [sum((x - s * nearest(x / s)) ** 2 * m for x, m in zip(group, m2, strict=True)) for s in candidates]
        scales[start : start + 16] = candidates[int(np.argmin(costs))]
    if not pass_on:
        return d * scales * [nearest(x) for x in w / scales]
    e = 0.0
    for k in range(n):
        q[k] = scales[k] * nearest((w[k] + e / (mean[k] * (c + n - k))) / scales[k])
        e += (w[k] - q[k]) * mean[k]
    for k in range(n):
        e -= (w[k] - q[k]) * mean[k]
        q[k] = scales[k] * nearest((w[k] + e / (mean[k] * (c + 1))) / scales[k])
        e += (w[k] - q[k]) * mean[k]
    return d * q
