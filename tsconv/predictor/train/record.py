"""Running a model over chunks of text while the activations of some layers go to files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tsconv.predictor.train.samples import HELD, HELD_EVERY, TRAINED, SampleFiles
from tsconv.runtime.layers import LayersContext
from tsconv.runtime.model import SparseLlama


def record(
    model: SparseLlama,
    chunks: npt.NDArray[np.int32],
    layers: range,
    shape: tuple[int, int, int],
    folder: Path,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Writes the samples of `layers`; every HELD_EVERY-th chunk is held out of training.

    Args:
        model: opened with exact sparsity, so that what is seen is what the predictors are to find.
        chunks: tokens [n, chunk], each chunk computed from an empty context.
        shape: n_ffn, n_embd, n_ff.
        folder: where the files go; there are none of these layers.
        progress: called with the number of tokens done.

    Raises:
        OutputError: the disk is full, or cannot be written.
        BackendError: llama.cpp cannot compute.
    """
    files = SampleFiles(folder, layers, *shape)
    try:
        with LayersContext(model, chunks.shape[1]) as context, model.recording(layers, files):
            for i, chunk in enumerate(chunks.tolist()):
                files.split = HELD if i % HELD_EVERY == HELD_EVERY - 1 else TRAINED
                context.compute(chunk)
                progress((i + 1) * len(chunk))
    finally:
        files.close()


def groups(n_layer: int, layer_bytes: int, room: int) -> Sequence[range]:
    """Layers that are recorded together, so that their samples take at most `room` bytes; one at least."""
    each = max(1, room // max(1, layer_bytes))
    return [range(start, min(start + each, n_layer)) for start in range(0, n_layer, each)]
