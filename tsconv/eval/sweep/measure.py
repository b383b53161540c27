"""Measuring the points of a sweep: the base, exact sparsity, first, into a file; each other point against it."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tsconv.errors import OutputError, TsconvError
from tsconv.eval.base_file import BaseFile, BaseWriter, row_bytes
from tsconv.eval.estimate import Mean
from tsconv.eval.kld import Divergence
from tsconv.eval.ppl import likelihoods, neuron_shares, perplexity_of
from tsconv.eval.sweep.file import SweepFile
from tsconv.eval.sweep.points import EXACT, Point
from tsconv.eval.windows import Windows, scored_logits, windows
from tsconv.runtime.model import SparseLlama, load

N_CTX = 256  # of the model's own context, which is used for decoding
N_DECODED, N_REPEATS = 32, 3

Logits = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # sparsity, windows done, windows in all


def sweep(
    model: Path,
    text: bytes,
    wanted: Sequence[str],
    kept: SweepFile,
    *,
    progress: Progress = lambda sparsity, done, total: None,
    say: Callable[[str], None] = lambda line: None,
    **loading: Any,
) -> None:
    """Measures those of the wanted sparsities that `kept` does not have, and keeps each as soon as it is there.

    Args:
        wanted: as `tsconv.eval.sweep.points.wanted_sparsities` gives them.
        kept: its identity says how the text is taken.
        progress: called after every window.
        say: called with a line when a point is done.
        **loading: for `tsconv.load`.

    Raises:
        TsconvError: the text is too short; no room for the base.
        ModelFileError, BackendError: as `tsconv.load`.
        OutputError: points or base cannot be written.
    """
    todo = [sparsity for sparsity in wanted if sparsity not in kept.points]
    others = [sparsity for sparsity in todo if sparsity != EXACT]
    if EXACT in todo or (others and not _base_is_good(kept, say)):
        with _loaded(model, EXACT, loading) as llama:
            point = _measure_base(llama, windows_of(llama, text, kept), kept, progress)
        if EXACT in todo:
            kept.add(point)
            say(_line(point))
    for sparsity in others:
        with _loaded(model, sparsity, loading) as llama:
            found = windows_of(llama, text, kept)
            point = _measure_point(llama, found, kept, progress)
        kept.add(point)
        say(_line(point))
    kept.drop_base()


def windows_of(llama: SparseLlama, text: bytes, kept: SweepFile) -> Windows:
    return windows(llama, text, kept.identity["n_ctx"], kept.identity["chunks"])


@contextlib.contextmanager
def _loaded(model: Path, sparsity: str, loading: dict[str, Any]) -> Iterator[SparseLlama]:
    with contextlib.closing(load(model, sparsity=sparsity, n_ctx=N_CTX, **loading)) as llama:
        yield llama


def _base_is_good(kept: SweepFile, say: Callable[[str], None]) -> bool:
    if not kept.base_is_complete():
        return False
    try:
        BaseFile(kept.base_path)
    except TsconvError as error:
        say(f"the base is computed again: {error}")
        return False
    return True


def _line(point: Point) -> str:
    return f"{point.sparsity}: perplexity {point.perplexity:.4f}, KL {point.kl:z.6f}, {point.reached:.2%} dropped"


def _measure_base(llama: SparseLlama, found: Windows, kept: SweepFile, progress: Progress) -> Point:
    """Exact sparsity, whose log probabilities go to the base's file."""
    _check_room(kept.base_path, found, llama.n_vocab())
    decode = _decoding_speed(llama, found)
    nll, clock = Mean(), _Clock()
    llama.reset_ffn_stats()
    with BaseWriter(kept.base_path, found, llama.n_vocab()) as base:
        for i, logits in enumerate(clock.timed(scored_logits(llama, found, kept.identity["n_batch"]))):
            nll.add(likelihoods(logits, found.targets(i)))
            base.write(logits)
            progress(llama.sparsity, i + 1, len(found))
    kept.base_is_written()
    value, error = perplexity_of(nll)
    return Point(
        sparsity=llama.sparsity,
        perplexity=value,
        error=error,
        ratio=1.0,
        ratio_error=0.0,
        kl=0.0,
        kl_error=0.0,
        same_top=1.0,
        same_top_error=0.0,
        prefill_tokens_per_s=found.tokens.size / clock.seconds,
        decode_tokens_per_s=decode,
        n_tokens=nll.n,
        **_neurons(llama),
    )


def _measure_point(llama: SparseLlama, found: Windows, kept: SweepFile, progress: Progress) -> Point:
    base, exact = BaseFile(kept.base_path), kept.points[EXACT]
    decode = _decoding_speed(llama, found)
    sums, clock = Divergence(), _Clock()
    llama.reset_ffn_stats()
    computed = clock.timed(scored_logits(llama, found, kept.identity["n_batch"]))
    for i, (log_p, logits) in enumerate(zip(base.log_probabilities(), computed, strict=True)):
        sums.add(log_p, logits, found.targets(i))
        progress(llama.sparsity, i + 1, len(found))
    value, error = sums.perplexity
    ratio = value / exact.perplexity  # the base's own, from its file, lacks what is very unlikely
    kl, kl_error = sums.divergence
    same_top, same_top_error = sums.same_top
    return Point(
        sparsity=llama.sparsity,
        perplexity=value,
        error=error,
        ratio=ratio,
        ratio_error=ratio * sums.log_ratio[1],
        kl=kl,
        kl_error=kl_error,
        same_top=same_top,
        same_top_error=same_top_error,
        prefill_tokens_per_s=found.tokens.size / clock.seconds,
        decode_tokens_per_s=decode,
        n_tokens=sums.kld.n,
        **_neurons(llama),
    )


class _Clock:
    """The seconds that an iterator takes for its values, without what is done with them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, values: Iterable[Logits]) -> Iterator[Logits]:
        iterator = iter(values)
        while True:
            begin = time.perf_counter()
            try:
                value = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - begin
            yield value


def _decoding_speed(llama: SparseLlama, found: Windows) -> float:
    """Tokens per second, one at a time, from the beginning of the text: the fastest of a few times."""
    tokens, seconds = found.tokens.ravel()[:N_DECODED].tolist(), []
    for _ in range(N_REPEATS):
        begin = time.perf_counter()
        llama.token_logits(tokens, n_batch=1)
        seconds.append(time.perf_counter() - begin)
    return len(tokens) / min(seconds)


def _neurons(llama: SparseLlama) -> dict[str, Any]:
    predicted, active = neuron_shares(llama)
    layers = llama.ffn_stats()
    return {
        "predicted": predicted,
        "active": active,
        "layers_predicted": tuple(layer["predicted"] / layer["n_ff"] for layer in layers),
        "layers_active": tuple(layer["active"] / layer["n_ff"] for layer in layers),
        "n_threads": llama.n_threads,
    }


def _check_room(path: Path, found: Windows, n_vocab: int) -> None:
    """Raises OutputError where the disk has no room for the base."""
    needed = found.tokens.nbytes + len(found) * found.n_scored * row_bytes(n_vocab)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OutputError(
            "no room for the log probabilities that the points are compared with",
            where=path,
            expected=f"{needed:,} bytes",
            found=f"{free:,}",
            fix="fewer --chunks, or --points on another disk",
        )
