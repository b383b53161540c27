"""The devices that llama.cpp has in this process beside the CPU: GPUs, through its own CUDA, Vulkan, ROCm and others.

llama-cpp-python has a GPU's backend when it was compiled with it. `make setup VULKAN=1` and its like compile one as a
module beside llama.cpp's programs, `tsconv/bin/libggml-vulkan.so`: programs load it because it lies beside them
(ggml_backend_load_all in ggml/src/ggml-backend-reg.cpp), and this process because `gpus` does. TSCONV_GPU_BACKEND names
another module for this process.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import sysconfig
import threading
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tsconv
from tsconv.errors import BackendError

# llama.cpp's names of GPU backends, in the order in which it loads their modules (ggml-backend-reg.cpp).
BACKENDS = ("cann", "cuda", "hip", "metal", "sycl", "vulkan", "opencl", "musa", "openvino")
GPU, INTEGRATED_GPU = 1, 2  # enum ggml_backend_dev_type (ggml-backend.h)
LIST_SECONDS = 120  # drivers take their time to start


@dataclass(frozen=True)
class Gpu:
    """A GPU as llama.cpp sees it.

    Attributes:
        name: llama.cpp's, such as "CUDA0" or "Vulkan0".
        free_bytes, total_bytes: of its memory; of the machine's when it is integrated.
    """

    name: str
    description: str
    free_bytes: int
    total_bytes: int
    is_integrated: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.description}, {self.free_bytes / 1e9:.1f} of {self.total_bytes / 1e9:.1f} GB free)"


def program_folders() -> list[Path]:
    """Where llama.cpp's programs, and GPU backends beside them, are installed."""
    # An editable install leaves the Python files in the checkout and puts the programs into site-packages.
    return [path / "bin" for path in (*map(Path, tsconv.__path__), Path(sysconfig.get_path("platlib")) / "tsconv")]


def gpu_modules() -> list[Path]:
    """The GPU backends that were compiled as modules."""
    files = [folder / f"libggml-{name}.so" for name in BACKENDS for folder in program_folders()]
    named = os.environ.get("TSCONV_GPU_BACKEND")
    return [path.absolute() for path in [*([Path(named)] if named else []), *files] if path.is_file()]


def gpu_libraries() -> list[Path]:
    """The GPU backends that llama-cpp-python was compiled with."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    return [path for path in (folder / f"libggml-{name}.so" for name in BACKENDS) if path.is_file()]


def may_have_gpus() -> bool:
    """Whether llama.cpp has a GPU's backend at all, which costs little to know; drivers are not asked."""
    return bool(gpu_modules() or gpu_libraries() or _handles())


def gpus() -> list[Gpu]:
    """The GPUs that llama.cpp can use in this process, in its order. Loads the modules first; drivers start."""
    with _lock:
        for path in gpu_modules():
            _load(path)
    return [_gpu(*handle) for handle in _handles()]


def gpus_elsewhere() -> list[Gpu]:
    """The same, asked in a process that ends: this one does not start drivers, which keep memory of the GPU.

    Raises:
        BackendError: that process fails.
    """
    if not may_have_gpus():
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tsconv.native.devices"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIST_SECONDS,
            check=True,
        )
        return [Gpu(**found) for found in json.loads(done.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise BackendError(
            "llama.cpp's GPU backends cannot be asked", found=lines[-1], fix="-ngl 0 computes without"
        ) from None


def gpu_pointer(name: str) -> int:
    """ggml_backend_dev_t of a device of this process; 0 for none of that name."""
    return _functions().ggml_backend_dev_by_name(name.encode()) or 0


def cpu_buffer_type() -> int:
    """ggml_backend_buffer_type_t of host memory. As an override it means: as without a GPU, accelerators first."""
    return _functions().ggml_backend_cpu_buffer_type()


_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


@cache
def _load(path: Path) -> bool:
    """Whether llama.cpp took the module: not without a driver, for example."""
    from tsconv.native.log import quiet_unless

    with quiet_unless(False):
        return _functions().ggml_backend_load(os.fsencode(path)) is not None


def _handles() -> list[tuple[int, bool]]:
    """ggml_backend_dev_t of the GPUs of this process, and whether each is integrated."""
    lib = _functions()
    devices = map(lib.ggml_backend_dev_get, range(lib.ggml_backend_dev_count()))
    kinds = [(device, lib.ggml_backend_dev_type(device)) for device in devices]
    return [(device, kind == INTEGRATED_GPU) for device, kind in kinds if kind in (GPU, INTEGRATED_GPU)]


def _gpu(device: int, is_integrated: bool) -> Gpu:
    lib = _functions()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    name, description = (
        function(device).decode(errors="replace")
        for function in (lib.ggml_backend_dev_name, lib.ggml_backend_dev_description)
    )
    return Gpu(name, description, free.value, total.value, is_integrated)


@cache
def _functions() -> Any:
    """ggml's functions (ggml-backend.h), of the library that llama-cpp-python uses."""
    from llama_cpp import llama_cpp

    # A handle of its own: the declarations here leave those of others as they are.
    lib = ctypes.CDLL(llama_cpp._lib._name)
    pointer, text, size_out = ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t)
    prototypes: dict[str, tuple[list[Any], Any]] = {
        "ggml_backend_load": ([text], pointer),
        "ggml_backend_dev_count": ([], ctypes.c_size_t),
        "ggml_backend_dev_get": ([ctypes.c_size_t], pointer),
        "ggml_backend_dev_by_name": ([text], pointer),
        "ggml_backend_dev_type": ([pointer], ctypes.c_int),
        "ggml_backend_dev_name": ([pointer], text),
        "ggml_backend_dev_description": ([pointer], text),
        "ggml_backend_dev_memory": ([pointer, size_out, size_out], None),
        "ggml_backend_cpu_buffer_type": ([], pointer),
    }
    for name, (arguments, result) in prototypes.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result
    return lib


if __name__ == "__main__":
    print(json.dumps([asdict(gpu) for gpu in gpus()]))
