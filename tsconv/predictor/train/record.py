"""Running a model over chunks of text while the activations of some layers go to files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tsconv.errors import TsconvError
from tsconv.predictor.train.samples import HELD, HELD_EVERY, TRAINED, SampleFiles
from tsconv.runtime.layers import LayersContext
from tsconv.runtime.model import SparseLlama
from tsconv.stats.text.chunks import chunks
from tsconv.stats.text.corpus import Corpus

SPREAD = 16  # a text is read to so many times the tokens that are taken of it


def record(
    model: SparseLlama,
    tokens: npt.NDArray[np.int32],
    layers: range,
    shape: tuple[int, int, int],
    folder: Path,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Writes the samples of `layers`; every HELD_EVERY-th chunk is held out of training.

    Args:
        model: opened with exact sparsity, so that what is seen is what the predictors are to find.
        tokens: [n, chunk], each chunk computed from an empty context.
        shape: n_ffn, n_embd, n_ff.
        folder: where the files go; there are none of these layers.
        progress: called with the number of tokens done.

    Raises:
        OutputError: the disk is full, or cannot be written.
        BackendError: llama.cpp cannot compute.
    """
    files = SampleFiles(folder, layers, *shape)
    try:
        with (
            LayersContext(model, tokens.shape[1]) as context,
            model.recording(layers, files, stops=context.one_batch) as check,
        ):
            for i, chunk in enumerate(tokens.tolist()):
                files.split = HELD if i % HELD_EVERY == HELD_EVERY - 1 else TRAINED
                context.compute(chunk)
                check()
                progress((i + 1) * len(chunk))
    finally:
        files.close()


def take_chunks(model: SparseLlama, corpus: Corpus, chunk: int, n_tokens: int, seed: int) -> npt.NDArray[np.int32]:
    """`n_tokens` tokens, rounded up to whole chunks, from all over a text: int32 [n, chunk], in random order.

    Raises:
        TsconvError: the text is too short.
        HubError: it cannot be reached.
    """
    bos = model.token_bos() if model.token_bos() >= 0 else None
    found: list[list[int]] = []
    for row in chunks(lambda text: model.tokenize(text, add_bos=False, special=False), bos, corpus, chunk):
        found.append(row)
        if len(found) * chunk >= SPREAD * n_tokens:
            break
    if len(found) < 2 * HELD_EVERY:
        raise TsconvError(
            "the text is too short to train on",
            expected=f"at least {2 * HELD_EVERY * chunk:,} tokens",
            found=f"{len(found) * chunk:,} in whole chunks",
            fix="take a longer text, or lower --chunk",
        )
    order = np.random.default_rng(seed).permutation(len(found))
    return np.array(found, np.int32)[order[: -(-n_tokens // chunk)]]


def groups(n_layer: int, layer_bytes: int, room: int) -> Sequence[range]:
    """Layers that are recorded together, so that their samples take at most `room` bytes; one at least."""
    each = max(1, room // max(1, layer_bytes))
    return [range(start, min(start + each, n_layer)) for start in range(0, n_layer, each)]
