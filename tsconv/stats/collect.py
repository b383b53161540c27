"""Counting activations: runs a model over chunks of text while the backend counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tsconv.errors import BackendError, StoppedError, TsconvError
from tsconv.format.header import Header
from tsconv.format.order import neuron_order
from tsconv.format.pair import check_keys, fingerprint_of
from tsconv.runtime.layers import LayersContext
from tsconv.runtime.model import SparseLlama
from tsconv.stats.counts import Counts, Part, Source, Stats, Subject
from tsconv.transform.quantize import type_name

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Collected:
    """Statistics of one run. `stopped`: why it ended before the tokens asked for were counted; None when it did not."""

    stats: Stats
    stopped: TsconvError | None


def subject_of(header: Header, sparsity: str) -> Subject:
    """Whose neurons the model with this header has.

    Raises:
        ModelFileError: not a converted model, or one without a fingerprint.
        TsconvError: a sparsity that is not the model's own function.
    """
    if sparsity not in ("predictor", "exact", "dense"):
        raise TsconvError(
            "statistics are of a function that the model has", expected="--sparsity predictor or exact", found=sparsity
        )
    check_keys(header)
    keys = header.keys
    return Subject(
        fingerprint=fingerprint_of(header),
        name=str(keys.get("general.name", header.path.stem)),
        n_layer=keys["llama.block_count"],
        n_embd=keys["llama.embedding_length"],
        n_ff=keys["llama.feed_forward_length"],
        n_expert=keys.get("llama.expert_count", 0),
        n_expert_used=keys.get("llama.expert_used_count", 0),
        sparsity="exact" if sparsity == "dense" else sparsity,  # the same function
    )


def ffn_type(header: Header) -> str:
    """The ggml type of the FFN weights, as the command line spells it; "mixed" when there are several."""
    kinds = {type_name(t.kind) for t in header.tensors if ".ffn_gate" in t.name and "_inp" not in t.name}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def collect(
    model: SparseLlama,
    chunks: Iterable[Sequence[int]],
    *,
    source: tuple[str, str, str],
    chunk: int,
    n_tokens: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Collected:
    """Counts activations over `chunks`, whole chunks only.

    Args:
        model: not used by others meanwhile.
        chunks: token ids, `chunk` of them each, computed from an empty context.
        source: dataset, config and revision of the text, for the file.
        n_tokens: stop after so many; None for all chunks. Rounded up to whole chunks.
        seed: of the order in which the text comes; None for its own.
        progress: called with the tokens counted so far.
        should_stop: asked after every chunk.

    Raises:
        TsconvError: the chunks ended with an error before the first one was counted; later errors are in `stopped`.
        ModelFileError: the model has no fingerprint.
        BackendError: llama.cpp could not compute a chunk, or something else ran in the model meanwhile.
    """
    header = model.header
    subject = subject_of(header, model.sparsity)
    order = neuron_order(header)
    counted, n_chunks, stopped = 0, 0, None
    with model.profiling() as native, LayersContext(model, chunk) as layers:
        iterator = iter(chunks)
        while n_tokens is None or counted < n_tokens:
            try:
                tokens = next(iterator, None)
            except TsconvError as error:
                if not n_chunks:
                    raise
                stopped = error
                break
            if tokens is None:
                break
            layers.compute(tokens)
            counted += len(tokens)
            n_chunks += 1
            if progress is not None:
                progress(counted)
            if should_stop():
                stopped = StoppedError("interrupted")
                break
        counts = Counts.zeros(subject)
        for n in range(subject.n_layer):
            neurons = np.zeros(counts.neurons[:, n].shape, np.int64)
            native.read_profile(n, counts.tokens[n], neurons, counts.histograms[n])
            np.put_along_axis(counts.neurons[:, n], np.broadcast_to(order[n], neurons.shape), neurons, axis=-1)
    if (counts.tokens.sum(axis=1) != counted * max(1, subject.n_expert_used)).any():
        raise BackendError("the backend did not count every token", expected=counted, found=counts.tokens.sum(axis=1))
    part = Part(Source(*source, chunk, ffn_type(header)), counted, n_chunks, () if seed is None else (seed,), counts)
    return Collected(Stats(subject, (part,)), stopped)
