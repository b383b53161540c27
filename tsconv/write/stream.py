"""The conversion's data path: slabs of rows, read, reshaped and quantized in a thread pool, written in order.

At most `workers + QUEUED` slabs are in flight, so memory is bounded by them, by the largest ffn_down of the checkpoint,
which is read whole because its columns become rows, and, when neurons are reordered, by one FFN's matrix as stored.
The predictor's matrices are put in panels slab by slab, and so are gate, up and down in bundles: the three tensors of a
layer are written as one matrix, FFN after FFN.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from tsconv.arch.family import Output
from tsconv.arch.match import Matched
from tsconv.checkpoint.safetensors_reader import DTYPES, SourceTensor
from tsconv.errors import CheckpointError
from tsconv.format.types import takes_panels
from tsconv.signals import signals_wait
from tsconv.transform import q3_nl
from tsconv.transform.bundles import to_bundles
from tsconv.transform.layout import columns_as_rows, reciprocal
from tsconv.transform.neuron_order import Order, inverse
from tsconv.transform.panels import panel_step, to_panels
from tsconv.transform.quantize import BadWeightError, check_weights, float32, quantize_rows, row_bytes
from tsconv.transform.rope import rope_rows
from tsconv.write.writer import StreamedFile

SLAB_BYTES = 16 << 20  # of input; large enough for sequential disk reads, small beside the memory of any machine
QUEUED = 2  # slabs waiting beyond one per worker


class Predictor:
    """fc1 and fc2, where fc2 is q3_nl: both are written balanced."""

    def __init__(self, fc1: SourceTensor, fc2: SourceTensor) -> None:
        self._sources = fc1, fc2
        self._balance: q3_nl.Balance | None = None
        self._lock = threading.Lock()

    def balance(self) -> q3_nl.Balance:
        """Both matrices are read on the first call."""
        with self._lock:
            if self._balance is None:
                fc1, fc2 = (float32(source.read_rows(0, source.shape[0])) for source in self._sources)
                self._balance = q3_nl.balance(fc1, fc2)
            return self._balance


@dataclass(frozen=True)
class Job:
    """One tensor to write: what it is made of and the type it takes.

    `order` is [sources, rows]: stored row i of a source is the row order[source, i] that a conversion without it has
    there. None: all rows where they are. `predictor` is what this matrix is one of, if that is to be balanced.
    """

    matched: Matched
    kind: GGMLQuantizationType
    order: Order | None = None
    predictor: Predictor | None = None

    @property
    def output(self) -> Output:
        return self.matched.output

    @property
    def in_panels(self) -> bool:
        return takes_panels(self.output.name, self.kind)

    @property
    def declared_shape(self) -> tuple[int, ...]:
        """As a GGUF file has it, slowest dimension first: rows of bytes for a type that ggml does not have."""
        shape = self.output.shape
        return (*shape[:-1], row_bytes(self.kind, shape[-1])) if self.kind == q3_nl.KIND else shape

    @property
    def input_bytes(self) -> int:
        return sum(source.nbytes for source in self.matched.sources)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return len(self.matched.sources) * self.output.n_rows * row_bytes(self.kind, self.output.row_length)


def workers() -> int:
    """Threads that convert: one per core this process may use."""
    return len(os.sched_getaffinity(0))


def write_tensors(
    files: list[tuple[StreamedFile, list[Job]]],
    head_dim: int,
    bundles: Mapping[str, tuple[Job, Job, Job]],
    done: Callable[[int], None] | None,
) -> None:
    """Converts and writes all tensors of all files, which have begun.

    Args:
        bundles: gate, up and down that are written as bundles, by the name of the gate; they follow one another among
            the jobs. Empty: plain rows.
        head_dim: size of an attention head, for the RoPE order.
        done: called with the number of input bytes behind each slab that was written.

    Raises:
        CheckpointError: a weight is not finite or too large for its type, or a shard cannot be read.
        OutputError: from the writer.
    """
    pending: deque[tuple[_Slab, Future[np.ndarray]]] = deque()

    def write_next() -> None:
        slab, future = pending.popleft()
        with signals_wait():
            rows = future.result()
        slab.write(rows)
        if done:
            done(slab.input_bytes)

    limit = workers()
    pool = ThreadPoolExecutor(limit)
    try:
        for file, jobs in files:
            for slab in _all_slabs(file, jobs, head_dim, bundles):
                with signals_wait():
                    future = pool.submit(slab.make)
                pending.append((slab, future))
                if len(pending) >= limit + QUEUED:
                    write_next()
        while pending:
            write_next()
    finally:
        with signals_wait():
            pool.shutdown(wait=True, cancel_futures=True)


class _Scatter:
    """Rows of one source, taken slab by slab, each put where it belongs, and written when the last is there."""

    def __init__(self, positions: Order, write: Callable[[np.ndarray], None]) -> None:
        self.positions, self.write = positions, write
        self.start, self.rows = 0, np.empty((0, 0), np.uint8)

    def __call__(self, slab: np.ndarray) -> None:
        if self.start == 0:
            self.rows = np.empty((len(self.positions), slab.shape[1]), np.uint8)
        stop = self.start + len(slab)
        self.rows[self.positions[self.start : stop]] = slab
        self.start = stop
        if stop == len(self.positions):
            self.write(self.rows)


def _write_panels(kind: GGMLQuantizationType, write: Callable[[np.ndarray], None], rows: np.ndarray) -> None:
    step = panel_step(SLAB_BYTES // rows.shape[1])
    for start in range(0, len(rows), step):
        write(to_panels(rows[start : start + step], kind))


@dataclass(frozen=True)
class _Slab:
    """Some rows: how many bytes of input, the function that makes them, and the one that takes them, in order."""

    input_bytes: int
    make: Callable[[], np.ndarray]
    write: Callable[[np.ndarray], None]


def _all_slabs(
    file: StreamedFile, jobs: list[Job], head_dim: int, bundles: Mapping[str, tuple[Job, Job, Job]]
) -> Iterator[_Slab]:
    in_bundles = {job.output.name for parts in bundles.values() for job in parts}
    for job in jobs:
        name = job.output.name
        if name in bundles:
            yield from _bundle_slabs(bundles[name], file.write_on)
        elif name not in in_bundles:
            yield from _slabs(job, head_dim, file.write)


def _bundle_slabs(parts: tuple[Job, Job, Job], write: Callable[[np.ndarray], None]) -> Iterator[_Slab]:
    """The bundles of a layer: gate, up and down of the same neurons, FFN after FFN."""
    gate = parts[0]
    for i in range(len(gate.matched.sources)):
        sources = [job.matched.sources[i] for job in parts]
        bytes_per_row = sum(gate.output.row_length * DTYPES[source.dtype].itemsize for source in sources)
        step = max(1, SLAB_BYTES // bytes_per_row)
        wholes = [_whole(job, source) for job, source in zip(parts, sources, strict=True)]
        put = write if gate.order is None else _Scatter(inverse(gate.order[i]), write)
        for start in range(0, gate.output.n_rows, step):
            stop = min(start + step, gate.output.n_rows)
            make = functools.partial(_make_bundles, parts, sources, wholes, (start, stop))
            yield _Slab((stop - start) * bytes_per_row, make, put)


def _whole(job: Job, source: SourceTensor) -> np.ndarray | None:
    """All of a source whose columns become rows; None where rows can be read one by one."""
    return source.read_rows(0, source.shape[0]) if job.output.op == "neuron_major" else None


def _make_bundles(
    parts: Sequence[Job], sources: Sequence[SourceTensor], wholes: Sequence[np.ndarray | None], span: tuple[int, int]
) -> np.ndarray:
    """Bundles of the neurons in `span`: uint8 [stop - start, 3 * bytes per row]."""
    return to_bundles(
        [_make(job, source, whole, 0, span) for job, source, whole in zip(parts, sources, wholes, strict=True)]
    )


def _slabs(job: Job, head_dim: int, write: Callable[[np.ndarray], None]) -> Iterator[_Slab]:
    """The slabs of a tensor, in order; `write` appends to its file."""
    output = job.output
    for i, source in enumerate(job.matched.sources):
        bytes_per_row = output.row_length * DTYPES[source.dtype].itemsize
        step = max(1, SLAB_BYTES // bytes_per_row)
        if output.op == "rope":
            step = max(head_dim, step // head_dim * head_dim)
        elif job.in_panels:
            step = panel_step(step)
        whole = _whole(job, source)
        put = write
        if job.order is not None:
            write_rows = functools.partial(_write_panels, job.kind, write) if job.in_panels else write
            put = _Scatter(inverse(job.order[i]), write_rows)
        for start in range(0, output.n_rows, step):
            stop = min(start + step, output.n_rows)
            make = functools.partial(_make, job, source, whole, head_dim, (start, stop))
            yield _Slab((stop - start) * bytes_per_row, make, put)


def _make(job: Job, source: SourceTensor, whole: np.ndarray | None, head_dim: int, span: tuple[int, int]) -> np.ndarray:
    """Stored rows [start, stop) of `span` that `source` contributes, quantized: uint8 [stop - start, bytes per row].

    They are in panels when that is their layout and they stay where they are.
    """
    rows = source.read_rows(*span) if whole is None else columns_as_rows(whole, *span)
    if job.output.op == "rope":
        rows = rope_rows(rows, head_dim)
    elif job.output.op == "reciprocal":
        rows = reciprocal(float32(rows))
    try:
        if job.predictor is None:
            quantized = quantize_rows(rows, job.kind)
        else:
            quantized = _quantize_balanced(job.kind, rows, job.predictor.balance(), span)
    except BadWeightError as error:
        fix = "the checkpoint is damaged: download it again"
        if error.is_finite:
            fix = f"choose a type that holds it: --tensor-type {job.output.name}=bf16"
        raise CheckpointError(str(error), where=source.where, fix=fix) from None
    return to_panels(quantized, job.kind) if job.in_panels and job.order is None else quantized


def _quantize_balanced(
    kind: GGMLQuantizationType, raw: np.ndarray, balance: q3_nl.Balance, span: tuple[int, int]
) -> np.ndarray:
    """Rows `span` of a predictor's fc1 or, in q3_nl, its fc2."""
    check_weights(raw, kind)
    rows = float32(raw)
    if kind == q3_nl.KIND:
        rows *= balance.scale
        return q3_nl.quantize(rows, balance.importance)
    rows /= balance.scale[slice(*span), None]
    return quantize_rows(rows, kind)
