"""bits1 and bits2 against the formulas of docs/format.md, in Python's own integers."""

from __future__ import annotations

import numpy as np
import pytest

from tsconv.transform import bits
from tsconv.transform.panels import PANEL_ROWS, from_panels, to_panels


def unpacked(stored: np.ndarray, n_bits: int) -> list[list[int]]:
    """w = sum_k 2^k (1 - 2 (bit j of word k)), for each 32 columns n_bits words."""
    rows = []
    for row in stored.tolist():
        words = [int.from_bytes(bytes(row[i : i + 4]), "little") for i in range(0, len(row), 4)]
        blocks = [words[i : i + n_bits] for i in range(0, len(words), n_bits)]
        rows.append([sum((1 - 2 * (b >> j & 1)) << k for k, b in enumerate(of)) for of in blocks for j in range(32)])
    return rows


@pytest.mark.parametrize("n_bits", [1, 2])
@pytest.mark.parametrize("n", [32, 96, 256])
def test_weights(n_bits: int, n: int) -> None:
    rows = np.random.default_rng(n).standard_normal((5, n)).astype(np.float32)
    rows[0, :3] = 0.0, -0.0, -1e-30
    stored = bits.quantize(rows, n_bits)
    assert stored.shape == (5, n // 8 * n_bits)
    found = np.array(unpacked(stored, n_bits))
    assert found.tolist() == bits.rounded(rows, n_bits).tolist()
    assert found[0, :3].tolist() == [1, 1, -1]
    signs = np.where(rows < 0, -1, 1)
    if n_bits == 1:
        assert (found == signs).all()
        return
    assert (np.sign(found) == signs).all() and set(np.unique(found)) == {-3, -1, 1, 3}
    # the larger ones are further out, and the unit leaves little: 0.12 of the energy of normal weights
    assert np.abs(rows[found == 3]).min() > np.median(np.abs(rows))
    unit = (rows * found).sum(axis=1) / np.square(found).sum(axis=1)
    error = np.square(rows - unit[:, None] * found).sum(axis=1) / np.square(rows).sum(axis=1)
    assert (error < 0.2).all() and error.mean() < 0.15


@pytest.mark.parametrize("n_bits", range(1, 9))
def test_input(n_bits: int) -> None:
    x = np.random.default_rng(n_bits).standard_normal((4, 64)).astype(np.float32)
    x[1] = 0
    found = bits.input_values(x, n_bits)
    most = 2**n_bits - 1
    if n_bits == 1:
        assert (found == np.where(x >= 0, 1, -1)).all()
        return
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(most)
    assert (found[1] == 0).all()
    q = found[[0, 2, 3]] / d[[0, 2, 3]]
    assert np.allclose(q, np.rint(q), atol=1e-3) and (np.rint(q) % 2 == 1).all() and np.abs(q).max() < most + 0.01
    assert (np.abs(found - x) <= 1.001 * d).all()


@pytest.mark.parametrize("n_bits", [1, 2])
def test_panels(n_bits: int) -> None:
    """Word b[k] of 16 rows side by side, block of columns after block."""
    rows = np.random.default_rng(0).integers(0, 256, (2 * PANEL_ROWS, 96 // 8 * n_bits), np.uint8)
    kind = bits.KINDS[n_bits]
    panels = to_panels(rows, kind)
    words, found = rows.view("<u4"), panels.reshape(-1).view("<u4")
    at = 0
    for panel in range(2):
        for word in range(3 * n_bits):
            for i in range(PANEL_ROWS):
                assert found[at] == words[panel * PANEL_ROWS + i, word]
                at += 1
    assert at == found.size
    assert (from_panels(panels, kind) == rows).all()
