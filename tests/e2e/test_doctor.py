"""`tsconv doctor` on this installation, and on broken ones."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

import tsconv
from support import LLAMA, ROOT, fake_gpu, host_gpu, tiny

OTHERS = "other programs"  # whether there are any changes from moment to moment


def diagnose(env: dict[str, str] | None = None) -> tuple[int, bool, dict[str, dict[str, Any]]]:
    """Exit status, "healthy", and the checks by name."""
    result = tiny.run("doctor", "--json", env=env)
    assert result.stderr == b""
    report = json.loads(result.stdout)
    return result.returncode, report["healthy"], {check["name"]: check for check in report["checks"]}


def problems(checks: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, check in checks.items() if check["status"] == "problem"}


def test_this_installation():
    status, healthy, checks = diagnose()
    assert not problems(checks)
    assert (status, healthy) == (0, True)
    assert checks["tsconv"]["value"] == tsconv.__version__
    assert checks["llama-cpp-python"]["value"] == LLAMA.partition("==")[2]
    assert checks["backend loads"]["value"] == f"yes, built for ggml {checks['ggml']['value'].split()[0]}"
    assert Path(checks["backend"]["value"]).is_file()
    assert checks["kernels"]["status"] in ("ok", "warning")
    assert "cores usable" in checks["CPU"]["value"]
    assert "GB available" in checks["memory"]["value"]
    assert {"huge pages", "lockable memory"} < checks.keys()


def test_reads_of_models_larger_than_memory():
    assert diagnose({"TSFFN_READS": ""})[2]["disk reads"]["value"] in ("io_uring", "threads: io_uring is not allowed")
    status, healthy, checks = diagnose({"TSFFN_READS": "pool"})
    assert (status, healthy, checks["disk reads"]["status"]) == (0, True, "warning")


def test_gpu_for_neurons():
    """One, a module that cannot be opened, and a machine that has nothing to do with it."""
    _, healthy, checks = diagnose(host_gpu.environment())
    assert healthy and checks["hot neurons"]["value"] == f"CUDA0 ({host_gpu.NAME}, 1.1 of 1.1 GB free)"
    _, healthy, checks = diagnose({"TSFFN_CUDA_MODULE": "/nonexistent.so"})
    assert healthy and checks["hot neurons"]["status"] == "warning"
    assert "/nonexistent.so" in checks["hot neurons"]["value"]


def test_text_says_the_same():
    status, healthy, checks = diagnose()
    result = tiny.run("doctor")
    assert result.returncode == status
    lines = [line for line in result.stdout.decode().splitlines() if OTHERS not in line]
    checks.pop(OTHERS, None)
    for line, check in zip(lines, checks.values(), strict=False):
        assert line.split()[0] == check["status"]
        assert check["name"] in line
    assert (lines[-1] == "everything needed is there") == healthy


def test_programs():
    _, _, checks = diagnose()
    assert checks["programs"]["status"] == "ok"
    assert checks["programs"]["value"].startswith("llama-server, llama-cli, ")


def test_gpu():
    """One that llama.cpp has a backend for, and a backend without one."""
    _, healthy, checks = diagnose({"TSCONV_GPU_BACKEND": str(fake_gpu.library()), "FAKE_GPU_DEVICES": "2"})
    assert healthy and checks["GPU"]["status"] == "ok"
    for name in ("FAKE0", "FAKE1"):
        assert f"{name} (a GPU that is none, 8.6 of 8.6 GB free)" in checks["GPU"]["value"]
    _, healthy, checks = diagnose({"TSCONV_GPU_BACKEND": str(fake_gpu.library()), "FAKE_GPU_DEVICES": "0"})
    assert healthy and checks["GPU"]["status"] == "warning"
    assert "none that llama.cpp's backend" in checks["GPU"]["value"]


def test_busy_machine():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        _, healthy, checks = diagnose()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert checks[OTHERS]["status"] == "warning"
    assert "fewer threads" in checks[OTHERS]["fix"]
    assert healthy


def test_slower_kernels_are_a_warning():
    _, _, checks = diagnose({"TSFFN_ISA": "ref"})
    assert checks["kernels"]["status"] == "warning"
    assert checks["kernels"]["fix"] == "unset TSFFN_ISA"


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_backend_that_cannot_be_loaded(tmp_path, content):
    library = tmp_path / "libggml-tsffn.so"
    if content is not None:
        library.write_bytes(content)
    status, healthy, checks = diagnose({"TSCONV_BACKEND": str(library)})
    assert (status, healthy) == (1, False)
    assert "backend loads" in problems(checks)
    assert str(library) in checks["backend loads"]["value"]
    assert checks["backend loads"]["fix"] == "unset TSCONV_BACKEND or reinstall tsconv into this environment"


def test_two_openmp_runtimes(tmp_path):
    """A second libgomp under another name, as a wheel with a bundled copy would bring it."""
    name = ctypes.util.find_library("gomp")
    if name is None:
        pytest.skip("no libgomp to copy")
    loaded = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({name!r}); print(open('/proc/self/maps').read())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    original = next(line.split(maxsplit=5)[-1] for line in loaded.splitlines() if "libgomp" in line)
    copy = tmp_path / "libgomp.so.9"
    copy.write_bytes(Path(original).read_bytes().replace(b"libgomp.so.1\0", b"libgomp.so.9\0"))
    _, _, checks = diagnose({"LD_PRELOAD": str(copy)})
    assert checks["OpenMP"]["status"] == "problem"
    assert str(copy) in checks["OpenMP"]["value"]
    assert "two thread pools" in checks["OpenMP"]["fix"]


def has_amx() -> bool:
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


INSTEAD = """
#include <signal.h>
int ggml_backend_sched_graph_compute_async(void * sched, void * graph) { return %s; }
"""


@pytest.mark.parametrize(
    ("instead", "found"),
    [("raise(SIGILL)", "a prompt crashes llama.cpp (SIGILL)"), ("0", "the logits of a prompt are off by")],
)
def test_llama_cpp_that_cannot_compute(tmp_path, instead, found):
    """A library in front of libggml-base that dies where a graph is computed, as broken kernels do, or leaves it."""
    if not has_amx():
        pytest.skip("llama.cpp has no AMX kernels on this machine")
    (source := tmp_path / "instead.c").write_text(INSTEAD % instead)
    library = tmp_path / "instead.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    status, healthy, checks = diagnose({"LD_PRELOAD": str(library)})
    assert (status, healthy) == (1, False)
    assert problems(checks) == {"AMX"}
    assert found in checks["AMX"]["value"]
    assert f"--no-binary llama-cpp-python {LLAMA}" in checks["AMX"]["fix"]


def test_fewer_cpus():
    cpu = min(os.sched_getaffinity(0))
    result = subprocess.run(
        ["taskset", "-c", str(cpu), *tiny.TSCONV, "doctor", "--json"], capture_output=True, cwd=ROOT, check=False
    )
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert f"1 cores usable (1 of {os.cpu_count()} CPUs)" in checks["CPU"]["value"]
