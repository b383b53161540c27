"""Opened models: what Python asks of `struct tsffn_model` (native/include/tsffn.h)."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tsconv.errors import BackendError, ModelFileError
from tsconv.format.header import Header, read_header
from tsconv.format.order import shape_of
from tsconv.format.pair import sidecar_path
from tsconv.native.library import ERROR_SIZE, RECORD, Backend, GpuShare, LayerStats, Placed, check_array, load_backend
from tsconv.native.log import quiet_unless
from tsconv.runtime.guard import CLOSED, FORKED
from tsconv.runtime.sparsity import parse_sparsity

Ints = npt.NDArray[np.int64]
Recorder = Callable[[int, npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]], None]

N_SQUARES = 2  # TSFFN_N_SQUARES (native/include/tsffn.h)
CACHE_PIECE = 64 << 20  # bytes of a file that are read before Ctrl-C is looked for

# enum tsffn_place_flags (native/include/tsffn.h)
PLACE_PREFAULT, PLACE_LOCK, PLACE_RANDOM_REST = 1, 2, 4


_fclose = ctypes.CDLL(None).fclose
_fclose.argtypes = [ctypes.c_void_p]


def open_model(path: Path, sidecar: Path | None, sparsity: str | None, header: Header | None = None) -> NativeModel:
    """Opens and checks a model and its sidecar (docs/format.md).

    Args:
        path: the model, `NAME.gguf`.
        sidecar: None looks for `NAME.predictor.gguf` beside it.
        sparsity: "predictor", "predictor:D", "exact", "dense", "topk:S", or None for the model's own.
        header: of the model file, where it has been read already.

    Raises:
        ModelFileError: a file that is missing, damaged, or not its partner's.
        TsconvError: another sparsity.
    """
    backend = load_backend()
    if sparsity is not None:
        parse_sparsity(sparsity)
    message = ctypes.create_string_buffer(ERROR_SIZE)
    with quiet_unless(False) as errors:
        handle = backend.lib.tsffn_model_open(
            os.fsencode(path),
            None if sidecar is None else os.fsencode(sidecar),
            None if sparsity is None else sparsity.encode(),
            message,
            ERROR_SIZE,
        )
    if handle is None:
        # The first thing that ggml's reader objected to, when it was ggml's reader.
        reason = f" ({errors[0]})" if errors else ""
        part = Path(f"{path}.part")
        fix = f"{part} is left of a conversion that was cut short: convert again" if part.exists() else None
        raise ModelFileError(message.value.decode(errors="replace") + reason, fix=fix)
    return NativeModel(backend, handle, path, header, sidecar)


class NativeModel:
    """An opened `struct tsffn_model`: the sidecar's mapping and the counters."""

    def __init__(
        self, backend: Backend, handle: int, path: Path, header: Header | None = None, sidecar: Path | None = None
    ) -> None:
        self.backend = backend
        self._lib = lib = backend.lib
        self.path = path
        self._header = header
        self._handle: int | None = handle
        self._load_lock = backend.load_lock
        self._gone = CLOSED
        self.reads: str | None = None  # how neurons are read from disk: "io_uring" or "threads"; None: they are not
        self.lock = threading.RLock()  # held while C works with the handle, so that nobody closes it meanwhile
        self.sparsity: str = lib.tsffn_model_sparsity(handle).decode()
        self.kind = parse_sparsity(self.sparsity).kind
        self.n_layer = lib.tsffn_model_n_layer(handle)
        self.file_bytes = lib.tsffn_model_file_bytes(handle)
        self._sidecar = sidecar

    def cache_file(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Brings the model file into the page cache, in huge pages where its file system has them. Ctrl-C stops it.

        Args:
            progress: called with (bytes done, bytes in all), at most CACHE_PIECE bytes apart.

        Raises:
            ModelFileError: it cannot be read.
            BackendError: the model is closed.
        """
        for start in range(0, self.file_bytes, CACHE_PIECE):
            with self._opened() as handle:
                failure = self._lib.tsffn_model_cache(handle, start, CACHE_PIECE)
            if failure:
                raise ModelFileError(f"cannot be read: {os.strerror(failure)}", where=self.path)
            if progress is not None:
                progress(min(start + CACHE_PIECE, self.file_bytes), self.file_bytes)

    def stream(self, n_bytes: int) -> None:
        """From now on neurons are read from disk when they are needed, into at most `n_bytes` of memory. To be called
        before llama.cpp loads the model.

        Raises:
            BackendError: too few bytes, no memory, predictors that cannot be read, or the model is closed.
        """
        message = ctypes.create_string_buffer(ERROR_SIZE)
        with self._opened() as handle:
            if not self._lib.tsffn_model_stream(handle, n_bytes, message, ERROR_SIZE):
                raise BackendError(message.value.decode(errors="replace"))
            self.reads = self._lib.tsffn_model_reads(handle).decode()

    def fill(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Reads neurons until there is no room for more, the first ones of every FFN. Ctrl-C stops it.

        Args:
            progress: called with (bytes done, bytes in all).

        Returns:
            the bytes that neurons may take.

        Raises:
            ModelFileError: the file cannot be read.
            BackendError: the model is closed.
        """
        filled, room, before = ctypes.c_uint64(), ctypes.c_uint64(), -1
        message = ctypes.create_string_buffer(ERROR_SIZE)
        while filled.value != before:
            before = filled.value
            with self._opened() as handle:
                if not self._lib.tsffn_model_fill(handle, CACHE_PIECE, filled, room, message, ERROR_SIZE):
                    raise ModelFileError(message.value.decode(errors="replace"))
            if progress is not None:
                progress(filled.value, room.value)
        if progress is not None:
            progress(room.value, room.value)
        return room.value

    @contextmanager
    def file(self) -> Iterator[int]:
        """The model file as a FILE * for llama.cpp, which passes over what `stream` reads from disk.

        Raises:
            BackendError: no memory, or the model is closed.
        """
        with self._opened() as handle:
            stream = self._lib.tsffn_model_file(handle)
        if stream is None:
            raise BackendError("no memory to read the model", where=self.path)
        try:
            yield stream
        finally:
            _fclose(stream)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The handle, which stays open while this holds.

        Raises:
            BackendError: the model is closed.
        """
        with self.lock:
            if self._handle is None:
                raise BackendError(self._gone)
            yield self._handle

    @contextmanager
    def armed(self) -> Iterator[None]:
        """While this holds, the backend claims the FFN weights that llama.cpp loads for this model.

        Raises:
            BackendError: the model is closed.
        """
        with self._load_lock:
            with self._opened() as handle:
                self._lib.tsffn_model_arm(handle)
            try:
                yield
            finally:
                self._lib.tsffn_model_arm(None)

    def stats(self, layer: int) -> LayerStats:
        """The counters of one layer.

        Raises:
            BackendError: no such layer, or the model is closed.
        """
        stats = LayerStats()
        with self._opened() as handle:
            if not self._lib.tsffn_model_stats(handle, layer, ctypes.byref(stats)):
                raise BackendError("layer", expected=f"0 to {self.n_layer - 1}", found=layer)
        return stats

    def reset_stats(self) -> None:
        """Sets all counters to 0.

        Raises:
            BackendError: the model is closed.
        """
        with self._opened() as handle:
            self._lib.tsffn_model_reset_stats(handle)

    def profile(self, on: bool) -> None:
        """Begins counting activations from 0, or stops and drops the counts. Not while the model computes.

        Raises:
            BackendError: no memory for the counters, or the model was opened with topk, or is closed.
        """
        if on and self.kind == "topk":
            raise BackendError("activations are not counted with topk", found=self.sparsity, fix="count with exact")
        with self._opened() as handle:
            if not self._lib.tsffn_model_profile(handle, on):
                raise BackendError("no memory for the activation counters")

    def read_profile(self, layer: int, tokens: Ints, neurons: Ints, histograms: Ints) -> None:
        """Copies one layer's counts into contiguous int64 arrays: tokens [n_ffn], neurons [6, n_ffn, n_ff] in the order
        of the file, histograms [3, 130]; tsconv.stats.counts says of what.

        Raises:
            BackendError: counting is off, other arrays than these, or the model is closed.
        """
        _, n_ffn, n_ff = self._shape
        arrays = ((tokens, (n_ffn,)), (neurons, (6, n_ffn, n_ff)), (histograms, (3, 130)))
        for array, shape in arrays:
            check_array(array, np.int64, shape)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array, _ in arrays)
        with self._opened() as handle:
            if not self._lib.tsffn_model_read_profile(handle, layer, *pointers):
                raise BackendError("activations are not being counted")

    def read_squares(self, layer: int) -> npt.NDArray[np.float64]:
        """Sums of h^2 of one layer's neurons since counting began, float64 [2, n_ffn, n_ff] in the order of the file,
        h = relu(gate . x) * relu(up . x): over all tokens, and over those for which the predictor left the neuron out.

        Raises:
            BackendError: counting is off, no such layer, or the model is closed.
        """
        _, n_ffn, n_ff = self._shape
        squares = np.zeros((N_SQUARES, n_ffn, n_ff))
        with self._opened() as handle:
            if not self._lib.tsffn_model_read_squares(handle, layer, squares.ctypes.data):
                raise BackendError("activations are not being counted")
        return squares

    @contextmanager
    def recording(self, layers: range, record: Recorder, stops: bool = False) -> Iterator[Callable[[], None]]:
        """While this holds, `record` is called each time an FFN of `layers` has been computed as a whole.

        It gets the layer; int32 [n_rows], the expert of each row, sorted; float32 x [n_rows, n_embd], what goes into
        gate and up; float32 h [n_rows, n_ff] = relu(gate . x) * relu(up . x) in the order of the file, 0 where the
        neuron was left out. The arrays are views that end with the call. When it raises something it is not called
        again; the function that is yielded raises that, and so does leaving.

        With `stops`, nothing of a batch is computed behind the last of the layers, or when something was raised. It is
        not added to the context then, and llama_decode returns 2, as `LayersContext.compute` expects.

        Raises:
            BackendError: no such layers, or the model is closed.
        """
        raised: list[BaseException] = []

        def told(address: Any, user: object) -> bool:
            if raised:
                return not stops
            try:
                a = address.contents
                x = np.ctypeslib.as_array(a.x, (a.n_rows, a.n_embd))
                h = np.ctypeslib.as_array(a.h, (a.n_rows, a.n_ff))
                record(a.layer, np.ctypeslib.as_array(a.ffn, (a.n_rows,)), x, h)
                return not (stops and a.layer == layers.stop - 1)
            except BaseException as error:  # C has nothing to raise it to
                raised.append(error)
                return not stops

        callback = RECORD(told)
        with self._opened() as handle:
            if not self._lib.tsffn_model_record(handle, layers.start, layers.stop, callback, None):
                raise BackendError("layers to record", expected=f"some of 0 to {self.n_layer - 1}", found=layers)

        def check() -> None:
            if raised:
                raise raised[0]

        try:
            yield check
        finally:
            with self._opened() as handle:
                self._lib.tsffn_model_record(handle, 0, 0, None, None)
        check()

    @functools.cached_property
    def header(self) -> Header:
        """Of the model file. Raises ModelFileError where Python cannot read it."""
        return read_header(self.path) if self._header is None else self._header

    @property
    def sidecar_bytes(self) -> int:
        """Of the predictors, 0 where they are not used."""
        return (self._sidecar or sidecar_path(self.path)).stat().st_size if self.kind == "predictor" else 0

    @functools.cached_property
    def _shape(self) -> tuple[int, int, int]:
        """n_layer, n_ffn, n_ff."""
        return shape_of(self.header)

    def place(self, hot: npt.NDArray[np.int32], flags: int) -> Placed:
        """Decides which weights are in RAM; tsconv.runtime.residency says what that means.

        Args:
            hot: int32 [n_layer, n_ffn], neurons at the front of each FFN that belong in RAM.
            flags: PLACE_PREFAULT | PLACE_LOCK | PLACE_RANDOM_REST, as wanted.

        Raises:
            BackendError: counts that do not fit the model, or llama.cpp has not loaded it, or no memory, or the model
                is closed.
        """
        hot = np.ascontiguousarray(hot, dtype=np.int32)
        place = self._lib.tsffn_model_place
        placed, message = Placed(), ctypes.create_string_buffer(ERROR_SIZE)
        with self._opened() as handle:
            if not place(handle, hot.ctypes.data, hot.size, flags, ctypes.byref(placed), message, ERROR_SIZE):
                raise BackendError(message.value.decode(errors="replace"))
        return placed

    def keep_on_gpu(self, device: str) -> None:
        """Before llama.cpp makes a context, where TSFFN_CUDA_SHARE is 1: what goes in and out of FFNs stays in the
        memory of its device of this name, as far as that GPU computes them.

        Raises:
            BackendError: the model is closed.
        """
        with self._opened() as handle:
            self._lib.tsffn_model_gpu_memory(handle, device.encode())

    def share_with_gpu(
        self,
        gpu: int,
        n_bytes: int,
        hot: npt.NDArray[np.int32] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> GpuShare:
        """Gives a GPU predictors and neurons of the loaded model, which it computes from then on. Ctrl-C stops it.

        Args:
            gpu: its number, in the order of `Backend.ffn_gpus`.
            n_bytes: of its memory, at most.
            hot: int32 [n_layer, n_ffn], neurons at the front of each FFN that it may have; None: all.
            progress: called with (bytes done, bytes in all).

        Raises:
            BackendError: it has no room, or fails; counts that do not fit the model; the model is closed, or a GPU has
                a share of it already.
        """
        hot = None if hot is None else np.ascontiguousarray(hot, dtype=np.int32)
        address, n_hot = (None, 0) if hot is None else (hot.ctypes.data, hot.size)
        share, message = GpuShare(), ctypes.create_string_buffer(ERROR_SIZE)
        copied, total = ctypes.c_uint64(0), ctypes.c_uint64(1)
        with self._opened() as handle:
            if not self._lib.tsffn_model_gpu(handle, gpu, n_bytes, address, n_hot, share, message, ERROR_SIZE):
                raise BackendError(message.value.decode(errors="replace"))
        while copied.value < total.value:
            with self._opened() as handle:
                if not self._lib.tsffn_model_gpu_upload(handle, copied, total, message, ERROR_SIZE):
                    raise BackendError(message.value.decode(errors="replace"))
            if progress is not None:
                progress(copied.value, total.value)
        return share

    def close(self) -> None:
        """Drops this reference; llama.cpp's weight buffers hold their own."""
        with self.lock:
            if self._handle is not None:
                self._lib.tsffn_model_close(self._handle)
                self._handle = None

    def after_fork(self) -> None:
        """In the child: leaves the parent's model alone, of which the child has a copy nobody may compute with."""
        self.lock = threading.RLock()
        if self._handle is not None:
            self._handle, self._gone = None, FORKED
