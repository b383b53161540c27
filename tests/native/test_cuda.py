"""The CUDA module: kernels on the host against the CPU's, faults that the checkers must find, what nvcc makes of it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.native_build import ROOT, TOOLS, build

SOURCES = ROOT / "native" / "src" / "cuda"
ROW_KERNELS = ["neurons", "down"]
FORMATS = 5  # of rows: F32, F16, BF16, Q8_0, Q4_0
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="session")
def folder() -> Path:
    return build(ROOT / "build" / "tests", "-DTSFFN_TESTS=ON") / "tests" / "cuda"


def run(folder: Path, kind: str, *options: str, **variables: str) -> subprocess.CompletedProcess:
    """test_cuda with the module that is built in one of three ways: host, address, thread."""
    program = folder / ("test_cuda" if kind == "host" else f"test_cuda_{kind}")
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 history_size=7"} | variables
    command = [program, folder / f"libtsffn-cuda-{kind}.so", *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)


def test_kernels_on_the_host(folder):
    done = run(folder, "host")
    assert (done.returncode, done.stdout) == (0, "host: ok\n"), done.stderr


@pytest.mark.parametrize(("kind", "part"), [("address", "tiny"), ("address", "prefill"), ("thread", "tiny")])
def test_sanitizers_are_silent(folder, kind, part):
    done = run(folder, kind, part)
    assert (done.returncode, done.stdout, done.stderr) == (0, "host: ok\n", "")


def test_another_version_is_refused(folder, tmp_path):
    source, module = tmp_path / "other.c", tmp_path / "libtsffn-cuda.so"
    source.write_text("static int table[] = {99};\nvoid * tsffn_cuda_module(void) { return table; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", module, source], check=True)
    done = subprocess.run([folder / "test_cuda", module], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"CUDA module: {module}: expected version 2, found 99: reinstall tsconv" in done.stderr


# ---- the checkers are checked


BARRIERS = [
    f"{source.name}:{number}"
    for source in sorted(SOURCES.glob("*.cuh"))
    for number, line in enumerate(source.read_text().splitlines(), 1)
    if "__syncthreads()" in line
]


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_found(folder, barrier):
    """By a wrong result, in some order of warps that run as far ahead as they may; or as a race."""
    for seed in range(6):
        if run(folder, "address", "tiny", TSFFN_PLANT_BARRIER=barrier, TSFFN_HOST_SEED=str(seed)).returncode != 0:
            return
    done = run(folder, "thread", "tiny", TSFFN_PLANT_BARRIER=barrier)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


@pytest.mark.parametrize("memory", ["shared", "device"])
def test_an_overrun_is_found(folder, memory):
    done = run(folder, "address", "tiny", TSFFN_PLANT_OVERRUN=memory)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_a_missing_wait_between_streams_is_found(folder):
    """Neurons that are computed before they are copied, or overwritten before they are computed."""
    done = run(folder, "address", "tiny", TSFFN_PLANT_WAIT="1")
    assert done.returncode != 0 and "y_error <= prefill_nmse(layer) * y_size" in done.stderr


# ---- what nvcc makes of it


@pytest.fixture(scope="module")
def library() -> Path:
    """Compiled for every target; a spilled register would be an error."""
    if NVCC is None:
        pytest.skip("no nvcc (pip install nvidia-cuda-nvcc nvidia-cuda-cccl)")
    options = ["-DTSFFN_KERNELS_ONLY=ON", "-DTSFFN_CUDA=ON", "-DTSFFN_CUDA_STRICT=ON"]
    return build(ROOT / "build" / "cuda", *options) / "libtsffn-cuda.so"


def test_library(library):
    """It is complete without a driver, says so where there is none, and shows nothing but its one function."""
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["tsffn_cuda_module"]

    class Table(ctypes.Structure):
        _fields_ = (
            ("version", ctypes.c_int),
            ("name", ctypes.c_char_p),
            ("n_devices", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)),
        )

    function = ctypes.CDLL(str(library)).tsffn_cuda_module
    function.restype = ctypes.POINTER(Table)
    table = function().contents
    assert (table.version, table.name) == (2, b"cuda")
    error = ctypes.create_string_buffer(256)
    n_devices = table.n_devices(error, len(error))
    assert n_devices >= 0 or error.value.startswith(b"CUDA: "), error.value


def kernels(code: str, begin: str) -> dict[str, str]:
    """Name -> code, of a listing in which `begin` matches the line that begins a kernel."""
    parts = re.split(begin, code, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.skipif(NVCC is None, reason="no nvcc (pip install nvidia-cuda-nvcc nvidia-cuda-cccl)")
@pytest.mark.parametrize("name", ROW_KERNELS)
def test_rows_are_read_16_bytes_at_a_time(name):
    """As PTX; of Q4_0, `down` for several tokens reads 8."""
    command = [NVCC, "-std=c++17", "-fmad=false", "-arch=compute_75", "-ptx", "-o", "-", SOURCES / f"{name}.cu"]
    code = subprocess.run(command, env=TOOLS, capture_output=True, text=True, check=True).stdout
    found = {k: v for k, v in kernels(code, r"^\.visible \.entry (\w+)\(").items() if name in k}
    assert len(found) == 2 * FORMATS
    eight = [k for k, v in found.items() if not re.search(r"ld\.global\.nc\.v4\.[ubf]32", v)]
    assert len(eight) == (name == "down")
    assert all(re.search(r"ld\.global\.nc\.v2\.[ubf]32", found[k]) for k in eight)


@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="no cuobjdump (pip install nvidia-cuda-cuobjdump)")
@pytest.mark.parametrize("target", ["sm_75", "sm_90"])
def test_machine_code_reads_16_bytes_at_a_time(library, target):
    command = ["cuobjdump", "-sass", "-arch", target, library]
    code = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True).stdout
    found = kernels(code, r"^\s*Function : (\w+)$")
    assert not [k for k, v in found.items() if re.search(r"\b(LDL|STL)\b", v)]
    on_tensor_cores = {k: v for k, v in found.items() if "7gate_upI" in k or "8add_downI" in k}
    assert len(on_tensor_cores) == 2 * FORMATS
    assert all(re.search(r"\bHMMA\.1(688|6816)\.F32\b", v) for v in on_tensor_cores.values())
    rows = {k: v for k, v in found.items() if any(f"{len(name)}{name}I" in k for name in ROW_KERNELS)}
    assert len(rows) == 2 * FORMATS * len(ROW_KERNELS)
    assert sum(re.search(r"\bLDG\.E\.128\b", v) is None for v in rows.values()) == 1
