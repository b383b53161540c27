"""The native library's own tests, and the layout of ggml's private structs against upstream's header."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from support import LLAMA
from support.native_build import OTHER_GGML, ROOT, TOOLS, build, library_for_other_ggml

BUILD = ROOT / "build" / "tests"


@pytest.fixture(scope="session")
def native_tests() -> Path:
    return build(BUILD, "-DTSFFN_TESTS=ON") / "tests"


PROGRAMS = ["test_kernels", "test_panels", "test_ffn", "test_topk", "test_neurons", "test_activation", "test_profile"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(native_tests, name):
    # Several threads on few cores: waiting threads must sleep, or the test takes minutes. Their stacks can be small.
    env = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_STACKSIZE": "64k"}
    done = subprocess.run([native_tests / name], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ref: ok" in done.stdout


def test_neuron_cache(native_tests):
    done = subprocess.run([native_tests / "test_neuron_cache"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "io_uring: ok\nthreads: ok\n"), done.stderr


def test_measure(native_tests):
    done = subprocess.run([native_tests / "test_measure"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "measure: ok\n"), done.stderr


def test_what_is_installed(native_tests, tmp_path):
    """What CMake puts into a wheel: the library and the machine profiles."""
    command = ["cmake", "--install", native_tests.parent, "--prefix", tmp_path]
    subprocess.run(command, env=TOOLS, capture_output=True, text=True, check=True)
    installed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    profiles = {f"tsconv/profiles/{path.name}" for path in (ROOT / "profiles").glob("*.toml")}
    assert installed == {"tsconv/lib/libggml-tsffn.so"} | profiles


@pytest.fixture(scope="session")
def upstream_ggml(tmp_path_factory) -> Path:
    """The ggml folder of llama-cpp-python's source distribution (77 MB), kept beside the other build products."""
    downloads = ROOT / "build" / "upstream"
    downloads.mkdir(parents=True, exist_ok=True)
    if not list(downloads.glob("llama_cpp_python-*.tar.gz")):
        # --no-deps --no-build-isolation: the archive is wanted, not its metadata.
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", ":all:", "-d", downloads, LLAMA]
        if subprocess.run(command, env=TOOLS, capture_output=True, check=False, timeout=300).returncode != 0:
            pytest.skip(f"the source distribution of {LLAMA} cannot be downloaded: no network")
    (archive,) = downloads.glob("llama_cpp_python-*.tar.gz")
    target = tmp_path_factory.mktemp("upstream")
    with tarfile.open(archive) as tar:
        inside = "vendor/llama.cpp/ggml/"
        members = [m for m in tar if inside in m.name and m.name.endswith(".h")]
        tar.extractall(target, members=members, filter="data")
    (ggml,) = target.glob("*/vendor/llama.cpp/ggml")
    return ggml


def test_struct_layout_equals_upstream(upstream_ggml, tmp_path):
    tests = build(tmp_path / "abi", "-DTSFFN_TESTS=ON", f"-DUPSTREAM_GGML={upstream_ggml}") / "tests"
    own, upstream = (
        subprocess.run([tests / name], capture_output=True, text=True, check=True).stdout
        for name in ("abi_layout_own", "abi_layout_upstream")
    )
    assert own.count("\n") > 70
    assert own == upstream


def test_wrong_ggml_version_is_refused():
    library = library_for_other_ggml()
    env = os.environ | {"TSCONV_BACKEND": str(library)}
    code = "from tsconv.native.library import load_backend; load_backend()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert f"BackendError: libggml-tsffn.so: built for another ggml: expected ggml {OTHER_GGML}, found " in done.stderr

    # llama.cpp's own loader, without our check in Python before it: it gets NULL and says so, and nothing crashes.
    code = f"import llama_cpp; lib = llama_cpp.llama_cpp._lib; print(lib.ggml_backend_load({os.fsencode(library)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.strip() == "0"
    assert f"expected ggml {OTHER_GGML}" in done.stderr
