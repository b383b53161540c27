"""Panels: rows of the predictor's matrices of some types, interleaved by 16 (docs/format.md).

Every row of them is multiplied for every token, and a panel lets one vector instruction serve 16 rows. Only bytes move:
both directions are exact. Pure functions of arrays.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tsconv.transform import bits, q3_nl

PANEL_ROWS = 16
PANEL_TYPES = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0, q3_nl.KIND, *bits.NAMES)

Rows = npt.NDArray[np.uint8]


def panel_step(n_rows: int) -> int:
    """About `n_rows`, in whole panels: the rows of a piece."""
    return max(1, n_rows // PANEL_ROWS) * PANEL_ROWS


def to_panels(rows: Rows, kind: GGMLQuantizationType) -> Rows:
    """Plain rows as panels, the last n_rows mod 16 as they are.

    Panels are independent of each other: a matrix may be given in pieces, each but the last of a multiple of 16 rows.

    Args:
        rows: contiguous uint8 [n_rows, row_bytes], whole blocks of `kind`, one of PANEL_TYPES.

    Returns:
        uint8 of the same shape; panel p has the bytes of rows 16 p to 16 p + 15.
    """
    whole = len(rows) // PANEL_ROWS * PANEL_ROWS
    out = np.empty_like(rows)
    for plain, panels in _same(rows[:whole], out[:whole], kind):
        panels[...] = plain
    out[whole:] = rows[whole:]
    return out


def from_panels(stored: Rows, kind: GGMLQuantizationType) -> Rows:
    """The plain rows that `to_panels` was given: uint8 [n_rows, row_bytes], as `stored`, and in pieces likewise."""
    whole = len(stored) // PANEL_ROWS * PANEL_ROWS
    out = np.empty_like(stored)
    for plain, panels in _same(out[:whole], stored[:whole], kind):
        plain[...] = panels
    out[whole:] = stored[whole:]
    return out


def _same(rows: Rows, stored: Rows, kind: GGMLQuantizationType) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views of plain rows and of panels, field by field, that hold the same at the same indices."""
    if kind in bits.NAMES:
        words = rows.view("<u4").reshape(-1, PANEL_ROWS, rows.shape[1] // 4)
        yield (
            words.swapaxes(1, 2),
            stored.reshape(-1, stored.shape[1] * PANEL_ROWS).view("<u4").reshape(-1, rows.shape[1] // 4, PANEL_ROWS),
        )
        return
    if kind == q3_nl.KIND:
        plain, panels = _plain_q3_nl(rows), _panels_q3_nl(stored)
        yield plain["d"], panels["d"]
        plain, panels = plain["blocks"], panels["blocks"]
        yield plain["scales"].transpose(0, 2, 1), panels["scales"]
    else:
        plain, panels = _plain(rows, kind), _panels(stored, kind)
        yield plain["d"].transpose(0, 2, 1), panels["d"]
    yield plain["q"].transpose(0, 2, 3, 1), panels["q"]


def _words(kind: GGMLQuantizationType) -> int:
    """G: 4-byte words of a block behind its f16 scale."""
    return (GGML_QUANT_SIZES[kind][1] - 2) // 4


def _plain(rows: Rows, kind: GGMLQuantizationType) -> np.ndarray:
    """Blocks {d, q[G]} of plain rows: [panel, row, block]."""
    block = np.dtype([("d", "<u2"), ("q", "<u4", (_words(kind),))])
    return rows.view(block).reshape(-1, PANEL_ROWS, rows.shape[1] // block.itemsize)


def _panels(stored: Rows, kind: GGMLQuantizationType) -> np.ndarray:
    """Blocks {d[16], q[G][16]} of panels: [panel, block]."""
    blocks = np.dtype([("d", "<u2", (PANEL_ROWS,)), ("q", "<u4", (_words(kind), PANEL_ROWS))])
    return stored.reshape(-1, stored.shape[1] * PANEL_ROWS).view(blocks)


def _blocks_q3_nl(row_bytes: int, rows: tuple[int, ...]) -> np.dtype:
    """{d, blocks {scales, q[3]}} of rows of `row_bytes` bytes, each field for `rows` of them."""
    block = np.dtype([("scales", "u1", rows), ("q", "<u4", (3, *rows))])
    n_blocks = (row_bytes - q3_nl.HEADER_BYTES) // q3_nl.BLOCK_BYTES
    return np.dtype([("d", "<u2", rows), ("blocks", block, (n_blocks,))])


def _plain_q3_nl(rows: Rows) -> np.ndarray:
    """Plain rows: [panel, row]."""
    return rows.view(_blocks_q3_nl(rows.shape[1], ())).reshape(-1, PANEL_ROWS)


def _panels_q3_nl(stored: Rows) -> np.ndarray:
    """Panels: [panel]."""
    n_bytes = stored.shape[1]
    return stored.reshape(-1, n_bytes * PANEL_ROWS).view(_blocks_q3_nl(n_bytes, (PANEL_ROWS,)))[:, 0]
