"""Bundles: gate, up and down of a neuron side by side (docs/format.md).

A token reads the three rows of a neuron together, at random places of the file: one piece of three rows comes faster
than three pieces. Only bytes move: both directions are exact. Pure functions of arrays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PARTS = ("gate", "up", "down")  # in this order in a bundle, and their tensors in a file
GATE = re.compile(r"^blk\.\d+\.ffn_gate(_exps)?\.weight$")  # the tensor that the bundles of a layer begin in

Rows = npt.NDArray[np.uint8]


def to_bundles(parts: Sequence[Rows]) -> Rows:
    """Rows of gate, up and down, each uint8 [n, row_bytes], as bundles: uint8 [n, 3 * row_bytes]."""
    return np.concatenate(parts, axis=1)


def from_bundles(bundles: Rows) -> tuple[Rows, Rows, Rows]:
    """The rows of gate, up and down that `to_bundles` was given, as views."""
    gate, up, down = np.split(bundles, len(PARTS), axis=1)
    return gate, up, down


def names_of_layer(first: str) -> tuple[str, str, str]:
    """The tensors that hold the bundles of the layer whose gate tensor is `first`."""
    gate, up, down = (first.replace("ffn_gate", f"ffn_{part}") for part in PARTS)
    return gate, up, down
