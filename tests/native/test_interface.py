"""The native library's functions and its device, through their C interfaces: each case in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tsconv
from support import CHECKPOINTS, tiny


def python(script: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=tiny.TIMEOUT_S, check=False
    )


# ---- NULL instead of a model

NOTHING = """
import ctypes, errno, sys
from tsconv.native.library import LayerStats, Placed, load_backend
lib = load_backend().lib
model = lib.tsffn_model_open(sys.argv[1].encode(), None, b"exact", ctypes.create_string_buffer(100), 100)
assert model and lib.tsffn_model_profile(model, True)
full = [ctypes.create_string_buffer(1 << 20) for _ in range(3)]
assert lib.tsffn_model_read_profile(model, 0, *full) and lib.tsffn_model_stats(model, 0, LayerStats())
"""
CALLS = {
    "stats": ["tsffn_model_stats(None, 0, LayerStats())", "tsffn_model_stats(model, 0, None)"],
    "reset_stats": ["tsffn_model_reset_stats(None)"],
    "profile": ["tsffn_model_profile(None, True)", "tsffn_model_profile(None, False)"],
    "read_profile": ["tsffn_model_read_profile(None, 0, *full)"]
    + [f"tsffn_model_read_profile(model, 0, *full[:{k}], None, *full[{k + 1}:])" for k in range(3)],
    "read_squares": ["tsffn_model_read_squares(None, 0, full[0])", "tsffn_model_read_squares(model, 0, None)"],
    "record": ["tsffn_model_record(None, 0, 1, None, None)"]
    + [f"tsffn_model_record(model, {first}, {end}, full[0], None)" for first, end in ((1, 1), (0, 99), (-1, 1))],
    "place": [
        "tsffn_model_place(None, full[0], 1, 0, Placed(), full[1], 9)",
        "tsffn_model_place(model, None, 1, 0, Placed(), full[1], 9)",
        "tsffn_model_place(model, full[0], 1, 0, None, full[1], 9)",
    ],
    "what it is": [f"tsffn_model_{name}(None)" for name in ("sparsity", "n_layer", "file_bytes")],
    "cache": ["tsffn_model_cache(None, 0, 1) != errno.EINVAL", "tsffn_model_cache(model, 1, 1) != errno.EINVAL"],
    "arm": ["tsffn_model_arm(None)"],
    "close": ["tsffn_model_close(None)"],
}


@pytest.mark.parametrize("function", CALLS)
def test_functions_without_a_model(function):
    calls = "".join(f"assert not lib.{call}\n" for call in CALLS[function])
    model = tiny.converted("tiny-turbosparse-mixtral", "q4_0")
    done = python(f"{NOTHING}{calls}lib.tsffn_model_close(model)", model)
    assert (done.returncode, done.stderr) == (0, "")


QUANTIZE = """
import numpy as np
from tsconv.native.library import load_backend
quantize = load_backend().lib.tsffn_quantize_q3_nl
w, importance, d, rows = np.ones((2, 64), "f4"), np.ones(64, "f4"), np.ones(2, "f2"), np.zeros((2, 28), "u1")
pointers = [array.ctypes.data for array in (w, importance, d, rows)]
def call(n_rows, n_cols, w, *others):
    return quantize(w, n_rows, n_cols, *others)
assert call(2, 64, *pointers) and rows.any()
for n_rows, n_cols in ((-1, 64), (2, 0), (2, -32), (2, 48), (2, (1 << 17) + 32), (2, 1 << 60)):
    assert not call(n_rows, n_cols, *pointers), (n_rows, n_cols)
for k in range(4):
    assert not call(2, 64, *pointers[:k], None, *pointers[k + 1:]), k
"""


def test_sizes_that_cannot_be_quantized():
    done = python(QUANTIZE)
    assert (done.returncode, done.stderr) == (0, "")


# ---- TSFFN_ISA

ISA = "from tsconv.native.library import load_backend; b = load_backend(); print(b.isa, b.isa)"


def test_kernels_that_are_unknown():
    """One line says so; a name that this machine lacks is a limit like any other."""
    best, empty, ref, unknown = (python(ISA, **env) for env in ({}, *({"TSFFN_ISA": v} for v in ("", "ref", "avx-2"))))
    assert all(done.returncode == 0 for done in (best, empty, ref, unknown))
    assert (best.stderr, empty.stderr, ref.stderr) == ("", "", "")
    assert ref.stdout == "ref ref\n"
    assert unknown.stdout == empty.stdout == best.stdout
    assert unknown.stderr.startswith("tsffn: TSFFN_ISA: expected one of ref, ")
    assert unknown.stderr.endswith(", found 'avx-2'; it is ignored\n")
    assert unknown.stderr.count("\n") == 1
    for name in unknown.stderr.partition("one of ")[2].partition(", found")[0].split(", "):
        done = python(ISA, TSFFN_ISA=name)
        assert (done.returncode, done.stderr) == (0, ""), name


# ---- a CPU backend that comes later

LATER = """
import ctypes, sys
from llama_cpp import llama_cpp
from tsconv.errors import ModelFileError
from tsconv.native.library import load_backend
from tsconv.runtime.binding import open_model
ggml = llama_cpp._lib
ggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
cpu = ctypes.c_void_p(ggml.ggml_backend_reg_by_name(b"CPU"))
load_backend()
ggml.ggml_backend_unload(cpu)
assert not ggml.ggml_backend_reg_by_name(b"CPU")
try:
    open_model(sys.argv[1], None, None)
    raise SystemExit("opened without the CPU backend")
except ModelFileError as error:
    print(error)
ggml.ggml_backend_register(cpu)
open_model(sys.argv[1], None, None).close()
"""


def test_cpu_backend_that_comes_later():
    done = python(LATER, tiny.converted())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "libggml-tsffn.so: this ggml has no CPU backend: load it first\n"


# ---- products with experts

PRODUCT = """
import ctypes, json, sys
import numpy as np
from llama_cpp import llama_cpp
from tsconv.runtime.binding import open_model
pointer, i64 = ctypes.c_void_p, ctypes.c_int64
F32, F16, I32 = 0, 1, 26

class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", pointer), ("no_alloc", ctypes.c_bool))

def declared(name, result, *arguments):
    function = getattr(llama_cpp._lib, name)
    function.restype, function.argtypes = result, arguments
    return function

init = declared("ggml_init", pointer, InitParams)
new_2d = declared("ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, i64, i64)
new_3d = declared("ggml_new_tensor_3d", pointer, pointer, ctypes.c_int, i64, i64, i64)
set_name = declared("ggml_set_name", pointer, pointer, ctypes.c_char_p)
mul_mat_id = declared("ggml_mul_mat_id", pointer, pointer, pointer, pointer, pointer)
new_graph = declared("ggml_new_graph", pointer, pointer)
expand = declared("ggml_build_forward_expand", None, pointer, pointer)
device_of = declared("ggml_backend_dev_by_name", pointer, ctypes.c_char_p)
buffer_type = declared("ggml_backend_dev_buffer_type", pointer, pointer)
allocate = declared("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
start = declared("ggml_backend_dev_init", pointer, pointer, ctypes.c_char_p)
supports = declared("ggml_backend_supports_op", ctypes.c_bool, pointer, pointer)
compute = declared("ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)
write = declared("ggml_backend_tensor_set", None, pointer, pointer, ctypes.c_size_t, ctypes.c_size_t)
read = declared("ggml_backend_tensor_get", None, pointer, pointer, ctypes.c_size_t, ctypes.c_size_t)

path, n_embd, n_ff, n_expert, n_rows, kind = sys.argv[1], *map(int, sys.argv[2:])
n_used, n_tokens = 4, 5
model = open_model(path, None, "exact")
ctx = init(InitParams(1 << 20, None, True))
w, ids = new_3d(ctx, F32, n_embd, n_ff, n_expert), new_2d(ctx, I32, n_used, n_tokens)
x = new_3d(ctx, kind, n_embd, n_rows, n_tokens)
set_name(w, b"blk.1.ffn_up_exps.weight")
y = mul_mat_id(ctx, w, x, ids)
set_name(y, b"product")
graph = new_graph(ctx)
expand(graph, y)
device = device_of(b"TSFFN")
with model.armed():
    assert allocate(ctx, buffer_type(device))
rng = np.random.default_rng(0)
values = {
    w: rng.standard_normal((n_expert, n_ff, n_embd), np.float32),
    x: rng.standard_normal((n_tokens, n_rows, n_embd), np.float32).astype(np.float16 if kind == F16 else np.float32),
    ids: rng.integers(0, n_expert, (n_tokens, n_used)).astype(np.int32),
}
for tensor, array in values.items():
    write(tensor, array.ctypes.data, 0, array.nbytes)
backend = start(device, None)
claimed, status = supports(backend, y), compute(backend, graph)
found = np.zeros((n_tokens, n_used, n_ff), np.float32)
read(y, found.ctypes.data, 0, found.nbytes)
expected = np.stack([
    [values[w][e] @ values[x][t, slot % n_rows].astype(np.float32) for slot, e in enumerate(experts)]
    for t, experts in enumerate(values[ids])
])
error = float(((found - expected) ** 2).sum() / (expected**2).sum())
json.dump({"claimed": claimed, "status": status, "error": error}, sys.stdout)
"""
F32, F16 = 0, 1


@pytest.fixture(scope="module")
def moe_in_rows(tmp_path_factory) -> tuple[Path, list[int]]:
    """The small MoE model with gate, up and down each in its own tensor; n_embd, n_ff, n_expert."""
    checkpoint = CHECKPOINTS / "tiny-turbosparse-mixtral"
    target = tmp_path_factory.mktemp("rows") / "m.gguf"
    model = tsconv.convert(checkpoint, target, "f32", ffn_layout="rows").model
    config = json.loads((checkpoint / "config.json").read_text())
    return model, [config[key] for key in ("hidden_size", "intermediate_size", "num_local_experts")]


@pytest.mark.parametrize("n_rows", [1, 2, 4])
def test_rows_of_experts(moe_in_rows, n_rows):
    """As ggml defines it: one row of a token for all of its four experts, one for each, or some that they take in
    turn."""
    path, shape = moe_in_rows
    done = python(PRODUCT, path, *shape, n_rows, F32)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert (result["claimed"], result["status"]) == (True, 0)
    assert result["error"] < 1e-10


def test_activations_that_cannot_be_computed(moe_in_rows):
    """They are refused when they are computed, not left to a backend that does not know how the weights lie."""
    path, shape = moe_in_rows
    done = python(PRODUCT, path, *shape, 1, F16)
    result = json.loads(done.stdout)
    assert (result["claimed"], result["status"]) == (True, -1)
    assert done.stderr == (
        "tsffn: product: expected contiguous f32 activations of tokens and their experts, "
        f"found f16 [{shape[0]}, 1, 5, 1]\n"
    )
