"""Row order of the q and k projections: Hugging Face's RoPE to llama.cpp's.

Hugging Face turns dimension i of a head together with i + d/2; llama.cpp's llama graph turns 2i with 2i + 1. Output row
2i + s of a head is therefore input row i + s * d/2, for s in {0, 1}. Scores q . k do not change.
"""

from __future__ import annotations

import numpy as np


def rope_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """[k * head_dim, n] rows of whole heads -> the same rows in llama.cpp's order, as a new array of the same type.

    Raises ValueError when `rows` does not hold whole heads of even size.
    """
    n_rows, n = rows.shape
    if head_dim % 2 or n_rows % head_dim:
        raise ValueError(f"{n_rows} rows are not whole heads of even size {head_dim}")
    return rows.reshape(-1, 2, head_dim // 2, n).swapaxes(1, 2).reshape(n_rows, n)
