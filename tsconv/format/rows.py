"""Rows of gate, up and down as a model file has them, in either layout, as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import gguf
import numpy as np
import numpy.typing as npt

from tsconv.errors import ModelFileError
from tsconv.format import layouts
from tsconv.format.header import Header, TensorEntry
from tsconv.format.order import shape_of
from tsconv.format.pair import layout_of
from tsconv.transform.bundles import PARTS


def ffn_rows(header: Header, layer: int, part: str, start: int, n: int) -> npt.NDArray[np.float32]:
    """Rows of a layer's gate, up or (neuron-major) down.

    Args:
        part: of tsconv.transform.bundles.PARTS.
        start, n: neurons of the layer, expert after expert: row i of expert e is e * n_ff + i.

    Returns:
        float32 [n, n_embd].

    Raises:
        ModelFileError: a tensor is missing, or the file cannot be read.
    """
    _, n_ffn, n_ff = shape_of(header)
    infix = "_exps" if header.keys.get("llama.expert_count") else ""
    in_bundles = layout_of(header) == layouts.FFN.other
    parts = PARTS if in_bundles else (part,)
    pieces = [_tensor(header, f"blk.{layer}.ffn_{name}{infix}.weight") for name in parts]
    n_rows = n_ffn * n_ff  # bundles where there are three pieces
    row_bytes = sum(piece.n_bytes for piece in pieces) // n_rows
    raw = read_across(header, pieces, start * row_bytes, n * row_bytes).reshape(n, len(pieces), -1)
    own = np.ascontiguousarray(raw[:, parts.index(part)])
    return gguf.dequantize(own, pieces[0].kind).reshape(n, pieces[0].n_weights // n_rows)


def _tensor(header: Header, name: str) -> TensorEntry:
    for tensor in header.tensors:
        if tensor.name == name:
            return tensor
    raise ModelFileError("the tensor is missing", where=f"{header.path}: {name}", fix="convert again")


def read_across(header: Header, pieces: Sequence[TensorEntry], start: int, n_bytes: int) -> npt.NDArray[np.uint8]:
    """Bytes of the pieces, as if they were one tensor. Raises ModelFileError."""
    data, before = [], 0
    try:
        with open(header.path, "rb") as file:
            for piece in pieces:
                begin, end = max(start, before), min(start + n_bytes, before + piece.n_bytes)
                if begin < end:
                    file.seek(piece.offset + begin - before)
                    data.append(file.read(end - begin))
                before += piece.n_bytes
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}", where=header.path) from None
    joined = b"".join(data)
    if len(joined) != n_bytes:
        raise ModelFileError("became shorter while it was read", where=header.path, fix="start again")
    return np.frombuffer(joined, np.uint8)
