"""Panels against a loop written from the formula of docs/format.md."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from support import q3_nl
from support.panels import naive_rows
from tsconv.transform.panels import PANEL_TYPES, from_panels, to_panels

N_ROWS = [1, 15, 16, 17, 100]
BLOCK_BYTES = {T.Q4_0: 18, T.Q8_0: 34, q3_nl.KIND: 13, T.I16: 4, T.I32: 8}  # bits1 and bits2 are I16 and I32


def random_rows(n_rows: int, n_blocks: int, kind: T) -> np.ndarray:
    shape = (n_rows, n_blocks * BLOCK_BYTES[kind] + 2 * (kind == q3_nl.KIND))
    return np.random.default_rng(n_rows * n_blocks).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("kind", PANEL_TYPES)
@pytest.mark.parametrize("n_blocks", [1, 2, 5])
@pytest.mark.parametrize("n_rows", N_ROWS)
def test_every_byte_is_where_the_formula_says(n_rows: int, n_blocks: int, kind: T) -> None:
    rows = random_rows(n_rows, n_blocks, kind)
    stored = to_panels(rows, kind)
    assert (stored.shape, stored.dtype) == (rows.shape, np.uint8)
    np.testing.assert_array_equal(naive_rows(stored.tobytes(), n_rows, kind), rows)
    np.testing.assert_array_equal(from_panels(stored, kind), rows)
    assert (n_rows < 16 or rows.shape[1] == 4) == np.array_equal(stored, rows)  # a word of each row is in their order


def test_a_panel_byte_by_byte() -> None:
    """q4_0, 17 rows of one block: byte k of row i is i * 13 + k."""
    rows = np.add.outer(np.arange(17) * 13, np.arange(18)).astype(np.uint8)
    stored = to_panels(rows, T.Q4_0).tobytes()
    assert stored[:6] == bytes([0, 1, 13, 14, 26, 27])  # d of rows 0, 1, 2
    assert stored[32:40] == bytes([2, 3, 4, 5, 15, 16, 17, 18])  # q[0..3] of rows 0, 1
    assert stored[96:104] == bytes([6, 7, 8, 9, 19, 20, 21, 22])  # q[4..7] of rows 0, 1
    assert stored[284:288] == bytes([15 * 13 % 256 + k for k in (14, 15, 16, 17)])  # q[12..15] of row 15
    assert stored[288:] == rows[16].tobytes()


@pytest.mark.parametrize("kind", PANEL_TYPES)
@pytest.mark.parametrize("step", [16, 48, 96])
def test_pieces_of_whole_panels(step: int, kind: T) -> None:
    rows = random_rows(100, 3, kind)
    stored = to_panels(rows, kind)
    starts = range(0, len(rows), step)
    np.testing.assert_array_equal(np.concatenate([to_panels(rows[i : i + step], kind) for i in starts]), stored)
    np.testing.assert_array_equal(np.concatenate([from_panels(stored[i : i + step], kind) for i in starts]), rows)
