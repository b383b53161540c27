"""Weights in panels and in bundles, read and rewritten with loops from the formulas of docs/format.md."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from support import q3_nl
from support.edited import edited

LAYOUT, VERSION = "turbosparse.predictor.layout", "turbosparse.format_version"
FFN_LAYOUT = "turbosparse.ffn.layout"
TYPES = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0, q3_nl.KIND)


def naive_rows(stored: bytes, n_rows: int, kind: GGMLQuantizationType) -> np.ndarray:
    """Plain rows of a matrix in panels: uint8 [n_rows, row_bytes]."""
    if kind == q3_nl.KIND:
        return q3_nl.plain_rows(stored, n_rows)
    row_bytes = len(stored) // n_rows
    if kind in (GGMLQuantizationType.I16, GGMLQuantizationType.I32):  # bits1, bits2: words alone
        return rows_of_words(stored, n_rows, row_bytes)
    block = GGML_QUANT_SIZES[kind][1]
    rows = bytearray(stored)
    for row in range(n_rows // 16 * 16):
        i = row % 16
        for b in range(row_bytes // block):
            source = row // 16 * 16 * row_bytes + b * 16 * block
            target = row * row_bytes + b * block
            rows[target : target + 2] = stored[source + 2 * i : source + 2 * i + 2]
            for g in range((block - 2) // 4):
                at = source + 32 + 64 * g + 4 * i
                rows[target + 2 + 4 * g : target + 6 + 4 * g] = stored[at : at + 4]
    return np.frombuffer(bytes(rows), np.uint8).reshape(n_rows, row_bytes)


def rows_of_words(stored: bytes, n_rows: int, row_bytes: int) -> np.ndarray:
    """Plain rows where a panel has word after word of its 16 rows."""
    rows = bytearray(stored)
    for row in range(n_rows // 16 * 16):
        for word in range(row_bytes // 4):
            at, to = row // 16 * 16 * row_bytes + word * 64 + row % 16 * 4, row * row_bytes + 4 * word
            rows[to : to + 4] = stored[at : at + 4]
    return np.frombuffer(bytes(rows), np.uint8).reshape(n_rows, row_bytes)


def bytes_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)


def rows_of_bundles(reader: gguf.GGUFReader, tensor: gguf.ReaderTensor, part: str) -> np.ndarray:
    """The rows of gate, up or down: uint8 [all bytes]. Row r of the bundles is row r mod R of tensor r div R."""
    parts = ["gate", "up", "down"]
    names = [tensor.name.replace(f"ffn_{part}", f"ffn_{name}") for name in parts]
    tensors = {t.name: t for t in reader.tensors}
    assert len({tensors[name].tensor_type for name in names}) == 1
    n_rows = int(tensor.shape[0 if part == "down" else 1]) * int(tensor.shape[2] if len(tensor.shape) > 2 else 1)
    pieces = [bytes_of(tensors[name]).reshape(n_rows, -1) for name in names]
    rows = [3 * neuron + parts.index(part) for neuron in range(n_rows)]
    return np.concatenate([pieces[row // n_rows][row % n_rows] for row in rows])


def stored_rows(reader: gguf.GGUFReader, tensor: gguf.ReaderTensor) -> np.ndarray:
    """The plain rows of a tensor of a model or sidecar, whatever its layout: uint8 [all bytes]."""
    data = bytes_of(tensor)
    part = re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)(_exps)?\.weight", tensor.name)
    ffn_layout = reader.get_field(FFN_LAYOUT)
    if part is not None and ffn_layout is not None and ffn_layout.contents() == "bundles":
        return rows_of_bundles(reader, tensor, part[1])
    layout = reader.get_field(LAYOUT)
    is_matrix = ".ffn_pred_fc" in tensor.name
    if layout is None or layout.contents() == "rows" or not is_matrix or tensor.tensor_type not in TYPES:
        return data
    assert layout.contents() == "panels16"
    return naive_rows(data.tobytes(), int(tensor.shape[1]), tensor.tensor_type).reshape(-1)


def write_rows(source: Path, target: Path, version: int = 1) -> Path:
    """Copies a sidecar in panels to one of plain rows: of version 1, or of version 2, which says so."""
    reader = gguf.GGUFReader(source)
    data = {
        tensor.name: stored_rows(reader, tensor).reshape(tensor.data.shape)
        for tensor in reader.tensors
        if tensor.tensor_type in TYPES
    }
    keys = {VERSION: version} if version == 1 else {VERSION: version, LAYOUT: "rows"}
    return edited(source, target, keys=keys, without=[LAYOUT] if version == 1 else [], data=data)
