"""What is refused, and how: one line that names the file, the tensor or key, what was expected and found, and what to
do. No traceback, no crash, and the same words from the command line and from `tsconv.load`."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tsconv
from support import CHECKPOINTS, LLAMA, ROOT, TESTS, synthetic, tiny
from support.edited import edited
from support.native_build import OTHER_GGML, library_for_other_ggml
from support.refused import assert_in, put, refusal, sidecar_of
from tsconv.errors import BackendError, ModelFileError
from tsconv.format.header import read_header
from tsconv.native.library import load_backend
from tsconv.runtime.binding import open_model

N_EMBD, N_FF, N_LAYER = 128, 512, 6


# ---- llama.cpp without the backend

STOCK = """
import sys, llama_cpp
model, *override = sys.argv[1:]
llama = llama_cpp.Llama(model, n_ctx=64, n_threads=1, verbose=True, logits_all=True,
                        kv_overrides={"general.architecture": override[0]} if override else None)
llama.eval([1, 20, 300, 7])
sys.stdout.buffer.write(llama.scores[:4].tobytes())
assert "tsffn" not in open("/proc/self/maps").read()
"""
UNARMED = "from tsconv.native.library import load_backend; load_backend()" + STOCK.replace("not in open", "in open")


def stock(script: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, cwd=ROOT, timeout=tiny.TIMEOUT_S, check=False)


@pytest.mark.parametrize("name", ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"])
def test_stock_llama_cpp_refuses_the_model(name):
    result = stock(STOCK, tiny.converted(name))
    assert result.returncode == 1
    assert b"unknown model architecture: 'turbosparse'" in result.stderr
    assert b"ValueError: Failed to load model from file" in result.stderr


def test_override_without_the_backend_uses_nothing_of_ours():
    """The override alone gives llama.cpp's own SwiGLU, whether our library is loaded or not."""
    model = tiny.converted()
    plain, loaded = stock(STOCK, model, "llama"), stock(UNARMED, model, "llama")
    for result in (plain, loaded):
        assert result.returncode == 0, result.stderr
        assert b"CPU_Mapped model buffer size" in result.stderr
        assert b"TSFFN model buffer size" not in result.stderr
    logits = np.frombuffer(plain.stdout, dtype=np.float32)
    assert logits.size and np.isfinite(logits).all()
    assert plain.stdout == loaded.stdout
    sparse = tsconv.load(model, sparsity="exact", n_threads=1)
    ours = sparse.token_logits([1, 20, 300, 7]).ravel()
    sparse.close()
    assert ((ours - logits) ** 2).sum() > 0.01 * (logits**2).sum(), "dReLU is not SwiGLU"


# ---- pairs


def test_sidecar_of_another_conversion(tmp_path):
    other = tsconv.convert(CHECKPOINTS / "tiny-turbosparse-mistral", tmp_path / "other.gguf", "f32").model
    model = put(tiny.converted(), tmp_path, with_sidecar=False)
    shutil.copy(sidecar_of(other), sidecar_of(model))
    found, expected = (read_header(path).keys["turbosparse.pair_id"] for path in (other, model))
    line = refusal(model)
    assert_in(line, sidecar_of(model), model, f"expected pair_id {expected}, found {found}", "one conversion wrote")
    model.with_name(model.name + ".part").touch()
    assert_in(refusal(model), f"{model}.part is left of a conversion that was cut short: convert again")
    with pytest.raises(ModelFileError, match=r"other\.predictor\.gguf: is the sidecar of another model"):
        tsconv.load(tiny.converted(), predictor_path=sidecar_of(other))


def test_sidecar_of_the_other_family(tmp_path):
    model = put(tiny.converted(), tmp_path, with_sidecar=False)
    other = sidecar_of(tiny.converted("tiny-turbosparse-mixtral"))
    shutil.copy(other, sidecar_of(model))
    assert_in(refusal(model), sidecar_of(model), "is the sidecar of another model than", "expected pair_id")
    # With the identity forged, the shapes still differ.
    keys = {key: read_header(model).keys[key] for key in ("turbosparse.pair_id", "turbosparse.neuron_order")}
    edited(other, sidecar_of(model), keys=keys)
    line = refusal(model)
    assert_in(line, f"other shape than {model}: expected {N_LAYER} layers, n_embd {N_EMBD}, n_ff {N_FF}, 0 experts")
    assert_in(line, "found", "8; convert again")


def test_missing_sidecar(tmp_path):
    model = put(tiny.converted(), tmp_path, with_sidecar=False)
    line = refusal(model)
    assert_in(line, f"{sidecar_of(model)}: the predictor sidecar is missing", f"beside {model}", "exact sparsity")
    llama = tsconv.load(model, sparsity="exact", n_threads=1)  # the remedy that the line names
    llama.close()


def test_model_and_sidecar_swapped(tmp_path):
    model = put(tiny.converted(), tmp_path)
    assert_in(refusal(sidecar_of(model)), sidecar_of(model), "is a predictor sidecar: expected the model", "NAME.gguf")
    shutil.copy(model, sidecar_of(model))
    assert_in(refusal(model), sidecar_of(model), "is a model: expected its predictor sidecar", "NAME.predictor.gguf")


def test_other_neuron_order(tmp_path):
    model = put(tiny.converted(), tmp_path)
    edited(sidecar_of(tiny.converted()), sidecar_of(model), keys={"turbosparse.neuron_order": "hot_first"})
    assert_in(refusal(model), sidecar_of(model), "expected checkpoint, found hot_first; reorder both files together")


# ---- files cut short


def cut(which: Callable[[Path], Path], where: Callable[[int, int], int], directory: Path) -> tuple[Path, Path]:
    """A pair whose model or sidecar ends at where(start of the data, end of the file)."""
    model = put(tiny.converted(), directory)
    file = which(model)
    start = min(tensor.offset for tensor in read_header(file).tensors)
    with open(file, "r+b") as stream:
        stream.truncate(where(start, file.stat().st_size))
    return model, file


CUTS = {
    "nothing": (lambda start, end: 0, "is not a GGUF file"),
    "magic": (lambda start, end: 3, "is not a GGUF file: expected its first bytes to be 'GGUF', found 'GGU' in a file"),
    "counts": (lambda start, end: 20, "the header cannot be read"),
    "keys": (lambda start, end: start // 3, "the header cannot be read"),
    "tensor table": (lambda start, end: start - 100, "the header cannot be read"),
    "data start": (lambda start, end: start, "the file is truncated: expected at least"),
    "data": (lambda start, end: (start + end) // 2, "the file is truncated: expected at least"),
    "last byte": (lambda start, end: end - 1, "the file is truncated: expected at least"),
}


@pytest.mark.parametrize("which", ["model", "sidecar"])
@pytest.mark.parametrize("place", CUTS)
def test_truncated(tmp_path, which, place):
    where, message = CUTS[place]
    model, file = cut(sidecar_of if which == "sidecar" else lambda path: path, where, tmp_path)
    line = refusal(model)
    assert_in(line, f"error: {file}: ", message)
    if "truncated" in message:
        assert_in(line, f"found {file.stat().st_size}; convert or download it again")
    elif "header" in message:
        assert_in(line, "convert or download it again")
        assert "failed to read" in line or "exceeds remaining file size" in line, line


# ---- no such file, no file, no permission


@pytest.mark.parametrize("which", ["model", "sidecar"])
def test_not_a_gguf_file(tmp_path, which):
    model = put(tiny.converted(), tmp_path)
    file = sidecar_of(model) if which == "sidecar" else model
    file.write_text("\x1b[31m not weights\n" * 10)
    line = refusal(model)
    assert_in(line, f"{file}: is not a GGUF file: expected its first bytes to be 'GGUF', found '?[31' in a file of 180")
    assert line.isprintable()


@pytest.mark.parametrize("which", ["model", "sidecar"])
def test_directory(tmp_path, which):
    model = put(tiny.converted(), tmp_path)
    file = sidecar_of(model) if which == "sidecar" else model
    file.unlink()
    file.mkdir()
    assert_in(refusal(model), f"{file}: is not a file: expected a GGUF file")


def test_pipe(tmp_path):
    os.mkfifo(pipe := tmp_path / "m.gguf")
    assert_in(refusal(pipe), f"{pipe}: is not a file: expected a GGUF file")


def test_missing_model(tmp_path):
    assert_in(refusal(tmp_path / "none.gguf"), tmp_path / "none.gguf", "cannot be opened: No such file or directory")


def test_no_permission(tmp_path):
    command = [*tiny.TSCONV, "run", "-p", "x", "-t", "1", "-m"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read everything, and there is no setpriv to take that away")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    model = put(tiny.converted(), tmp_path)
    for file in (sidecar_of(model), model):
        file.chmod(0)
        result = subprocess.run([*command, model], capture_output=True, cwd=ROOT, check=False)
        assert tiny.error_line(result) == f"error: {file}: cannot be opened: Permission denied"


# ---- what the model cannot do


@functools.cache
def without_predictor() -> Path:
    directory = tiny.converted().parent / "bamboo"
    shape = synthetic.SHAPES["bamboo"]
    checkpoint = synthetic.save(directory / "checkpoint", shape, synthetic.random_tensors(shape))
    return tsconv.convert(checkpoint, directory / "bamboo.gguf", "f32").model


def test_predictor_that_is_not_there():
    model = without_predictor()
    line = refusal(model, sparsity="predictor")
    assert_in(line, f"{model}: the model has no predictor; run with exact sparsity, or convert with --predictor")
    llama = tsconv.load(model, n_threads=1)
    assert llama.sparsity == "exact"
    llama.close()


# ---- the native library


def backend_refusal(library: Path) -> str:
    return refusal(tiny.converted(), BackendError, env={"TSCONV_BACKEND": str(library)})


def test_backend_that_is_not_there(tmp_path):
    line = backend_refusal(tmp_path / "none.so")
    assert_in(line, f"the native backend is missing: expected {tmp_path / 'none.so'}; unset TSCONV_BACKEND, which")
    assert_in(backend_refusal(tmp_path), f"the native backend is missing: expected {tmp_path}; unset TSCONV_BACKEND")


def test_backend_that_is_not_a_library(tmp_path):
    library = tmp_path / "text.so"
    library.write_text("not a library")
    assert_in(backend_refusal(library), f"{library}: cannot be loaded: found", "too short", "reinstall tsconv")


def test_backend_for_another_ggml():
    line = backend_refusal(library_for_other_ggml())
    assert_in(line, f"built for another ggml: expected ggml {OTHER_GGML}, found ", f"install {LLAMA}")


# ---- damaged headers


@pytest.mark.sanitized
@pytest.mark.parametrize("name", ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"])
def test_damaged_headers(tmp_path, name):
    """Hundreds of random edits of both headers: each file opens or is refused in one line; the process survives."""
    model = put(tiny.converted(name), tmp_path)
    command = [sys.executable, "-m", "support.fuzz_headers", model, "1", "400"]
    result = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=tiny.TIMEOUT_S, check=False)
    assert result.returncode == 0, f"after {result.stderr[-2000:]}"
    counts = dict(line.split() for line in result.stdout.splitlines())
    assert int(counts["opened"]) + int(counts["refused"]) == 800
    assert int(counts["opened"]) > 10
    assert int(counts["refused"]) > 400


def test_files_that_are_refused_are_closed(tmp_path):
    """And so are those of a model that is opened and closed."""
    damaged = put(tiny.converted(), tmp_path)
    damaged.write_bytes(damaged.read_bytes()[:5000])
    load_backend()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(ModelFileError):
            open_model(damaged, None, None)
        open_model(tiny.converted(), None, None).close()
    assert len(os.listdir("/proc/self/fd")) == before
