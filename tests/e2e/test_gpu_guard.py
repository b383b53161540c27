"""A GPU beside the backend takes FFNs that it would compute as SwiGLU: a context of such a model is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from support import fake_gpu, tiny
from support.edited import as_ordinary
from tsconv.native.library import library_path
from tsconv.runtime.programs import AS_LLAMA, FFN_WEIGHTS, environment, program_path

MODELS = {"dense": "tiny-turbosparse-mistral", "moe": "tiny-turbosparse-mixtral"}
KEEP_FFN = b"ffn_(gate|up|down)(_exps)?.weight"

# What a program does that knows nothing of tsconv.
# argv: GPU library, model, layers for the GPU, expression of tensors that stay with the CPU, file for the logits.
PROGRAM = r"""
import ctypes, os, sys
import numpy as np
from llama_cpp import llama_cpp as lib

gpu, model_path, n_gpu_layers, kept, logits_path = sys.argv[1:]
load = lib._lib.ggml_backend_load
load.argtypes, load.restype = [ctypes.c_char_p], ctypes.c_void_p
lib.llama_backend_init()
assert load(gpu.encode())


class Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


cpu = lib._lib.ggml_backend_cpu_buffer_type
cpu.restype = ctypes.c_void_p
overrides = (Override * 2)(Override(kept.encode(), cpu()) if kept else Override(), Override())


def params():
    p = original()
    p.n_gpu_layers = int(n_gpu_layers)
    p.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    return p


original = lib.llama_model_default_params
assert load(os.environ["BACKEND"].encode())
p = params()
p.load_mode = lib.LLAMA_LOAD_MODE_NONE if "NO_MMAP" in os.environ else lib.LLAMA_LOAD_MODE_MMAP
override = (lib.llama_model_kv_override * 2)()
override[0].key = b"general.architecture"
override[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_STR
override[0].value.val_str = b"llama"
p.kv_overrides = override
c = lib.llama_context_default_params()
c.n_ctx, c.n_batch = 64, 64
if "MEASURE" in os.environ:  # as llama-server does first, to see what fits: weights that are nowhere
    p.load_mode, p.no_alloc, p.n_gpu_layers = lib.LLAMA_LOAD_MODE_NONE, True, int(os.environ["MEASURE"])
    measured = lib.llama_model_load_from_file(model_path.encode(), p)
    context = lib.llama_init_from_model(measured, c)
    print("measured" if context else "not measured")
    lib.llama_free(context) if context else None
    lib.llama_model_free(measured)
    p.load_mode, p.no_alloc, p.n_gpu_layers = lib.LLAMA_LOAD_MODE_MMAP, False, int(n_gpu_layers)
model = lib.llama_model_load_from_file(model_path.encode(), p)
assert model
context = lib.llama_init_from_model(model, c)
if not context:
    sys.exit(3)
tokens = (ctypes.c_int32 * 4)(1, 20, 300, 7)
assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, 4)) == 0
n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
np.save(logits_path, np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (n_vocab,)).copy())
"""


def run(model: Path, n_gpu_layers: int, out: Path, kept: bytes = b"", **env: str):
    env = {"BACKEND": str(library_path()), "TSFFN_MODEL": str(model)} | env
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, fake_gpu.library(), model, str(n_gpu_layers), kept.decode(), out],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=tiny.TIMEOUT_S,
        check=False,
    )


def refusals(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "FFN tensors" in line]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "kept", [b"", b"ffn_(gate|up)(_exps)?.weight", rb"blk\.1\.ffn_"], ids=["none", "no down", "one layer"]
)
def test_ffn_on_the_gpu_is_refused(tmp_path, kind, kept):
    """Whether the GPU takes all layers or the last one only: in one line, and nothing is computed."""
    model = tiny.converted(MODELS[kind])
    for n_gpu_layers in (99, 2):  # llama.cpp counts the output as a layer
        done = run(model, n_gpu_layers, tmp_path / "logits.npy", kept)
        assert done.returncode == 3, done.stderr
        (line,) = refusals(done.stderr)
        assert str(model) in line
        assert "would compute SwiGLU instead of dReLU" in line
        assert not (tmp_path / "logits.npy").exists()


@pytest.mark.parametrize("kind", MODELS)
def test_ffn_that_is_kept_back(tmp_path, kind):
    """The logits are those without a GPU."""
    model = tiny.converted(MODELS[kind])
    logits = []
    for n_gpu_layers, kept in ((0, b""), (99, KEEP_FFN)):
        out = tmp_path / f"{n_gpu_layers}.npy"
        done = run(model, n_gpu_layers, out, kept)
        assert done.returncode == 0, done.stderr
        assert not refusals(done.stderr)
        logits.append(np.load(out))
    assert tiny.nmse(logits[1], logits[0]) < 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_llama_server_that_puts_it_there(tmp_path, kind):
    """Its own option for where tensors go, to the GPU: it ends with our line, and serves nothing."""
    model = tiny.converted(MODELS[kind])
    (tmp_path / "libggml-cuda.so").symlink_to(fake_gpu.library())
    command = [program_path("llama-server"), "-m", model, *AS_LLAMA, "-ngl", "99", "-ot", f"{FFN_WEIGHTS}=FAKE0"]
    done = subprocess.run(
        [*command, "--port", "0"],
        env=environment(model),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=tiny.TIMEOUT_S,
        check=False,
    )
    assert done.returncode != 0
    assert "would compute SwiGLU instead of dReLU" in done.stderr


@pytest.mark.parametrize("kind", MODELS)
def test_contexts_that_measure(tmp_path, kind):
    """A context without weights, which programs make to see what fits, works where the FFN would be ours, and does not
    open the way for one whose FFN is not."""
    model = tiny.converted(MODELS[kind])
    done = run(model, 0, tmp_path / "logits.npy", MEASURE="0")
    assert (done.returncode, done.stdout) == (0, "measured\n"), done.stderr
    done = run(model, 99, tmp_path / "none.npy", MEASURE="0")
    assert (done.returncode, done.stdout) == (3, "measured\n"), done.stderr
    assert len(refusals(done.stderr)) == 1
    done = run(model, 0, tmp_path / "logits.npy", MEASURE="99")
    assert (done.returncode, done.stdout) == (0, "not measured\n"), done.stderr
    done = run(model, 99, tmp_path / "logits.npy", KEEP_FFN, MEASURE="99")
    assert (done.returncode, done.stdout) == (0, "measured\n"), done.stderr


def test_another_model(tmp_path):
    """One that is loaded where the environment names another is refused, and not computed as SwiGLU."""
    model, other = tiny.converted(), tiny.converted("tiny-turbosparse-mixtral")
    done = run(other, 0, tmp_path / "none.npy", TSFFN_MODEL=str(model))
    assert done.returncode == 3, done.stderr
    assert f"tsffn: {other} is being loaded, but TSFFN_MODEL names {model}: " in done.stderr


def test_another_model_that_is_not_mapped(tmp_path):
    """One of the same shapes is told by its weights where no mapping tells which file they are from."""
    model = tiny.converted()
    done = run(model, 0, tmp_path / "logits.npy", NO_MMAP="1")
    assert done.returncode == 0, done.stderr
    name = "blk.2.ffn_up.weight"
    weights = next(t.data for t in gguf.GGUFReader(model).tensors if t.name == name)
    other = as_ordinary(model, tmp_path / "other.gguf", {name: weights[::-1].copy()})
    done = run(other, 0, tmp_path / "none.npy", NO_MMAP="1", TSFFN_MODEL=str(model))
    assert done.returncode == 3, done.stderr
    assert f"tsffn: {name} is not that of {model}: another model of its shape is being loaded" in done.stderr
