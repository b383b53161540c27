"""What the native backend does inside llama.cpp: which operations it is given, what it reads, what it leaves alone."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

import tsconv
from support import edited, synthetic, tiny
from tsconv.bench.synthetic import Shape, tensor_shapes, to_bf16
from tsconv.format.header import read_header
from tsconv.native.library import library_path

TOKENS = [1, 20, 300, 7]


def python(script: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=tiny.TIMEOUT_S, check=False
    )


# ---- which operations

RUN_VERBOSELY = """
import sys, tsconv
model = tsconv.load(sys.argv[1], verbose=True, n_threads=1)
model.token_logits([1, 20, 300, 7], n_batch=3)
"""
SPLIT = re.compile(r"## SPLIT #(\d+): (\S+) # (\d+) inputs")
NODE = re.compile(r"node #\s*\d+ \(\s*(\S+)\):\s+(\S.*?) \(\s*\S+\) \[\s*(\S+)\s")
FFN = {
    "tiny-turbosparse-mistral": [
        *(("MUL_MAT", "ffn_gate"), ("MUL_MAT", "ffn_up"), ("SWIGLU", "ffn_swiglu"), ("MUL_MAT", "ffn_out"))
    ],
    "tiny-turbosparse-mixtral": [
        *(("MUL_MAT_ID", "ffn_moe_gate"), ("MUL_MAT_ID", "ffn_moe_up")),
        *(("SWIGLU", "ffn_moe_swiglu"), ("MUL_MAT_ID", "ffn_moe_down")),
    ],
}


def graphs(log: str) -> list[list[tuple[str, int, list[tuple[str, str, str]]]]]:
    """The graphs that GGML_SCHED_DEBUG=2 prints: splits (backend, inputs copied, nodes (operation, name, backend))."""
    found = []
    for line in log.splitlines():
        if split := SPLIT.search(line):
            if split[1] == "0":
                found.append([])
            found[-1].append((split[2], int(split[3]), []))
        elif node := NODE.match(line):
            found[-1][-1][2].append((node[1], node[2], node[3]))
    return found


@pytest.mark.parametrize("name", FFN)
def test_splits(name):
    """One split per layer, holding exactly the FFN, with nothing copied; all the rest is llama.cpp's."""
    n_layer = read_header(tiny.converted(name)).keys["llama.block_count"]
    result = python(RUN_VERBOSELY, tiny.converted(name), GGML_SCHED_DEBUG="2")
    assert result.returncode == 0, result.stderr
    seen = graphs(result.stderr)
    assert len(seen) >= 2
    for graph in seen:
        ours = [split for split in graph if split[0] == "TSFFN"]
        for layer, (_, n_inputs, nodes) in enumerate(ours):
            assert n_inputs == 0
            assert nodes == [(op, f"{label}-{layer}", "TSFFN") for op, label in FFN[name]]
        assert len(ours) == n_layer
        others = [split for split in graph if split[0] != "TSFFN"]
        assert len(others) == n_layer + 1
        for backend, n_inputs, nodes in others:
            assert (backend, n_inputs) == ("CPU", 0)
            assert nodes
            assert {node[2] for node in nodes} == {"CPU"}


# ---- what is read

N_EMBD, N_FF, RANK, STEP = 2048, 8192, 32, 128
N_ON = N_FF // STEP
RESIDENT = """
import ctypes, json, os, re, sys, tsconv
path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
MADV_RANDOM, MADV_DONTNEED = 1, 4

def mappings():
    "(begin, end, offset in the file, resident bytes) of the model's file"
    found, current = [], None
    for line in open("/proc/self/smaps"):
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) r--s ([0-9a-f]+) \\S+ \\d+ +(.*)", line):
            current = [int(head[i], 16) for i in (1, 2, 3)] if head[4] == path else None
        elif re.match(r"[0-9a-f]+-", line):
            current = None
        elif current and line.startswith("Rss:"):
            found.append((*current, 1024 * int(line.split()[1])))
    return found

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

import llama_cpp
before = anonymous()
model = tsconv.load(path, n_threads=1, n_ctx=64)
copied = anonymous() - before
pieces = mappings()  # the FFNs are mappings of their own
begin, end, offset = pieces[0][0], pieces[-1][1], pieces[0][2]
loaded = sum(resident for *_, resident in pieces)
assert offset <= first < last <= offset + end - begin, "the FFN weights are in the mapping"

# Empty page cache and no read-ahead: what is resident from here on has been asked for.
libc = ctypes.CDLL(None)
begin, size = begin + first - offset, last - first
for advice in (MADV_RANDOM, MADV_DONTNEED):
    assert libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice) == 0
file = os.open(path, os.O_RDONLY)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
ffn = lambda: sum(resident for start, stop, _, resident in mappings() if begin <= start and stop <= begin + size)
empty = ffn()
model.token_logits([1, 20, 300, 7], n_batch=1)
json.dump({"copied": copied, "loaded": loaded, "empty": empty, "touched": ffn(), **model.ffn_stats()[0]}, sys.stdout)
"""


@functools.cache
def large_model() -> Path:
    """200 MB of FFN in one layer, whose predictor lets every 128th neuron through, whatever its input is."""
    directory = tiny.converted().parent / "large"
    shape = Shape(synthetic.N_VOCAB, N_EMBD, N_FF, 16, 4, 1, ranks=(RANK,))
    block = to_bf16(np.random.default_rng(0).standard_normal(1000003, dtype=np.float32) / 8)
    tensors = {
        name: np.resize(block, dims) if len(dims) > 1 else np.full(dims, 0x3F80, np.uint16)  # bf16 1.0
        for name, dims in tensor_shapes(shape).items()
    }
    sign = np.where(np.arange(N_FF) % STEP == 0, np.float32(1), np.float32(-1))
    tensors["model.layers.0.mlp.predictor.fc2.weight"] = to_bf16(np.repeat(sign[:, None], RANK, axis=1))
    checkpoint = synthetic.save(directory / "checkpoint", shape, tensors)
    model = tsconv.convert(checkpoint, directory / "large.gguf", "f32").model
    with open(model, "rb") as file:
        os.fsync(file.fileno())  # pages that wait to be written cannot be evicted
    return model


def test_only_touched_weights_are_resident():
    """The weights stay in the file's mapping: nothing is copied, and only the rows that are computed are read."""
    model = large_model()
    tensors = [tensor for tensor in read_header(model).tensors if ".ffn_" in tensor.name and "norm" not in tensor.name]
    page = os.sysconf("SC_PAGESIZE")
    first = -(-min(tensor.offset for tensor in tensors) // page) * page
    last = max(tensor.offset + tensor.n_bytes for tensor in tensors) // page * page
    n_bytes = sum(tensor.n_bytes for tensor in tensors)
    assert n_bytes == 3 * 4 * N_EMBD * N_FF
    assert last - first > 0.99 * n_bytes, "the FFN weights follow each other"

    result = python(RESIDENT, model, first, last)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    print({key: value for key, value in found.items() if key != "layer"}, "of", n_bytes)
    assert found["copied"] < 0.25 * n_bytes
    assert found["loaded"] < 0.001 * n_bytes, "llama.cpp populates the mapping; the backend takes it out again"
    if found["empty"]:
        pytest.skip("this file system does not evict pages")
    row = 4 * N_EMBD
    assert found["predicted"] == N_ON
    assert N_ON * row <= found["touched"] < 0.05 * n_bytes
    # Counters: per token, the predictor's matrices, every predicted gate, and up and down of what is left.
    n = len(TOKENS)
    assert found["bytes_predictor"] == 4 * n * (RANK * N_EMBD + N_FF * RANK)
    assert found["bytes_ffn"] == pytest.approx(n * row * (N_ON + found["gate_positive"] + found["active"]))
    assert found["bytes_dense"] == n * n_bytes
    assert found["bytes_read"] < 0.02 * found["bytes_dense"]


@pytest.mark.parametrize("name", FFN)
@pytest.mark.parametrize(("outtype", "row"), [("f16", 2), ("q8_0", 34 / 32), ("q4_0", 18 / 32)])
def test_bytes_follow_from_the_sparsity(name, outtype, row):
    """Bytes of the FFN are rows touched times bytes per row, for every type; dense is three rows per neuron."""
    model = tsconv.load(tiny.converted(name, outtype), n_threads=1)
    model.token_logits(list(range(10, 40)), n_batch=1)
    stats = model.ffn_stats()
    model.close()
    for layer in stats:
        row_bytes = row * read_header(tiny.converted(name)).keys["llama.embedding_length"]
        touched = layer["predicted"] + layer["gate_positive"] + layer["active"]
        assert layer["bytes_ffn"] == pytest.approx(touched * row_bytes * layer["tokens"])
        assert layer["bytes_dense"] == pytest.approx(3 * layer["n_ff"] * row_bytes * layer["tokens"])
        assert layer["predicted"] < 0.5 * layer["n_ff"]
        assert layer["bytes_ffn"] < 0.5 * layer["bytes_dense"]


@pytest.mark.parametrize("name", FFN)
def test_time_between_ffns(name):
    """Counted for all layers but the first, and no more than the whole took together with the FFNs."""
    model = tsconv.load(tiny.converted(name), n_threads=1)
    model.reset_ffn_stats()
    started = time.perf_counter()
    model.token_logits(list(range(10, 40)), n_batch=7)
    elapsed = time.perf_counter() - started
    first, *others = model.ffn_stats()
    model.reset_ffn_stats()
    assert all(layer["seconds_attention"] == 0 for layer in model.ffn_stats())
    model.close()
    assert first["seconds_attention"] == 0
    assert all(layer["seconds_attention"] > 0 for layer in others)
    parts = ("attention", "predictor", "ffn")
    assert sum(layer[f"seconds_{part}"] for layer in [first, *others] for part in parts) < elapsed


@pytest.mark.parametrize(
    ("options", "on"),
    [({}, True), ({"flash_attn": False}, False), ({"type_k": 0, "type_v": 0}, False)],
    ids=["default", "off", "keys in f32"],
)
def test_flash_attention(options, on):
    model = tsconv.load(tiny.converted(), n_threads=1, **options)
    assert (model.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED) == on
    model.token_logits(TOKENS)
    model.close()


# ---- other models

PLAIN = """
import sys, llama_cpp
plain, sparse = sys.argv[1:]
def logits():
    llama = llama_cpp.Llama(plain, n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True,
                            flash_attn=True)
    llama.eval([1, 20, 300, 7])
    return llama.scores[:4].tobytes()
if sparse:
    import tsconv
    from tsconv.native.library import load_backend
    load_backend()
    before = logits()
    model = tsconv.load(sparse, n_threads=1)
    model.token_logits([1, 20])
    assert model.ffn_stats()[0]["calls"] > 0
    model.reset_ffn_stats()
    beside = logits()
    assert model.ffn_stats()[0]["calls"] == model.ffn_stats()[0]["single_ops"] == 0
    model.close()
    assert before == beside == logits()
print(logits().hex())
"""


def test_ordinary_model_beside_ours(tmp_path):
    """A llama model of the same shapes, before, beside and after ours: what llama.cpp computes without the backend."""
    ours = tiny.converted()
    plain = edited.as_ordinary(ours, tmp_path / "plain.gguf")
    alone, beside = python(PLAIN, plain, ""), python(PLAIN, plain, ours)
    for result in (alone, beside):
        assert result.returncode == 0, result.stderr
    assert len(alone.stdout) > 1000
    assert alone.stdout == beside.stdout


IN_ANOTHER_THREAD = """
import sys, threading, llama_cpp
from tsconv.runtime.binding import open_model

ours, plain = sys.argv[1:]
found = []


def logits():
    model = llama_cpp.Llama(plain, n_ctx=64, n_threads=1, use_mmap=False, verbose=False, logits_all=True)
    model.eval([1, 20, 300, 7])
    found.append(model.scores[:4].tobytes())


logits()
native = open_model(ours, None, "exact")
with native.armed():
    other = threading.Thread(target=logits)
    other.start()
    other.join()
native.close()
assert found[0] == found[1]
"""


def test_ordinary_model_loaded_in_another_thread(tmp_path):
    """Ours may be loading meanwhile: what has its shapes, in memory that tells no file, is left to llama.cpp."""
    plain = edited.as_ordinary(tiny.converted(), tmp_path / "plain.gguf")
    result = python(IN_ANOTHER_THREAD, tiny.converted(), plain)
    assert result.returncode == 0, result.stderr


# ---- without the Python package: what stock tools do

STOCK = """
import os, sys, llama_cpp
library, model = sys.argv[1:]
assert llama_cpp.llama_cpp._lib.ggml_backend_load(library.encode()), "refused"
llama = llama_cpp.Llama(model, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True,
                        flash_attn=True, kv_overrides={"general.architecture": "llama"})
llama.eval([1, 20, 300, 7])
assert "tsconv" not in sys.modules
print(llama.scores[:4].tobytes().hex())
"""


@pytest.mark.parametrize("name", FFN)
@pytest.mark.parametrize("sparsity", ["predictor", "exact", "dense", "topk:0.9", "predictor:-0.5", None])
def test_model_named_in_the_environment(name, sparsity):
    model = tiny.converted(name)
    env = {"TSFFN_MODEL": str(model), "TSFFN_SPARSITY": sparsity or "", "TSFFN_PREDICTOR": ""}  # empty: as not set
    result = python(STOCK, library_path(), model, **env)
    assert result.returncode == 0, result.stderr
    llama = tsconv.load(model, sparsity=sparsity, n_threads=1, logits_all=True)
    llama.eval(TOKENS)
    expected = llama.scores[: len(TOKENS)].tobytes()
    llama.close()
    assert bytes.fromhex(result.stdout) == expected


def test_sidecar_named_in_the_environment(tmp_path):
    model = tmp_path / "elsewhere.gguf"
    model.symlink_to(tiny.converted())
    env = {"TSFFN_MODEL": str(model)}
    result = python(STOCK, library_path(), model, **env)
    assert result.returncode == 1
    assert f"{tmp_path}/elsewhere.predictor.gguf: the predictor sidecar is missing" in result.stderr
    sidecar = tiny.converted().with_suffix(".predictor.gguf")
    assert python(STOCK, library_path(), model, TSFFN_PREDICTOR=str(sidecar), **env).returncode == 0


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"TSFFN_MODEL": "/nonexistent/m.gguf"}, "/nonexistent/m.gguf: cannot be opened: No such file or directory"),
        *(
            (
                {"TSFFN_SPARSITY": value},
                "TSFFN_SPARSITY: expected 'predictor', 'exact', 'dense', 'topk:S' with S from 0 to below 1, or "
                f"'predictor:D' with a number D, found '{value}'",
            )
            for value in ("none", "topk:1.5", "topk:x")
        ),
    ],
)
def test_mistakes_in_the_environment(env, message):
    result = python(STOCK, library_path(), tiny.converted(), **{"TSFFN_MODEL": str(tiny.converted())} | env)
    assert result.returncode == 1
    assert f"tsffn: {message}" in result.stderr.splitlines()
    assert "AssertionError: refused" in result.stderr


def test_ordinary_model_where_another_is_expected(tmp_path):
    """While the environment names ours: one of the same shapes is refused, never computed as dReLU; others work."""
    plain = edited.as_ordinary(tiny.converted(), tmp_path / "plain.gguf")
    loud = STOCK.replace("verbose=False", "verbose=True")
    result = python(loud, library_path(), plain, TSFFN_MODEL=str(tiny.converted()))
    assert result.returncode == 1
    assert f"tsffn: another model of the shape of {tiny.converted()} is being loaded" in result.stderr
    assert "Failed to load model from file" in result.stderr
    other = python(STOCK, library_path(), plain, TSFFN_MODEL=str(tiny.converted("tiny-turbosparse-mixtral")))
    assert other.returncode == 0, other.stderr
    assert other.stdout == python(PLAIN.replace("n_ctx=64", "n_ctx=512"), plain, "").stdout
