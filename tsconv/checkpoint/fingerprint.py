"""One number for a checkpoint, equal for all its conversions: `turbosparse.source.fingerprint` (docs/format.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from tsconv.checkpoint.config import ModelConfig
from tsconv.checkpoint.safetensors_reader import SourceTensor

ROW_STEP = 64  # rows of a gate matrix from one that is hashed to the next


def compute_fingerprint(config: ModelConfig, gates: Iterable[SourceTensor]) -> str:
    """SHA-256 of the shape and of every 64th row of every gate matrix: 64 lower-case hex digits.

    It is of the checkpoint's own bytes, before any transformation, so that neither type nor order of a conversion
    matters. Models that differ in other matrices only are not told apart: their gates, and so mostly what their neurons
    respond to, are the same.

    Args:
        gates: [n_ff, n_embd] each, layer after layer, of a layer expert after expert.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    digest = hashlib.sha256(b"tsconv fingerprint 1\n")
    digest.update(f"{config.n_layer} {config.n_embd} {config.n_ff} {config.n_expert}\n".encode())
    for gate in gates:
        digest.update(f"{gate.dtype}\n".encode())
        for row in range(0, gate.shape[0], ROW_STEP):
            digest.update(gate.read_rows(row, row + 1).data)
    return digest.hexdigest()
