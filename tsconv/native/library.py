"""Loading of `libggml-tsffn.so` into the llama.cpp that llama-cpp-python brings.

The library is registered in llama.cpp's own backend registry, the one inside the libraries that `libllama` is linked
with. (`llama_cpp._ggml.libggml` is a second copy of that registry in wheel installs: what is loaded there is not seen.)
"""

from __future__ import annotations

import ctypes
import os
import re
import sysconfig
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import tsconv
from tsconv.errors import BackendError
from tsconv.native.threads import use_threads

LIBRARY_NAME = "libggml-tsffn.so"
GPU_MODULE_NAME = "libtsffn-cuda.so"
ERROR_SIZE = 2048


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
            "needed",
            "missing",
            "ahead",
            "in_vain",
            "reads",
            "bytes_disk",
            "ns_disk",
            "gpu_calls",
            "gpu_neurons",
            "gpu_active",
            "gpu_bytes",
            "gpu_streamed",
            "ns_gpu",
            "ns_gpu_predictor",
            "ns_gpu_wait",
        )
    )


class Activations(ctypes.Structure):
    """struct tsffn_activations (native/include/tsffn.h)."""

    _fields_ = (
        ("layer", ctypes.c_int32),
        ("n_rows", ctypes.c_int64),
        ("n_embd", ctypes.c_int64),
        ("n_ff", ctypes.c_int64),
        ("ffn", ctypes.POINTER(ctypes.c_int32)),
        ("x", ctypes.POINTER(ctypes.c_float)),
        ("h", ctypes.POINTER(ctypes.c_float)),
    )


RECORD = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Activations), ctypes.c_void_p)  # tsffn_record_fn


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


class GpuInfo(ctypes.Structure):
    """struct tsffn_gpu (native/include/tsffn.h)."""

    _fields_ = (
        ("name", ctypes.c_char * 128),
        ("capability", ctypes.c_int32),
        ("free_bytes", ctypes.c_uint64),
        ("total_bytes", ctypes.c_uint64),
    )


class GpuShare(ctypes.Structure):
    """struct tsffn_gpu_share (native/include/tsffn.h)."""

    _fields_ = (
        ("name", ctypes.c_char * 128),
        ("capability", ctypes.c_int32),
        ("predictors", ctypes.c_int32),
        ("n_predictors", ctypes.c_int32),
        ("neurons", ctypes.c_uint64),
        ("n_neurons", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("prefill_tokens", ctypes.c_int32),
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


def gpu_module() -> Path | None:
    """The module with which a GPU computes FFNs: `$TSFFN_CUDA_MODULE`, or the one beside the library; None: there is
    none, or the variable is "off".

    Raises:
        BackendError: there is no library.
    """
    named = os.environ.get("TSFFN_CUDA_MODULE")
    if named == "off":
        return None
    path = Path(named) if named else library_path().parent / GPU_MODULE_NAME
    return path if path.is_file() else None


def llama_cpp_python() -> str:
    """The llama-cpp-python that this installation was built for: "llama-cpp-python==X.Y.Z", or its bare name where
    tsconv is not installed but only found."""
    try:
        requirements = metadata.requires("tsconv") or []
    except metadata.PackageNotFoundError:
        requirements = []
    found = (re.match(r"llama-cpp-python(?:\[.*?\])?==([\w.]+)", line) for line in requirements)
    return next((f"llama-cpp-python=={match[1]}" for match in found if match), "llama-cpp-python")


class Backend:
    """The loaded native library. Use `load_backend()`: there is one per process.

    Attributes:
        path: its file.
        lib: its functions (native/include/tsffn.h), declared.
        load_lock: held while llama.cpp loads a model whose FFN weights the library claims.
    """

    def __init__(self, path: Path) -> None:
        """Checks the ABI and registers the library with llama.cpp.

        Raises:
            BackendError: another ggml than the library was built for, or a library that cannot be loaded.
        """
        from llama_cpp import llama_cpp  # loads libllama and its ggml, which our library links to by name

        from tsconv.native.log import quiet_unless

        self.path = path
        self.load_lock = threading.Lock()
        try:
            self.lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(
                "cannot be loaded",
                where=path,
                found=error,
                fix=f"install {llama_cpp_python()} and reinstall tsconv; `tsconv doctor` tells more",
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
        if not self.lib.tsffn_check_abi(message, ERROR_SIZE):
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
        self.load_lock = threading.Lock()

    def _declare(self) -> None:
        handle, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
        double_out, uint64_out = ctypes.POINTER(ctypes.c_double), ctypes.POINTER(ctypes.c_uint64)
        prototypes = {
            "tsffn_check_abi": ([text, size], ctypes.c_bool),
            "tsffn_model_open": ([text, text, text, text, size], handle),
            "tsffn_model_close": ([handle], None),
            "tsffn_model_arm": ([handle], None),
            "tsffn_model_sparsity": ([handle], text),
            "tsffn_model_n_layer": ([handle], ctypes.c_int32),
            "tsffn_model_file_bytes": ([handle], ctypes.c_uint64),
            "tsffn_model_cache": ([handle, ctypes.c_uint64, ctypes.c_uint64], ctypes.c_int),
            "tsffn_model_stream": ([handle, ctypes.c_uint64, text, size], ctypes.c_bool),
            "tsffn_model_file": ([handle], handle),
            "tsffn_model_fill": ([handle, ctypes.c_uint64, uint64_out, uint64_out, text, size], ctypes.c_bool),
            "tsffn_model_reads": ([handle], text),
            "tsffn_reads": ([], text),
            "tsffn_model_stats": ([handle, ctypes.c_int32, ctypes.POINTER(LayerStats)], ctypes.c_bool),
            "tsffn_model_reset_stats": ([handle], None),
            "tsffn_model_profile": ([handle, ctypes.c_bool], ctypes.c_bool),
            "tsffn_model_read_profile": ([handle, ctypes.c_int32, handle, handle, handle], ctypes.c_bool),
            "tsffn_model_read_squares": ([handle, ctypes.c_int32, handle], ctypes.c_bool),
            "tsffn_model_record": ([handle, ctypes.c_int32, ctypes.c_int32, handle, handle], ctypes.c_bool),
            "tsffn_model_place": (
                [handle, handle, size, ctypes.c_uint32, ctypes.POINTER(Placed), text, size],
                ctypes.c_bool,
            ),
            "tsffn_gpus": ([text, size], ctypes.c_int32),
            "tsffn_gpu": ([ctypes.c_int32, ctypes.POINTER(GpuInfo), text, size], ctypes.c_bool),
            "tsffn_model_gpu": (
                [handle, ctypes.c_int32, ctypes.c_uint64, handle, size, ctypes.POINTER(GpuShare), text, size],
                ctypes.c_bool,
            ),
            "tsffn_model_gpu_memory": ([handle, text], ctypes.c_bool),
            "tsffn_model_gpu_upload": ([handle, uint64_out, uint64_out, text, size], ctypes.c_bool),
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
            function = getattr(self.lib, name)
            function.argtypes = arguments
            function.restype = result

    @property
    def stop_before_output(self) -> Any:
        """For `llama_context_params.cb_eval`: layers are computed, logits are not."""
        from llama_cpp import llama_cpp

        return llama_cpp.ggml_backend_sched_eval_callback(("tsffn_stop_before_output", self.lib))

    @property
    def isa(self) -> str:
        """The ISA tier of the kernels in use: ref, avx2, avx512 or amx."""
        return self.lib.tsffn_isa_name().decode()

    @property
    def ggml_version(self) -> str:
        """The ggml version the library was built for."""
        return self.lib.tsffn_ggml_version().decode()

    @property
    def reads(self) -> str:
        """How models larger than memory are read here: "io_uring", or "threads" where that is not allowed."""
        return self.lib.tsffn_reads().decode()

    def ffn_gpus(self) -> list[GpuInfo]:
        """The GPUs that FFNs can be computed on; drivers start.

        Raises:
            BackendError: none, and why: no module, no driver, or one that is too old.
        """
        message = ctypes.create_string_buffer(ERROR_SIZE)
        gpus = [GpuInfo() for _ in range(self.lib.tsffn_gpus(message, ERROR_SIZE))]
        if not gpus or not all(self.lib.tsffn_gpu(i, gpu, message, ERROR_SIZE) for i, gpu in enumerate(gpus)):
            raise BackendError(message.value.decode(errors="replace"))
        return gpus

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
        measure = self.lib.tsffn_measure_rows
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
        return rate.value if self.lib.tsffn_measure_compute(n_threads, seconds, rate) else None


def check_array(array: npt.NDArray[Any], dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
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
