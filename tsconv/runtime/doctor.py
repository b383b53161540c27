"""Looks at an installation and the machine: what is there, what is wrong, and what to do about it."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tsconv
from tsconv.errors import BackendError
from tsconv.machine import limits
from tsconv.machine.cpu import cpu_model, physical_cores
from tsconv.native.devices import gpu_libraries, gpu_modules, gpus
from tsconv.native.ffn_gpus import NoGpuError, ffn_gpus
from tsconv.native.library import library_path, llama_cpp_python, load_backend
from tsconv.runtime.programs import PROGRAMS, check_devices, program_path

OPENMP_LIBRARY = re.compile(r"/lib(gomp|omp|iomp5)\b[^/]*\.so[^/]*$")
MAX_AMX_ERROR = 1e-3  # squared error over squared size of logits; both ways compute with 8-bit integers
PROBE_SECONDS = 60
MIN_AVAILABLE_BYTES = 1 << 30
LOAD_SECONDS = 0.3
GPU_DEVICES = (  # in /dev, and what adds llama.cpp's backend for them
    ("nvidia[0-9]*", "make setup CUDA=1"),
    ("kfd", "make setup HIP=1"),
    ("dri/renderD*", "make setup VULKAN=1"),
)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Check:
    """One finding. `status` is "ok", "warning" (works, but slower or with less), or "problem" (does not work)."""

    name: str
    value: str
    status: str = "ok"
    fix: str | None = None


def diagnose() -> list[Check]:
    """All findings. Loads llama.cpp and the native backend into this process."""
    checks = [Check("tsconv", tsconv.__version__), Check("python", platform.python_version())]
    for find in (_packages, _ggml, _backend, _openmp, _programs, _gpus, _ffn_gpus, _cpu, _load, _memory, _streaming):
        checks += find()
    return checks


def is_healthy(checks: list[Check]) -> bool:
    """Whether none of them is a problem."""
    return all(check.status != "problem" for check in checks)


def _packages() -> Iterator[Check]:
    required = llama_cpp_python().partition("==")[2]
    for name in ("llama-cpp-python", "gguf", "numpy"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wanted = llama_cpp_python() if name == "llama-cpp-python" else name
            yield Check(name, "missing", "problem", f"pip install '{wanted}'")
            continue
        if name == "llama-cpp-python" and required not in ("", version):
            yield Check(
                name,
                f"{version}, but tsconv needs {required}",
                "problem",
                f"pip install 'llama-cpp-python=={required}'",
            )
        else:
            yield Check(name, version)


def _ggml() -> Iterator[Check]:
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        yield Check("ggml", f"llama.cpp cannot be loaded: {error}", "problem", "reinstall llama-cpp-python")
        return
    version, commit = (_text_function(llama_cpp._lib, name) for name in ("ggml_version", "ggml_commit"))
    yield Check("ggml", f"{version()} ({commit()})")
    if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
        yield _amx()


def _amx() -> Check:
    """llama.cpp's AMX kernels are on: do they compute a prompt?

    Compilers have got them wrong: GCC 12.2 believes that _tile_loadconfig reads 8 bytes and drops the other 56 of the
    tile configuration (llama.cpp issue 20824).
    """
    fix = (
        "reinstall llama-cpp-python with GCC 13.3 or newer, or: CMAKE_ARGS=-DCMAKE_CXX_FLAGS=-fno-dse pip install "
        "--force-reinstall --no-deps --no-cache-dir "
        f"--no-binary llama-cpp-python {llama_cpp_python()}"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tsconv.runtime.probe"],
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check(
            "AMX", f"on; a tiny prompt took more than {PROBE_SECONDS} s", "warning", "look at the load of the machine"
        )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return Check("AMX", f"on, but a prompt crashes llama.cpp ({name}): its compiler broke them", "problem", fix)
    if done.returncode > 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Check("AMX", f"on, but llama.cpp cannot compute a prompt: {reason}", "problem", fix)
    error = float(done.stdout)
    if not error <= MAX_AMX_ERROR:
        return Check("AMX", f"on, but wrong: the logits of a prompt are off by {error:.1e}", "problem", fix)
    return Check("AMX", "on, computes a prompt")


def _text_function(library: ctypes.CDLL, name: str) -> Callable[[], str]:
    function = getattr(library, name)
    function.argtypes, function.restype = [], ctypes.c_char_p
    return lambda: function().decode()


def _backend() -> Iterator[Check]:
    try:
        path = library_path()
        yield Check("backend", str(path))
        backend = load_backend()
    except BackendError as error:
        override = "unset TSCONV_BACKEND or " if "TSCONV_BACKEND" in os.environ else ""
        yield Check("backend loads", str(error), "problem", f"{override}reinstall tsconv into this environment")
        return
    except (ImportError, OSError, RuntimeError):
        return  # no llama.cpp: reported above
    yield Check("backend loads", f"yes, built for ggml {backend.ggml_version}")
    limit = os.environ.get("TSFFN_ISA")
    if backend.isa == "ref":
        fix = "unset TSFFN_ISA" if limit else "a processor with AVX2 is several times faster"
        yield Check("kernels", "ref (plain C)", "warning", fix)
    elif limit and limit != backend.isa:
        fix = "unset TSFFN_ISA: it names no kernels of this machine"
        yield Check("kernels", f"{backend.isa}, and not TSFFN_ISA={limit}", "warning", fix)
    else:
        yield Check("kernels", backend.isa + (f" (TSFFN_ISA={limit})" if limit else ""))


def _openmp() -> Iterator[Check]:
    """ggml-cpu and the backend must share one pool of threads: two would compete for the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    found = sorted(
        {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if OPENMP_LIBRARY.search(line)}
    )
    if len(found) == 1:
        yield Check("OpenMP", found[0])
    elif found:
        yield Check(
            "OpenMP",
            " and ".join(found),
            "problem",
            "two thread pools compete for the cores: build llama-cpp-python on this machine "
            "(pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python), then reinstall tsconv",
        )
    else:
        yield Check("OpenMP", "none loaded", "warning", "llama.cpp was built without OpenMP: threads are not shared")


def _programs() -> Iterator[Check]:
    """llama.cpp's programs: there, and run with the backend."""
    try:
        folder = program_path(PROGRAMS[0]).parent
        for name in PROGRAMS:
            check_devices(name, {**os.environ, "GGML_BACKEND_PATH": os.fspath(library_path())})
    except BackendError as error:
        yield Check("programs", str(error), "warning", "tsconv serve and tsconv tools need them")
    else:
        yield Check("programs", f"{', '.join(PROGRAMS)} in {folder}")


def _gpus() -> Iterator[Check]:
    """GPUs that llama.cpp can use for attention, or why there are none."""
    modules, libraries = gpu_modules(), gpu_libraries()
    if not modules and not libraries:
        device, command = next(
            ((path, command) for path, command in GPU_DEVICES if list(Path("/dev").glob(path))), (None, None)
        )
        if device is None:
            yield Check("GPU", "none, and llama.cpp has no backend for one")
        else:
            fix = f"{command} compiles llama.cpp's backend for it (docs/gpu.md)"
            yield Check("GPU", f"/dev/{device} is there, but llama.cpp has no backend for it", "warning", fix)
        return
    names = ", ".join(path.name.removeprefix("libggml-").removesuffix(".so") for path in (*modules, *libraries))
    found = gpus()
    if found:
        yield Check("GPU", f"{'; '.join(map(str, found))}: llama.cpp's backend for {names}")
    else:
        yield Check("GPU", f"none that llama.cpp's backend for {names} can use", "warning", "look at the GPU's driver")


def _ffn_gpus() -> Iterator[Check]:
    """GPUs that FFNs can be computed on, or why there are none; nothing on a machine without an NVIDIA GPU."""
    try:
        found = ffn_gpus(load_backend())
    except NoGpuError as error:
        if os.environ.get("TSFFN_CUDA_MODULE") or list(Path("/dev").glob("nvidia[0-9]*")):
            yield Check("hot neurons", str(error), "warning", "they stay on the CPU (docs/gpu.md)")
    except (BackendError, ImportError, OSError, RuntimeError):
        return  # reported above
    else:
        shown = (
            f"CUDA{i} ({gpu.name}, {gpu.free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free)"
            for i, gpu in enumerate(found)
        )
        yield Check("hot neurons", f"{'; '.join(shown)}")


def _load() -> Iterator[Check]:
    """Threads of a layer wait for one another: where others compute too, all wait for the slowest."""
    busy = limits.busy_cores(LOAD_SECONDS)
    if busy is not None and busy > limits.MAX_BUSY_CORES:
        yield Check(
            "other programs",
            f"use {busy:.1f} of {os.cpu_count() or 1} CPUs",
            "warning",
            "decoding is several times slower beside them: end them, or use fewer threads (-t)",
        )


def _cpu() -> Iterator[Check]:
    n_usable, n_cpu = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    value = f"{physical_cores()} cores usable ({n_usable} of {n_cpu} CPUs), {cpu_model()}"
    quota = limits.cpu_quota()
    if quota is not None and quota < n_usable:
        yield Check(
            "CPU",
            f"{value}, limited to {quota:g} CPUs of time",
            "warning",
            f"models use {limits.usable_cores()} threads unless -t says otherwise; raise the limit for more",
        )
    else:
        yield Check("CPU", value)


def _memory() -> Iterator[Check]:
    available = limits.available_memory()
    value = f"{limits.total_memory() / 1e9:.1f} GB, {available / 1e9:.1f} GB available"
    if available < MIN_AVAILABLE_BYTES:
        yield Check("memory", value, "warning", "close other programs: a model is read from the file system's cache")
    else:
        yield Check("memory", value)


def _streaming() -> Iterator[Check]:
    """What a model larger than memory is read with (tsconv.runtime.streaming)."""
    try:
        reads = load_backend().reads
    except (BackendError, ImportError, OSError, RuntimeError):
        return  # reported above
    if reads == "io_uring":
        yield Check("disk reads", "io_uring")
    else:
        yield Check(
            "disk reads",
            f"{reads}: io_uring is not allowed",
            "warning",
            "models larger than memory run slower: sysctl kernel.io_uring_disabled=0, or a container that allows it",
        )
    try:
        huge = HUGE_PAGES.read_text()
    except OSError:
        huge = "[never]"
    if "[never]" in huge:
        yield Check("huge pages", "off", "warning", f"echo madvise > {HUGE_PAGES}: weights are found faster in them")
    else:
        yield Check("huge pages", "on")
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield Check("lockable memory", "no limit" if limit == resource.RLIM_INFINITY else f"{limit / 1e6:.1f} MB")
