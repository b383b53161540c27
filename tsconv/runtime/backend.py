"""Loading of `libggml-tsffn.so` into the llama.cpp that llama-cpp-python brings.

The library is registered in llama.cpp's own backend registry, the one inside the libraries that `libllama` is linked
with. (`llama_cpp._ggml.libggml` is a second copy of that registry in wheel installs: what is loaded there is not seen.)
"""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import tsconv
from tsconv.errors import BackendError, ModelFileError, TsconvError
from tsconv.runtime.guard import CLOSED, FORKED, use_threads

Ints = npt.NDArray[np.int64]

LIBRARY_NAME = "libggml-tsffn.so"
ERROR_SIZE = 2048
CACHE_PIECE = 64 << 20  # bytes of a file that are read before Ctrl-C is looked for

# enum tsffn_sparsity (native/include/tsffn.h)
SPARSITY_VALUES = {None: 0, "predictor": 1, "exact": 2, "dense": 3}
SPARSITY_NAMES = {1: "predictor", 2: "exact", 3: "dense"}


class LayerStats(ctypes.Structure):
    """struct tsffn_layer_stats (native/include/tsffn.h)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "calls",
            "rows",
            "neurons",
            "predicted",
            "gate_positive",
            "active",
            "bytes_predictor",
            "bytes_ffn",
            "bytes_dense",
            "ns_predictor",
            "ns_ffn",
            "single_ops",
            "ns_attention",
        )
    )


# enum tsffn_place_flags (native/include/tsffn.h)
PLACE_PREFAULT, PLACE_LOCK, PLACE_RANDOM_REST = 1, 2, 4


class Placed(ctypes.Structure):
    """struct tsffn_placed (native/include/tsffn.h)."""

    _fields_ = (
        *(
            (name, ctypes.c_uint64)
            for name in (
                "ffn",
                "hot",
                "hot_resident",
                "hot_locked",
                "sidecar",
                "sidecar_resident",
                "sidecar_locked",
                "random",
            )
        ),
        *((name, ctypes.c_int32) for name in ("prefault_errno", "lock_errno", "advice_errno")),
    )


def library_path() -> Path:
    """The native library, an absolute path: `$TSCONV_BACKEND`, or the one installed with the package.

    Raises:
        BackendError: when there is none.
    """
    override = os.environ.get("TSCONV_BACKEND")
    # An editable install leaves the Python files in the checkout and puts the library into site-packages.
    packages = [*map(Path, tsconv.__path__), Path(sysconfig.get_path("platlib")) / "tsconv"]
    candidates = [Path(override)] if override else [package / "lib" / LIBRARY_NAME for package in packages]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate.absolute()  # dlopen looks elsewhere for a name without a slash
    reinstall = "reinstall tsconv (from a source checkout: make setup)"
    raise BackendError(
        "the native backend is missing",
        expected=" or ".join(map(str, candidates)),
        fix=f"unset TSCONV_BACKEND, which names it, or {reinstall}" if override else reinstall,
    )


class Backend:
    """The loaded native library. Use `load_backend()`: there is one per process."""

    def __init__(self, path: Path) -> None:
        """Checks the ABI and registers the library with llama.cpp.

        Raises:
            BackendError: another ggml than the library was built for, or a library that cannot be loaded.
        """
        from llama_cpp import llama_cpp  # loads libllama and its ggml, which our library links to by name

        from tsconv.runtime.log import quiet_unless

        self.path = path
        self._load_lock = threading.Lock()
        try:
            self._lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(
                "cannot be loaded",
                where=path,
                found=error,
                fix="install llama-cpp-python==0.3.36 and reinstall tsconv; `tsconv doctor` tells more",
            ) from None
        try:
            self._declare()
        except AttributeError:
            raise BackendError(
                "is another library than tsconv's backend",
                where=path,
                expected=LIBRARY_NAME,
                fix="unset TSCONV_BACKEND, or reinstall tsconv",
            ) from None
        message = ctypes.create_string_buffer(ERROR_SIZE)
        if not self._lib.tsffn_check_abi(message, ERROR_SIZE):
            raise BackendError(message.value.decode(errors="replace"))
        ggml_backend_load = llama_cpp._lib.ggml_backend_load
        ggml_backend_load.argtypes = [ctypes.c_char_p]
        ggml_backend_load.restype = ctypes.c_void_p
        with quiet_unless(False) as errors:
            registered = ggml_backend_load(os.fsencode(path))
        if registered is None:
            raise BackendError("llama.cpp refused the backend", where=path, found="; ".join(errors))

    def after_fork(self) -> None:
        """In the child: see `_after_fork`."""
        self._load_lock = threading.Lock()

    def _declare(self) -> None:
        handle, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
        double_out = ctypes.POINTER(ctypes.c_double)
        prototypes = {
            "tsffn_check_abi": ([text, size], ctypes.c_bool),
            "tsffn_model_open": ([text, text, ctypes.c_int, text, size], handle),
            "tsffn_model_close": ([handle], None),
            "tsffn_model_arm": ([handle], None),
            "tsffn_model_sparsity": ([handle], ctypes.c_int),
            "tsffn_model_n_layer": ([handle], ctypes.c_int32),
            "tsffn_model_file_bytes": ([handle], ctypes.c_uint64),
            "tsffn_model_cache": ([handle, ctypes.c_uint64, ctypes.c_uint64], ctypes.c_int),
            "tsffn_model_stats": ([handle, ctypes.c_int32, ctypes.POINTER(LayerStats)], ctypes.c_bool),
            "tsffn_model_reset_stats": ([handle], None),
            "tsffn_model_profile": ([handle, ctypes.c_bool], ctypes.c_bool),
            "tsffn_model_read_profile": ([handle, ctypes.c_int32, handle, handle, handle], ctypes.c_bool),
            "tsffn_model_place": (
                [handle, handle, size, ctypes.c_uint32, ctypes.POINTER(Placed), text, size],
                ctypes.c_bool,
            ),
            "tsffn_measure_rows": (
                [handle, size, size, size, ctypes.c_uint64, ctypes.c_int, double_out, ctypes.POINTER(ctypes.c_uint64)],
                ctypes.c_bool,
            ),
            "tsffn_measure_compute": ([ctypes.c_int, ctypes.c_double, double_out], ctypes.c_bool),
            "tsffn_quantize_q3_nl": (
                [handle, ctypes.c_int64, ctypes.c_int64, handle, handle, handle],
                ctypes.c_bool,
            ),
            "tsffn_isa_name": ([], text),
            "tsffn_ggml_version": ([], text),
        }
        for name, (arguments, result) in prototypes.items():
            function = getattr(self._lib, name)
            function.argtypes = arguments
            function.restype = result

    @property
    def stop_before_output(self) -> ctypes._CFuncPtr:
        """For `llama_context_params.cb_eval`: layers are computed, logits are not."""
        from llama_cpp import llama_cpp

        return llama_cpp.ggml_backend_sched_eval_callback(("tsffn_stop_before_output", self._lib))

    @property
    def isa(self) -> str:
        """The ISA tier of the kernels in use: ref, avx2, avx512 or amx."""
        return self._lib.tsffn_isa_name().decode()

    @property
    def ggml_version(self) -> str:
        """The ggml version the library was built for."""
        return self._lib.tsffn_ggml_version().decode()

    def measure_rows(
        self, address: int, n_rows: int, row_bytes: int, *, every: int, nth: int, n_threads: int
    ) -> tuple[float, int]:
        """Reads one row of every `every` consecutive ones of the memory [n_rows, row_bytes] at `address`: all of them
        for every = 1, others for another `nth` below `every`.

        Returns:
            seconds, and the sum of all 64-bit words read, modulo 2^64.

        Raises:
            BackendError: memory or sizes that are not a multiple of 8 bytes, or fewer threads than asked for.
        """
        use_threads(n_threads)
        seconds, total = ctypes.c_double(), ctypes.c_uint64()
        measure = self._lib.tsffn_measure_rows
        if not measure(address, n_rows, row_bytes, every, nth, n_threads, seconds, total):
            raise BackendError(
                "memory cannot be measured", found=f"{n_rows} rows, {row_bytes} bytes, {n_threads} threads"
            )
        return seconds.value, total.value

    def measure_compute(self, n_threads: int, seconds: float) -> float | None:
        """Q4_0 rows of 4096 weights that n_threads threads multiply per second out of the caches, measured for some
        seconds (at most 60); None when OpenMP grants fewer threads."""
        use_threads(n_threads)
        rate = ctypes.c_double()
        return rate.value if self._lib.tsffn_measure_compute(n_threads, seconds, rate) else None

    def quantize_q3_nl(
        self,
        rows: npt.NDArray[np.float32],
        importance: npt.NDArray[np.float32],
        units: npt.NDArray[np.float16],
        out: npt.NDArray[np.uint8],
    ) -> None:
        """Rounds `rows` [n, r] to q3_nl; tsconv.transform.q3_nl says what the arguments are. The GIL is released.

        Args:
            importance: [r].
            units: [n].
            out: [n, bytes of a row], written.

        Raises:
            BackendError: out of memory, or arrays that do not fit each other.
        """
        from tsconv.transform import q3_nl  # brings gguf, and with it a library that `tsconv doctor` need not load

        arrays = (rows, importance, units, out)
        dtypes = (np.float32, np.float32, np.float16, np.uint8)
        n, r = rows.shape
        shapes = ((n, r), (r,), (n,), (n, q3_nl.row_bytes(r)))
        if r % q3_nl.BLOCK:
            raise BackendError("columns of rows for q3_nl", expected=f"a multiple of {q3_nl.BLOCK}", found=r)
        for array, dtype, shape in zip(arrays, dtypes, shapes, strict=True):
            _check_array(array, dtype, shape)
        quantize = self._lib.tsffn_quantize_q3_nl
        if not quantize(rows.ctypes.data, *rows.shape, importance.ctypes.data, units.ctypes.data, out.ctypes.data):
            raise BackendError("no memory to quantize a row")

    def open_model(self, path: Path, sidecar: Path | None, sparsity: str | None) -> NativeModel:
        """Opens and checks a model and its sidecar (docs/format.md).

        Args:
            path: the model, `NAME.gguf`.
            sidecar: None looks for `NAME.predictor.gguf` beside it.
            sparsity: "predictor", "exact", "dense", or None for the model's own.

        Raises:
            ModelFileError: a file that is missing, damaged, or not its partner's.
        """
        if sparsity not in SPARSITY_VALUES:
            raise TsconvError("sparsity", expected="'predictor', 'exact' or 'dense'", found=repr(sparsity))
        from tsconv.runtime.log import quiet_unless

        message = ctypes.create_string_buffer(ERROR_SIZE)
        with quiet_unless(False) as errors:
            handle = self._lib.tsffn_model_open(
                os.fsencode(path),
                None if sidecar is None else os.fsencode(sidecar),
                SPARSITY_VALUES[sparsity],
                message,
                ERROR_SIZE,
            )
        if handle is None:
            # The first thing that ggml's reader objected to, when it was ggml's reader.
            reason = f" ({errors[0]})" if errors else ""
            raise ModelFileError(message.value.decode(errors="replace") + reason)
        return NativeModel(self._lib, handle, self._load_lock, path)


class NativeModel:
    """An opened `struct tsffn_model`: the sidecar's mapping and the counters."""

    def __init__(self, lib: ctypes.CDLL, handle: int, load_lock: threading.Lock, path: Path) -> None:
        self._lib = lib
        self.path = path
        self._handle: int | None = handle
        self._load_lock = load_lock
        self._gone = CLOSED
        self.lock = threading.RLock()  # held while C works with the handle, so that nobody closes it meanwhile
        self.sparsity = SPARSITY_NAMES[lib.tsffn_model_sparsity(handle)]
        self.n_layer = lib.tsffn_model_n_layer(handle)
        self.file_bytes = lib.tsffn_model_file_bytes(handle)

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
            BackendError: no memory for the counters, or the model is closed.
        """
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
            _check_array(array, np.int64, shape)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array, _ in arrays)
        with self._opened() as handle:
            if not self._lib.tsffn_model_read_profile(handle, layer, *pointers):
                raise BackendError("activations are not being counted")

    @functools.cached_property
    def _shape(self) -> tuple[int, int, int]:
        """n_layer, n_ffn, n_ff."""
        from tsconv.format.header import read_header
        from tsconv.format.order import shape_of

        return shape_of(read_header(self.path))

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


def _check_array(array: npt.NDArray[Any], dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    """Raises BackendError unless C may take the array's address for contiguous memory of that type and shape."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else ", not contiguous"
        raise BackendError(
            "an array for the native library",
            expected=f"{np.dtype(dtype)} {list(shape)}",
            found=f"{array.dtype} {list(array.shape)}{order}",
        )


_loaded: list[Backend] = []  # at most one
_backend_lock = threading.Lock()


def _after_fork() -> None:
    """In the child: other threads may have held the locks, and are not there to give them back."""
    globals()["_backend_lock"] = threading.Lock()
    for backend in _loaded:
        backend.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def load_backend() -> Backend:
    """The process's backend, loaded on the first call.

    Raises:
        BackendError: missing library, or another ggml than it was built for.
    """
    with _backend_lock:
        if not _loaded:
            _loaded.append(Backend(library_path()))
        return _loaded[0]
