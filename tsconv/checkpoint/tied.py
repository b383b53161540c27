"""Whether the output matrix is the embeddings: what config.json says, and what the checkpoint holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tsconv.checkpoint.config import ModelConfig
from tsconv.checkpoint.safetensors_reader import SourceTensor
from tsconv.transform.quantize import float32

EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
PIECE = 1 << 20  # weights compared at a time


def resolve_tied(
    config: ModelConfig, tensors: dict[str, SourceTensor]
) -> tuple[ModelConfig, dict[str, SourceTensor], list[str]]:
    """Reads tie_word_embeddings = true as transformers 5 does.

    A matrix that is there under one of the two names serves as both. Of two that are equal one is left out; two that
    differ are both kept, which a note says.

    Returns:
        The configuration, the tensors and notes.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    embeddings, output = tensors.get(EMBEDDINGS), tensors.get(OUTPUT)
    if not config.tied_embeddings or output is None:
        return config, tensors, []
    if embeddings is None:
        others = {name: tensor for name, tensor in tensors.items() if name != OUTPUT}
        return config, others | {EMBEDDINGS: _renamed(output)}, []
    if _equal(embeddings, output):
        return config, tensors, []
    note = (
        f"{OUTPUT} is kept: it differs from {EMBEDDINGS}, although config.json says tie_word_embeddings = true"
        " (transformers 5 keeps it too, older ones do not)"
    )
    return replace(config, tied_embeddings=False), tensors, [note]


def _renamed(output: SourceTensor) -> SourceTensor:
    """The output matrix by the name of the embeddings."""
    return replace(output, name=EMBEDDINGS)  # type: ignore[type-var] # all kinds of tensors are dataclasses


def _equal(a: SourceTensor, b: SourceTensor) -> bool:
    """Whether two matrices have the same shape and values."""
    if a.shape != b.shape or len(a.shape) != 2:
        return False
    step = max(1, PIECE // max(1, a.shape[1]))
    pieces = ((start, min(start + step, a.shape[0])) for start in range(0, a.shape[0], step))
    return all(np.array_equal(float32(a.read_rows(*piece)), float32(b.read_rows(*piece))) for piece in pieces)
